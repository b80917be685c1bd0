"""Several runs over one connection, on a real Redis: whatever it does, each run comes whole and in order."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Sequence

import pytest
from redis.asyncio import Redis

from broker.events import Entry
from broker.gateway.dialects.native.many.cursor import Composite
from broker.gateway.dialects.native.many.multiplexer import Multiplexer
from broker.gateway.dialects.native.many.sources import Listed
from broker.gateway.reader import End
from broker.runs import log
from broker.runs.scripts import Lease, Scripts
from tests.kit import sse
from tests.kit.hub import Connection, Gateway, hub_of
from tests.kit.many import check_cursors, check_runs
from tests.kit.redis_server import RedisServer
from tests.kit.runs import FINAL, append, running, words
from tests.kit.scale import scaled
from tests.kit.waiting import until


@pytest.fixture
def scripts(redis: Redis) -> Scripts:
    return Scripts(redis)


@pytest.fixture
async def gateway(redis: Redis, redis_server: RedisServer) -> AsyncIterator[Gateway]:
    async with hub_of(redis, redis_server.url, heartbeat_seconds=0.2) as gateway:
        yield gateway


async def follow(gateway: Gateway, leases: Sequence[Lease], connection: Connection, after: str = "") -> End:
    heads = {lease.request_id: await gateway.head(lease.request_id) for lease in leases}
    source = Listed(Composite.parse(after) if after else Composite({}), heads, [])
    return await Multiplexer(gateway.hub, source, connection, seconds=None, heartbeat_seconds=0.2).follow()


async def logs_of(redis: Redis, leases: Sequence[Lease]) -> dict[str, list[Entry]]:
    return {lease.request_id: await log.read_all(redis, lease.request_id) for lease in leases}


@pytest.mark.parametrize("chunked", [False, True])
async def test_a_connection_that_fills_up_anywhere_gets_each_run_whole_and_in_order(
    redis: Redis, scripts: Scripts, gateway: Gateway, chance: random.Random, chunked: bool
) -> None:
    """What comes for several runs at once is written one after the other, and any write may be the one too many."""
    for _ in range(scaled(30)):
        leases = [await running(scripts) for _ in range(4)]
        connection = Connection(chunked=chunked)
        following = asyncio.create_task(follow(gateway, leases, connection))
        await until(lambda connection=connection: len(sse.parse(connection.data())) == 8)  # type: ignore[misc]

        async def stop_and_go(connection: Connection = connection) -> None:
            while True:
                connection.room = len(connection.body) + chance.randrange(1, 600)
                await asyncio.sleep(chance.random() * 0.01)
                if connection.paused:
                    connection.read_on()

        reading = asyncio.create_task(stop_and_go())
        for seq in range(2, 40, 3):
            texts = words(*(f"{seq}.{n} " for n in range(3)))
            await asyncio.gather(*(append(scripts, lease, seq, *texts) for lease in leases))
        await asyncio.gather(*(append(scripts, lease, 41, FINAL) for lease in leases))
        async with asyncio.timeout(30):
            assert await following is End.FINISHED
        reading.cancel()
        await asyncio.wait([reading])
        events = sse.parse(connection.data())
        check_runs(events, await logs_of(redis, leases))
        check_cursors(events)
        assert connection.overruns == 0, "what a client does not take would be kept for it"


async def test_a_connection_that_is_stuck_holds_a_page_of_one_run_and_not_of_each(
    redis: Redis, scripts: Scripts, gateway: Gateway
) -> None:
    """Memory is bounded by connections: no client shall make a gateway hold half a megabyte for each of 50 runs."""
    leases = [await running(scripts) for _ in range(6)]
    for lease in leases:
        for n in range(3):
            await append(scripts, lease, 2 + 20 * n, *words(*("x" * 20_000 for _ in range(20))))
        await append(scripts, lease, 62, FINAL)
    connection = Connection()
    connection.room = 1
    before = await reads_of(redis)
    following = asyncio.create_task(follow(gateway, leases, connection))
    await until(lambda: connection.paused)
    await asyncio.sleep(0.5)
    assert await reads_of(redis) - before == 1
    assert not following.done()
    connection.read_on()
    async with asyncio.timeout(30):
        assert await following is End.FINISHED
    check_runs(sse.parse(connection.data()), await logs_of(redis, leases))
    assert await reads_of(redis) - before > 6


async def reads_of(redis: Redis) -> int:
    """How many pages of logs Redis has been asked for; the first of them too."""
    stats = await redis.info("commandstats")
    return int(stats.get("cmdstat_xrange", {}).get("calls", 0))


async def test_when_the_client_goes_nothing_of_its_readers_is_left(
    redis: Redis, scripts: Scripts, gateway: Gateway
) -> None:
    leases = [await running(scripts) for _ in range(5)]
    tasks = len(asyncio.all_tasks())
    connections = [Connection() for _ in range(3)]
    following = [asyncio.create_task(follow(gateway, leases, connection)) for connection in connections]
    await until(lambda: gateway.hub.readers == 15)
    connections[0].leave()
    assert await following[0] is End.CLOSED
    connections[1].stop_reading()
    connections[1].leave()
    assert await following[1] is End.CLOSED
    assert gateway.hub.readers == 5
    gateway.hub.drain()
    assert await following[2] is End.CUT
    assert gateway.hub.readers == 0
    assert await follow(gateway, leases, Connection()) is End.CUT
    await until(lambda: len(asyncio.all_tasks()) == tasks)


async def test_the_frames_of_a_run_are_encoded_once_for_all_connections(
    redis: Redis, scripts: Scripts, gateway: Gateway
) -> None:
    """However different the runs beside it are: all readers of a run share one view."""
    leases = [await running(scripts) for _ in range(4)]
    groups = [leases[:2], leases[1:], [leases[1]]]
    connections = [Connection() for _ in groups]
    following = [
        asyncio.create_task(follow(gateway, group, connection))
        for group, connection in zip(groups, connections, strict=True)
    ]
    await until(lambda: gateway.hub.readers == 6)
    channels = gateway.hub._channels
    assert [len(channels[lease.request_id].views) for lease in leases] == [1, 1, 1, 1]
    assert [sum(len(view.readers) for view in channels[lease.request_id].views.values()) for lease in leases] == [
        1,
        3,
        1,
        1,
    ]
    await asyncio.gather(*(append(scripts, lease, 2, FINAL) for lease in leases))
    assert [await each for each in following] == [End.FINISHED] * 3
    for group, connection in zip(groups, connections, strict=True):
        check_runs(sse.parse(connection.data()), await logs_of(redis, group))
