"""What a process knows of the primaries of a Cluster, where one of them is away."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from broker.runs import keys, primaries
from broker.runs.connections import connect
from broker.runs.primaries import SILENT_SECONDS, Primaries
from broker.runs.scripts import Answer, Scripts
from broker.runs.shards import shards
from tests.kit.cluster import Cluster, slot_of
from tests.kit.redis_server import RedisServer
from tests.kit.runs import cancel, queued

SETTLE = 2.0


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[Cluster]:
    """Where slots without a primary do not keep it from serving the others."""
    async with Cluster(tmp_path / "cluster", "--cluster-require-full-coverage", "no", replicas=0) as made:
        yield made


@pytest.fixture
async def registry(tmp_path: Path) -> AsyncIterator[RedisServer]:
    (tmp_path / "registry").mkdir()
    server = RedisServer(tmp_path / "registry")
    try:
        yield server.start()
    finally:
        server.close()


@pytest.mark.parametrize("go", [RedisServer.pause, RedisServer.kill], ids=["stopped", "killed"])
async def test_a_primary_that_is_away_is_no_matter_to_the_runs_of_the_others(
    cluster: Cluster, registry: RedisServer, go: Callable[[RedisServer], None]
) -> None:
    redis, queue = connect(cluster.url, connections=4), connect(registry.url, connections=2)
    scripts, looker = Scripts(redis), Primaries(redis, queue)
    await looker.look()
    here = await queued(scripts)
    away = cluster.owner_of(keys.run(here))
    there = await queued(scripts)
    while cluster.owner_of(keys.run(there)) is away:
        there = await queued(scripts)
    calm_since = looker.calm_since(there)
    looking = asyncio.create_task(looker.run())
    try:
        go(away)
        began = time.monotonic()
        while time.monotonic() - began < 2 * SILENT_SECONDS:
            assert looker.calm_since(there) == calm_since, "whether its lease has run out can be judged"
            await asyncio.sleep(0.05)
        assert looker.calm_since(here) > calm_since

        async with asyncio.timeout(3):
            await looker.look()
            assert (await looker.in_new_epoch(there, lambda _: cancel(scripts, there))).answer is Answer.OK
    finally:
        looking.cancel()
        away.resume()
        await redis.aclose()
        await queue.aclose(close_connection_pool=True)


async def test_the_successor_of_a_primary_has_its_name_and_only_its_runs_wait_until_it_has_settled(
    tmp_path: Path, registry: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(primaries, "SETTLE_SECONDS", SETTLE)
    async with Cluster(tmp_path / "cluster") as cluster:
        redis, queue = connect(cluster.url, connections=4), connect(registry.url, connections=2)
        scripts, looker = Scripts(redis), Primaries(redis, queue)
        await looker.look()
        here = await queued(scripts)
        old = cluster.owner_of(keys.run(here))
        there = await queued(scripts)
        while cluster.owner_of(keys.run(there)) is old:
            there = await queued(scripts)
        names = {shard.name for shard in await shards(redis)}
        first, other = looker.changed_at(here), looker.changed_at(there)
        replid = await looker.settled(here)
        await cluster.until_replicated()
        old.kill()
        await cluster.until_failed_over(slot_of(keys.run(here)), old)
        try:
            async with asyncio.timeout(20):
                while looker.changed_at(here) == first:
                    with contextlib.suppress(ConnectionError):
                        await looker.look()
                    await asyncio.sleep(0.05)
            assert {shard.name for shard in await shards(redis)} == names
            assert looker.changed_at(there) == other
            began = asyncio.get_running_loop().time()
            await looker.settled(there)
            assert asyncio.get_running_loop().time() - began < SETTLE / 2
            assert await looker.settled(here) != replid
            assert asyncio.get_running_loop().time() - looker.changed_at(here) > SETTLE * 0.9
        finally:
            await redis.aclose()
            await queue.aclose(close_connection_pool=True)
