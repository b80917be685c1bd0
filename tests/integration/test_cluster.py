"""Runs on a Redis Cluster: the whole path, a slot that moves and a primary that dies in mid-stream, few connections."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import threading
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from broker.events import Entry
from broker.runs import keys
from broker.runs.connections import connect
from broker.runs.scripts import Scripts
from broker.settings import Settings
from tests.conftest import Launcher
from tests.kit.checker import check_log, check_poll, check_reader, entries_of
from tests.kit.cluster import Cluster, slot_of
from tests.kit.eventsource import Stream
from tests.kit.http import Client, token
from tests.kit.many import check_runs, path_of
from tests.kit.processes import Gateway, Worker
from tests.kit.redis_server import RedisServer, redis_6_2
from tests.kit.runs import field, now_ms, running
from tests.kit.scribe import Scribe
from tests.kit.tls import make_certificates
from tests.kit.whole_path import check_stream_and_poll, check_whole_path
from worker.keeper import LeaseKeeper

PASSWORD = "pelican-and-heron"
AUTH = {"Authorization": f"Bearer {token('alice')}"}


@dataclass
class Service:
    """Two gateways and a worker; the logs on a Cluster, the queue on a server of its own."""

    cluster: Cluster
    queue: RedisServer
    gateways: list[Gateway]
    worker: Worker

    def client(self, number: int = 0, subject: str = "alice") -> Client:
        return Client(self.gateways[number].url, subject)

    def check_logs(self, *levels: str) -> None:
        """No line is of another level, and none shows a password."""
        allowed = levels or ("INFO", "WARNING")
        for process in (*self.gateways, self.worker):
            assert not [line for line in process.log_lines() if line["level"] not in allowed]
            assert PASSWORD not in process.log_text()

    async def submit(self, query: str, **body: Any) -> str:
        def submit() -> str:
            with self.client() as alice:
                return alice.submit(query, **body)

        return await asyncio.to_thread(submit)

    async def stream(self, run: str, number: int = 0, *, after: str | None = None) -> Stream:
        cursor = {"Last-Event-ID": after} if after else {}
        return await Stream().open(self.gateways[number].url, f"/api/v1/runs/{run}/stream", {**AUTH, **cursor})

    async def check(self, run: str, *streams: Stream) -> None:
        """All of them read the whole log, and so does the poll."""
        for stream in streams:
            assert await stream.ended(60) == "finished"

        def check() -> None:
            with self.client(-1) as alice:
                log = alice.log(run)
                check_log(log)
                for stream in streams:
                    check_reader(entries_of(stream.events), log)
                check_poll(alice.run(run), log)

        await asyncio.to_thread(check)


def start(launch: Launcher, cluster: Cluster, gateways: int = 2, **settings: Any) -> Service:
    queue = launch.redis()
    urls = {"queue_redis_url": queue.url, **settings}
    made = [launch.gateway(cluster.url, **urls) for _ in range(gateways)]
    return Service(cluster, queue, made, launch.worker(cluster.url, **urls))


@pytest.fixture(scope="module")
def shared_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """For tests that leave it whole; slots may have moved. No primary is silent for so long that it is replaced."""
    cluster = Cluster(tmp_path_factory.mktemp("cluster"), node_timeout_ms=60_000)
    try:
        yield cluster.start()
    finally:
        cluster.close()


@pytest.fixture(scope="module")
def shared(shared_cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with contextlib.closing(Launcher(tmp_path_factory.mktemp("service"))) as launcher:
        yield start(launcher, shared_cluster)


@pytest.fixture
async def service(shared: Service) -> AsyncIterator[Service]:
    await shared.cluster.until_whole()
    yield shared
    shared.check_logs()


@contextlib.asynccontextmanager
async def serving(folder: Path, cluster: Cluster, **settings: Any) -> AsyncIterator[Service]:
    """On a Cluster of the test's own, which outlives the processes."""
    async with cluster:
        with contextlib.closing(Launcher(folder)) as launcher:
            yield start(launcher, cluster, **settings)


def slot_of_run(run: str) -> int:
    return slot_of(keys.run(run))


