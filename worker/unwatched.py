"""`cancel_if_unwatched`: when a run that nobody reads is stopped (PROTOCOL 5.6)."""

from __future__ import annotations

import asyncio

from broker.runs.primaries import Primaries

FIRST_WATCHER_SECONDS = 60.0
"""A run that nobody has read yet is given this long for its first reader."""


class Watch:
    """Counts, on this process' own clock, for how long nobody has read a run.

    It never trusts an interval in which a reader could not have been noticed: a break starts it again, with one lease
    of grace.
    """

    def __init__(self, seconds: float, grace: float) -> None:
        self._seconds = seconds
        self._grace = grace
        self._seen: str | None = None
        self._since = 0.0
        self.asked_at = 0.0

    def expired(self, watched_at: str, *, now: float, age: float, calm_since: float) -> bool:
        """`watched_at` is what the record says now, '' for never. `now` and `calm_since` are of one clock, in seconds;
        `age` is how long ago the run was accepted."""
        self.asked_at = now
        if watched_at != self._seen:
            self._seen, self._since = watched_at, now
        if not watched_at and age < FIRST_WATCHER_SECONDS:
            self._since = now
        since = max(self._since, calm_since + self._grace)
        return now - since >= self._seconds

    def expired_on(self, primaries: Primaries, request_id: str, created_at: int, watched_at: str) -> bool:
        """The same, by what is known of the run's primary. `created_at` is in milliseconds, by Redis' clock."""
        return self.expired(
            watched_at,
            now=asyncio.get_running_loop().time(),
            age=max((primaries.now_ms() or created_at) - created_at, 0) / 1000,
            calm_since=primaries.calm_since(request_id),
        )
