"""Attempts of real workers: where a later one begins, what readers are told, and replies that are lost (P4)."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from broker.events import Entry
from broker.ids import EventId
from tests.conftest import Launcher
from tests.kit.findings import survivors
from tests.kit.fleet import Fleet, attempts, check_resumed, check_steps, reasons
from tests.kit.processes import wait_for
from tests.kit.proxy import Command, Proxy, calls
from tests.kit.scale import LONG, scaled

LEASE = 1.5
NEVER = 600.0
CORPUS = Path(__file__).parent.parent / "corpus"


@pytest.fixture
def proxy(fleet: Fleet) -> Iterator[Proxy]:
    with Proxy(fleet.redis.port) as proxy:
        yield proxy


# -- where a later attempt begins ----------------------------------------------------------------------------

QUESTION = "How hot should the water be for green tea?"


class Ended(NamedTuple):
    """A run that has ended: as a poll shows it, its log, and the log's pages as they are in JSON."""

    run: dict[str, Any]
    log: list[Entry]
    rows: list[dict[str, Any]]


@pytest.fixture(scope="module")
def after_a_kill(gateway_of_fleets: Fleet, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Ended]:
    """Runs whose worker was killed while they wrote, and one that nobody disturbed."""
    fleet, launcher = gateway_of_fleets, Launcher(tmp_path_factory.mktemp("kill"))
    try:
        victim = launcher.worker(fleet.redis.url, lease_seconds=LEASE, docs=CORPUS)
        runs = {"undisturbed": fleet.client.submit(QUESTION, agent="research")}
        fleet.until_ended(list(runs.values()))
        runs["research"] = fleet.client.submit(QUESTION, agent="research", parameters={"pace": 20})
        runs["saving"] = fleet.submit("steps", count=60, pause=0.03, every=7)
        runs["starting again"] = fleet.submit("steps", count=60, pause=0.03)
        fleet.until_running(list(runs.values())[2:], events=24)
        wait_for(lambda: "token" in [entry.type for entry in fleet.client.log(runs["research"])])
        victim.signal(signal.SIGKILL)
        launcher.worker(fleet.redis.url, lease_seconds=LEASE, docs=CORPUS)
        fleet.until_ended(list(runs.values()))
        ended = {name: Ended(*fleet.ended(request_id), pages(fleet, request_id)) for name, request_id in runs.items()}
    finally:
        launcher.close()
    return ended


def pages(fleet: Fleet, request_id: str) -> list[dict[str, Any]]:
    page = fleet.client.get(f"/api/v1/runs/{request_id}/events", params={"limit": 500}).json()
    rows: list[dict[str, Any]] = page["events"]
    return rows


def test_research_goes_on_after_its_retrieval_and_does_not_search_again(after_a_kill: dict[str, Ended]) -> None:
    run, log, _ = after_a_kill["research"]
    assert (run["status"], reasons(log)) == ("completed", ["started", "worker_lost"])
    covered = [entry for entry in log if str(entry.id) == attempts(log)[1].resume_from]
    assert [(entry.type, json.loads(entry.data)["message"]) for entry in covered] == [
        ("progress", "Writing the answer")
    ]
    second = [entry.type for entry in log[[entry.type for entry in log].index("attempt", 2) + 1 :]]
    assert set(second) == {"token", "progress", "final"}
    assert [entry.type for entry in survivors(log)].count("sources") == 3
    for name in ("answer", "citations", "usage"):
        assert run[name] == after_a_kill["undisturbed"].run[name]


@pytest.mark.parametrize("name", ["saving", "starting again"])
def test_what_a_later_attempt_voids_is_marked_in_the_pages_and_missing_in_the_poll(
    after_a_kill: dict[str, Ended], name: str
) -> None:
    run, log, rows = after_a_kill[name]
    assert (run["status"], reasons(log)) == ("completed", ["started", "worker_lost"])
    check_steps(log, 60)
    second = next(entry.id for entry in reversed(log) if entry.type == "attempt")
    resumed = EventId.parse(attempts(log)[1].resume_from)
    assert [row["void"] for row in rows] == [resumed < entry.id < second for entry in log]
    numbers = [token.partition(":") for token in run["answer"].split()]
    assert [int(n) for _, _, n in numbers] == list(range(60))
    writers = {int(attempt) for attempt, _, _ in numbers}
    if name == "saving":
        assert writers == {1, 2}
        check_resumed(log, 7)
    else:
        assert writers == {2}
        assert any(row["void"] for row in rows)


