"""How far a stream of a session has come: which runs it begins, and from where it would go on. No I/O.

The session's index names runs by the time of their submit. A run may come into it late, behind others that were
submitted after it, but never later than SETTLE_MS (PROTOCOL 3.3).
"""

from __future__ import annotations

from collections.abc import Sequence

from broker.gateway.dialects.native.many.cursor import MAX_RUNS, Composite, Places

SETTLE_MS = 65_000
"""A run is created within a minute of its `claimed_at`, or never; servers' clocks differ by at most 2 s."""


class Progress(Places):
    """What of a session's runs the client has, and what it is being given."""

    floor: int

    def __init__(self, cursor: Composite) -> None:
        super().__init__(cursor)
        self.floor = cursor.floor or 0
        self._begun = set(cursor.positions)
        self._over = cursor.places.keys() - self._begun
        self._submitted: dict[str, int] = {}
        """When, of the runs that the index had above the floor."""
        self.crowded = False
        """Whether there were more runs at the last look than may be begun."""

    def over(self, request_id: str) -> None:
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
        room = MAX_RUNS - len(self._begun | self._texts.keys())
        waiting = self.waiting(rows)
        self.crowded = not complete or len(waiting) > room
        return waiting[: max(room, 0)]

    def waiting(self, rows: Sequence[tuple[str, int]]) -> list[str]:
        """Those of these (request_id, submitted at) that are still to be begun."""
        known = self._begun | self._over
        return [name for name, at in rows if at > self.floor and name not in known]

    def begin(self, request_id: str) -> None:
        self._begun.add(request_id)

    def never_came(self, request_id: str, now_ms: int) -> bool:
        """Whether a run that the index names and that has no record will not get one any more."""
        return self._submitted.get(request_id, 0) <= now_ms - SETTLE_MS

    def _raise_floor(self, limit: int) -> None:
        """At most to `limit`, and as far as every run below has a place or is over."""
        for request_id, submitted_ms in self._submitted.items():
            if request_id not in self._texts and request_id not in self._over:
                limit = min(limit, submitted_ms - 1)
        self.floor = max(self.floor, limit)

    def _leave_out(self, unknown_ms: int) -> None:
        """What is over and at or below the floor; `unknown_ms` is of runs that the index has not shown yet."""
        for request_id in [*self._over]:
            if self._submitted.get(request_id, unknown_ms) <= self.floor:
                self._over.discard(request_id)
                self._begun.discard(request_id)
                self._texts.pop(request_id, None)
                self._submitted.pop(request_id, None)