async def test_many_runs_over_one_connection_come_from_all_shards(service: Service) -> None:
    session, pause = secrets.token_hex(4), {"pause": 0.01}
    runs = [await service.submit(f"a few words {n} {session}", session_id=session, parameters=pause) for n in range(8)]
    assert len({slot_of_run(run) // 5462 for run in runs}) > 1, "all on one shard"
    listed = await Stream().open(service.gateways[0].url, path_of(*runs), AUTH)
    of_session = await Stream().open(service.gateways[1].url, path_of(session_id=session), AUTH)
    runs.append(await service.submit(f"later {session}", session_id=session, parameters=pause))
    assert await listed.ended(60) == "finished"
    await of_session.until(lambda: [event.type for event in of_session.events].count("final") == 9)

    def logs() -> dict[str, list[Entry]]:
        with service.client(-1) as alice:
            return {run: alice.log(run) for run in runs}

    found = await asyncio.to_thread(logs)
    check_runs(of_session.events, found)
    check_runs(listed.events, {run: found[run] for run in runs[:8]})
    await of_session.close()


async def test_the_whole_path(service: Service) -> None:
    with service.client() as one, service.client(1) as two:
        await asyncio.to_thread(check_whole_path, one, two)


async def test_runs_are_spread_over_all_primaries(service: Service) -> None:
    def work() -> set[str]:
        with service.client(subject="bob") as bob:
            runs = {check_stream_and_poll(bob, f"query {n}") for n in range(24)}
            listed = {run["request_id"] for run in bob.get("/api/v1/runs").json()["runs"]}
            assert listed == runs
            return runs

    runs = await asyncio.to_thread(work)
    owners = [service.cluster.owner(slot_of_run(run)) for run in runs]
    assert {server.port for server in owners} == {server.port for server in service.cluster.primaries}
    for run, owner in zip(runs, owners, strict=True):
        assert owner.ask("EXISTS", keys.run(run), keys.log(run)) == 2


async def test_publishing_stays_on_the_shard(service: Service) -> None:
    """PUBLISH would go to every node of the Cluster."""
    run = await service.submit("sharded", agent="hangs")
    stream = await service.stream(run)
    await stream.until(lambda: len(stream.events) == 3)
    channel = keys.channel(run).encode()
    for server in service.cluster.primaries:
        here = server is service.cluster.owner(slot_of_run(run))
        assert (channel in server.ask("PUBSUB", "SHARDCHANNELS")) == here
        assert not server.ask("PUBSUB", "CHANNELS")
    with service.client() as alice:
        assert (await asyncio.to_thread(alice.post, f"/api/v1/runs/{run}/cancel")).status_code == 200
    await service.check(run, stream)


async def test_a_worker_that_is_blocked_keeps_its_leases_on_all_shards(service: Service) -> None:
    """Its thread has an event loop and connections of its own."""
    redis = connect(service.cluster.url, connections=2)
    scripts = Scripts(redis)
    leases = [await running(scripts) for _ in range(12)]
    settings = Settings(redis_url=service.cluster.url, queue_redis_url=service.queue.url, lease_seconds=600)

    async def keep() -> None:
        keeping = asyncio.create_task(LeaseKeeper(settings, lambda: leases).keep())
        await asyncio.wait([keeping], timeout=2)
        keeping.cancel()
        await asyncio.wait([keeping])

    await asyncio.to_thread(asyncio.run, keep())
    for lease in leases:
        assert int(await field(redis, lease.request_id, "deadline")) > now_ms() + 300_000
    await redis.aclose(close_connection_pool=True)


async def test_a_stream_goes_on_while_its_slot_moves(service: Service) -> None:
    """Twice, with the run half-way between the servers for a while; on a gateway that idles beside it too."""
    cluster = service.cluster
    parameters = {"count": 60, "pause": 0.05}
    run = await service.submit("moving", agent="tokens", parameters=parameters)
    others = [await service.submit(f"other {n}", agent="tokens", parameters=parameters) for n in range(5)]
    streams = [await service.stream(run, number) for number in (0, 1, 1)]
    beside = [await service.stream(other) for other in others]
    for moves in range(2):
        await streams[0].until(lambda: len(streams[0].events) > 8 + 20 * moves)  # noqa: B023
        before = cluster.owner(slot_of_run(run))
        await cluster.move_slot(slot_of_run(run), pause=0.2)
        assert cluster.owner(slot_of_run(run)) is not before
    streams.append(await service.stream(run))
    resumed = await service.stream(run, 1, after=streams[0].events[5].id)
    await service.check(run, *streams)
    resumed.events[:0] = streams[0].events[:6]
    await service.check(run, resumed)
    for other, stream in zip(others, beside, strict=True):
        await service.check(other, stream)


async def test_nothing_but_a_move_is_needed_for_a_stream_to_follow(service: Service) -> None:
    """No event comes, no heartbeat looks, and no command is refused in the meantime."""
    cluster = service.cluster
    async with Scribe(cluster.url) as scribe:
        run = await scribe.running("alice", f"quiet {secrets.token_hex(4)}", tokens=2)
        stream = await service.stream(run.request_id)
        await stream.until(lambda: len(stream.events) == 4)
        await cluster.move_slot(slot_of_run(run.request_id))
        owner = cluster.owner(slot_of_run(run.request_id))
        channel = keys.channel(run.request_id).encode()
        async with asyncio.timeout(10):
            while channel not in owner.ask("PUBSUB", "SHARDCHANNELS"):
                await asyncio.sleep(0.05)
        await run.tokens(3)
        await stream.until(lambda: len(stream.events) == 7, 3)  # far below the heartbeat of 15 s
        await run.end()
        await service.check(run.request_id, stream)


async def test_what_is_written_between_the_servers_is_read(service: Service) -> None:
    """The keys have moved, the slot has not: the script publishes where nobody listens yet."""
    cluster = service.cluster
    async with Scribe(cluster.url) as scribe:
        run = await scribe.running("alice", f"between {secrets.token_hex(4)}", tokens=2)
        stream = await service.stream(run.request_id)
        await stream.until(lambda: len(stream.events) == 4)
        move = cluster.begin_move(slot_of_run(run.request_id))
        move.keys()
        await run.tokens(5)
        with service.client(1) as alice:
            polled = await asyncio.to_thread(alice.run, run.request_id)
        assert polled["last_event_id"] == str((await run.log())[-1].id)
        move.end()
        await stream.until(lambda: len(stream.events) == 9, 10)
        await run.end()
        await service.check(run.request_id, stream)


async def test_a_stream_goes_on_where_its_primary_hands_over_to_its_replica(service: Service) -> None:
    """The old primary lives, and its connections with it."""
    parameters = {"count": 30, "pause": 0.1}
    run = await service.submit("handed over", agent="tokens", parameters=parameters)
    streams = [await service.stream(run, number) for number in (0, 1)]
    await streams[0].until(lambda: len(streams[0].events) > 6)
    await service.cluster.fail_over(slot_of_run(run))
    await service.check(run, *streams)


async def test_connections_are_bounded_by_the_number_of_shards(service: Service) -> None:
    """P16: one for pub/sub and four for commands to each shard, two to the queue; for a moment one more, to ask how
    the Cluster looks.
    """
    cluster = service.cluster
    most: dict[int, int] = {}
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(0.05):
            for server in (*cluster.servers, service.queue):
                most[server.port] = max(most.get(server.port, 0), connections(server, service.gateways[0]))

    watcher = threading.Thread(target=watch)
    async with Scribe(cluster.url) as scribe:
        runs = [await scribe.running("alice", f"run {n} {secrets.token_hex(4)}", tokens=3) for n in range(30)]
        watcher.start()
        try:
            streams = [await service.stream(runs[n % 30].request_id) for n in range(100)]
            limits = httpx.Limits(max_connections=50)
            async with httpx.AsyncClient(
                base_url=service.gateways[0].url, headers=AUTH, timeout=60, verify=False, limits=limits
            ) as client:
                asked = [client.get(f"{run.path}{tail}") for run in runs for tail in ("", "/events")]
                asked += [client.get("/api/v1/runs") for _ in range(20)] + [client.get("/readyz") for _ in range(10)]
                asked += [client.post("/api/v1/query", json={"query": f"q {n}"}) for n in range(40)]
                assert {reply.status_code for reply in await asyncio.gather(*asked)} <= {200, 202}
            for run in runs:
                await run.tokens(2)
                await run.end()
            for n, stream in enumerate(streams):
                assert await stream.ended(30) == "finished"
                assert [event.id for event in stream.events] == [str(entry.id) for entry in await runs[n % 30].log()]
        finally:
            stop.set()
            watcher.join()
    primaries = {server.port for server in cluster.primaries}
    for server in cluster.servers:
        assert most[server.port] <= (6 if server.port in primaries else 1), "more connections than are allowed"
    assert all(most[port] >= 2 for port in primaries)
    assert most[service.queue.port] <= 2
    assert sum(connections(server, service.gateways[0]) for server in cluster.servers) <= 3 * 6


async def test_a_shard_that_does_not_answer_leaves_the_heartbeats_of_the_others_true(
    launch: Launcher, service: Service
) -> None:
    cluster = service.cluster
    gateway = launch.gateway(cluster.url, queue_redis_url=service.queue.url, heartbeat_seconds=0.5)
    runs = [await service.submit(f"beats {n}", agent="hangs") for n in range(12)]
    silent = cluster.primaries[0]
    here = [run for run in runs if cluster.owner(slot_of_run(run)) is silent]
    there = [run for run in runs if run not in here]
    assert here and there
    streams = {run: await Stream().open(gateway.url, f"/api/v1/runs/{run}/stream", AUTH) for run in runs}
    for stream in streams.values():
        await stream.until(lambda: any("lease=1" in comment for comment in stream.comments))  # noqa: B023
    silent.pause()
    try:
        seen = {run: len(stream.comments) for run, stream in streams.items()}
        for run, stream in streams.items():
            await stream.until(lambda: len(stream.comments) > seen[run] + 3)  # noqa: B023
        unknown = {
            run: ["unknown" in comment for comment in stream.comments[seen[run] + 2 :]]
            for run, stream in streams.items()
        }
    finally:
        silent.resume()
    assert all(all(unknown[run]) for run in here)
    assert not any(any(unknown[run]) for run in there)
    for stream in streams.values():
        await stream.close()
    with service.client() as alice:
        for run in runs:
            assert (await asyncio.to_thread(alice.post, f"/api/v1/runs/{run}/cancel")).status_code == 200


def connections(server: RedisServer, gateway: Gateway) -> int:
    found = psutil.Process(gateway.pid).net_connections("tcp")
    return sum(1 for one in found if one.raddr and one.raddr.port == server.port and one.status == "ESTABLISHED")


# A Cluster of the test's own


async def test_a_stream_goes_on_where_its_primary_is_killed(tmp_path: Path) -> None:
    own = Cluster(tmp_path / "cluster", password=PASSWORD)
    async with serving(tmp_path, own, heartbeat_seconds=1) as service:
        body = {"agent": "tokens", "parameters": {"count": 36, "pause": 0.2}}
        run = await service.submit("killed", **body)
        others = [await service.submit(f"other {n}", **body) for n in range(6)]
        streams = [await service.stream(run, number) for number in (0, 1)]
        beside = [await service.stream(other, n % 2) for n, other in enumerate(others)]
        await streams[0].until(lambda: len(streams[0].events) > 8)
        await own.until_replicated()  # what a failover loses is not judged here
        old = await own.kill_primary(slot_of_run(run))
        await own.until_failed_over(slot_of_run(run), old)
        await own.start_again(old)
        with service.client() as alice:
            await asyncio.to_thread(check_stream_and_poll, alice, "after the failover")
        await service.check(run, *streams)
        for other, stream in zip(others, beside, strict=True):
            await service.check(other, stream)
        service.check_logs()


async def test_the_whole_path_over_tls_where_what_was_accepted_is_replicated(tmp_path: Path) -> None:
    """WAIT on the connection, and so on the shard, of what it is for (PROTOCOL 5.3)."""
    certificates = make_certificates(tmp_path / "certificates")
    own = Cluster(tmp_path / "cluster", shards=2, certificates=certificates, password=PASSWORD)
    async with serving(tmp_path, own, gateways=1, durability="replicated") as service:
        with service.client() as alice:
            await asyncio.to_thread(check_whole_path, alice, alice)
            for replica in set(own.servers) - set(own.primaries):
                replica.pause()
            reply = await asyncio.to_thread(alice.post, "/api/v1/query", json={"query": "nobody has a copy"})
            assert (reply.status_code, reply.json()["code"]) == (503, "unavailable")
            for replica in set(own.servers):
                replica.resume()
        service.check_logs()


async def test_the_whole_path_on_6_2_which_has_no_sharded_publish(tmp_path: Path) -> None:
    binary = redis_6_2()
    if binary is None:
        pytest.skip("no redis-server 6.2")
    own = Cluster(tmp_path / "cluster", replicas=0, binary=binary)
    async with serving(tmp_path, own, gateways=1) as service:
        with service.client() as alice:
            await asyncio.to_thread(check_whole_path, alice, alice)
        run = await service.submit("moving", agent="tokens", parameters={"count": 40, "pause": 0.05})
        stream = await service.stream(run)
        await stream.until(lambda: len(stream.events) > 8)
        await own.move_slot(slot_of_run(run), pause=0.1)
        await service.check(run, stream)
        service.check_logs("INFO")
