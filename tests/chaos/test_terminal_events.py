"""P7: every run ends, with exactly one terminal event, atomic with its status, and nothing after it.

Whatever its agent does, whatever is in its job, whenever its worker dies, whoever else wants to end it.
"""

from __future__ import annotations

import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future
from datetime import datetime

import pytest

from broker.runs import keys
from tests.conftest import Launcher
from tests.kit.fleet import LEASE, Fleet, check_steps, reasons
from tests.kit.processes import Worker, wait_for
from tests.kit.proxy import Command, Proxy, calls
from tests.kit.scale import LONG, scaled


def seconds_between(run: dict[str, str]) -> float:
    started, finished = (datetime.fromisoformat(run[name]).timestamp() for name in ("started_at", "finished_at"))
    return finished - started


# -- what an agent does --------------------------------------------------------------------------------------


MOST = 8
"""Seconds that a run may take."""


def test_whatever_its_agent_does_a_run_has_one_end(fleet: Fleet, launch: Launcher) -> None:
    """Also when it never ends: `max_run_seconds` counts from the first claim, over all attempts."""
    first = launch.worker(fleet.redis.url, lease_seconds=LEASE, max_run_seconds=MOST)
    ends = {
        fleet.submit("echo"): ("completed", None),
        fleet.submit("raises"): ("failed", "agent_failed"),
        fleet.submit("no_final"): ("completed", None),
        fleet.submit("yields_junk"): ("failed", "invalid_event"),
        fleet.submit("coroutine"): ("failed", "invalid_agent"),
        **{
            fleet.submit("misbehaves", what=what): ("failed", code)
            for what, code in {"exits": "agent_failed", "cancels": "agent_failed", "error": "no_quota"}.items()
        },
    }
    fleet.until_ended(list(ends))
    hanging = [fleet.submit("hangs") for _ in range(5)]
    fleet.until_running(hanging)
    second = launch.worker(fleet.redis.url, lease_seconds=LEASE, max_run_seconds=MOST)
    first.signal(signal.SIGKILL)
    ends |= dict.fromkeys(hanging, ("failed", "timeout"))
    fleet.until_running(hanging, attempt=2)
    fleet.until_ended(hanging)
    for request_id, (status, code) in ends.items():
        run, log = fleet.ended(request_id)
        assert (run["status"], (run["error"] or {}).get("code")) == (status, code)
        assert run["attempt"] == (2 if request_id in hanging else 1)
        assert reasons(log) == ["started", "worker_lost"][: run["attempt"]]
    print(
        f"timeout of {MOST} s after",
        [round(seconds_between(fleet.client.run(request_id)), 2) for request_id in hanging],
    )
    assert all(seconds_between(fleet.client.run(request_id)) < MOST + 5 for request_id in hanging), (
        "not as much for each attempt"
    )
    assert second.popen.poll() is None


def test_a_run_whose_time_runs_out_without_a_worker_is_ended_by_a_reaper(fleet: Fleet, launch: Launcher) -> None:
    """Whether it waits for an attempt whose job is lost, or was running when its worker was."""

    def start() -> Worker:
        return launch.worker(fleet.redis.url, lease_seconds=LEASE, max_run_seconds=1.5, grace_seconds=0)

    first = start()
    waiting = [fleet.submit("hangs") for _ in range(5)]
    fleet.until_running(waiting)
    assert first.stop() == 0
    assert set(fleet.statuses(waiting)) == {"queued"}
    fleet.direct.delete(keys.QUEUE)
    time.sleep(1.5)
    second = start()
    running = [fleet.submit("hangs") for _ in range(5)]
    fleet.until_running(running)
    second.signal(signal.SIGKILL)
    third = start()
    fleet.until_reaped(waiting)
    fleet.until_ended(running)
    for request_id in running + waiting:
        run, log = fleet.ended(request_id)
        assert (run["status"], run["error"]["code"], run["answer"]) == ("failed", "timeout", "waiting ")
        assert reasons(log) == ["started", "timeout"]
    assert len(third.logged("reaped", done="closed_timeout")) == 10


# -- what is in the queue ------------------------------------------------------------------------------------


def test_a_run_whose_job_nobody_can_read_is_enqueued_again(fleet: Fleet, launch: Launcher) -> None:
    request_ids = [fleet.submit("echo") for _ in range(5)]
    for name in fleet.direct.scan_iter("arq:job:*"):
        fleet.direct.set(name, b"\x80not JSON")
    worker = launch.worker(fleet.redis.url, lease_seconds=LEASE)
    wait_for(lambda: fleet.direct.zcard(keys.QUEUE) == 0)
    assert set(fleet.statuses(request_ids)) == {"queued"}
    fleet.look_now(request_ids)
    fleet.until_ended(request_ids)
    for request_id in request_ids:
        run, log = fleet.ended(request_id)
        assert (run["status"], reasons(log)) == ("completed", ["started"])
    assert len(worker.logged("reaped", done="requeued")) == 5


