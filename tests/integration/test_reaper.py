"""PROTOCOL 4.2 to 4.7 over processes: who makes the index whole again, and what several reapers do."""

from __future__ import annotations

import asyncio
import json
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis as sync_redis

from broker.runs import keys
from broker.settings import Settings
from tests.conftest import Launcher
from tests.kit.cluster import Cluster
from tests.kit.fleet import Fleet, reasons
from tests.kit.http import Client
from tests.kit.processes import Worker, wait_for
from tests.kit.redis_server import RedisServer
from tests.kit.runs import now_ms, running
from tests.kit.sse import read
from worker.parts import make_parts
from worker.reaper import Reaper

LEASE = 1.0
SETTINGS: dict[str, Any] = {"lease_seconds": LEASE, "heartbeat_seconds": 0.5}


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[RedisServer, Client]]:
    """A Redis and a gateway; a test brings its workers."""
    launcher = Launcher(tmp_path_factory.mktemp("reaper"))
    try:
        server = launcher.redis()
        with Client(launcher.gateway(server.url, **SETTINGS).url) as client:
            yield server, client
    finally:
        launcher.close()


@pytest.fixture
def fleet(service: tuple[RedisServer, Client]) -> Iterator[Fleet]:
    server, client = service
    with server.client() as direct:
        direct.flushall()
        yield Fleet(server, client, direct)


def index(direct: sync_redis.Redis) -> set[str]:
    members = direct.zrange(keys.LEASES, 0, -1)
    assert isinstance(members, list)
    return {member.decode() for member in members}


def reaped(*workers: Worker) -> Counter[str]:
    return Counter(line["done"] for worker in workers for line in worker.logged("reaped"))


# -- a lost index --------------------------------------------------------------------------------------------


def test_a_submit_puts_its_run_into_the_index_and_a_repeat_does_so_again(fleet: Fleet) -> None:
    """No worker is there in these tests: nobody scans."""
    request_id = fleet.client.submit("same")
    assert index(fleet.direct) == {request_id}
    fleet.direct.delete(keys.LEASES)
    assert fleet.client.submit("same") == request_id
    assert index(fleet.direct) == {request_id}


def test_a_poll_puts_an_unfinished_run_back_into_the_index(fleet: Fleet) -> None:
    request_id, other = fleet.client.submit("a"), fleet.client.submit("b")
    fleet.client.post(f"/api/v1/runs/{other}/cancel")
    fleet.direct.delete(keys.LEASES)
    for one in (request_id, other):
        fleet.client.run(one)
    wait_for(lambda: bool(index(fleet.direct)))
    assert index(fleet.direct) == {request_id}


def test_a_heartbeat_puts_a_run_that_nobody_works_on_back_into_the_index(fleet: Fleet) -> None:
    request_id = fleet.client.submit("q")
    with fleet.client.stream("GET", f"/api/v1/runs/{request_id}/stream") as response:
        events = read(response.iter_raw())
        assert next(events).type == "start"
        fleet.direct.delete(keys.LEASES)
        wait_for(lambda: index(fleet.direct) == {request_id})


def test_what_nobody_meets_is_found_by_the_workers_walk_through_all_records(fleet: Fleet, launch: Launcher) -> None:
    """A slice at a time; a few records are one slice."""
    runs = [fleet.submit("sleeper", seconds=0) for _ in range(30)]
    fleet.direct.delete(keys.LEASES, keys.QUEUE)
    fleet.client.post(f"/api/v1/runs/{runs[0]}/cancel")
    worker = launch.worker(fleet.redis.url, **SETTINGS)
    fleet.until_ended(runs)
    for request_id in runs[1:]:
        assert fleet.client.run(request_id)["status"] == "completed"
    assert reaped(worker) == {"requeued": 29}
    assert runs[0] not in index(fleet.direct)


# -- several reapers -----------------------------------------------------------------------------------------


