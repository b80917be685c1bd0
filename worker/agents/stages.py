"""The `sources` of a stage of `research`, as an event has room for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from broker.events import Sources, dumps
from worker.documents.text import shorten

EXCERPT_CHARS = 300
MAX_BYTES = 60_000
"""An event may have a little more."""

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
