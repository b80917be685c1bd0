"""P5: a worker that was away for longer than its lease finds its runs taken, and changes nothing in them any more.

It stands still by SIGSTOP, or its link does, and then comes back: with agents that write, that wait, and that end while
they are away.
"""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.conftest import Launcher
from tests.kit.fleet import LEASE, Fleet, check_resumed, check_steps, reasons, steps
from tests.kit.processes import Worker, wait_for
from tests.kit.proxy import Proxy
from tests.kit.scale import scaled

EVERY = 10
"""Tokens from one checkpoint to the next."""
STEPS = 150


@contextmanager
def stopped(worker: Worker) -> Iterator[None]:
    worker.signal(signal.SIGSTOP)
    try:
        yield
    finally:
        worker.signal(signal.SIGCONT)


def until_fenced(worker: Worker, runs: list[str]) -> None:
    """Its agents are closed, and its log says of each run that it belongs to somebody else."""
    wait_for(lambda: all(worker.logged("run ended", request_id=request_id, attempt=1) for request_id in runs))
    outcomes = {line["request_id"]: line["outcome"] for line in worker.logged("run ended", attempt=1)}
    assert {outcomes[request_id] for request_id in runs} == {"fenced"}, outcomes


@pytest.mark.parametrize("turn", range(scaled(10)))
def test_a_worker_that_was_stopped_for_longer_than_its_lease_changes_nothing_any_more(
    fleet: Fleet, launch: Launcher, chance: random.Random, tmp_path: Path, turn: int
) -> None:
    zombie = launch.worker(fleet.redis.url, lease_seconds=LEASE)
    marks = [tmp_path / f"mark-{n}" for n in range(13)]
    writing = [fleet.submit("steps", count=STEPS, pause=0.02, mark=str(mark)) for mark in marks[:5]]
    saving = [fleet.submit("steps", count=STEPS, pause=0.02, every=EVERY, mark=str(mark)) for mark in marks[5:10]]
    silent = [fleet.submit("slow", seconds=60, mark=str(mark)) for mark in marks[10:]]
    runs = writing + saving + silent
    fleet.until_running(runs)
    other = launch.worker(fleet.redis.url, lease_seconds=LEASE)
    time.sleep(0.5 * chance.random())
    with stopped(zombie):
        began = time.monotonic()
        fleet.until_running(runs, attempt=2)
        time.sleep(max(began + 1.5 * LEASE - time.monotonic(), 0))
        before = {request_id: len(fleet.client.log(request_id)) for request_id in writing}
    until_fenced(zombie, runs)
    closed = [Path(f"{mark}.1") for mark in marks[:10]] + marks[10:]
    assert all(mark.exists() for mark in closed), "an agent of the zombie was not closed"
    after = {request_id: len(fleet.client.log(request_id)) for request_id in writing}
    assert all(after[request_id] > before[request_id] for request_id in writing), (
        "the second attempts went on meanwhile"
    )
    for request_id in silent:
        assert fleet.client.post(f"/api/v1/runs/{request_id}/cancel").json()["status"] == "cancelled"
    fleet.until_ended(runs)
    for request_id in runs:
        run, log = fleet.ended(request_id)
        assert reasons(log)[:2] == ["started", "worker_lost"]
        if request_id in silent:
            assert (run["status"], reasons(log)[2:]) == ("cancelled", ["cancelled"])
            assert [entry.type for entry in log].count("token") == 2
            continue
        assert (run["status"], reasons(log)[2:]) == ("completed", [])
        check_steps(log, STEPS)
        # Once the second attempt has begun, nobody but it has written: its epoch is the last one, and without a hole.
        [_, second] = [at for at, entry in enumerate(log) if entry.type == "attempt"]
        assert {step.attempt for step in steps(log[:second])} == {1}
        assert {step.attempt for step in steps(log[second:])} == {2}
        if request_id in saving:
            check_resumed(log, EVERY)
    assert zombie.popen.poll() is None
    other.stop()
    again = fleet.submit("echo")
    fleet.until_ended([again])
    assert zombie.logged("run ended", request_id=again, outcome="final")


