"""A renewal: an append of nothing, by somebody who knows nothing of what the run's owner has under way."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator

import pytest
from redis.asyncio import Redis

from broker.ids import EventId
from broker.runs import keys
from broker.runs.scripts import RENEWAL, Lease, Scripts
from tests.kit.redis_server import VERSIONS, RedisServer, server_of
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


@pytest.fixture(scope="module", params=VERSIONS)
def redis_server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    server = server_of(request.param, tmp_path_factory.mktemp("redis"))
    try:
        yield server.start()
    finally:
        server.close()


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