def test_a_run_whose_jobs_are_never_readable_ends_after_five_enqueues(fleet: Fleet, launch: Launcher) -> None:
    """PROTOCOL 4.3: the poison payload. An enqueue does not touch what is stored under its job's id already."""
    request_id, other = fleet.submit("echo"), fleet.submit("echo")
    for n in range(6):
        fleet.direct.set(f"arq:job:{request_id}:1:{n}", b"\x80not JSON")
    worker = launch.worker(fleet.redis.url, lease_seconds=LEASE)
    fleet.until_reaped([request_id])
    run, log = fleet.ended(request_id)
    assert (run["status"], run["error"]["code"], run["attempt"]) == ("failed", "not_started", 0)
    assert reasons(log) == ["not_started"]
    assert [line["times"] for line in worker.logged("reaped", done="requeued", request_id=request_id)] == [
        1,
        2,
        3,
        4,
        5,
    ]
    assert fleet.ended(other)[0]["status"] == "completed"


# -- when its worker dies ------------------------------------------------------------------------------------


def doomed(
    proxy: Proxy,
    launch: Launcher,
    nth: int,
    matches: Callable[[Command], bool],
    *,
    before: bool,
) -> Worker:
    """A worker that is killed at the `nth` of its commands to Redis that match. It takes one run after the other."""
    born = Future[Worker]()
    proxy.strike(nth, lambda: born.result(20).signal(signal.SIGKILL), matches=matches, before=before)
    worker = launch.worker(proxy.url, lease_seconds=LEASE, max_jobs=1)
    born.set_result(worker)
    return worker


def dead(worker: Worker) -> bool:
    return worker.popen.poll() is not None


def test_a_run_that_loses_every_worker_between_its_job_and_its_claim_ends(fleet: Fleet, launch: Launcher) -> None:
    """PROTOCOL 4.3. Each of them takes the job off the queue, and dies before its claim reaches Redis."""
    request_id = fleet.submit("echo")
    with Proxy(fleet.redis.port) as proxy:
        for _ in range(6):
            victim = doomed(proxy, launch, 1, calls("claim"), before=True)
            fleet.look_now([request_id])
            wait_for(lambda victim=victim: dead(victim))  # type: ignore[misc]
            assert fleet.field(request_id, "status") == "queued"
    assert fleet.field(request_id, "enqueues") == "5"
    launch.worker(fleet.redis.url, lease_seconds=LEASE)
    fleet.until_reaped([request_id])
    run, log = fleet.ended(request_id)
    assert (run["status"], run["error"]["code"], run["attempt"]) == ("failed", "not_started", 0)
    assert reasons(log) == ["not_started"]


READS = {b"TIME", b"INFO", b"ZRANGEBYSCORE", b"SCAN", b"DBSIZE", b"HMGET", b"EXISTS", b"ZSCORE", b"CLIENT"}
"""They change nothing, and a worker sends most of them also when it has nothing to do."""
MOST_WRITES = 28
"""About what a run of four tokens takes, from the first look at its job to the last trace of it."""
SURE_WRITES = 8
"""What it takes in any case."""


def test_a_worker_that_dies_between_any_two_commands_leaves_no_run_without_its_one_end(
    fleet: Fleet, launch: Launcher, chance: random.Random
) -> None:
    """Taking, claim, appends, ends; and as a reaper: fence, enqueue, closing."""
    runs, died = list[str](), 0
    moments = [(nth, before) for nth in range(1, MOST_WRITES + 1) for before in (False, True)]
    chance.shuffle(moments)
    for nth, before in moments if LONG else [moment for moment in moments if moment[0] <= SURE_WRITES][:4]:
        runs.append(fleet.submit("steps", count=4, every=2, pause=0.01))
        with Proxy(fleet.redis.port) as proxy:
            victim = doomed(proxy, launch, nth, lambda command: command[0].upper() not in READS, before=before)
            deadline = time.monotonic() + LEASE
            while not dead(victim) and time.monotonic() < deadline:
                time.sleep(0.01)
            died += dead(victim)
            victim.kill()
    launch.worker(fleet.redis.url, lease_seconds=LEASE)
    fleet.look_now(runs)
    fleet.until_ended(runs)
    ends = Counter[str]()
    for request_id in runs:
        run, log = fleet.ended(request_id)
        check_steps(log, 4 if run["status"] == "completed" else None)
        assert run["status"] == "completed" or run["error"]["code"] == "worker_lost"
        ends[f"{run['status']} in attempt {run['attempt']}"] += 1
    print(f"{died} workers were killed at a command; {dict(ends)}")
    assert died, "no worker was killed"
    assert not LONG or len(ends) > 1, "no kill has hit a run"


