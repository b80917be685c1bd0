"""The cursor of a stream of many runs: where the client stands in each of them, as text that is an SSE id."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

from broker.errors import BadCursor
from broker.ids import Cursor, EventId

MAX_RUNS = 50
"""Runs in one cursor. At 67 bytes for the longest place it stays below 4 KiB, and with a URL that lists the runs below
8 KiB, which is what nginx takes for a line of a request's head."""
GONE = "gone"
"""In the place of an event id: the client knows that the run is not there any more."""
_FLOOR = re.compile(r"0|[1-9][0-9]{0,15}", re.ASCII)


class Composite(NamedTuple):
    """`<request_id>/<event id>,<request_id>/<event id>,…`, and of a session `,<floor>` at the end.

    The first place is that of the event's own run, so the cursor of one run is its long form (PROTOCOL 6.4).
    """

    places: Mapping[str, EventId | None]
    """By request_id; None where the run is gone. A run that has no place here has not begun."""
    floor: int | None = None
    """Milliseconds: the runs of the session that were submitted until then and have no place here are over."""

    def __str__(self) -> str:
        parts = [f"{request_id}/{GONE if at is None else at}" for request_id, at in self.places.items()]
        return ",".join(parts if self.floor is None else [*parts, str(self.floor)])

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
            request_id, at = _place(part)
            if request_id in places:
                raise BadCursor("A cursor names each run once.")
            places[request_id] = at
        return cls(places, floor)


def _place(text: str) -> tuple[str, EventId | None]:
    name, _, at = text.rpartition("/")
    gone = at == GONE
    cursor = Cursor.parse(f"{name}/0-0" if gone else text)
    if cursor.request_id is None:
        raise BadCursor("On this route a cursor is '<request_id>/<event id>', for each run one, joined by commas.")
    return cursor.request_id, None if gone else cursor.event_id
