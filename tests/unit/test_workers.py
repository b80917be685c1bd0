"""What workers say of themselves, on a real Redis."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
from redis.asyncio import Redis

from broker.runs import keys, workers
from broker.runs.clock import now_ms
from broker.runs.connections import connect
from broker.runs.workers import LIFE_MS, WorkerInfo, Workers
from tests.kit.proxy import Proxy
from tests.kit.redis_server import RedisServer
from tests.kit.waiting import until
from worker import presence as presence_module
from worker.presence import Presence

ONE = WorkerInfo(
    id="one:1:abcd",
    host="one",
    pid=1,
    version="0.1.0",
    started_at_ms=7,
    runs=0,
    max_jobs=5,
    agents=("echo", "research"),
)
TWO = replace(ONE, id="two:2:abcd", host="two", pid=2, runs=3)


async def test_who_has_just_said_so_is_there_and_with_what_was_said_last(redis: Redis) -> None:
    said = Workers(redis)
    assert await said.alive() == []
    before = await now_ms(redis)
    await said.put(ONE)
    await said.put(TWO)
    await said.put(replace(ONE, runs=2))
    found = {info.id: info for info in await said.alive()}
    assert all(before <= info.seen_at_ms <= before + 10_000 for info in found.values())
    assert {replace(info, seen_at_ms=0) for info in found.values()} == {replace(ONE, runs=2), TWO}


async def test_who_has_said_nothing_for_long_is_gone_and_leaves_nothing_behind(
    redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = Workers(redis)
    monkeypatch.setattr(workers, "LIFE_MS", 200)
    await said.put(ONE)
    await asyncio.sleep(0.3)
    assert await said.alive() == []
    await said.put(TWO)
    assert sorted(await redis.keys("*")) == sorted([keys.WORKERS.encode(), keys.worker(TWO.id).encode()])
    assert await redis.zrange(keys.WORKERS, 0, -1) == [TWO.id.encode()]


async def test_who_leaves_is_gone_at_once(redis: Redis) -> None:
    said = Workers(redis)
    await said.put(ONE)
    await said.put(TWO)
    assert 0 < await redis.pttl(keys.worker(ONE.id)) <= LIFE_MS
    await said.remove(ONE.id)
    assert [info.id for info in await said.alive()] == [TWO.id]
    assert not await redis.exists(keys.worker(ONE.id))


@pytest.mark.parametrize("text", ["", "no JSON", "[]", "{}", '{"id": "one:1:abcd", "agents": []}'])
async def test_what_another_version_says_is_left_out(redis: Redis, text: str) -> None:
    said = Workers(redis)
    await said.put(ONE)
    await said.put(TWO)
    await redis.set(keys.worker(ONE.id), text)
    assert [info.id for info in await said.alive()] == [TWO.id]


async def test_a_worker_without_redis_goes_on_trying(
    redis: Redis, redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(presence_module, "EVERY_SECONDS", 0.05)
    runs = 1
    with Proxy(redis_server.port) as proxy:
        through = connect(proxy.url, connections=1)
        made = Presence(Workers(through), agents=["echo"], max_jobs=4, running=lambda: runs)
        proxy.refuse()
        saying = asyncio.create_task(made.run())
        await asyncio.sleep(0.3)
        assert await Workers(redis).alive() == []
        proxy.accept()

        async def says(count: int) -> bool:
            return [(info.runs, info.max_jobs, info.agents) for info in await Workers(redis).alive()] == [
                (count, 4, ("echo",))
            ]

        await until(lambda: says(1))
        runs = 2
        await until(lambda: says(2))
        saying.cancel()
        await asyncio.wait([saying])
        proxy.refuse()
        await made.leave()
        proxy.accept()
        assert len(await Workers(redis).alive()) == 1
        await made.leave()
        assert await Workers(redis).alive() == []
        await through.aclose(close_connection_pool=True)
