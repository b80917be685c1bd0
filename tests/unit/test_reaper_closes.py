"""A reaper ends what waits for ever in the queue (PROTOCOL 4.4)."""

from __future__ import annotations

import asyncio
import contextlib

import pytest
from redis.asyncio import Redis

from broker.runs import keys
from broker.settings import Settings
from tests.kit.redis_server import RedisServer
from tests.kit.runs import field, lose_worker, now_ms, running
from worker.parts import make_parts
from worker.reaper import Reaper


@pytest.mark.parametrize("lost", [False, True])
async def test_a_queued_run_that_has_taken_too_long_over_its_attempts_is_ended(
    redis: Redis, redis_server: RedisServer, lost: bool
) -> None:
    """Handed over, or taken from a worker that was lost; its job is there, and no worker has room for it."""
    parts = make_parts(Settings(redis_url=redis_server.url, lease_seconds=1, max_run_seconds=60))
    lease = await running(parts.scripts)
    if lost:
        await lose_worker(redis, parts.scripts, lease.request_id)
    else:
        await parts.scripts.hand_over(lease, "handed_over")
    await redis.hset(keys.run(lease.request_id), "started_at", str(now_ms() - 61_000))  # type: ignore[misc]
    await parts.queue.enqueue(lease.request_id, 2, enqueues=0, now_ms=now_ms())
    await parts.leases.put({lease.request_id: now_ms()})
    working = [asyncio.create_task(part.run()) for part in (parts.primaries, parts.closings, Reaper(parts))]
    try:
        async with asyncio.timeout(30):
            while await field(redis, lease.request_id, "status") != "failed":
                # A queued run is looked at every ten seconds; this one at once.
                await parts.leases.put({lease.request_id: now_ms()})
                await asyncio.sleep(0.1)
        assert '"timeout"' in await field(redis, lease.request_id, "result")
    finally:
        for task in working:
            task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.gather(*working)
        await parts.close()
