"""P25: a cancel closes the run at once, worker or no worker; a living worker's agent is closed soon after (P7)."""

from __future__ import annotations

import asyncio
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import redis as sync_redis

from broker.runs import keys
from broker.runs.connections import connect
from broker.runs.scripts import Scripts
from tests.conftest import Launcher
from tests.kit.checker import check_log, check_reader, entries_of
from tests.kit.http import Client
from tests.kit.processes import Gateway, Worker, wait_for
from tests.kit.redis_server import RedisServer
from tests.kit.runs import RETENTION_MS
from tests.kit.scale import LONG, scaled

PATIENT = 120.0
"""A lease whose renewal comes too late to be what a test sees: what closes the agent is the message."""
BRISK = 1.5
"""A lease that is renewed twice a second."""


@dataclass
class Stage:
    redis: RedisServer
    gateways: list[Gateway]
    client: Client
    elsewhere: Client
    direct: sync_redis.Redis

    def cancel(self, request_id: str, client: Client | None = None) -> dict[str, Any]:
        response = (client or self.client).post(f"/api/v1/runs/{request_id}/cancel")
        assert response.status_code == 200, response.text
        run: dict[str, Any] = response.json()
        return run

    def types(self, request_id: str) -> list[str]:
        log = self.client.log(request_id)
        check_log(log)
        return [entry.type for entry in log]

    def entries(self, request_id: str) -> int:
        count = self.direct.xlen(keys.log(request_id))
        assert isinstance(count, int)
        return count

    def running(self, agent: str, mark: Path | None = None, **parameters: Any) -> str:
        """A run whose agent has begun."""
        given = {**parameters, "mark": str(mark)} if mark else parameters
        request_id = self.client.submit(f"{agent} {time.monotonic_ns()}", agent=agent, parameters=given)
        wait_for(lambda: self.entries(request_id) >= 3)
        return request_id


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    """Two gateways; a test brings its worker."""
    launcher = Launcher(tmp_path_factory.mktemp("cancel"))
    try:
        server = launcher.redis("--appendfsync", "always")  # one test kills it, and nothing shall be lost
        gateways = [launcher.gateway(server.url, heartbeat_seconds=1) for _ in range(2)]
        with Client(gateways[0].url) as client, Client(gateways[1].url) as elsewhere, server.client() as direct:
            yield Stage(server, gateways, client, elsewhere, direct)
    finally:
        launcher.close()


@pytest.fixture
def stage(one: Stage) -> Stage:
    one.direct.flushall()
    return one


@pytest.fixture
def patient(stage: Stage, launch: Launcher) -> Worker:
    return launch.worker(stage.redis.url, lease_seconds=PATIENT)


def silently(server: RedisServer, call: Callable[[Scripts], Any]) -> None:
    """Calls a script whose messages nobody hears: what it publishes goes into a question instead."""

    async def work() -> None:
        redis = connect(server.url, connections=1)
        await call(Scripts(redis, publish="SISMEMBER"))
        await redis.aclose(close_connection_pool=True)

    asyncio.run(work())


# -- without a worker ----------------------------------------------------------------------------------------


def test_a_queued_run_is_closed_at_once_and_no_worker_takes_it_later(stage: Stage, launch: Launcher) -> None:
    request_id = stage.client.submit("queued")
    run = stage.cancel(request_id, stage.elsewhere)
    assert (run["status"], run["error"], run["answer"], run["attempt"]) == ("cancelled", None, None, 0)
    assert run["finished_at"] is not None
    assert stage.types(request_id) == ["start", "attempt", "cancelled"]
    worker = launch.worker(stage.redis.url)
    wait_for(lambda: bool(worker.logged("claim refused", request_id=request_id, answer="CLOSED")))
    assert not worker.logged("run started")
    assert stage.types(request_id) == ["start", "attempt", "cancelled"]


def test_a_run_between_two_attempts_is_closed_at_once(stage: Stage, launch: Launcher) -> None:
    worker = launch.worker(stage.redis.url)
    request_id = stage.running("hangs")
    worker.kill()
    stage.direct.hset(keys.run(request_id), mapping={"status": "queued", "token": ""})  # as a reaper does
    run = stage.cancel(request_id)
    assert (run["status"], run["attempt"], run["answer"]) == ("cancelled", 1, "waiting ")
    assert stage.types(request_id) == ["start", "attempt", "token", "attempt", "cancelled"]


def test_a_run_whose_worker_is_dead_is_closed_at_once(stage: Stage, launch: Launcher) -> None:
    worker = launch.worker(stage.redis.url)
    request_id = stage.running("hangs")
    worker.kill()
    assert stage.cancel(request_id)["status"] == "cancelled"
    assert stage.types(request_id)[-2:] == ["attempt", "cancelled"]


