"""What a run has taken: its attempts, their times, and what its retries have cost. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise

from broker.client import LogEvent, Run


@dataclass(frozen=True, kw_only=True)
class Count:
    """Events, but for `attempt`."""

    events: int = 0
    token_events: int = 0
    """How many of them are `token`: a piece of the answer, which may be more than one of the model's tokens."""

    def plus(self, event: LogEvent) -> Count:
        return Count(events=self.events + 1, token_events=self.token_events + (event.type == "token"))


@dataclass(frozen=True, kw_only=True)
class AttemptAccount:
    """One attempt. It lasts until the next one begins or the run ends: the wait for a lost worker's lease is in it."""

    attempt: int
    reason: str
    began_seconds: float
    """After the run was created."""
    seconds: float
    """So far, where it has not ended."""
    total: Count
    void: Count


@dataclass(frozen=True, kw_only=True)
class Account:
    """`queued_seconds` until the first attempt, `running_seconds` from then on; so far, where the run has not ended."""

    queued_seconds: float
    running_seconds: float
    attempts: tuple[AttemptAccount, ...]
    total: Count
    void: Count


def account(run: Run, events: Iterable[LogEvent], now: datetime) -> Account:
    """`events` is the whole log. `now` matters only where the run has not ended.

    An event carries no time, but its epoch does (PROTOCOL 1.3): milliseconds, counted from the run's claim on. Where
    that lies is known by the first attempt, whose epoch began at `started_at`.
    """
    end = ((run.finished_at or now) - run.created_at).total_seconds()
    waited = ((run.started_at or run.finished_at or now) - run.created_at).total_seconds()
    began: list[tuple[int, str, int]] = []
    counts: list[tuple[Count, Count]] = [(Count(), Count())]
    for event in events:
        if event.type != "attempt":
            total, void = counts[-1]
            counts[-1] = total.plus(event), void.plus(event) if event.void else void
        elif event.data["attempt"] > (began[-1][0] if began else 0):  # else it is that of a closing (PROTOCOL 5.1)
            began.append((event.data["attempt"], event.data["reason"], event.id.epoch))
            counts.append((Count(), Count()))
    starts = [waited + (epoch - began[0][2]) / 1000 for _, _, epoch in began]
    attempts = tuple(
        AttemptAccount(
            attempt=number,
            reason=reason,
            began_seconds=start,
            seconds=max(stop - start, 0.0),
            total=total,
            void=void,
        )
        for (number, reason, _), (start, stop), (total, void) in zip(
            began, pairwise([*starts, end]), counts[1:], strict=True
        )
    )
    return Account(
        queued_seconds=max(waited, 0.0),
        running_seconds=max(end - waited, 0.0),
        attempts=attempts,
        total=_sum(total for total, _ in counts),
        void=_sum(void for _, void in counts),
    )


def _sum(counts: Iterable[Count]) -> Count:
    listed = list(counts)
    return Count(events=sum(count.events for count in listed), token_events=sum(count.token_events for count in listed))
