"""An agent that blocks its worker's event loop: who it is is told, and the other runs stay where they are."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import Launcher
from tests.kit.fleet import Fleet, check_steps, reasons
from tests.kit.processes import Process, Worker, environment, wait_for
from tests.kit.scale import LONG

LEASE = 1.0


class ImpatientWorker(Worker):
    module = "tests.kit.impatient_worker"


@pytest.fixture
def impatient(fleet: Fleet, tmp_path: Path) -> Iterator[Worker]:
    worker: Process = ImpatientWorker(environment(fleet.redis.url, lease_seconds=LEASE), tmp_path)
    assert isinstance(worker, Worker)
    yield worker.until_ready()
    worker.kill()


@pytest.mark.parametrize("task", [False, True] if LONG else [True])
def test_runs_beside_one_that_blocks_keep_their_leases_and_the_log_says_who_blocks(
    fleet: Fleet, launch: Launcher, tmp_path: Path, task: bool
) -> None:
    until = tmp_path / "until"
    blocked = launch.worker(fleet.redis.url, lease_seconds=LEASE)
    blocks = fleet.submit("blocks", until=str(until), seconds=3, task=task)
    healthy = [fleet.submit("steps", count=120, pause=0.02) for _ in range(3)]
    fleet.until_running([blocks, *healthy], events=3)
    other = launch.worker(fleet.redis.url, lease_seconds=LEASE)
    until.touch()
    wait_for(lambda: bool(blocked.logged("the event loop is blocked")))
    assert not fleet.field(blocks, "finished_at"), "it is told at once"
    fleet.until_ended([blocks, *healthy])
    for request_id in (blocks, *healthy):
        run, log = fleet.ended(request_id)
        assert (run["status"], reasons(log)) == ("completed", ["started"])
    for request_id in healthy:
        check_steps(fleet.client.log(request_id), 120)
    assert not other.logged("reaped")
    [told] = blocked.logged("the event loop is blocked")
    assert (told["request_id"], told["agent"], told["attempt"]) == (blocks, "blocks", 1)
    assert "tests/kit/agents.py:" in told["place"][0]
    assert told["place"][0].endswith(" _block")
    [over] = blocked.logged("the event loop turns again", request_id=blocks)
    assert 2.5 < over["seconds"] < 15
    assert not [line for line in blocked.log_lines() if line["level"] == "ERROR"]


def test_a_loop_that_is_blocked_for_too_long_loses_all_its_runs_and_writes_nothing_any_more(
    fleet: Fleet, launch: Launcher, impatient: Worker, tmp_path: Path
) -> None:
    until, release = tmp_path / "until", tmp_path / "release"
    blocks = fleet.submit("blocks", until=str(until), release=str(release))
    healthy = [fleet.submit("steps", count=200, pause=0.02, every=10) for _ in range(3)]
    fleet.until_running([blocks, *healthy], events=3)
    other = launch.worker(fleet.redis.url, lease_seconds=LEASE)
    until.touch()
    fleet.until_running([blocks, *healthy], attempt=2)
    assert impatient.logged("the event loop is blocked for too long: its runs are left to other workers")
    fleet.until_ended([blocks])
    assert not impatient.logged("the event loop turns again"), "it is still blocked"
    release.touch()
    wait_for(lambda: bool(impatient.logged("the event loop turns again")), seconds=20)
    fleet.until_ended(healthy)
    time.sleep(0.5)
    for request_id in (blocks, *healthy):
        run, log = fleet.ended(request_id)
        assert (run["status"], reasons(log)) == ("completed", ["started", "worker_lost"])
    for request_id in healthy:
        check_steps(fleet.client.log(request_id), 200)
    wait_for(
        lambda: (
            len(impatient.logged("run ended", outcome="fenced")) + len(impatient.logged("run ended", outcome="closed"))
            == 4
        )
    )
    assert other.stop() == 0
