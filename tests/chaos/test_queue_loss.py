"""PROTOCOL 4.1, 4.2: the queue and the index of leases may be lost, or restored from an old copy; no run is (P2)."""

from __future__ import annotations

import json
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import median
from typing import Any, NamedTuple

import pytest
import redis as sync_redis

from broker.runs import keys
from tests.conftest import Launcher
from tests.kit.checker import check_log, check_poll
from tests.kit.fleet import Fleet, reasons
from tests.kit.http import Client
from tests.kit.processes import Gateway, Worker, wait_for
from tests.kit.redis_server import RedisServer
from tests.kit.scale import LONG, scaled

LEASE = 1.0
SETTINGS: dict[str, Any] = {"lease_seconds": LEASE, "heartbeat_seconds": 0.5}


@dataclass
class Stage:
    """The queue on a server of its own."""

    launch: Launcher
    redis: RedisServer
    queue: RedisServer
    gateway: Gateway
    client: Client
    direct: sync_redis.Redis
    fleet: Fleet

    def worker(self, **settings: Any) -> Worker:
        return self.launch.worker(self.redis.url, queue_redis_url=self.queue.url, **SETTINGS, **settings)

    def submit(self, count: int, agent: str, **parameters: Any) -> list[str]:
        return [self.fleet.submit(agent, **parameters) for _ in range(count)]

    def statuses(self, request_ids: list[str]) -> Counter[str]:
        return Counter(self.fleet.statuses(request_ids))

    def until(self, condition: Callable[[], bool], seconds: float = 30) -> None:
        wait_for(condition, seconds=seconds, every=0.05)

    def ask(self, *command: Any) -> Any:
        """The queue's server."""
        return self.queue.ask(*command)


@pytest.fixture
def stage(launch: Launcher) -> Iterator[Stage]:
    redis, queue = launch.redis(), launch.redis()
    gateway = launch.gateway(redis.url, queue_redis_url=queue.url, **SETTINGS)
    with Client(gateway.url) as client, redis.client() as direct:
        yield Stage(launch, redis, queue, gateway, client, direct, Fleet(redis, client, direct))


def ended_in_one_attempt(stage: Stage, request_ids: list[str]) -> None:
    for request_id in request_ids:
        run, log = stage.fleet.ended(request_id)
        assert run["status"] == "completed", run
        assert reasons(log) == ["started"], "a lost queue is no reason for another attempt"


# -- lost ----------------------------------------------------------------------------------------------------


def emptied(stage: Stage) -> None:
    stage.ask("FLUSHALL")


def started_empty(stage: Stage) -> None:
    stage.queue.kill()
    stage.queue.cut_aof(1_000_000)
    stage.queue.start()


def without_its_jobs(stage: Stage) -> None:
    names = [keys.QUEUE, *(name.decode() for name in stage.ask("KEYS", "arq:*"))]
    stage.ask("DEL", *names)


def without_its_index(stage: Stage) -> None:
    stage.ask("DEL", keys.LEASES, keys.QUEUE)


@pytest.mark.parametrize("lose", [started_empty, *([emptied, without_its_index, without_its_jobs] if LONG else [])])
def test_no_accepted_run_is_lost_with_the_queue(stage: Stage, lose: Callable[[Stage], None]) -> None:
    """Runs of three kinds: under way, queued with all slots taken, accepted while no worker was there."""
    early = stage.submit(10, "sleeper", seconds=0.1)
    lose(stage)
    worker = stage.worker(max_jobs=4)
    stage.until(lambda: stage.statuses(early)["completed"] == 10)
    long = stage.submit(4, "sleeper", seconds=3)
    stage.until(lambda: stage.statuses(long)["running"] == 4)
    waiting = stage.submit(10, "sleeper", seconds=0.1)
    lose(stage)
    lost_at = time.monotonic()
    stage.until(lambda: stage.ask("ZCARD", keys.QUEUE) == 10)
    print(f"{lose.__name__}: all jobs are there again after {time.monotonic() - lost_at:.1f} s")
    stage.until(lambda: stage.statuses([*waiting, *long])["completed"] == 14)
    ended_in_one_attempt(stage, [*early, *long, *waiting])
    stage.until(lambda: stage.ask("ZCARD", keys.QUEUE) == 0)
    assert not worker.logged("run handed over")
    assert stage.client.finished(stage.client.submit("and on"))["status"] == "completed"


def test_queues_that_are_lost_at_any_moment_lose_no_run(stage: Stage) -> None:
    """Each run less often than MAX_ENQUEUES, after which a run that nobody could start ends."""
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    workers = [stage.worker(max_jobs=3) for _ in range(2)]
    lost, took = 0, list[float]()
    for _ in range(scaled(30)):
        runs = stage.submit(40, "sleeper", seconds=0.1)
        for _ in range(3):
            time.sleep(chance.random() * 0.3)
            chance.choice([emptied, without_its_index])(stage)
            lost, lost_at = lost + 1, time.monotonic()
        stage.fleet.until_ended(runs, seconds=60)
        took.append(time.monotonic() - lost_at)
        ended_in_one_attempt(stage, runs)
    requeued = sum(len(worker.logged("reaped", done="requeued")) for worker in workers)
    print(
        f"{40 * len(took)} runs, {lost} queues lost, {requeued} jobs enqueued again; "
        f"all had ended {median(took):.1f} s (at most {max(took):.1f} s) after the last loss"
    )
    assert requeued, "nothing was lost"
    assert not [line for worker in workers for line in worker.logged("reaped") if line["done"] != "requeued"]


