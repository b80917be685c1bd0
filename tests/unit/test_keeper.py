"""Leases that are renewed by somebody who knows nothing of what their owner has under way."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest
from redis.asyncio import Redis

from broker.ids import EventId
from broker.runs import keys
from broker.runs.scripts import RENEWAL, Lease, Scripts
from broker.settings import Settings
from tests.kit.redis_server import RedisServer
from tests.kit.runs import (
    FINAL,
    LEASE_MS,
    RETENTION_MS,
    Ears,
    append,
    cancel,
    channels,
    claim,
    field,
    lose_worker,
    now_ms,
    roll_back,
    running,
    snapshot,
    words,
)
from tests.kit.waiting import until
from worker.keeper import LeaseKeeper


@pytest.fixture
def scripts(redis: Redis) -> Scripts:
    return Scripts(redis)


async def fenced(redis: Redis, scripts: Scripts, lease: Lease) -> None:
    await lose_worker(redis, scripts, lease.request_id)


async def taken(redis: Redis, scripts: Scripts, lease: Lease) -> None:
    await claim(scripts, lease.request_id, await lose_worker(redis, scripts, lease.request_id))


async def cancelled(redis: Redis, scripts: Scripts, lease: Lease) -> None:
    await cancel(scripts, lease.request_id)


async def ended(redis: Redis, scripts: Scripts, lease: Lease) -> None:
    await append(scripts, lease, 5, FINAL)


async def erased(redis: Redis, scripts: Scripts, lease: Lease) -> None:
    await scripts.erase(lease.request_id, tombstone_ms=60_000)


async def expired(redis: Redis, scripts: Scripts, lease: Lease) -> None:
    await redis.delete(keys.run(lease.request_id), keys.log(lease.request_id))


async def handed_over(redis: Redis, scripts: Scripts, lease: Lease) -> None:
    await scripts.hand_over(lease, "handed_over")


async def claim_lost(redis: Redis, scripts: Scripts, lease: Lease) -> None:
    """By a failover, with all that came after it."""
    await roll_back(redis, lease.request_id, EventId(0, 1), status="queued", epoch="0", token="", attempt="0")


async def claimed(scripts: Scripts) -> Lease:
    lease = await running(scripts)
    await append(scripts, lease, 2, *words("a", "b", "c"))
    return lease


async def test_a_lease_is_renewed_whatever_its_owner_has_under_way_and_nothing_is_said(
    redis: Redis, scripts: Scripts, redis_server: RedisServer
) -> None:
    lease = await claimed(scripts)
    for lost in (False, True):
        if lost:
            await roll_back(redis, lease.request_id, EventId(lease.epoch, 2))
        before = await snapshot(redis, lease.request_id)
        await redis.hset(keys.run(lease.request_id), "deadline", "1")  # type: ignore[misc]
        with Ears(redis_server.url, *channels(lease.request_id)) as ears:
            await scripts.append(lease, RENEWAL, lease_ms=LEASE_MS, retention_ms=RETENTION_MS)
            assert ears.heard() == []
        assert int(await field(redis, lease.request_id, "deadline")) > now_ms() + LEASE_MS // 2
        assert await snapshot(redis, lease.request_id) == before


@pytest.mark.parametrize("change", [fenced, taken, cancelled, ended, erased, expired, handed_over, claim_lost])
async def test_a_run_that_is_somebody_elses_or_over_is_left_as_it_is(
    redis: Redis,
    scripts: Scripts,
    redis_server: RedisServer,
    change: Callable[[Redis, Scripts, Lease], Awaitable[None]],
) -> None:
    lease = await claimed(scripts)
    await change(redis, scripts, lease)
    before = await snapshot(redis, lease.request_id), await field(redis, lease.request_id, "deadline")
    with Ears(redis_server.url, *channels(lease.request_id)) as ears:
        reply = await scripts.append(lease, RENEWAL, lease_ms=LEASE_MS, retention_ms=RETENTION_MS)
        assert ears.heard() == []
    assert reply.answer != "OK"
    assert (await snapshot(redis, lease.request_id), await field(redis, lease.request_id, "deadline")) == before


async def test_all_leases_are_kept_and_reapers_are_told_to_look_later(
    redis: Redis, scripts: Scripts, redis_server: RedisServer
) -> None:
    leases = [await claimed(scripts) for _ in range(20)]
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
