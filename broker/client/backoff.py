"""How long to wait before the next try: full jitter, doubled at each failure in a row."""

from __future__ import annotations

import random
from collections.abc import Callable

FIRST_CONTACT_SECONDS = 2.0
"""How long a service is tried that has never answered: more likely its URL is wrong than that it is away."""
PAUSE_SECONDS = 1.0
_MOST_DOUBLINGS = 16


class Backoff:
    """Times are of any one clock, in seconds; `chance` gives numbers from 0 to 1."""

    def __init__(
        self, *, patience: float, longest: float, known: bool, chance: Callable[[], float] = random.random
    ) -> None:
        """`patience`: for how long in a row everything may fail. `longest`: the longest pause. `known`: the service has
        answered before."""
        self.base = min(PAUSE_SECONDS, longest)
        """The first pause is at most this long: what the service asks for with `retry:`."""
        self._patience = patience
        self._longest = longest
        self._known = known
        self._chance = chance
        self._failures = 0
        self._failing_since: float | None = None

    def answered(self) -> None:
        """Somebody is there, if only to say: come again."""
        self._known = True

    def succeeded(self) -> None:
        self._known, self._failures, self._failing_since = True, 0, None

    def pause(self, now: float, *, at_least: float = 0.0) -> float | None:
        """Seconds to wait after a failure; None where patience has ended.

        Patience is counted from the first failure on, not from the last success: a laptop that wakes up has failed
        only once.
        """
        if self._failing_since is None:
            self._failing_since = now
        patience = self._patience if self._known else min(self._patience, FIRST_CONTACT_SECONDS)
        left = self._failing_since + patience - now
        if left <= 0:
            return None
        most = min(self.base * float(1 << self._failures), self._longest)
        self._failures = min(self._failures + 1, _MOST_DOUBLINGS)
        return min(max(self._chance() * most, min(at_least, self._longest)), left)