def test_a_run_that_was_taken_from_a_lost_worker_is_closed_before_another_has_room_for_it(
    stage: Stage, launch: Launcher
) -> None:
    """Fenced, and not yet claimed."""
    lost = launch.worker(stage.redis.url, lease_seconds=1)
    request_id = stage.running("hangs")
    full = launch.worker(stage.redis.url, lease_seconds=1, max_jobs=1)
    lost.signal(signal.SIGSTOP)  # or it would take this one as well
    other = stage.running("hangs")
    lost.kill()
    wait_for(lambda: bool(full.logged("reaped", done="fenced", request_id=request_id)), seconds=20)
    run = stage.cancel(request_id)
    assert (run["status"], run["attempt"], run["answer"]) == ("cancelled", 1, "waiting ")
    stage.cancel(other)  # now it has room
    wait_for(lambda: bool(full.logged("claim refused", request_id=request_id, answer="CLOSED")))
    assert stage.types(request_id) == ["start", "attempt", "token", "attempt", "cancelled"]


def test_a_run_that_was_handed_over_is_closed_before_another_worker_comes(stage: Stage, launch: Launcher) -> None:
    worker = launch.worker(stage.redis.url, grace_seconds=0)
    request_id = stage.running("hangs")
    assert worker.stop() == 0
    assert stage.client.run(request_id)["status"] == "queued"
    assert stage.cancel(request_id, stage.elsewhere)["status"] == "cancelled"
    later = launch.worker(stage.redis.url)
    wait_for(lambda: bool(later.logged("claim refused", request_id=request_id, answer="CLOSED")))
    assert stage.types(request_id) == ["start", "attempt", "token", "attempt", "cancelled"]


# -- a living worker -----------------------------------------------------------------------------------------


