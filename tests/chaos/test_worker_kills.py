"""P6: what a killed worker had under way goes on elsewhere, soon, and at its last checkpoint."""

from __future__ import annotations

import random
import signal
import time
from statistics import median

import pytest

from tests.conftest import Launcher
from tests.kit.fleet import LEASE, Fleet, attempts, check_resumed, check_steps, now_ms, reasons
from tests.kit.processes import Worker, wait_for
from tests.kit.proxy import Proxy, calls
from tests.kit.scale import LONG, scaled

EVERY = 10


def kill(worker: Worker) -> None:
    worker.signal(signal.SIGKILL)
    worker.wait()


def under_way(worker: Worker) -> dict[str, int]:
    """The runs that it has begun and not ended: which attempt of each."""
    attempts_of = {line["request_id"]: line["attempt"] for line in worker.logged("run started")}
    for line in worker.logged("run ended"):
        attempts_of.pop(line["request_id"], None)
    return attempts_of


def test_what_a_killed_worker_had_under_way_goes_on_at_its_last_checkpoint(
    fleet: Fleet, launch: Launcher, chance: random.Random
) -> None:
    def start() -> Worker:
        return launch.worker(fleet.redis.url, lease_seconds=LEASE, max_attempts=1000)

    workers = [start(), start()]
    saving, starting_again = list[str](), list[str]()
    kills, recovered = 20 if LONG else 2, list[int]()
    for turn in range(kills):
        saving += [fleet.submit("steps", count=100, pause=0.02, every=EVERY) for _ in range(8)]
        starting_again += [fleet.submit("steps", count=60, pause=0.02) for _ in range(6)]
        fleet.until_running(saving + starting_again, events=10)
        time.sleep(chance.random() / 2)
        victim = workers.pop(turn % 2)
        killed_ms = now_ms()
        kill(victim)
        lost = under_way(victim)
        workers.insert(turn % 2, start())
        fleet.until(
            lambda request_id, lost=lost: (  # type: ignore[misc]
                bool(fleet.field(request_id, "finished_at"))
                or (int(fleet.field(request_id, "attempt")) > lost[request_id])
            ),
            list(lost),
        )
        for request_id, attempt in lost.items():
            claimed_ms = fleet.claimed_ms(request_id, fleet.client.log(request_id))
            recovered += [claimed - killed_ms for claimed in claimed_ms[attempt : attempt + 1]]
    assert len(recovered) > 2 * kills, "the kills have hit too little to prove anything"
    print(
        f"{kills} kills, lease {LEASE} s: {len(recovered)} runs were claimed again {median(recovered)} ms after the "
        f"kill in the median, {max(recovered)} ms at most"
    )
    fleet.until_ended(saving + starting_again)
    resumed = 0
    for request_id in saving + starting_again:
        run, log = fleet.ended(request_id)
        assert run["status"] == "completed"
        assert set(reasons(log)[1:]) <= {"worker_lost"}
        check_steps(log, 100 if request_id in saving else 60)
        if request_id in saving:
            check_resumed(log, EVERY)
            resumed += sum(seen.resume_from != "0-1" for seen in attempts(log))
        else:
            assert all(seen.resume_from == "0-1" for seen in attempts(log))
    assert resumed > 0


def test_a_run_that_loses_all_its_workers_fails_when_its_attempts_are_used_up(fleet: Fleet, launch: Launcher) -> None:
    """By a reaper, for nobody else is there to tell: PROTOCOL 4.4, 5.1."""
    workers = [launch.worker(fleet.redis.url, lease_seconds=LEASE, max_attempts=2) for _ in range(3)]
    never = fleet.submit("kills")
    fleet.until_ended([never])
    run, log = fleet.ended(never)
    assert (run["status"], run["error"]["code"], run["attempt"]) == ("failed", "worker_lost", 2)
    assert run["answer"] == "2 ", "what the last attempt has said stays"
    assert reasons(log) == ["started", "worker_lost", "worker_lost"]
    assert [entry.type for entry in log[-2:]] == ["attempt", "error"]
    assert sum(worker.popen.poll() == -signal.SIGKILL for worker in workers) == 2
    [closed] = [line for worker in workers for line in worker.logged("reaped", done="closed_worker_lost")]
    assert closed["request_id"] == never


@pytest.mark.parametrize("before", [True, False] if LONG else [True])
def test_a_worker_that_dies_in_the_claim_costs_at_most_its_attempt(
    fleet: Fleet, launch: Launcher, before: bool
) -> None:
    """It has taken the job off the queue. Killed before the claim it leaves a queued run without a job; after it, a
    running one without a worker."""
    recovered = list[int]()
    with Proxy(fleet.redis.port) as proxy:
        for _ in range(scaled(10)):
            proxy.heal()
            victim = launch.worker(proxy.url, lease_seconds=LEASE)
            times = list[int]()

            def strike(victim: Worker = victim, times: list[int] = times) -> None:
                victim.signal(signal.SIGKILL)
                times.append(now_ms())

            proxy.strike(1, strike, matches=calls("claim"), before=before)
            request_id = fleet.submit("echo")
            wait_for(lambda victim=victim: victim.popen.poll() is not None)  # type: ignore[misc]
            other = launch.worker(fleet.redis.url, lease_seconds=LEASE)
            fleet.until_ended([request_id])
            run, log = fleet.ended(request_id)
            assert run["status"] == "completed"
            assert reasons(log) == (["started"] if before else ["started", "worker_lost"])
            recovered.append(fleet.claimed_ms(request_id, log)[-1] - times[0])
            kill(other)
    print(f"{len(recovered)} kills {'before' if before else 'after'} the claim: claimed again after {recovered} ms")