def test_when_a_worker_dies_the_reapers_of_all_others_do_each_thing_once(fleet: Fleet, launch: Launcher) -> None:
    victim = launch.worker(fleet.redis.url, **SETTINGS)
    runs = [fleet.submit("hangs") for _ in range(20)]
    doomed = fleet.submit("hangs")
    fleet.until_running([*runs, doomed])
    others = [launch.worker(fleet.redis.url, **SETTINGS) for _ in range(3)]
    fleet.direct.hset(keys.run(doomed), "fails", "2")  # this is its last attempt
    victim.kill()
    fleet.until_running(runs, attempt=2)
    wait_for(lambda: fleet.field(doomed, "status") == "failed")
    for request_id in runs:
        log = fleet.client.log(request_id)
        assert reasons(log) == ["started", "worker_lost"]
        assert len([1 for worker in others for _ in worker.logged("run started", request_id=request_id)]) == 1
    _, log = fleet.ended(doomed)
    assert reasons(log) == ["started", "worker_lost"]
    assert json.loads(log[-1].data)["code"] == "worker_lost"
    assert reaped(*others) == {"fenced": 20, "closed_worker_lost": 1}
    # What each has done is counted in its lines, and in its last one.
    for worker in others:
        worker.signal(signal.SIGTERM)
    for worker in others:
        worker.wait()
        [stopped] = worker.logged("worker stopped")
        assert stopped["reaped"] == dict(reaped(worker))
        for done, times in reaped(worker).items():
            assert [line["count"] for line in worker.logged("reaped", done=done)] == [*range(1, times + 1)]


# -- patience ------------------------------------------------------------------------------------------------


def test_memory_that_was_full_for_longer_than_a_lease_costs_no_attempt(fleet: Fleet, launch: Launcher) -> None:
    """PROTOCOL 4.7: nobody could renew. The owners come first when it ends."""
    workers = [launch.worker(fleet.redis.url, **SETTINGS) for _ in range(2)]
    runs = [fleet.submit("tokens", count=60, pause=0.1) for _ in range(10)]
    fleet.until_running(runs)
    fleet.redis.fill_memory()
    deadlines = [int(fleet.field(request_id, "deadline")) for request_id in runs]
    wait_for(lambda: fleet.direct.time()[0] * 1000 > max(deadlines) + LEASE * 1000)  # type: ignore[index]
    fleet.redis.free_memory()
    fleet.until_ended(runs)
    for request_id in runs:
        run, log = fleet.ended(request_id)
        assert (run["status"], reasons(log)) == ("completed", ["started"])
    assert not reaped(*workers)


def test_a_worker_that_starts_while_leases_are_expired_leaves_their_owners_time(fleet: Fleet, launch: Launcher) -> None:
    """The owner stands still, for longer than a lease; who has just come does not know for how long."""
    owner = launch.worker(fleet.redis.url, **SETTINGS)
    runs = [fleet.submit("hangs") for _ in range(5)]
    fleet.until_running(runs)
    owner.signal(signal.SIGSTOP)
    wait_for(lambda: fleet.direct.time()[0] * 1000 > max(int(fleet.field(r, "deadline")) for r in runs))  # type: ignore[index]
    new = launch.worker(fleet.redis.url, **{**SETTINGS, "lease_seconds": 4})
    owner.signal(signal.SIGCONT)
    wait_for(lambda: all(int(fleet.field(r, "deadline")) > fleet.direct.time()[0] * 1000 for r in runs))  # type: ignore[index]
    assert not reaped(new, owner)
    assert {fleet.field(request_id, "attempt") for request_id in runs} == {"1"}


# -- a Cluster -----------------------------------------------------------------------------------------------


async def test_while_one_shard_is_away_the_runs_of_the_others_are_reaped(tmp_path: Path) -> None:
    (tmp_path / "queue").mkdir()
    queue = RedisServer(tmp_path / "queue").start()
    settings = Settings(queue_redis_url=queue.url, lease_seconds=1)
    async with Cluster(tmp_path / "cluster", node_timeout_ms=6000) as cluster:
        parts = make_parts(settings.model_copy(update={"redis_url": cluster.url}))
        reaper = Reaper(parts)
        working = [asyncio.create_task(work) for work in (parts.primaries.run(), reaper.run())]
        try:
            names = [(await running(parts.scripts)).request_id for _ in range(12)]
            dead = cluster.owner_of(keys.run(names[0]))
            away = {name for name in names if cluster.owner_of(keys.run(name)) is dead}
            for name in names:
                await parts.redis.hset(keys.run(name), "deadline", str(now_ms() + 500))  # type: ignore[misc]
            dead.kill()
            await parts.leases.put(dict.fromkeys(names, 1))
            async with asyncio.timeout(60):
                while reaper.counts["fenced"] < 12 - len(away):
                    await asyncio.sleep(0.05)
                fenced = {job.decode()[:32] for job in await parts.queue.redis.zrange(keys.QUEUE, 0, -1)}
                assert fenced == set(names) - away
                while reaper.counts["fenced"] < 12:  # when its replica has taken over
                    await asyncio.sleep(0.05)
        finally:
            for task in working:
                task.cancel()
            await asyncio.wait(working)
            await parts.close()
            queue.close()