REAPING = [("fence", False), ("fence", True), ("requeue", False), ("requeue", True), ("close", False), ("close", True)]


@pytest.mark.parametrize(("deed", "before"), REAPING)
def test_a_reaper_that_dies_half_way_is_followed_by_another(
    fleet: Fleet, launch: Launcher, deed: str, before: bool
) -> None:
    """Killed as it takes a run from a lost worker, enqueues one whose job is lost, or ends one without attempts."""
    lost = launch.worker(fleet.redis.url, lease_seconds=LEASE)
    runs = [fleet.submit("steps", count=20, pause=0.02) for _ in range(5)]
    fleet.until_running(runs)
    lost.signal(signal.SIGKILL)
    lost.wait()
    if deed == "close":
        for request_id in runs:
            fleet.direct.hset(keys.run(request_id), "fails", "2")
    jobless = [fleet.submit("echo") for _ in range(5)] if deed == "requeue" else []
    fleet.direct.delete(keys.QUEUE)
    with Proxy(fleet.redis.port) as proxy:
        victim = doomed(proxy, launch, 1, calls(deed), before=before)
        fleet.look_now(jobless)
        wait_for(lambda: dead(victim))
    launch.worker(fleet.redis.url, lease_seconds=LEASE)
    fleet.until_reaped(runs + jobless)
    for request_id in runs + jobless:
        run, log = fleet.ended(request_id)
        assert run["status"] == ("failed" if deed == "close" else "completed")
        assert reasons(log) == ["started", "worker_lost"][: 1 if request_id in jobless else 2]


# -- who else wants to end it --------------------------------------------------------------------------------


def test_of_a_reaper_that_closes_and_a_worker_that_comes_back_one_wins(fleet: Fleet, launch: Launcher) -> None:
    """No attempt is left. The worker comes back at the very moment at which the first of its runs is closed."""
    ends = Counter[str]()
    for _ in range(scaled(10)):
        worker = launch.worker(fleet.redis.url, lease_seconds=LEASE, max_attempts=1)
        runs = [fleet.submit("sleeper", seconds=1 + n * 0.03) for n in range(60)]
        fleet.until_running(runs, events=2)
        other = launch.worker(fleet.redis.url, lease_seconds=LEASE, max_attempts=1)
        worker.signal(signal.SIGSTOP)
        wait_for(lambda runs=runs: "failed" in fleet.statuses(runs), every=0.001)  # type: ignore[misc]
        worker.signal(signal.SIGCONT)
        fleet.until_ended(runs)
        wait_for(lambda worker=worker: len(worker.logged("run ended")) == 60)  # type: ignore[misc]
        for request_id in runs:
            run, log = fleet.ended(request_id)
            assert [entry.type for entry in log if entry.terminal] == [log[-1].type]
            if run["status"] == "completed":
                assert reasons(log) == ["started"]
            else:
                assert (run["error"]["code"], reasons(log)) == ("worker_lost", ["started", "worker_lost"])
            ends[run["status"]] += 1
        for each in (worker, other):
            each.kill()
    print(dict(ends))


def test_of_a_cancel_and_a_fence_the_run_ends_cancelled(fleet: Fleet, launch: Launcher, chance: random.Random) -> None:
    """P25, between attempts: a cancel at any time around the loss of the worker closes the run, and it stays closed."""
    victim = launch.worker(fleet.redis.url, lease_seconds=LEASE)
    runs = [fleet.submit("hangs") for _ in range(40)]
    fleet.until_running(runs)
    launch.worker(fleet.redis.url, lease_seconds=LEASE, max_jobs=2)  # most of them have to wait in the queue
    victim.signal(signal.SIGKILL)
    began = time.monotonic()
    cancelled_when = Counter[str]()
    for n, request_id in enumerate(runs):
        # From before the first lease can end until all runs are in their second attempt.
        time.sleep(max(began + LEASE * (0.5 + n / 25) - time.monotonic(), 0))
        before = fleet.field(request_id, "status")
        response = fleet.client.post(f"/api/v1/runs/{request_id}/cancel")
        assert (response.status_code, response.json()["status"]) == (200, "cancelled")
        cancelled_when[f"{before}, attempt {response.json()['attempt']}"] += 1
    time.sleep(LEASE)
    for request_id in runs:
        run, log = fleet.ended(request_id)
        assert run["status"] == "cancelled"
        assert reasons(log)[-1] == "cancelled"
    print(f"cancelled while {dict(cancelled_when)}")
