"""A primary that Sentinels watch: the whole path, a failover in mid-stream, and servers that are not believed."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis

from broker.runs.connections import connect, is_away
from broker.runs.pool import Pool
from tests.conftest import Launcher
from tests.kit.checker import check_log, check_poll, check_reader, entries_of
from tests.kit.eventsource import Stream
from tests.kit.http import Client, token
from tests.kit.processes import Gateway, Process, Worker
from tests.kit.redis_server import RedisServer, redis_6_2, redis_binary
from tests.kit.sentinel import Sentinel, Sentinels
from tests.kit.tls import make_certificates
from tests.kit.waiting import until
from tests.kit.whole_path import check_stream_and_poll, check_whole_path

PASSWORD = "pelican-and-heron"


@contextlib.asynccontextmanager
async def serving(folder: Path, sentinels: Sentinels, **settings: Any) -> AsyncIterator[tuple[list[Gateway], Worker]]:
    """Two gateways and a worker, which end before their Redis does."""
    with contextlib.closing(Launcher(folder)) as launch:
        gateways = [launch.gateway(sentinels.url, **settings) for _ in range(2)]
        yield gateways, launch.worker(sentinels.url, **settings)


def named(server: RedisServer) -> set[str]:
    """The connections of ours that a server has."""
    with server.client() as client:
        return {row["id"] for row in client.client_list() if row["name"] == "stream-broker"}


def check_no_password(*processes: Process) -> None:
    for process in processes:
        assert PASSWORD not in process.log_text()


async def test_the_whole_path_with_tls_and_passwords_everywhere(tmp_path: Path) -> None:
    certificates = make_certificates(tmp_path / "certificates")
    secure = Sentinels(tmp_path, certificates=certificates, password=PASSWORD, sentinel_password=f"{PASSWORD}-2")
    async with secure as sentinels, serving(tmp_path, sentinels) as (gateways, worker):
        with Client(gateways[0].url) as one, Client(gateways[1].url) as two:
            await asyncio.to_thread(check_whole_path, one, two)
        check_no_password(*gateways, worker)


async def test_a_stream_goes_on_where_the_primary_is_killed(tmp_path: Path) -> None:
    async with (
        Sentinels(tmp_path, password=PASSWORD) as sentinels,
        serving(tmp_path, sentinels, heartbeat_seconds=1) as (gateways, worker),
    ):
        auth = {"Authorization": f"Bearer {token('alice')}"}
        with Client(gateways[0].url) as alice:
            run = alice.submit("failover", agent="tokens", parameters={"count": 40, "pause": 0.2})
            path = f"/api/v1/runs/{run}/stream"
            stream = await Stream().open(gateways[0].url, path, auth)
            await stream.until(lambda: len(stream.events) > 8)
            await sentinels.until_replicated()  # what a failover loses is not judged here
            old = await sentinels.kill_primary()
            await sentinels.until_failed_over(old)
            before = len(stream.events)
            await stream.until(lambda: len(stream.events) > before + 5, 30)
            resumed = await Stream().open(gateways[1].url, path, {**auth, "Last-Event-ID": stream.events[4].id})
            await sentinels.start_again(old)
            assert await stream.ended(60) == await resumed.ended(60) == "finished"
            log = await asyncio.to_thread(alice.log, run)
            check_log(log)
            check_reader(entries_of(stream.events), log)
            check_reader(entries_of([*stream.events[:5], *resumed.events]), log)
            check_poll(alice.run(run), log)
            await asyncio.to_thread(check_stream_and_poll, alice, "after the failover")
        assert not named(old), "nobody is connected to the replica"
        check_no_password(*gateways, worker)


async def test_sentinels_that_are_gone_or_silent_keep_nobody_from_the_primary(tmp_path: Path) -> None:
    async with Sentinels(tmp_path) as sentinels:
        killed, paused, _ = sentinels.sentinels
        killed.kill()
        paused.pause()
        redis = connect(sentinels.url, connections=4)
        assert await asyncio.gather(*(redis.ping() for _ in range(20))) == [True] * 20
        await redis.aclose(close_connection_pool=True)
        paused.resume()


async def test_who_connects_at_the_same_time_asks_the_sentinels_together(tmp_path: Path) -> None:
    async with Sentinels(tmp_path) as sentinels:
        first = sentinels.sentinels[0]

        def connections() -> int:
            count: int = first.ask("INFO", "stats")["total_connections_received"]
            return count

        redis = connect(sentinels.url, connections=10)
        before = connections()
        work = (redis.execute_command("BLPOP", "none", "0.3") for _ in range(10))  # type: ignore[no-untyped-call]
        await asyncio.gather(*work)
        assert len(named(sentinels.primary)) == 10
        assert connections() - before < 5, "not by each of the ten; this test and other Sentinels ask as well"
        await redis.aclose(close_connection_pool=True)


async def test_a_name_that_no_sentinel_knows_is_an_error_that_says_so(tmp_path: Path) -> None:
    async with Sentinels(tmp_path) as sentinels:
        redis = connect(sentinels.url.replace("/main", "/other"), connections=1)
        with pytest.raises(Exception, match="no Sentinel knows where 'other' is") as caught:
            await redis.ping()
        assert is_away(caught.value)
        await redis.aclose(close_connection_pool=True)


async def test_commands_follow_a_failover_of_a_primary_that_lives(tmp_path: Path) -> None:
    async with Sentinels(tmp_path) as sentinels:
        redis = connect(sentinels.url, connections=4)
        await asyncio.gather(*(redis.incr("count") for _ in range(20)))
        old = sentinels.primary
        await sentinels.until_replicated()
        sentinels.sentinels[0].ask("SENTINEL", "FAILOVER", sentinels.name)
        await sentinels.until_failed_over(old)

        async def counted() -> bool:
            try:
                return bool(await redis.incr("count") > 20)
            except Exception as error:
                assert is_away(error), error
                return False

        await until(counted)
        await sentinels.until_replicated()
        assert not named(old)
        await redis.aclose(close_connection_pool=True)


async def test_whoever_finds_the_new_primary_takes_the_others_from_the_old_one(tmp_path: Path) -> None:
    """A paused primary answers nobody and ends no connection: each of them would wait for its own timeout."""
    async with Sentinels(tmp_path) as sentinels:
        redis = connect(f"{sentinels.url}?socket_timeout=1", connections=4)
        pool = redis.connection_pool
        assert isinstance(pool, Pool)
        await asyncio.gather(*(redis.execute_command("BLPOP", "none", "0.2") for _ in range(4)))  # type: ignore[no-untyped-call]
        old = sentinels.primary

        def at_the_old_one() -> int:
            return sum(
                1
                for connection in pool.connections()
                if connection.port == old.port and connection.is_connected and not connection._writer.is_closing()
            )

        assert at_the_old_one() == 4
        old.pause()
        new = await sentinels.until_failed_over(old)

        async def found() -> bool:
            try:
                return await redis.get("a") is None
            except Exception as error:
                assert is_away(error), error
                return False

        await until(found)
        assert at_the_old_one() == 0
        assert await asyncio.gather(*(redis.get("a") for _ in range(20))) == [None] * 20
        assert {connection.port for connection in pool.connections() if connection.is_connected} == {new.port}
        old.resume()
        await redis.aclose(close_connection_pool=True)


# Servers that are not what they should be


@pytest.fixture
def server(tmp_path: Path) -> RedisServer:
    return make_server(tmp_path / "server")


def make_server(folder: Path, *options: str, binary: str | None = None) -> RedisServer:
    folder.mkdir()
    return RedisServer(folder, *options, binary=binary)


async def test_a_primary_that_came_back_as_a_replica_is_not_taken(tmp_path: Path, server: RedisServer) -> None:
    """A Sentinel without a majority does nothing, and names it for ever."""
    sentinel = Sentinel(tmp_path, f"sentinel monitor main 127.0.0.1 {server.port} 2", None, None)
    redis = connect(f"redis+sentinel://127.0.0.1:{sentinel.port}/main", connections=1)
    try:
        server.start()
        sentinel.start()

        async def answers() -> bool:
            try:
                return bool(await redis.ping())
            except Exception as error:
                assert is_away(error), error
                return False

        await until(answers)
        server.ask("REPLICAOF", "127.0.0.1", "1")
        await redis.connection_pool.disconnect()
        with pytest.raises(Exception, match="is a replica, not the primary") as caught:
            await redis.ping()
        assert is_away(caught.value)

        async def left() -> bool:
            return not named(server)

        await until(left)
        server.ask("REPLICAOF", "NO", "ONE")
        assert await redis.ping()
    finally:
        await redis.aclose(close_connection_pool=True)
        sentinel.kill()
        server.close()


@pytest.mark.parametrize("binary", [redis_binary(), redis_6_2()])
async def test_who_waits_for_replicas_of_a_primary_that_is_demoted_is_told_that_redis_is_away(
    tmp_path: Path, binary: str | None
) -> None:
    """Else the end of a run whose worker lives is given up, and another attempt writes a second one."""
    if binary is None:
        pytest.skip("no redis-server 6.2")
    server = make_server(tmp_path / "server", binary=binary).start()
    redis = connect(server.url, connections=1)
    try:
        await redis.set("a", 1)
        waiting = asyncio.create_task(redis.execute_command("WAIT", 1, 4000))  # type: ignore[no-untyped-call]
        await until(lambda: server.info("clients")["blocked_clients"] == 1)
        server.ask("REPLICAOF", "127.0.0.1", "1")
        with pytest.raises(Exception, match=r".+") as caught:
            await waiting
        assert is_away(caught.value), caught.value
    finally:
        await redis.aclose(close_connection_pool=True)
        server.close()


async def write(redis: Redis) -> None:
    await redis.set("a", 1)


async def write_in_a_script(redis: Redis) -> None:
    await redis.eval("return redis.call('SET', KEYS[1], '1')", 1, "a")  # type: ignore[misc]


async def write_in_a_pipeline(redis: Redis) -> None:
    async with redis.pipeline(transaction=False) as pipe:
        pipe.get("a")
        pipe.set("a", 1)
        await pipe.execute()


async def write_in_a_transaction(redis: Redis) -> None:
    async with redis.pipeline(transaction=True) as pipe:
        pipe.set("a", 1)
        await pipe.execute()


@pytest.mark.parametrize("work", [write, write_in_a_script, write_in_a_pipeline, write_in_a_transaction])
@pytest.mark.parametrize("binary", [redis_binary(), redis_6_2()])
async def test_a_write_that_a_replica_refuses_drops_all_connections_to_it(
    tmp_path: Path, work: Callable[[Redis], Awaitable[None]], binary: str | None
) -> None:
    """The address may lead to another server by now; until then a reader would not notice."""
    if binary is None:
        pytest.skip("no redis-server 6.2")
    server = make_server(tmp_path / "server", binary=binary).start()
    redis = connect(server.url, connections=3)
    try:
        await asyncio.gather(*(redis.execute_command("BLPOP", "none", "0.2") for _ in range(3)))  # type: ignore[no-untyped-call]
        before = named(server)
        assert len(before) == 3
        server.ask("REPLICAOF", "127.0.0.1", "1")
        with pytest.raises(Exception, match=r".+") as caught:
            await work(redis)
        assert is_away(caught.value), caught.value

        async def dropped() -> bool:
            return not before & named(server)

        await until(dropped)
        server.ask("REPLICAOF", "NO", "ONE")
        await work(redis)
    finally:
        await redis.aclose(close_connection_pool=True)
        server.close()
