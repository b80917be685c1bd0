"""Leases that are renewed by somebody who knows nothing of what their owner has under way."""

from __future__ import annotations

import asyncio

from redis.asyncio import Redis

from broker.runs import keys
from broker.runs.scripts import Scripts
from broker.settings import Settings
from tests.kit.redis_server import RedisServer
from tests.kit.runs import field, now_ms, running
from tests.kit.waiting import until
from worker.keeper import LeaseKeeper


async def test_all_leases_are_kept_and_reapers_are_told_to_look_later(redis: Redis, redis_server: RedisServer) -> None:
    scripts = Scripts(redis)
    leases = [await running(scripts) for _ in range(20)]
    for lease in leases:
        await redis.hset(keys.run(lease.request_id), "deadline", "1")  # type: ignore[misc]
    await redis.hset(keys.run(leases[3].request_id), "token", "another")  # type: ignore[misc]
    keeper = LeaseKeeper(Settings(redis_url=redis_server.url, lease_seconds=3), lambda: leases)
    keeping = asyncio.create_task(keeper.keep())

    async def kept() -> bool:
        deadlines = [int(await field(redis, lease.request_id, "deadline")) for lease in leases]
        return sum(deadline > now_ms() + 1000 for deadline in deadlines) == len(leases) - 1

    await until(kept)
    scores = [await redis.zscore(keys.LEASES, lease.request_id) or 0 for lease in leases]
    assert min(scores) > now_ms() + 1000
    keeping.cancel()
    await asyncio.wait([keeping])
    assert await field(redis, leases[3].request_id, "deadline") == "1"
