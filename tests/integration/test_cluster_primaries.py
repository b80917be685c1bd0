"""What a process knows of the primaries of a Cluster, where one of them is away."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from broker.runs import keys
from broker.runs.connections import connect
from broker.runs.primaries import SILENT_SECONDS, Primaries
from broker.runs.scripts import Answer, Scripts
from tests.kit.cluster import Cluster
from tests.kit.redis_server import RedisServer
from tests.kit.runs import cancel, queued


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
    scripts, primaries = Scripts(redis), Primaries(redis, queue)
    await primaries.look()
    here = await queued(scripts)
    away = cluster.owner_of(keys.run(here))
    there = await queued(scripts)
    while cluster.owner_of(keys.run(there)) is away:
        there = await queued(scripts)
    calm_since = primaries.calm_since(there)
    looking = asyncio.create_task(primaries.run())
    try:
        go(away)
        began = time.monotonic()
        while time.monotonic() - began < 2 * SILENT_SECONDS:
            assert primaries.calm_since(there) == calm_since, "whether its lease has run out can be judged"
            await asyncio.sleep(0.05)
        assert primaries.calm_since(here) > calm_since

        async with asyncio.timeout(3):
            await primaries.look()
            assert (await primaries.in_new_epoch(there, lambda _: cancel(scripts, there))).answer is Answer.OK
    finally:
        looking.cancel()
        away.resume()
        await redis.aclose()
        await queue.aclose(close_connection_pool=True)