def test_a_worker_whose_link_stands_still_is_fenced_also_with_an_end_under_way(
    fleet: Fleet, launch: Launcher, chance: random.Random
) -> None:
    """What it sent before and while the link stood still arrives when the second attempt is there; of some runs it is
    the end."""
    with Proxy(fleet.redis.port) as proxy:
        zombie = launch.worker(proxy.url, lease_seconds=LEASE)
        runs = [fleet.submit("steps", count=60 + n * 10, pause=0.02, every=EVERY) for n in range(12)]
        fleet.until_running(runs, events=5)
        launch.worker(fleet.redis.url, lease_seconds=LEASE)
        time.sleep(0.3 * chance.random())
        proxy.pause()
        cut_off = [request_id for request_id in runs if fleet.field(request_id, "status") == "running"]
        assert cut_off, "too busy a machine"
        fleet.until_running(cut_off, attempt=2)
        proxy.resume()
        until_fenced(zombie, cut_off)
        fleet.until_ended(runs)
        for n, request_id in enumerate(runs):
            run, log = fleet.ended(request_id)
            assert run["status"] == "completed"
            assert reasons(log) == ["started", "worker_lost"][: 2 if request_id in cut_off else 1]
            check_steps(log, 60 + n * 10)
            check_resumed(log, EVERY)
        zombie.stop()


def test_a_worker_that_was_fenced_takes_its_own_runs_again_where_nobody_else_has_room(
    fleet: Fleet, launch: Launcher
) -> None:
    """As their second attempts, while the first ones do not know yet that they are over."""
    zombie = launch.worker(fleet.redis.url, lease_seconds=LEASE)
    runs = [fleet.submit("steps", count=80, pause=0.02, every=EVERY) for _ in range(10)]
    fleet.until_running(runs, events=15)
    with stopped(zombie):
        full = launch.worker(fleet.redis.url, lease_seconds=LEASE, max_jobs=1)
        occupying = fleet.submit("hangs")
        fleet.until_running([occupying])
        fleet.until(lambda request_id: fleet.field(request_id, "status") == "queued", runs)
    fleet.until_ended(runs)
    until_fenced(zombie, runs)
    for request_id in runs:
        run, log = fleet.ended(request_id)
        assert (run["status"], reasons(log)) == ("completed", ["started", "worker_lost"])
        check_steps(log, 80)
        check_resumed(log, EVERY)
    assert len(zombie.logged("run started", attempt=2)) == len(runs)
    assert [line["request_id"] for line in full.logged("run started")] == [occupying]


def test_a_stop_shorter_than_the_lease_costs_no_attempt(fleet: Fleet, launch: Launcher, chance: random.Random) -> None:
    lease = 2.0
    workers = [launch.worker(fleet.redis.url, lease_seconds=lease) for _ in range(2)]
    time.sleep(lease)  # from here on their reapers are not patient any more
    runs = [fleet.submit("steps", count=80, pause=0.02) for _ in range(10)]
    runs += [fleet.submit("steps", count=2, pause=1) for _ in range(10)]
    fleet.until_running(runs)
    for worker in workers:
        time.sleep(0.2 * chance.random())
        with stopped(worker):
            time.sleep(lease / 3)
    fleet.until_ended(runs)
    for request_id in runs:
        run, log = fleet.ended(request_id)
        assert (run["status"], reasons(log)) == ("completed", ["started"])
        check_steps(log)


def test_a_worker_that_was_stopped_for_longer_than_its_lease_revives_its_runs_where_nobody_took_them(
    fleet: Fleet, launch: Launcher, chance: random.Random
) -> None:
    """PROTOCOL 4.5: an expired lease refuses nothing. Its own reaper must not be faster than its renewals."""
    worker = launch.worker(fleet.redis.url, lease_seconds=LEASE)
    for _ in range(scaled(10)):
        writing = [fleet.submit("steps", count=100, pause=0.02) for _ in range(10)]
        silent = [fleet.submit("steps", count=2, pause=1.5) for _ in range(60)]
        fleet.until_running(writing + silent)
        time.sleep(0.5 * chance.random())
        with stopped(worker):
            time.sleep(1.5 * LEASE)
        fleet.until_ended(writing + silent)
        for request_id in writing + silent:
            run, log = fleet.ended(request_id)
            assert (run["status"], reasons(log)) == ("completed", ["started"])
            check_steps(log, 100 if request_id in writing else 2)
    assert not worker.logged("reaped")
