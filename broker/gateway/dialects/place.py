"""Where a client of a dialect stands that counts by event ids: at an entry, or between two of its frames."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from typing import NamedTuple, TypeVar

from broker.errors import BadCursor
from broker.ids import EventId

LAST = sys.maxsize
"""The part that is an entry's last frame: who has it has the entry."""
JUMP = 1_000_000
"""Where positions are numbers: a later attempt counts from its number times this (PROTOCOL 6.6)."""
_PLACE = re.compile(r"([^.]*)(?:\.([1-9][0-9]{0,2}))?", re.ASCII)

T = TypeVar("T")


class Place(NamedTuple):
    """As text `12-40`, or `12-40.1` for the first of several frames of 12-40. Compares as three integers."""

    epoch: int
    seq: int
    part: int = LAST

    def __str__(self) -> str:
        return f"{self.epoch}-{self.seq}" + ("" if self.part == LAST else f".{self.part}")

    @classmethod
    def parse(cls, text: str) -> Place:
        """Raises BadCursor."""
        match = _PLACE.fullmatch(text)
        if match is None:
            raise BadCursor("A cursor is '<epoch>-<seq>' or '<epoch>-<seq>.<part>'.")
        return cls(*EventId.parse(match[1]), int(match[2]) if match[2] else LAST)


def places(event_id: EventId, parts: Sequence[T]) -> Iterator[tuple[Place, T]]:
    """The parts of what is shown of an entry, each with its place."""
    for number, part in enumerate(parts, start=1):
        yield Place(*event_id, number if number < len(parts) else LAST), part