# -- restored ------------------------------------------------------------------------------------------------


class Copy(NamedTuple):
    """A backup of the queue's server: values, and when they expire (ms since the epoch, 0 for never)."""

    values: dict[bytes, tuple[bytes, int]]

    @classmethod
    def of(cls, client: sync_redis.Redis) -> Copy:
        values = {}
        now = int(time.time() * 1000)
        for name in client.scan_iter():
            life, value = client.pttl(name), client.dump(name)
            assert isinstance(life, int)
            if isinstance(value, bytes):
                values[name] = value, now + life if life > 0 else 0
        return cls(values)

    def restore(self, client: sync_redis.Redis) -> None:
        client.flushall()
        for name, (value, expires) in self.values.items():
            client.restore(name, expires, value, replace=True, absttl=True)


def test_a_queue_that_is_restored_from_an_old_copy_changes_nothing(stage: Stage) -> None:
    """Jobs come twice, and late: of runs that have ended, were cancelled, erased, or are at a later attempt."""
    done, cancelled, erased = (stage.submit(5, "sleeper", seconds=0.1) for _ in range(3))
    under_way = stage.submit(3, "sleeper", seconds=8)
    with stage.queue.client() as client:
        copy = Copy.of(client)
    for request_id in cancelled:
        stage.client.post(f"/api/v1/runs/{request_id}/cancel").raise_for_status()
    for request_id in erased:
        stage.client.delete(f"/api/v1/runs/{request_id}").raise_for_status()
    first = stage.worker(grace_seconds=0)
    stage.until(lambda: stage.statuses(under_way)["running"] == 3 and stage.statuses(done)["completed"] == 5)
    first.signal(signal.SIGTERM)
    second = stage.worker()
    stage.until(lambda: len(second.logged("run started", attempt=2)) == 3)
    later = stage.submit(3, "sleeper", seconds=0.1)
    before = {request_id: stage.client.log(request_id) for request_id in [*done, *cancelled, *under_way]}
    with stage.queue.client() as client:
        for _ in range(2):
            copy.restore(client)
            time.sleep(0.5)
    refused = [*done, *cancelled, *under_way, *erased]
    stage.until(lambda: {line["request_id"] for line in second.logged("claim refused")} >= set(refused))
    for request_id in [*done, *cancelled]:
        assert stage.client.log(request_id) == before[request_id]
        check_poll(stage.client.run(request_id), before[request_id])
    for request_id in erased:
        assert stage.client.get(f"/api/v1/runs/{request_id}").status_code == 404
        assert stage.direct.hgetall(keys.run(request_id)) == {b"status": b"erased"}
    stage.fleet.until_ended([*under_way, *later])
    for request_id in under_way:
        log = stage.client.log(request_id)
        check_log(log)
        assert reasons(log) == ["started", "handed_over"]
        assert log[: len(before[request_id])] == before[request_id]
    ended_in_one_attempt(stage, later)
    assert not second.logged("reaped", done="fenced")


# -- away ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["killed", *(["silent"] if LONG else [])])
def test_while_the_queues_redis_is_away_runs_go_on_and_are_read_polled_and_cancelled(stage: Stage, fault: str) -> None:
    """Only what is new must wait: a submit is told to come again."""
    limit = 3 + LEASE
    stage.worker(max_jobs=3)
    watched = stage.client.submit("w", agent="hangs", cancel_if_unwatched=limit)
    steps = stage.client.submit("s", agent="tokens", parameters={"count": 60, "pause": 0.1})
    victim = stage.fleet.submit("hangs")
    queued = stage.client.submit("q", agent="sleeper", parameters={"seconds": 0}, cancel_if_unwatched=limit)
    stage.until(lambda: stage.statuses([watched, steps, victim])["running"] == 3)
    if fault == "killed":
        stage.queue.kill()
    else:
        stage.queue.pause()
    began = time.monotonic()
    slowest = 0.0
    with Client(stage.gateway.url) as reader, reader.stream("GET", f"/api/v1/runs/{queued}/stream") as stream:
        assert stream.status_code == 200
        while time.monotonic() - began < limit + 2 * LEASE:
            for request_id in (watched, steps):
                asked = time.monotonic()
                assert stage.client.run(request_id)["status"] in ("running", "completed")
                slowest = max(slowest, time.monotonic() - asked)
            time.sleep(0.3)
        assert stage.statuses([watched, queued]) == {"running": 1, "queued": 1}, "they were watched"
        assert stage.client.post(f"/api/v1/runs/{victim}/cancel").json()["status"] == "cancelled"
        refused = stage.client.post("/api/v1/query", json={"query": "new"})
        assert (refused.status_code, refused.json()["code"]) == (503, "unavailable")
        if fault == "killed":
            stage.queue.start()
        else:
            stage.queue.resume()
        back = time.monotonic()
        stage.until(lambda: stage.statuses([queued])["completed"] == 1)
        print(f"{fault}: slowest poll {slowest:.2f} s; the queued run had ended {time.monotonic() - back:.1f} s later")
    ended_in_one_attempt(stage, [steps, queued])
    assert json.loads(stage.client.log(victim)[-1].data) == {"reason": "client"}
    new = stage.client.submit("new")
    assert stage.client.finished(new)["status"] == "completed"