def test_a_running_agent_is_closed_and_its_partial_output_stays(stage: Stage, patient: Worker, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    request_id = stage.running("slow", mark)
    run = stage.cancel(request_id, stage.elsewhere)
    assert (run["status"], run["answer"]) == ("cancelled", "begun ")
    wait_for(mark.exists)
    assert stage.types(request_id) == ["start", "attempt", "token", "attempt", "cancelled"]
    wait_for(lambda: bool(patient.logged("run ended", request_id=request_id, outcome="cancelled")))


def test_how_soon_the_agents_of_cancelled_runs_are_closed(stage: Stage, patient: Worker, tmp_path: Path) -> None:
    marks = [tmp_path / f"mark-{n}" for n in range(100 if LONG else 20)]
    runs = [stage.running("slow", mark) for mark in marks]
    took = []
    for n, (request_id, mark) in enumerate(zip(runs, marks, strict=True)):
        began = time.monotonic()
        stage.cancel(request_id, (stage.client, stage.elsewhere)[n % 2])
        wait_for(mark.exists, every=0.002)
        took.append(time.monotonic() - began)
    print(f"{len(took)} agents closed, median {median(took) * 1000:.0f} ms, max {max(took) * 1000:.0f} ms")


def test_every_stream_of_the_run_ends_with_the_cancel(stage: Stage, patient: Worker) -> None:
    request_id = stage.running("hangs")
    with ThreadPoolExecutor(4) as pool:
        reading = [pool.submit(lambda c: list(c.events(request_id)), c) for c in (stage.client, stage.elsewhere)]
        waiting = pool.submit(stage.elsewhere.run, request_id, 30)
        time.sleep(0.3)
        with Client(stage.gateways[0].url) as third:
            stage.cancel(request_id, third)
        log = stage.client.log(request_id)
        for stream in reading:
            check_reader(entries_of(stream.result(10)), log)
        assert waiting.result(10)["status"] == "cancelled"
    assert log[-1].type == "cancelled"


def test_a_second_cancel_and_one_after_the_end_change_nothing(stage: Stage, patient: Worker) -> None:
    cancelled = stage.running("hangs")
    first = stage.cancel(cancelled)
    assert stage.cancel(cancelled, stage.elsewhere) == first
    completed = stage.client.submit("one two")
    before = stage.client.finished(completed)
    assert stage.cancel(completed) == before
    failed = stage.client.submit("fails", agent="raises")
    before = stage.client.finished(failed)
    assert stage.cancel(failed) == before
    assert before["status"] == "failed"


def test_an_agent_that_writes_without_a_pause_is_closed_by_its_next_append(
    stage: Stage, patient: Worker, tmp_path: Path
) -> None:
    request_id = stage.running("tokens", count=40_000, pause=0.01, every=20)
    stage.cancel(request_id)
    wait_for(lambda: bool(patient.logged("run ended", request_id=request_id)))
    types = stage.types(request_id)
    assert types[-1] == "cancelled"
    assert len(types) < 40_000


@pytest.mark.parametrize("message", [b"", b"nudge", b"2 cancelled", b"worker_stopped", b"\xff"])
def test_a_control_message_that_nobody_understands_stops_nothing(stage: Stage, patient: Worker, message: bytes) -> None:
    """In a rolling upgrade a newer version may say more than this one knows."""
    request_id = stage.running("tokens", count=40, pause=0.01)
    stage.direct.publish(keys.control(request_id), message)
    assert stage.client.finished(request_id)["status"] == "completed"
    assert len(stage.types(request_id)) == 43
    assert patient.logged("a control message is not understood", request_id=request_id)


@contextmanager
def no_pubsub(server: RedisServer) -> Iterator[None]:
    """Nobody's subscription lives longer than a moment."""
    over = threading.Event()

    def kill() -> None:
        with server.client() as client:
            while not over.is_set():
                client.client_kill_filter(_type="pubsub")

    killing = threading.Thread(target=kill)
    killing.start()
    try:
        yield
    finally:
        over.set()
        killing.join()


def test_when_the_workers_subscription_is_lost_the_next_renewal_closes_the_agent(
    stage: Stage, launch: Launcher, tmp_path: Path
) -> None:
    launch.worker(stage.redis.url, lease_seconds=BRISK)
    marks = [tmp_path / f"mark-{n}" for n in range(4)]
    runs = [stage.running("slow", mark) for mark in marks]
    with no_pubsub(stage.redis):
        time.sleep(0.1)
        for request_id in runs:
            assert stage.cancel(request_id)["status"] == "cancelled"
    for request_id, mark in zip(runs, marks, strict=True):
        wait_for(mark.exists)
        assert stage.types(request_id)[-1] == "cancelled"


def test_a_cancel_that_nobody_hears_is_found_by_the_renewal_and_the_heartbeat(
    stage: Stage, launch: Launcher, tmp_path: Path
) -> None:
    mark = tmp_path / "mark"
    request_id = stage.client.submit("q", agent="slow", parameters={"mark": str(mark)})
    launch.worker(stage.redis.url, lease_seconds=BRISK)
    wait_for(lambda: stage.entries(request_id) >= 3)
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(lambda: list(stage.elsewhere.events(request_id)))
        time.sleep(0.3)
        silently(
            stage.redis,
            lambda scripts: scripts.close(
                request_id,
                kind="cancelled",
                data='{"reason":"client"}',
                reason="cancelled",
                token="t",
                retention_ms=RETENTION_MS,
            ),
        )
        wait_for(mark.exists)
        check_reader(entries_of(reading.result(10)), stage.client.log(request_id))


def test_a_stubborn_agent_is_left_behind_and_writes_nothing(stage: Stage, patient: Worker) -> None:
    request_id = stage.running("stubborn")
    stage.cancel(request_id)
    log = stage.client.log(request_id)
    wait_for(lambda: bool(patient.logged("run ended", request_id=request_id)), seconds=20)
    [warning] = [line for line in patient.log_lines() if "left behind" in line["message"]]
    assert (warning["level"], warning["request_id"]) == ("WARNING", request_id)
    assert stage.client.finished(stage.client.submit("the worker lives"))["status"] == "completed"
    time.sleep(0.3)
    assert stage.client.log(request_id) == log


# -- while Redis fails over, or is away ----------------------------------------------------------------------


def test_a_cancel_right_after_a_failover_is_answered_when_the_primary_has_settled(
    launch: Launcher, tmp_path: Path
) -> None:
    """P25: running and queued, through either gateway. Nothing is closed before its worker could mend the log."""
    pair = launch.pair()
    gateways = [launch.gateway(pair.url, heartbeat_seconds=1) for _ in range(2)]
    worker = launch.worker(pair.url, max_jobs=3)
    with Client(gateways[0].url) as one, Client(gateways[1].url) as two, ThreadPoolExecutor(6) as pool:
        marks = [tmp_path / f"mark-{n}" for n in range(3)]
        runs = [one.submit(f"{n}", agent="slow", parameters={"mark": str(mark)}) for n, mark in enumerate(marks)]
        wait_for(lambda: all(one.run(request_id)["last_event_id"].endswith("-2") for request_id in runs))
        runs += [one.submit(f"{n}", agent="slow") for n in range(3, 6)]
        pair.until_synchronised()
        asyncio.run(pair.fail_over())
        began = time.monotonic()

        def cancel(request_id: str, client: Client) -> float:
            while (response := client.post(f"/api/v1/runs/{request_id}/cancel")).status_code == 503:
                time.sleep(0.1)
            assert response.json()["status"] == "cancelled"
            return time.monotonic() - began

        took = list(pool.map(cancel, runs, [one, two] * 3))
        print(f"answered {min(took):.1f} to {max(took):.1f} s after the failover")
        for request_id in runs:
            log = one.log(request_id)
            check_log(log)
            assert log[-1].type == "cancelled"
        for mark in marks:
            wait_for(mark.exists)
    # By the primary's clock: an epoch is the milliseconds since the run was submitted.
    with pair.primary.client() as client:
        since = max(int(value) for value in client.hgetall(keys.PRIMARIES).values())
        for request_id in runs:
            finished_at = client.hget(keys.run(request_id), "finished_at")
            assert isinstance(finished_at, bytes)
            assert int(finished_at) >= since + 5000
    assert not worker.logged("run handed over")


def test_a_cancel_while_redis_is_away_is_told_to_come_again_and_then_works(stage: Stage, patient: Worker) -> None:
    request_id = stage.running("hangs")
    stage.redis.kill()
    response = stage.client.post(f"/api/v1/runs/{request_id}/cancel")
    assert (response.status_code, response.json()["code"]) == (503, "unavailable")
    stage.redis.start()
    while (response := stage.client.post(f"/api/v1/runs/{request_id}/cancel")).status_code == 503:
        time.sleep(0.1)
    assert response.json()["status"] == "cancelled"
    assert stage.types(request_id)[-1] == "cancelled"


# -- erasure -------------------------------------------------------------------------------------------------


def test_an_erased_run_is_gone_for_all_and_its_agent_is_closed(stage: Stage, patient: Worker, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    request_id = stage.running("slow", mark)
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(lambda: list(stage.elsewhere.events(request_id)))
        time.sleep(0.3)
        assert stage.client.delete(f"/api/v1/runs/{request_id}").status_code == 204
        events = reading.result(10)
    assert [event.type for event in events] == ["start", "attempt", "token", "error"]
    assert events[-1].json["code"] == "gone"
    wait_for(mark.exists)
    for client in (stage.client, stage.elsewhere):
        assert client.get(f"/api/v1/runs/{request_id}").status_code == 404
        assert client.post(f"/api/v1/runs/{request_id}/cancel").status_code == 404
        assert client.delete(f"/api/v1/runs/{request_id}").status_code == 404
    wait_for(lambda: bool(patient.logged("run ended", request_id=request_id)))
    assert stage.direct.hgetall(keys.run(request_id)) == {b"status": b"erased"}
    assert not stage.direct.exists(keys.log(request_id))


def test_an_erasure_that_nobody_hears_is_found_by_the_renewal(stage: Stage, launch: Launcher, tmp_path: Path) -> None:
    launch.worker(stage.redis.url, lease_seconds=BRISK)
    mark = tmp_path / "mark"
    request_id = stage.running("slow", mark)
    silently(stage.redis, lambda scripts: scripts.erase(request_id, tombstone_ms=RETENTION_MS))
    wait_for(mark.exists)
    assert stage.direct.hgetall(keys.run(request_id)) == {b"status": b"erased"}


# -- races ---------------------------------------------------------------------------------------------------


def test_of_a_cancel_and_a_completion_exactly_one_wins_and_all_agree_which(stage: Stage, patient: Worker) -> None:
    """P7: one terminal event, atomic with the status, nothing after it."""
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    clients = [stage.client, stage.elsewhere]

    def race(n: int, seconds: float, patience: float) -> tuple[str, str]:
        client = clients[n % 2]
        request_id = client.submit(f"race {n}", agent="sleeper", parameters={"seconds": seconds})
        time.sleep(patience)
        told: str = stage.cancel(request_id, clients[(n + 1) % 2])["status"]
        assert told in ("completed", "cancelled")
        return request_id, told

    # On a machine that is busy the runs take longer: then the cancels come later, until both have won.
    told: dict[str, str] = {}
    most = 0.03
    with ThreadPoolExecutor(8) as pool:
        while len(told) < 10 * scaled(1000) and (not told or len(set(told.values())) < 2):
            first = len(told)
            racing = [
                pool.submit(race, n, chance.random() * 0.02, chance.random() * most)
                for n in range(first, first + scaled(1000))
            ]
            told |= dict(each.result() for each in racing)
            most *= 3
    wait_for(lambda: len(patient.logged("run ended")) >= len(patient.logged("run started")))
    terminal = {"completed": "final", "cancelled": "cancelled"}
    for request_id, status in told.items():
        types = stage.types(request_id)
        assert types[-1] == terminal[status], f"the cancel was told {status}, the log ends with {types[-1]}"
        assert stage.client.run(request_id)["status"] == status
    outcomes = Counter(told.values())
    assert outcomes.keys() == terminal.keys(), f"no race at all: {outcomes}"
