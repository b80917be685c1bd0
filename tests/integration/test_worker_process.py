"""`broker worker` as a process: signals, slots, the queue, and a Redis that goes away."""

from __future__ import annotations

import json
import pickle
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import redis as sync_redis

from broker.runs import keys
from tests.conftest import Launcher
from tests.kit.checker import check_log, surviving_text
from tests.kit.http import Client
from tests.kit.processes import Gateway, Worker, wait_for
from tests.kit.proxy import Proxy
from tests.kit.redis_server import RedisServer
from tests.kit.scale import LONG
from worker.jobs import POLL_SECONDS


@dataclass
class Stage:
    """A gateway and an empty Redis; a test brings its workers."""

    redis: RedisServer
    gateway: Gateway
    client: Client
    direct: sync_redis.Redis

    def status(self, request_id: str) -> str:
        status: str = self.client.run(request_id)["status"]
        return status

    def all_have(self, status: str, request_ids: list[str], seconds: float = 20) -> None:
        wait_for(lambda: all(self.status(request_id) == status for request_id in request_ids), seconds=seconds)

    def arq_keys(self) -> list[str]:
        return sorted(key.decode() for key in self.direct.scan_iter("arq:*"))


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    launcher = Launcher(tmp_path_factory.mktemp("stage"))
    try:
        server = launcher.redis()
        gateway = launcher.gateway(server.url)
        with Client(gateway.url) as client, server.client() as direct:
            yield Stage(server, gateway, client, direct)
    finally:
        launcher.close()


@pytest.fixture
def stage(running: Stage) -> Stage:
    running.direct.flushall()
    return running


def milliseconds(text: str) -> float:
    return datetime.fromisoformat(text).timestamp() * 1000


# -- signals -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_runs_end_in_the_grace_period_and_takes_no_new_ones(
    stage: Stage, launch: Launcher, number: signal.Signals
) -> None:
    worker = launch.worker(stage.redis.url, grace_seconds=20)
    under_way = [stage.client.submit(f"{n}", agent="slow", parameters={"seconds": 0.7}) for n in range(3)]
    stage.all_have("running", under_way)
    worker.signal(number)
    wait_for(lambda: bool(worker.logged("draining")))
    later = stage.client.submit("later")
    assert worker.wait(15) == 0
    for request_id in under_way:
        assert stage.status(request_id) == "completed"
        assert stage.client.run(request_id)["answer"] == "begun done"
    assert stage.status(later) == "queued"
    assert worker.logged("worker stopped")


def test_after_the_grace_period_runs_are_handed_over_at_once(stage: Stage, launch: Launcher, tmp_path: Path) -> None:
    """Another worker goes on with them, and nobody waits for a lease to end."""
    worker = launch.worker(stage.redis.url, grace_seconds=0.3, lease_seconds=600)
    mark = tmp_path / "mark"
    slow = stage.client.submit("s", agent="slow", parameters={"mark": str(mark)})
    hangs = stage.client.submit("h", agent="hangs")
    stage.all_have("running", [slow, hangs])
    assert worker.stop() == 0
    assert mark.read_text() == "closed"
    stage.all_have("queued", [slow, hangs])
    launch.worker(stage.redis.url)
    stage.all_have("running", [slow, hangs])
    for request_id in (slow, hangs):
        attempts = [json.loads(entry.data) for entry in stage.client.log(request_id) if entry.type == "attempt"]
        assert [data["reason"] for data in attempts] == ["started", "handed_over"]


def test_a_second_signal_ends_a_worker_at_once(stage: Stage, launch: Launcher) -> None:
    worker = launch.worker(stage.redis.url, grace_seconds=600)
    request_id = stage.client.submit("h", agent="hangs")
    stage.all_have("running", [request_id])
    worker.signal(signal.SIGTERM)
    wait_for(lambda: bool(worker.logged("draining")))
    worker.signal(signal.SIGTERM)
    assert worker.wait(15) == 1


def test_a_worker_without_runs_ends_at_once(stage: Stage, launch: Launcher) -> None:
    worker = launch.worker(stage.redis.url, grace_seconds=600)
    request_id = stage.client.submit("done")
    stage.client.finished(request_id)
    assert worker.stop() == 0


