"""The chunks of a UI message stream, as frames. Only types and fields that ai 5.0.0 knows: it rejects others.

Everything in a chunk that an agent, a tool or a user can influence is a JSON string or a JSON value in its own field.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any, Literal, NamedTuple

from broker.events import dumps
from broker.gateway.dialects.dialect import Frame
from broker.ids import EventId

PartKind = Literal["text", "reasoning"]
PART_KINDS = ("text", "reasoning")

DONE = b"data: [DONE]\n\n"
"""After the last chunk. It is none itself: the Workflow transport does not count it."""


class Part(NamedTuple):
    """The part that deltas go to."""

    kind: PartKind
    id: str


class Pen:
    """Writes the chunks of one entry: counts them, and opens and closes parts as deltas need it."""

    def __init__(self, event_id: EventId, count: int, part: Part | None) -> None:
        """`count` chunks have been written before, and left `part` open."""
        self.count = count
        self.part = part
        self.frames: list[Frame] = []
        self._id = b"id: %d-%d\n" % event_id

    def chunk(self, kind: str, **fields: Any) -> None:
        self._write(dumps({"type": kind, **fields}))

    def say(self, kind: PartKind, text: str) -> bool:
        """A delta; whether it began a part."""
        begins = self.part is None or self.part.kind != kind
        if begins:
            self.close()
            self.part = Part(kind, f"{kind}-{self.count}")
            self.chunk(f"{kind}-start", id=self.part.id)
        assert self.part is not None
        self._write(f'{{"type":"{kind}-delta","id":"{self.part.id}","delta":{dumps(text)}}}')
        return begins

    def close(self) -> None:
        """A part must have its end before an abort, an error or a finish."""
        if self.part is not None:
            self.chunk(f"{self.part.kind}-end", id=self.part.id)
            self.part = None

    def reset(self) -> None:
        """The client drops every part, the open one too."""
        self.chunk("reset-step")
        self.part = None

    def transient(self, name: str, data: str) -> None:
        """Something that is told to `onData` and not kept in the message; `data` is JSON."""
        self._write(f'{{"type":{dumps(f"data-{name}")},"data":{_harmless(data)},"transient":true}}')

    def finish(self) -> None:
        self.chunk("finish")
        position, data = self.frames[-1]
        self.frames[-1] = Frame(position, data + DONE)

    def _write(self, text: str) -> None:
        self.count += 1
        self.frames.append(Frame(self.count, b"%bdata: %b\n\n" % (self._id, text.encode("ascii"))))


def loose(*chunks: dict[str, Any]) -> bytes:
    """Chunks that are not of the log, to the end of the stream."""
    return b"".join(b"data: %b\n\n" % dumps(chunk).encode("ascii") for chunk in chunks) + DONE


def harmless(value: Any) -> Any:
    """The value, or its JSON as a text where a client would refuse it: AI SDK ends the whole stream with an error where
    an object has `__proto__`, or a `constructor` with a `prototype`, at any depth (its secure-json-parse).
    """
    text = dumps(value)
    return text if _refused(text) else value


def _harmless(text: str) -> str:
    return dumps(text) if _refused(text) else text


def _refused(text: str) -> bool:
    if '"__proto__"' not in text and '"constructor"' not in text:
        return False
    values = [json.loads(text)]
    while values:
        value = values.pop()
        if isinstance(value, dict):
            made = value.get("constructor")
            if "__proto__" in value or (isinstance(made, dict) and "prototype" in made):
                return True
        values += _inside(value)
    return False


def _inside(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()
