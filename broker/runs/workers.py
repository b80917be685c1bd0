"""`sb:workers`: the workers that are there, as they say themselves every few seconds (PROTOCOL 4.8).

It is for people: nothing is decided by it. A worker that is killed, or whose event loop is blocked, is missing from it
after LIFE_MS.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from redis.asyncio import Redis

from broker.events import dumps
from broker.runs import keys
from broker.runs.clock import now_ms

LIFE_MS = 30_000


@dataclass(frozen=True, kw_only=True)
class WorkerInfo:
    """A worker. `seen_at_ms` is when it last said so, by the clock of the queue's Redis; the rest is its own."""

    id: str
    host: str
    pid: int
    version: str
    started_at_ms: int
    runs: int
    """How many it executes."""
    max_jobs: int
    agents: tuple[str, ...]
    seen_at_ms: int = 0


class Workers:
    """All raise redis-py's exceptions."""

    def __init__(self, redis: Redis) -> None:
        """`redis` is the queue's."""
        self._redis = redis

    async def put(self, info: WorkerInfo) -> None:
        """Says that the worker is there, for LIFE_MS, and drops those that have not said so for as long."""
        now = await now_ms(self._redis)
        async with self._redis.pipeline(transaction=True) as pipe:
            pipe.set(keys.worker(info.id), _stored(info), px=LIFE_MS)
            pipe.zadd(keys.WORKERS, {info.id: now})
            pipe.zremrangebyscore(keys.WORKERS, "-inf", now - LIFE_MS)
            await pipe.execute()

    async def remove(self, worker_id: str) -> None:
        async with self._redis.pipeline(transaction=True) as pipe:
            pipe.delete(keys.worker(worker_id))
            pipe.zrem(keys.WORKERS, worker_id)
            await pipe.execute()

    async def alive(self) -> list[WorkerInfo]:
        """Those that have said so within LIFE_MS, the longest silent first."""
        now = await now_ms(self._redis)
        seen = await self._redis.zrangebyscore(keys.WORKERS, now - LIFE_MS, "+inf", withscores=True)
        if not seen:
            return []
        texts: Sequence[bytes | None] = await self._redis.mget(
            [keys.worker(name.decode("utf-8", "replace")) for name, _ in seen]
        )
        found = [_parse(text, int(score)) for text, (_, score) in zip(texts, seen, strict=True) if text is not None]
        return [info for info in found if info is not None]


def _stored(info: WorkerInfo) -> str:
    return dumps({name: value for name, value in asdict(info).items() if name != "seen_at_ms"})


def _parse(text: bytes, seen_at_ms: int) -> WorkerInfo | None:
    """None for what another version wrote, with other fields."""
    try:
        fields = json.loads(text)
        return WorkerInfo(**{**fields, "agents": tuple(fields["agents"]), "seen_at_ms": seen_at_ms})
    except (ValueError, TypeError, KeyError):
        return None
