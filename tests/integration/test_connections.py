"""P16: a gateway has a small, fixed number of connections to Redis; few of them make it slower, never stuck."""

from __future__ import annotations

import asyncio
import random
import secrets
import threading
from collections.abc import Awaitable, Callable, Iterator

import httpx
import psutil
import pytest
from redis.asyncio import Redis
from redis.exceptions import ConnectionError

from broker.errors import Unavailable
from broker.runs.connections import connect, is_away, unavailable
from broker.runs.subscriber import Subscriber
from tests.conftest import Launcher
from tests.kit.eventsource import Stream
from tests.kit.http import token
from tests.kit.processes import Process
from tests.kit.redis_server import RedisServer
from tests.kit.scribe import Scribe

MOST = 10


class Count:
    """The largest number of connections to Redis that a process has while this runs."""

    def __init__(self, process: Process, redis: RedisServer) -> None:
        self.most = 0
        self._process = psutil.Process(process.pid)
        self._port = redis.port
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def now(self) -> int:
        found = self._process.net_connections("tcp")
        return sum(1 for one in found if one.raddr and one.raddr.port == self._port and one.status == "ESTABLISHED")

    def _watch(self) -> None:
        while not self._stop.is_set():
            self.most = max(self.most, self.now())
            self._stop.wait(0.05)

    def __enter__(self) -> Count:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()


async def test_500_clients_on_50_runs_need_no_more_connections_than_one(launch: Launcher) -> None:
    server = launch.redis()
    gateway = launch.gateway(server.url)
    auth = {"Authorization": f"Bearer {token('alice')}"}
    async with Scribe(server.url) as scribe:
        runs = [await scribe.running("alice", f"run {n}", tokens=3) for n in range(50)]
        with Count(gateway, server) as count:
            streams = [Stream() for _ in range(500)]
            for first in range(0, 500, 100):
                await asyncio.gather(
                    *(
                        streams[n].open(gateway.url, f"{runs[n % 50].path}/stream", auth)
                        for n in range(first, first + 100)
                    )
                )
            async with httpx.AsyncClient(
                base_url=gateway.url, headers=auth, timeout=60, verify=False, limits=httpx.Limits(max_connections=50)
            ) as client:
                asked = [client.get(f"{runs[n % 50].path}{tail}") for n in range(100) for tail in ("", "/events")]
                asked += [client.get("/api/v1/runs") for _ in range(30)] + [client.get("/readyz") for _ in range(10)]
                asked += [client.post("/api/v1/query", json={"query": f"q {n}"}) for n in range(60)]
                replies = await asyncio.gather(*asked)
                assert {reply.status_code for reply in replies} <= {200, 202}
                for run in runs:
                    await run.tokens(2)
                    await run.end()
                held = await asyncio.gather(*(client.get(run.path, params={"wait": 5}) for run in runs))
                assert {reply.json()["status"] for reply in held} == {"completed"}
            logs = {run.request_id: await run.log() for run in runs}
            for n, stream in enumerate(streams):
                assert await stream.ended(30) == "finished"
                assert [event.id for event in stream.events] == [
                    str(entry.id) for entry in logs[runs[n % 50].request_id]
                ]
    assert 2 <= count.most <= MOST
    # By the server's own account too; a connection that is closed and opened again would show here as two.
    with server.client() as client_of_redis:
        named = [one for one in client_of_redis.client_list() if one["name"] == "stream-broker"]
        assert 2 <= len(named) <= MOST
        total = client_of_redis.info("stats")["total_connections_received"]
        assert total < 60, "connections are kept, not made for each request"


async def test_waiting_polls_and_idle_streams_hold_no_connection(launch: Launcher) -> None:
    server = launch.redis()
    gateway = launch.gateway(server.url, heartbeat_seconds=0.5)
    auth = {"Authorization": f"Bearer {token('alice')}"}
    async with Scribe(server.url) as scribe:
        run = await scribe.running("alice", "idle", tokens=1)
        streams = [await Stream().open(gateway.url, f"{run.path}/stream", auth) for _ in range(50)]
        waits = [await Stream().open(gateway.url, f"{run.path}/stream", auth) for _ in range(5)]
        with Count(gateway, server) as count:
            async with httpx.AsyncClient(base_url=gateway.url, headers=auth, timeout=60, verify=False) as client:
                held = [asyncio.create_task(client.get(run.path, params={"wait": 2})) for _ in range(50)]
                await asyncio.sleep(0.5)
                # All fifty wait, and there is still a connection for everybody else.
                for _ in range(20):
                    assert (await client.get("/api/v1/runs")).status_code == 200
                assert not any(task.done() for task in held)
                assert {(await task).status_code for task in held} == {200}
        assert count.most <= MOST
        for stream in (*streams, *waits):
            assert stream.comments, "it beats"
            await stream.close()


# A pool that is too small


@pytest.fixture
def server(redis_server: RedisServer) -> RedisServer:
    return redis_server


@pytest.fixture
def watch(server: RedisServer) -> Iterator[list[int]]:
    """How many connections of ours the server has had at once."""
    seen: list[int] = []
    stop = threading.Event()

    def look() -> None:
        with server.client() as client:
            while not stop.wait(0.01):
                seen.append(sum(1 for one in client.client_list() if one["name"] == "stream-broker"))

    thread = threading.Thread(target=look)
    thread.start()
    yield seen
    stop.set()
    thread.join()