def test_no_run_is_lost_while_workers_take_turns(stage: Stage, launch: Launcher) -> None:
    """Jobs that are taken at the very moment of the signal are executed or left to others."""
    submitted = list[str]()
    for turn in range(4):
        worker = launch.worker(stage.redis.url, grace_seconds=20, max_jobs=5)
        for n in range(15):
            submitted.append(stage.client.submit(f"{turn}/{n}", agent="sleeper", parameters={"seconds": 0.02}))
            if n == 9:
                worker.signal(signal.SIGTERM)
        assert worker.wait(15) == 0
    launch.worker(stage.redis.url)
    stage.all_have("completed", submitted)
    for request_id in submitted:
        log = stage.client.log(request_id)
        check_log(log)
        assert [entry.type for entry in log] == ["start", "attempt", "final"]


def test_a_worker_says_that_it_is_there_until_it_ends(stage: Stage, launch: Launcher) -> None:
    """PROTOCOL 4.8."""

    def said() -> list[dict[str, Any]]:
        names = stage.direct.zrange(keys.WORKERS, 0, -1)
        assert isinstance(names, list)
        return [json.loads(text) for name in names if (text := stage.direct.get(keys.worker(name.decode())))]  # type: ignore[arg-type]

    worker = launch.worker(stage.redis.url, max_jobs=7)
    wait_for(lambda: bool(said()))
    [info] = said()
    assert (info["pid"], info["max_jobs"]) == (worker.pid, 7)
    assert {"echo", "research"} <= set(info["agents"])
    assert worker.stop() == 0
    assert stage.direct.keys("sb:worker*") == []


# -- slots and order -----------------------------------------------------------------------------------------


def test_no_more_runs_than_slots_and_the_others_in_their_order(stage: Stage, launch: Launcher) -> None:
    submitted = [
        stage.client.submit(f"{n}", agent="sleeper", parameters={"seconds": 0.2 + n % 2 / 10}) for n in range(12)
    ]
    launch.worker(stage.redis.url, max_jobs=3)
    stage.all_have("completed", submitted)
    runs = [stage.client.run(request_id) for request_id in submitted]
    times = [(milliseconds(run["started_at"]), milliseconds(run["finished_at"])) for run in runs]
    order = sorted(range(len(times)), key=lambda n: times[n][0])
    assert all(abs(place - n) < 3 for place, n in enumerate(order)), "those that begin together may overtake each other"
    for started, _ in times:
        at_once = sum(other_started <= started < other_finished for other_started, other_finished in times)
        assert at_once <= 3


def test_a_slot_that_is_free_again_is_used_at_once(stage: Stage, launch: Launcher) -> None:
    """Not only when the queue is polled next: ten runs through one slot would take nine polls."""
    submitted = [stage.client.submit(f"{n}") for n in range(10)]
    launch.worker(stage.redis.url, max_jobs=1)
    stage.all_have("completed", submitted)
    started = [milliseconds(stage.client.run(request_id)["started_at"]) for request_id in submitted]
    gaps = [later - earlier for earlier, later in pairwise(started)]
    assert median(gaps) < POLL_SECONDS * 1000 / 2, gaps


def test_more_long_runs_than_the_queues_window_do_not_hide_a_new_one(stage: Stage, launch: Launcher) -> None:
    """arq looks at the first max(5 × max_jobs, 100) jobs only; a run that has started is none of them."""
    full = launch.worker(stage.redis.url, max_jobs=110, grace_seconds=0)
    long = [stage.client.submit(f"{n}", agent="sleeper", parameters={"seconds": 300}) for n in range(110)]
    wait_for(lambda: len(full.logged("run started")) == 110, seconds=30)
    other = launch.worker(stage.redis.url, max_jobs=1)
    assert stage.client.finished(stage.client.submit("new"))["status"] == "completed"
    assert len(other.logged("run started")) == 1
    assert stage.direct.zcard(keys.QUEUE) == 0
    for request_id in long[:3]:
        assert stage.status(request_id) == "running"


def test_the_doorbell_starts_a_run_long_before_the_next_poll(stage: Stage, launch: Launcher) -> None:
    launch.worker(stage.redis.url)
    stage.client.finished(stage.client.submit("warm"))
    waited = []
    for n in range(7):
        time.sleep(0.13)  # out of step with the poll
        run = stage.client.finished(stage.client.submit(f"{n}"))
        waited.append(milliseconds(run["started_at"]) - milliseconds(run["created_at"]))
    assert median(waited) < POLL_SECONDS * 1000 / 4, waited


