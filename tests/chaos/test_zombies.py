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
from tests.kit.fleet import Fleet, attempts, check_resumed, check_steps, reasons, steps
from tests.kit.http import Client
from tests.kit.processes import Worker, wait_for
from tests.kit.proxy import Proxy
from tests.kit.scale import scaled

LEASE = 1.5
EVERY = 10
"""Tokens from one checkpoint to the next."""
STEPS = 200


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    launcher = Launcher(tmp_path_factory.mktemp("zombies"))
    try:
        server = launcher.redis()
        gateway = launcher.gateway(server.url, heartbeat_seconds=1, lease_seconds=LEASE)
        with Client(gateway.url) as client, server.client() as direct:
            yield Fleet(server, client, direct)
    finally:
        launcher.close()


@pytest.fixture
def fleet(one: Fleet) -> Fleet:
    one.direct.flushall()
    return one


@pytest.fixture
def chance() -> random.Random:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    return random.Random(seed)


@contextmanager
def stopped(worker: Worker) -> Iterator[None]:
    worker.signal(signal.SIGSTOP)
    try:
        yield
    finally:
        worker.signal(signal.SIGCONT)


def marks(folder: Path, runs: list[str]) -> dict[str, Path]:
    return {request_id: folder / f"mark-{n}" for n, request_id in enumerate(runs)}


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
    names = [str(tmp_path / f"mark-{n}") for n in range(11)]
    writing = [fleet.submit("steps", count=STEPS, pause=0.02, mark=mark) for mark in names[:5]]
    saving = [fleet.submit("steps", count=STEPS, pause=0.02, every=EVERY, mark=mark) for mark in names[5:10]]
    silent = [fleet.submit("steps", count=2, pause=3, mark=names[10])]
    runs = writing + saving + silent
    fleet.until_running(writing + saving, events=15)
    other = launch.worker(fleet.redis.url, lease_seconds=LEASE)
    time.sleep(0.5 * chance.random())
    with stopped(zombie):
        began = time.monotonic()
        fleet.until_running(runs, attempt=2)
        time.sleep(max(began + 1.5 * LEASE - time.monotonic(), 0))
        before = {request_id: len(fleet.client.log(request_id)) for request_id in runs}
    until_fenced(zombie, runs)
    assert [Path(f"{mark}.1").exists() for mark in names] == [True] * len(names), (
        "an agent of the zombie was not closed"
    )
    after = {request_id: len(fleet.client.log(request_id)) for request_id in writing}
    assert all(after[request_id] > before[request_id] for request_id in writing), (
        "the second attempts went on meanwhile"
    )
    fleet.until_ended(runs)
    for request_id in runs:
        run, log = fleet.ended(request_id)
        assert (run["status"], reasons(log)) == ("completed", ["started", "worker_lost"])
        check_steps(log, 2 if request_id in silent else STEPS)
        # Once the second attempt has begun, nobody but it has written: its epoch is the last one, and without a hole.
        [_, second] = [at for at, entry in enumerate(log) if entry.type == "attempt"]
        assert {step.attempt for step in steps(log[:second])} == {1}
        assert {step.attempt for step in steps(log[second:])} == {2}
        if request_id in saving:
            assert attempts(log)[1].resume_from != "0-1"
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
        runs = [fleet.submit("steps", count=40 + n * 15, pause=0.02, every=EVERY) for n in range(12)]
        fleet.until_running(runs, events=12)
        launch.worker(fleet.redis.url, lease_seconds=LEASE)
        time.sleep(0.3 * chance.random())
        proxy.pause()
        cut_off = [request_id for request_id in runs if fleet.field(request_id, "status") == "running"]
        assert len(cut_off) > 6, "too busy a machine"
        fleet.until_running(cut_off, attempt=2)
        proxy.resume()
        until_fenced(zombie, cut_off)
        fleet.until_ended(runs)
        for n, request_id in enumerate(runs):
            run, log = fleet.ended(request_id)
            assert run["status"] == "completed"
            assert reasons(log) == ["started", "worker_lost"][: 2 if request_id in cut_off else 1]
            check_steps(log, 40 + n * 15)
            check_resumed(log, EVERY)
        zombie.stop()


def test_a_stop_shorter_than_the_lease_costs_no_attempt(fleet: Fleet, launch: Launcher, chance: random.Random) -> None:
    paused, other = (launch.worker(fleet.redis.url, lease_seconds=2 * LEASE) for _ in range(2))
    runs = [fleet.submit("steps", count=100, pause=0.02) for _ in range(10)]
    fleet.until_running(runs)
    for worker in (paused, other):
        time.sleep(0.3 * chance.random())
        with stopped(worker):
            time.sleep(0.5 * LEASE)
    fleet.until_ended(runs)
    for request_id in runs:
        run, log = fleet.ended(request_id)
        assert (run["status"], reasons(log)) == ("completed", ["started"])
        check_steps(log, 100)


def test_a_worker_that_was_stopped_for_longer_than_its_lease_revives_its_runs_where_nobody_took_them(
    fleet: Fleet, launch: Launcher, chance: random.Random
) -> None:
    """PROTOCOL 4.5: an expired lease refuses nothing. Its own reaper must not be faster than its renewals."""
    worker = launch.worker(fleet.redis.url, lease_seconds=LEASE)
    writing = [fleet.submit("steps", count=150, pause=0.02) for _ in range(10)]
    silent = [fleet.submit("steps", count=2, pause=2) for _ in range(60)]
    fleet.until_running(writing + silent)
    for _ in range(scaled(10)):
        time.sleep(chance.random())
        with stopped(worker):
            time.sleep(1.5 * LEASE)
    fleet.until_ended(writing + silent)
    for request_id in writing + silent:
        run, log = fleet.ended(request_id)
        assert (run["status"], reasons(log)) == ("completed", ["started"])
        check_steps(log, 150 if request_id in writing else 2)
    assert not worker.logged("reaped")