async def slow(redis: Redis, seconds: float) -> None:
    """A command that takes its time, and holds its connection."""
    await redis.execute_command("BLPOP", "nothing", str(seconds))  # type: ignore[no-untyped-call]


async def use(redis: Redis, n: int, rounds: int) -> int:
    """What requests do: single commands, pipelines and slow commands."""
    for k in range(rounds):
        await redis.set(f"key-{n}", k)
        assert int(await redis.get(f"key-{n}")) == k
        async with redis.pipeline(transaction=k % 2 == 0) as pipe:
            pipe.incr(f"count-{n}")
            pipe.time()
            await pipe.execute()
        await slow(redis, 0.01)
    return rounds


async def test_a_pool_of_two_serves_twenty_users_and_is_never_stuck(server: RedisServer, watch: list[int]) -> None:
    redis = connect(server.url, connections=2, wait=30)
    async with asyncio.timeout(60):
        assert await asyncio.gather(*(use(redis, n, 5) for n in range(20))) == [5] * 20
    await redis.aclose(close_connection_pool=True)
    assert max(watch) == 2


async def test_a_pool_of_two_is_whole_again_after_its_users_were_cancelled_anywhere(
    server: RedisServer, watch: list[int]
) -> None:
    """A client that goes away cancels its request: in a command, in a pipeline, or while it waits for a connection."""
    seed = secrets.randbits(32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    redis = connect(server.url, connections=2, wait=30)
    async with asyncio.timeout(60):
        for _ in range(8):
            tasks = [asyncio.create_task(use(redis, n, 20)) for n in range(20)]
            for task in rng.sample(tasks, 20):
                await asyncio.sleep(rng.random() / 100)
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            # Both connections work, at the same time, and answer what they were asked.
            assert await asyncio.gather(*(redis.echo(f"{n}") for n in range(20))) == [b"%d" % n for n in range(20)]
    await redis.aclose(close_connection_pool=True)
    assert max(watch) <= 2


async def interrupted(work: Callable[[], Awaitable[object]], turns: int) -> None:
    """Cancels `work` after some turns of the event loop, and then it must be at its end."""

    async def forever() -> None:
        await work()
        await asyncio.Event().wait()

    task = asyncio.create_task(forever())
    for _ in range(turns):
        await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait([task], timeout=3)
    assert task.cancelled(), f"it goes on, after {turns} turns"


@pytest.mark.parametrize("turns", range(20))
async def test_a_task_that_is_cancelled_while_it_uses_redis_ends(server: RedisServer, turns: int) -> None:
    """In any turn of a connect, a command or a pipeline. redis-py alone would lose some, on Python 3.11."""
    fresh, used = connect(server.url, connections=1), connect(server.url, connections=1)
    await used.ping()

    async def pipeline() -> None:
        async with used.pipeline(transaction=True) as pipe:
            pipe.incr("count")
            await pipe.execute()

    for work in (fresh.ping, used.ping, pipeline):
        await interrupted(work, turns)
        await interrupted(work, turns + 20)
    for redis in (fresh, used):
        assert await redis.ping()
        await redis.aclose(close_connection_pool=True)


@pytest.mark.parametrize("turns", range(0, 60, 3))
async def test_a_subscriber_is_closed_at_any_moment_of_its_start(server: RedisServer, turns: int) -> None:
    redis = connect(server.url, connections=1)
    subscriber = Subscriber(redis, on_message=lambda *_: None, channels=["one", "two"])
    subscriber.start()
    for _ in range(turns):
        await asyncio.sleep(0)
    closing = asyncio.create_task(subscriber.close())
    await asyncio.wait([closing], timeout=3)
    assert closing.done(), "it does not end"
    await redis.aclose(close_connection_pool=True)


async def test_who_waits_too_long_for_a_connection_is_told_that_redis_is_away(server: RedisServer) -> None:
    redis = connect(server.url, connections=2, wait=0.3)
    hogs = [asyncio.create_task(slow(redis, 1.5)) for _ in range(2)]
    await asyncio.sleep(0.1)
    results = await asyncio.gather(*(redis.ping() for _ in range(20)), return_exceptions=True)
    assert all(isinstance(error, ConnectionError) and is_away(error) for error in results)
    assert not any(hog.done() for hog in hogs), "they have waited side by side, not one after the other"
    with pytest.raises(Unavailable), unavailable():
        await redis.ping()
    for hog in hogs:
        await hog
    assert await asyncio.gather(*(redis.ping() for _ in range(20))) == [True] * 20
    await redis.aclose(close_connection_pool=True)


async def test_a_pool_whose_connections_were_killed_makes_new_ones(server: RedisServer) -> None:
    redis = connect(server.url, connections=2)
    await asyncio.gather(*(redis.ping() for _ in range(10)))
    with server.client() as admin:
        for _ in range(3):
            admin.client_kill_filter(_type="normal", skipme=True)
            failed = [
                e
                for e in await asyncio.gather(*(redis.ping() for _ in range(2)), return_exceptions=True)
                if e is not True
            ]
            assert all(isinstance(error, BaseException) and is_away(error) for error in failed)
            assert await asyncio.gather(*(redis.ping() for _ in range(20))) == [True] * 20
    await redis.aclose(close_connection_pool=True)