def test_without_the_doorbell_the_next_poll_finds_a_run(stage: Stage, launch: Launcher) -> None:
    worker = launch.worker(stage.redis.url)
    stage.client.finished(stage.client.submit("warm"))
    request_id = stage.client.submit("deaf", agent="sleeper", parameters={"seconds": 0.1})
    stage.client.finished(request_id)
    # What is left of a ring that nobody heard: a job in the queue.
    with stage.direct.pipeline() as pipe:
        rid = "ab" * 16
        payload = json.dumps({"request_id": rid, "attempt": 1})
        pipe.set(f"arq:job:{rid}:1:0", json.dumps({"t": None, "f": "run", "a": [payload], "k": {}, "et": 1}))
        pipe.zadd(keys.QUEUE, {f"{rid}:1:0": 1})
        pipe.execute()
    wait_for(lambda: bool(worker.logged("claim refused", request_id=rid)))


# -- the queue -----------------------------------------------------------------------------------------------


def test_a_job_is_off_the_queue_as_its_run_starts_and_nothing_of_arq_is_left(stage: Stage, launch: Launcher) -> None:
    request_id = stage.client.submit("h", agent="slow", parameters={"seconds": 0.5})
    [job_key] = stage.arq_keys()
    stored = stage.direct.get(job_key)
    assert isinstance(stored, bytes)
    assert json.loads(stored)["a"] == [json.dumps({"request_id": request_id, "attempt": 1}, separators=(",", ":"))]
    launch.worker(stage.redis.url)
    stage.all_have("running", [request_id])
    assert stage.direct.zcard(keys.QUEUE) == 0
    assert stage.arq_keys() == []
    stage.client.finished(request_id)
    time.sleep(0.2)
    assert stage.arq_keys() == []


def poison(client: sync_redis.Redis) -> dict[bytes, bytes | None]:
    """Jobs that nobody of ours wrote: id -> what is stored under it."""

    def job(function: str, *args: Any) -> bytes:
        return json.dumps({"t": None, "f": function, "a": list(args), "k": {}, "et": 1}).encode()

    bad: dict[bytes, bytes | None] = {
        b"expired": None,
        b"text": b"not JSON",
        b"pickle": pickle.dumps({"t": None, "f": "run", "a": ["x"], "k": {}, "et": 1}),
        b"list": b"[]",
        b"empty": b"{}",
        b"another-function": job("rm", "-rf"),
        b"no-arguments": job("run"),
        b"too-many": job("run", "a", "b", "c"),
        b"a-number": job("run", 7),
        b"not-a-payload": job("run", "[1, 2]"),
        b"no-such-run": job("run", json.dumps({"request_id": "cd" * 16, "attempt": 1})),
        b"a-strange-id": job("run", json.dumps({"request_id": "x/{y}\n", "attempt": 1})),
        b"an-attempt-that-is-none": job("run", json.dumps({"request_id": "cd" * 16, "attempt": None})),
        b"\xff\xfe": job("run", json.dumps({"request_id": "cd" * 16, "attempt": 1})),
    }
    for n, (name, data) in enumerate(bad.items()):
        client.zadd(keys.QUEUE, {name: 1 + n})
        if data is not None:
            client.set(b"arq:job:" + name, data)
    return bad


def test_poison_in_the_queue_stops_nobody_and_does_not_stay_there(stage: Stage, launch: Launcher) -> None:
    bad = poison(stage.direct)
    worker = launch.worker(stage.redis.url, max_jobs=4)
    submitted = [stage.client.submit(f"{n}") for n in range(10)]
    stage.all_have("completed", submitted)
    wait_for(lambda: stage.direct.zcard(keys.QUEUE) == 0)
    assert stage.direct.keys("arq:in-progress:*") == []
    assert worker.popen.poll() is None
    assert len(bad) > 10
    again = [stage.client.submit(f"again {n}") for n in range(10)]
    stage.all_have("completed", again)
    assert worker.stop() == 0


def test_a_job_that_comes_twice_is_executed_once_and_the_run_still_hears_its_cancel(
    stage: Stage, launch: Launcher, tmp_path: Path
) -> None:
    """PROTOCOL 4.1: jobs may come twice; the claim decides. The second one must not take the first one's ears."""
    worker = launch.worker(stage.redis.url, lease_seconds=120)
    mark = tmp_path / "mark"
    request_id = stage.client.submit("twice", agent="slow", parameters={"mark": str(mark), "seconds": 100})
    stage.all_have("running", [request_id])
    payload = json.dumps({"request_id": request_id, "attempt": 1})
    for n in (0, 1):  # under the first one's own id, and under another
        stage.direct.set(
            f"arq:job:{request_id}:1:{n}", json.dumps({"t": None, "f": "run", "a": [payload], "k": {}, "et": 1})
        )
        stage.direct.zadd(keys.QUEUE, {f"{request_id}:1:{n}": n + 1})
    wait_for(lambda: bool(worker.logged("claim refused", request_id=request_id)))
    wait_for(lambda: stage.direct.zcard(keys.QUEUE) == 0)
    assert stage.status(request_id) == "running"
    stage.client.post(f"/api/v1/runs/{request_id}/cancel").raise_for_status()
    wait_for(mark.exists, seconds=10)
    assert len(worker.logged("run started")) == 1
    assert not worker.logged("taking jobs failed")
    wait_for(lambda: bool(worker.logged("run ended")))
    assert worker.stop() == 0
    assert not [line for line in worker.log_lines() if line["level"] == "ERROR"]