# -- P4: lost replies ----------------------------------------------------------------------------------------


def is_end(command: Command) -> bool:
    """An append that ends its run."""
    return calls("append")(command) and command[-2] in (b"final", b"error")


@pytest.mark.parametrize("before", [False, True], ids=["reply", "command"])
def test_an_end_that_is_lost_is_sent_again_and_there_is_one(
    fleet: Fleet, launch: Launcher, proxy: Proxy, before: bool
) -> None:
    worker = launch.worker(proxy.url, lease_seconds=NEVER, queue_redis_url=fleet.redis.url)
    proxy.swallow(is_end, every=2, before=before)
    runs = [fleet.submit(agent) for agent in ("echo", "raises") for _ in range(scaled(100))]
    fleet.until_ended(runs)
    assert proxy.swallowed >= len(runs) / 2
    for request_id in runs:
        _, log = fleet.ended(request_id)
        assert log[-1].type in ("final", "error")
    assert {line["outcome"] for line in worker.logged("run ended")} <= {"final", "error"}


def is_transaction(command: Command) -> bool:
    return command[0] == b"EXEC"


def first(most: int, *kinds: Callable[[Command], bool]) -> Callable[[Command], bool]:
    """Matches the first `most` commands of each kind."""
    seen = [0] * len(kinds)

    def matches(command: Command) -> bool:
        for n, kind in enumerate(kinds):
            if kind(command):
                seen[n] += 1
                return seen[n] <= most
        return False

    return matches


@pytest.mark.parametrize("before", [False, True] if LONG else [False])
def test_a_hand_over_whose_replies_are_lost_is_one(fleet: Fleet, launch: Launcher, proxy: Proxy, before: bool) -> None:
    """The script's, and the one to the job that it enqueues."""
    draining = launch.worker(proxy.url, lease_seconds=NEVER, grace_seconds=0)
    runs = [fleet.submit("steps", count=50, pause=0.02, every=10) for _ in range(8)]
    fleet.until_running(runs)
    proxy.swallow(first(5, calls("hand_over"), is_transaction), before=before)
    assert draining.stop() == 0
    assert proxy.swallowed == 10
    assert set(fleet.statuses(runs)) == {"queued"}
    launch.worker(fleet.redis.url, lease_seconds=NEVER)
    fleet.until_ended(runs)
    for request_id in runs:
        run, log = fleet.ended(request_id)
        assert (run["status"], reasons(log)) == ("completed", ["started", "handed_over"])
        check_steps(log, 50)
        check_resumed(log, 10)


@pytest.mark.parametrize("before", [False, True], ids=["reply", "command"])
def test_a_reaper_whose_replies_are_lost_does_everything_once(
    fleet: Fleet, launch: Launcher, proxy: Proxy, before: bool
) -> None:
    """It fences some runs, ends others, whose attempts are used up, and enqueues again what has lost its job."""
    victim = launch.worker(fleet.redis.url, lease_seconds=LEASE)
    lost = [fleet.submit("hangs") for _ in range(12)]
    fleet.until_running(lost)
    victim.signal(signal.SIGKILL)
    victim.wait()
    spent = lost[:6]
    for request_id in spent:
        fleet.direct.hset(f"sb:{{{request_id}}}:run", "fails", "2")
    jobless = [fleet.submit("echo") for _ in range(6)]
    fleet.direct.delete("sb:queue")
    kinds = (calls("fence"), calls("requeue"), calls("close"), is_transaction)
    proxy.swallow(first(1, *kinds), before=before)
    worker = launch.worker(proxy.url, lease_seconds=LEASE)
    fleet.until_reaped(jobless)
    fleet.until_running(lost[6:], attempt=2)
    fleet.until_ended(spent)
    assert proxy.swallowed == len(kinds)
    for request_id in spent:
        run, log = fleet.ended(request_id)
        assert (run["error"]["code"], reasons(log)) == ("worker_lost", ["started", "worker_lost"])
    for request_id in jobless:
        run, log = fleet.ended(request_id)
        assert (run["status"], reasons(log)) == ("completed", ["started"])
    for request_id in lost[6:]:
        assert fleet.field(request_id, "fails") == "1"
        assert reasons(fleet.client.log(request_id)) == ["started", "worker_lost"]
    assert worker.popen.poll() is None
