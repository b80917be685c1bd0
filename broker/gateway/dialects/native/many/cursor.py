"""The cursor of a stream of many runs: where the client stands in each of them, as text that is an SSE id."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from broker.errors import BadCursor
from broker.ids import Cursor, EventId

MAX_RUNS = 50
"""Runs in one cursor. At 67 bytes for the longest place it stays below 4 KiB, and with a URL that lists the runs below
8 KiB, which is what nginx takes for a line of a request's head."""
GONE = "gone"
"""In the place of an event id: the client knows that the run is not there any more."""
FAST_CLOCK_MS = 24 * 3600 * 1000
"""A floor that is further ahead of Redis' time is not of a clock that is fast: it is in another unit."""
_FLOOR = re.compile(r"0|[1-9][0-9]{0,15}", re.ASCII)


class Composite(NamedTuple):
    """`<request_id>/<event id>,<request_id>/<event id>,…`, and of a session `,<floor>` at the end.

    The first place is that of the event's own run, so the cursor of one run is its long form (PROTOCOL 6.4).
    """

    places: Mapping[str, EventId | None]
    """By request_id; None where the run is gone. A run that has no place here has not begun."""
    floor: int | None = None
    """Milliseconds: the runs of the session that were submitted until then and have no place here are over."""

    @property
    def positions(self) -> dict[str, EventId]:
        """Of the runs that are not gone."""
        return {request_id: at for request_id, at in self.places.items() if at is not None}

    def __str__(self) -> str:
        return _tail([_place(*item) for item in self.places.items()], self.floor).decode("ascii").removeprefix(",")

    def not_ahead_of(self, now_ms: int) -> Composite:
        """With a floor of at most `now_ms`, Redis' time: above it is everything that is still to be submitted, however
        fast the client's clock is. Raises BadCursor for a floor that no clock shows."""
        if self.floor is None or self.floor <= now_ms:
            return self
        if self.floor > now_ms + FAST_CLOCK_MS:
            raise BadCursor("The floor of this cursor is in the future: it is a time in milliseconds since 1970.")
        return self._replace(floor=now_ms)

    @classmethod
    def parse(cls, text: str) -> Composite:
        """Raises BadCursor for what no stream has given out."""
        *parts, last = text.split(",", MAX_RUNS + 1)
        floor = int(last) if _FLOOR.fullmatch(last) else None
        if floor is None:
            parts.append(last)
        if len(parts) > MAX_RUNS:
            raise BadCursor(f"A cursor has at most {MAX_RUNS} runs.")
        places: dict[str, EventId | None] = {}
        for part in parts:
            request_id, at = _parse_place(part)
            if request_id in places:
                raise BadCursor("A cursor names each run once.")
            places[request_id] = at
        return cls(places, floor)


class Places:
    """The cursor of a stream while it is written. It is kept as text, since it goes into every id."""

    def __init__(self, cursor: Composite) -> None:
        """`cursor`: where the client stands."""
        self.floor = cursor.floor
        self._texts = {request_id: _place(request_id, at) for request_id, at in cursor.places.items()}

    def complete(self, request_id: str, frames: bytes) -> bytes:
        """Frames of one run, whose ids are its own place: with those of the other runs behind it. From now on the
        client stands there."""
        tail = _tail([text for name, text in self._texts.items() if name != request_id], self.floor)
        pieces: list[bytes] = []
        for frame in frames.split(b"\n\n")[:-1]:
            first, _, rest = frame.partition(b"\n")
            pieces += (first, tail, b"\n", rest, b"\n\n")
            self._texts[request_id] = first.removeprefix(b"id: ")
        return b"".join(pieces)

    def over(self, request_id: str) -> None:
        """Nothing more is to be given of the run; or of it there is nothing, and there never will be."""


def _place(request_id: str, at: EventId | None) -> bytes:
    return f"{request_id}/{GONE if at is None else at}".encode("ascii")


def _tail(places: Iterable[bytes], floor: int | None) -> bytes:
    """What stands behind a cursor's first place."""
    tail = b"".join(b"," + place for place in places)
    return tail if floor is None else b"%b,%d" % (tail, floor)


def _parse_place(text: str) -> tuple[str, EventId | None]:
    name, _, at = text.rpartition("/")
    gone = at == GONE
    cursor = Cursor.parse(f"{name}/0-0" if gone else text)
    if cursor.request_id is None:
        raise BadCursor("On this route a cursor is '<request_id>/<event id>', for each run one, joined by commas.")
    return cursor.request_id, None if gone else cursor.event_id