# -- Redis goes away -----------------------------------------------------------------------------------------


def test_after_an_outage_of_redis_a_worker_goes_on(launch: Launcher) -> None:
    """P12, the worker's part: arq's own loop ends after three seconds of it."""
    server = launch.redis()
    gateway, worker = launch.gateway(server.url), launch.worker(server.url)
    with Client(gateway.url) as client:
        under_way = client.submit("u", agent="tokens", parameters={"count": 60, "pause": 0.03})
        wait_for(lambda: client.run(under_way)["status"] == "running")
        server.kill()
        time.sleep(10 if LONG else 2)
        server.start()
        wait_for(lambda: client.get("/readyz").status_code == 200, seconds=20)
        after = [client.submit(f"{n}") for n in range(5)]
        for request_id in after:
            assert client.finished(request_id)["status"] == "completed"
        assert client.finished(under_way)["status"] == "completed"
        log = client.log(under_way)
        check_log(log)
        assert surviving_text(log) == "".join(f"{n} " for n in range(60))
    assert worker.stop() == 0


TAKING = [b"WATCH", b"INCRBY", b"EXEC", b"EXISTS", b"ZSCORE", b"ZRANGEBYSCORE", b"ZREM"]


@pytest.mark.parametrize("name", TAKING if LONG else TAKING[:2])
def test_a_connection_that_is_lost_while_a_job_is_taken_costs_no_slot(
    stage: Stage, launch: Launcher, name: bytes
) -> None:
    with Proxy(stage.redis.port) as proxy:
        worker = launch.worker(stage.redis.url, queue_redis_url=proxy.url, max_jobs=2)
        stage.client.finished(stage.client.submit("warm"))
        proxy.swallow(lambda command: command[0].upper() == name)
        lost = [stage.client.submit(f"lost {n}") for n in range(4)]
        wait_for(lambda: proxy.swallowed >= 3, seconds=20)
        proxy.heal()
        submitted = [stage.client.submit(f"{n}") for n in range(5)]
        stage.all_have("completed", submitted)
        if name not in (b"INCRBY", b"ZREM"):  # what arq gives up, and what was off the queue: a reaper's business
            stage.all_have("completed", lost)
        assert worker.popen.poll() is None


# -- the log -------------------------------------------------------------------------------------------------


def test_every_line_of_the_log_is_json_and_says_which_run(stage: Stage, launch: Launcher) -> None:
    worker = launch.worker(stage.redis.url)
    request_id = stage.client.submit("logged", agent="raises")
    stage.client.finished(request_id)
    wait_for(lambda: bool(worker.logged("run ended")))
    [started] = worker.logged("run started")
    [failed] = worker.logged("an agent failed")
    [ended] = worker.logged("run ended")
    assert {line["request_id"] for line in (started, failed, ended)} == {request_id}
    assert (ended["outcome"], ended["attempt"], ended["agent"]) == ("error", 1, "raises")
    assert "a secret detail of the agent" in failed["exc_info"]
    assert worker.stop() == 0
    assert all({"time", "level", "logger", "message"} <= line.keys() for line in worker.log_lines())


def test_an_agent_that_cannot_be_imported_is_one_line_and_exit_1(stage: Stage, launch: Launcher) -> None:
    from tests.kit.processes import environment

    for target, named in [
        ("no.such.module:agent", "no.such.module"),
        ("tests.kit.agents:no_such_agent", "no_such_agent"),
        ("tests.kit.agents:SECRET", "SECRET"),
    ]:
        worker = Worker(environment(stage.redis.url, agents=f"mine={target}", default_agent="mine"), launch.folder)
        assert worker.wait() == 1
        [line] = [line for line in worker.log_text().splitlines() if not line.startswith("{")]
        assert "BROKER_AGENTS: mine" in line
        assert named in line
        assert "Traceback" not in worker.log_text()
