"""The `sources` of a stage of `research`, and the sentences of citations, as an event has room for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from broker.events import Sources, dumps
from worker.agent import MAX_EVENT_BYTES
from worker.documents.text import shorten

EXCERPT_CHARS = 300
MAX_BYTES = MAX_EVENT_BYTES - 4096
"""Of what an event or a checkpoint has a list of; the rest has room beside it."""


class Citation(BaseModel):
    """Where a part of the answer is from: `sentence` is in the file at `path`, from `line` on; `score` is 0 to 1."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    number: int
    title: str
    path: str
    line: int
    sentence: str
    score: float


Stage = Literal["discovered", "screened", "analyzed"]


@dataclass(frozen=True, kw_only=True)
class Place:
    """A passage as clients are told of it; without `text` only where it is."""

    title: str
    heading: str
    path: str
    line: int
    score: float
    text: str = ""

    def item(self, chars: int) -> dict[str, Any]:
        """With so much of its text."""
        told: dict[str, Any] = {
            "title": self.title,
            "heading": self.heading,
            "path": self.path,
            "line": self.line,
            "score": round(self.score, 3),
        }
        return told | {"passage": shorten(self.text, chars)} if self.text else told


def stage(name: Stage, places: Sequence[Place]) -> Sources:
    """All of them: the more there are, and the more bytes their script needs, the less of each text."""
    chars = EXCERPT_CHARS
    while True:
        items = [place.item(chars) for place in places]
        if chars <= 1 or len(dumps(items)) <= MAX_BYTES:
            return Sources(stage=name, count=len(items), items=items)
        chars //= 2


def fitted(text: str, most: int) -> str:
    """The text, or as much of it as has at most so many bytes as ASCII JSON, ending with `…`."""
    if len(dumps(text)) <= most:
        return text
    low, high = 1, len(text)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if len(dumps(shorten(text, middle))) <= most else (low, middle - 1)
    return shorten(text, low)
