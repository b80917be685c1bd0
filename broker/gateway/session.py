"""How far a stream of a session has come: which runs it begins, and from where it would go on. No I/O.

The session's index names runs by the time of their submit. A run may come into it late, behind others that were
submitted after it, but never later than SETTLE_MS (PROTOCOL 3.3).
"""

from __future__ import annotations

from collections.abc import Sequence

from broker.gateway.composite import MAX_RUNS, Composite
from broker.ids import EventId

SETTLE_MS = 65_000
"""A run is created within a minute of its `claimed_at`, or never; servers' clocks differ by at most 2 s."""


class Progress:
    """What of a session's runs the client has, and what it is being given."""

    def __init__(self, cursor: Composite) -> None:
        self.places: dict[str, EventId | None] = dict(cursor.places)
        """Where the client stands, as in the cursor: runs of which something was written."""
        self.floor = cursor.floor or 0
        self._begun = {request_id for request_id, at in self.places.items() if at is not None}
        self._over = self.places.keys() - self._begun
        self._submitted: dict[str, int] = {}
        """When, of the runs that the index had above the floor."""

    @property
    def cursor(self) -> Composite:
        return Composite(self.places, self.floor)

    @property
    def under_way(self) -> list[str]:
        """Runs that are begun and not over; at first those that the client has a part of."""
        return [request_id for request_id in self._begun if request_id not in self._over]

    def stands(self, request_id: str, at: EventId | None) -> None:
        """The client has been given the run up to here; None: it was told that the run is gone."""
        self.places[request_id] = at

    def over(self, request_id: str) -> None:
        """Nothing more is to be given of the run; or of it there is nothing, and there never will be."""
        self._over.add(request_id)

    def look(self, rows: Sequence[tuple[str, int]], *, complete: bool, now_ms: int) -> list[str]:
        """Runs that may be begun now: to be followed by `begin`, or by `over`, or else they are named again.

        `rows` are the index's first (request_id, submitted at) above the floor, the lowest first, and never a part of
        one millisecond; `complete`: these are all.
        """
        self._submitted.update(rows)
        limit = now_ms - SETTLE_MS
        self._raise_floor(limit if complete or not rows else min(limit, rows[-1][1]))
        self._leave_out(unknown_ms=self.floor if complete else self.floor + 1)
        room = MAX_RUNS - len(self._begun | self.places.keys())
        known = self._begun | self._over
        return [name for name, at in rows if at > self.floor and name not in known][: max(room, 0)]

    def begin(self, request_id: str) -> None:
        self._begun.add(request_id)

    def never_came(self, request_id: str, now_ms: int) -> bool:
        """Whether a run that the index names and that has no record will not get one any more."""
        return self._submitted.get(request_id, 0) <= now_ms - SETTLE_MS

    def _raise_floor(self, limit: int) -> None:
        """At most to `limit`, and as far as every run below has a place or is over."""
        for request_id, submitted_ms in self._submitted.items():
            if request_id not in self.places and request_id not in self._over:
                limit = min(limit, submitted_ms - 1)
        self.floor = max(self.floor, limit)

    def _leave_out(self, unknown_ms: int) -> None:
        """What is over and at or below the floor; `unknown_ms` is of runs that the index has not shown yet."""
        for request_id in [*self._over]:
            if self._submitted.get(request_id, unknown_ms) <= self.floor:
                self._over.discard(request_id)
                self._begun.discard(request_id)
                self.places.pop(request_id, None)
                self._submitted.pop(request_id, None)
