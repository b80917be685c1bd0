"""The queue, and the runs that nobody works at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from redis.asyncio import Redis

from broker.doctor.finding import Finding, error, ok, warning
from broker.runs import keys
from broker.runs.clock import now_ms
from broker.runs.queue import DUE_MARGIN_MS
from broker.words import count

LONG_SECONDS = 10.0
"""A run that nobody took for so long waits for a worker, not for a poll."""
_SHOWN = 3


@dataclass(frozen=True, kw_only=True)
class Queue:
    """Times are seconds by the clock of the queue's Redis."""

    waiting: int
    oldest_seconds: float = 0.0
    """For how long the first has waited."""
    abandoned: int = 0
    """Runs that a reaper should have looked at two leases ago."""
    abandoned_seconds: float = 0.0
    """Since when it should have looked at the first of them."""
    abandoned_ids: Sequence[str] = ()
    """Some of them, the longest due first."""


async def look_at_queue(redis: Redis, lease_seconds: float) -> Queue:
    """`redis` is the queue's. Raises redis-py's exceptions."""
    now = await now_ms(redis)
    latest = now - int(lease_seconds * 2000)
    waiting = await redis.zcard(keys.QUEUE)
    first = await redis.zrange(keys.QUEUE, 0, 0, withscores=True)
    abandoned = await redis.zcount(keys.LEASES, "-inf", latest)
    ids = await redis.zrangebyscore(keys.LEASES, "-inf", latest, start=0, num=_SHOWN, withscores=True)
    return Queue(
        waiting=waiting,
        oldest_seconds=max((now - DUE_MARGIN_MS - first[0][1]) / 1000, 0.0) if first else 0.0,
        abandoned=abandoned,
        abandoned_seconds=(now - ids[0][1]) / 1000 if ids else 0.0,
        abandoned_ids=tuple(member.decode("ascii", "replace") for member, _ in ids),
    )


def judge_queue(queue: Queue) -> list[Finding]:
    found = [_waiting(queue)]
    if queue.abandoned:
        more = ", …" if queue.abandoned > len(queue.abandoned_ids) else ""
        found.append(
            error(
                "runs_without_worker",
                f"{_count(queue.abandoned)} without a worker, the first for {queue.abandoned_seconds:.0f} s: "
                f"{', '.join(queue.abandoned_ids)}{more}",
                "Their leases have ended, or nobody claimed them, and no reaper has taken them up: every worker is "
                "one, so start workers, or see in their logs why they do not.",
            )
        )
    else:
        found.append(ok("runs_without_worker", "no run is without a worker"))
    return found


def _waiting(queue: Queue) -> Finding:
    said = f"{_count(queue.waiting)} in the queue" + (
        f", the first for {queue.oldest_seconds:.1f} s" if queue.waiting else ""
    )
    if queue.waiting and queue.oldest_seconds > LONG_SECONDS:
        return warning(
            "queue",
            said,
            "Workers do not keep up: start more, or raise BROKER_MAX_JOBS where agents mostly wait for a model.",
        )
    return ok("queue", said)


def _count(runs: int) -> str:
    return count(runs, "run") if runs else "no run"
