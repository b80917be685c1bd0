"""When a model that has failed is asked again: with back-off and jitter, as the server wishes, within the deadline."""

from __future__ import annotations

import random
from collections.abc import Callable

from worker.models.failures import Failed

FIRST_SECONDS = 0.5
LONGEST_SECONDS = 20.0
MOST_EMPTY = 2
"""Empty answers after which another one is not worth its tokens."""


class Retries:
    """Of one answer. `deadline` and `now` are seconds since the epoch; `seconds` is how long, from the first failure
    on, it is asked again; `first` is the first pause.
    """

    def __init__(
        self,
        *,
        deadline: float,
        seconds: float,
        first: float = FIRST_SECONDS,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self._deadline = deadline
        self._seconds = seconds
        self._pause = first
        self._jitter = jitter
        self._failed: float | None = None
        self._empty = 0

    def pause(self, failed: Failed, now: float) -> float | None:
        """The seconds to wait before the next try, or None: it is not worth another one, or there is no time for it."""
        self._failed = now if self._failed is None else self._failed
        self._empty += failed.code == "model_empty"
        if not failed.retry or self._empty > MOST_EMPTY:
            return None
        backoff = self._pause * (0.5 + self._jitter() / 2)
        self._pause = min(2 * self._pause, LONGEST_SECONDS)
        pause = backoff if failed.after is None else failed.after + backoff / 10
        over = now + pause > self._failed + self._seconds or now + pause >= self._deadline
        return None if over else pause
