"""P17: a worker that is asked to end: its runs end within the grace period, or go on elsewhere at once, none is lost.

The lease is long here where it must not be what moves a run.
"""

from __future__ import annotations

import asyncio
import random
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from statistics import median

from redis.asyncio import Redis

from tests.conftest import Launcher
from tests.kit.fleet import LEASE, Fleet, attempts, check_resumed, check_steps, reasons, steps
from tests.kit.http import Client
from tests.kit.load import Load, Plan
from tests.kit.processes import Worker, wait_for
from tests.kit.proxy import Proxy
from tests.kit.runs import field
from tests.kit.scale import LONG

NEVER = 600.0
"""A lease that does not end within a test."""
EVERY = 10


def gap(fleet: Fleet, request_id: str) -> float:
    """Reads a run to its end. Returns the longest pause between two attempts of it, in seconds."""
    previous, longest = time.monotonic(), 0.0
    with Client(str(fleet.client.base_url)) as client:
        for event in client.events(request_id):
            if event.type == "attempt" and event.json["attempt"] > 1:
                longest = max(longest, time.monotonic() - previous)
            previous = time.monotonic()
    return longest


def test_runs_that_end_in_the_grace_period_end_and_the_others_go_on_elsewhere_at_once(
    fleet: Fleet, launch: Launcher
) -> None:
    draining, other = (launch.worker(fleet.redis.url, lease_seconds=NEVER, grace_seconds=1.5) for _ in range(2))
    other.signal(signal.SIGSTOP)  # so that it takes none of them yet
    ending = [fleet.submit("steps", count=20, pause=0.02) for _ in range(8)]
    saving = [fleet.submit("steps", count=140, pause=0.02, every=EVERY) for _ in range(8)]
    starting_again = [fleet.submit("steps", count=100, pause=0.02) for _ in range(4)]
    silent = [fleet.submit("steps", count=1, pause=2) for _ in range(4)]
    runs = ending + saving + starting_again + silent
    fleet.until_running(ending + saving, events=5)
    with ThreadPoolExecutor(len(saving)) as pool:
        gaps = [pool.submit(gap, fleet, request_id) for request_id in saving]
        draining.signal(signal.SIGTERM)
        other.signal(signal.SIGCONT)
        assert draining.wait() == 0
        assert set(fleet.statuses(ending)) == {"completed"}
        told = [one.result(30) for one in gaps]
    fleet.until_ended(runs)
    handed_over = [line["request_id"] for line in draining.logged("run handed over", reason="handed_over")]
    assert set(saving) <= set(handed_over)
    assert not set(ending) & set(handed_over)
    for request_id in runs:
        run, log = fleet.ended(request_id)
        assert run["status"] == "completed"
        assert reasons(log) == ["started", "handed_over"][: 2 if request_id in handed_over else 1]
        assert fleet.field(request_id, "fails") == ""
        check_steps(log)
        if request_id in saving:
            check_resumed(log, EVERY)
            # Nothing was lost with the worker: what it had was written before it gave the run back.
            [first, second] = attempts(log)
            said = max(step.n for step in steps(log) if step.attempt == 1)
            [resumed] = [step.n for step in steps(log) if str(step.id) == second.resume_from]
            assert resumed + EVERY > said, f"{first} said {said}, {second}"
    assert other.stop() == 0
    print(
        f"{len(handed_over)} runs handed over; in {len(told)} of them the pause that a reader saw was "
        f"{median(told) * 1000:.0f} ms in the median, {max(told) * 1000:.0f} ms at most"
    )


def test_hand_overs_are_no_failures_and_what_waits_is_taken_by_the_next_worker(fleet: Fleet, launch: Launcher) -> None:
    """PROTOCOL 4.4: three hand-overs where two lost attempts would be the end. No other worker is there."""

    def start() -> Worker:
        return launch.worker(fleet.redis.url, lease_seconds=NEVER, grace_seconds=0, max_attempts=2)

    def epoch_of(request_id: str) -> str:
        return fleet.field(request_id, "epoch") + "-"

    runs = [fleet.submit("steps", count=80, pause=0.02, every=EVERY) for _ in range(4)]
    for turn in range(1, 4):
        worker = start()
        fleet.until_running(runs, attempt=turn)
        fleet.until(lambda request_id: fleet.field(request_id, "checkpoint_id").startswith(epoch_of(request_id)), runs)
        assert worker.stop() == 0
        assert set(fleet.statuses(runs)) == {"queued"}
    start()
    fleet.until_ended(runs)
    for request_id in runs:
        run, log = fleet.ended(request_id)
        assert (run["status"], run["attempt"]) == ("completed", 4)
        assert reasons(log) == ["started", *["handed_over"] * 3]
        resumed = [seen.resume_from for seen in attempts(log)]
        assert all(earlier != later for earlier, later in pairwise(resumed)), "each went on where the last one ended"
        check_steps(log, 80)
        check_resumed(log, EVERY)


def test_a_second_signal_ends_a_worker_at_once_and_its_lease_gives_its_runs_back(
    fleet: Fleet, launch: Launcher
) -> None:
    """Whatever its agents do: one of them does not let itself be closed."""
    impatient = launch.worker(fleet.redis.url, lease_seconds=LEASE, grace_seconds=NEVER)
    runs = [fleet.submit("steps", count=80, pause=0.02, every=EVERY) for _ in range(5)]
    stubborn = fleet.submit("stubborn")
    fleet.until_running([*runs, stubborn])
    impatient.signal(signal.SIGTERM)
    wait_for(lambda: bool(impatient.logged("draining")))
    time.sleep(0.3)
    began = time.monotonic()
    impatient.signal(signal.SIGTERM)
    assert impatient.wait(10) == 1
    print(f"exit {time.monotonic() - began:.2f} s after the second signal")
    fleet.client.post(f"/api/v1/runs/{stubborn}/cancel")
    launch.worker(fleet.redis.url, lease_seconds=LEASE)
    fleet.until_ended(runs)
    for request_id in runs:
        run, log = fleet.ended(request_id)
        assert run["status"] == "completed"
        assert reasons(log) in (["started", "worker_lost"], ["started", "handed_over"])
        check_steps(log, 80)
        check_resumed(log, EVERY)


def test_a_stubborn_agent_holds_up_its_own_run_only(fleet: Fleet, launch: Launcher) -> None:
    draining, other = (launch.worker(fleet.redis.url, lease_seconds=NEVER, grace_seconds=0) for _ in range(2))
    other.signal(signal.SIGSTOP)  # so that it takes none of them yet
    stubborn = fleet.submit("stubborn")
    runs = [fleet.submit("steps", count=30, pause=0.02, every=EVERY) for _ in range(5)]
    fleet.until_running([*runs, stubborn])
    draining.signal(signal.SIGTERM)
    other.signal(signal.SIGCONT)
    assert draining.wait() == 0
    [*others, last] = [line["request_id"] for line in draining.logged("run handed over")]
    assert (set(others), last) == (set(runs), stubborn)
    fleet.until_ended(runs)
    fleet.until_running([stubborn], attempt=2)
    fleet.client.post(f"/api/v1/runs/{stubborn}/cancel")
    for request_id in runs:
        run, log = fleet.ended(request_id)
        assert (run["status"], reasons(log)) == ("completed", ["started", "handed_over"])


def test_a_worker_that_cannot_hand_over_ends_all_the_same_and_its_lease_gives_its_runs_back(
    fleet: Fleet, launch: Launcher
) -> None:
    """Redis is away from it: one is refused, the other one hears nothing."""
    with Proxy(fleet.redis.port) as refusing, Proxy(fleet.redis.port) as silent:
        workers, runs = list[Worker](), list[str]()
        for proxy in (refusing, silent):
            workers.append(launch.worker(proxy.url, lease_seconds=LEASE, grace_seconds=0.5, max_jobs=4))
            runs += [fleet.submit("steps", count=300, pause=0.02, every=EVERY) for _ in range(4)]
            fleet.until_running(runs)
        refusing.refuse()
        silent.pause()
        began = time.monotonic()
        for worker in workers:
            worker.signal(signal.SIGTERM)
        other = launch.worker(fleet.redis.url, lease_seconds=LEASE)
        for worker in workers:
            code = worker.wait(30)
            print(f"exit {code} after {time.monotonic() - began:.1f} s")
        silent.resume()
        fleet.until_ended(runs)
        for request_id in runs:
            run, log = fleet.ended(request_id)
            assert (run["status"], reasons(log)) == ("completed", ["started", "worker_lost"])
            check_steps(log, 300)
            check_resumed(log, EVERY)
        assert other.stop() == 0


async def test_a_rolling_restart_of_all_workers_loses_nothing_and_counts_no_failure(
    launch: Launcher, tmp_path: Path
) -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    server = launch.redis()
    gateways = [launch.gateway(server.url, lease_seconds=LEASE, heartbeat_seconds=1) for _ in range(2)]

    def start(at: int) -> Worker:
        return launch.worker(server.url, grace_seconds=at * 0.7, lease_seconds=NEVER, max_jobs=20, max_attempts=1)

    workers = [start(at) for at in range(3)]
    # Readers that leave and come again by themselves need time, and show nothing of workers.
    plan = Plan(runs=60 if LONG else 18, count=50, pause=0.05, spread=15 if LONG else 2, torn=0, slow=0, limit=110)
    urls = [gateway.url for gateway in gateways]
    async with Load(urls, server.url, plan, chance=random.Random(seed), folder=tmp_path) as load:
        await asyncio.sleep(0.8)
        for turn in range(12 if LONG else 3):
            at = turn % len(workers)
            load.history.fault("restart", worker=at)
            code = await asyncio.to_thread(workers[at].stop)
            assert code == 0
            workers[at] = await asyncio.to_thread(start, at)
            await asyncio.sleep(0.3)
        evidence = await load.finish()
    print(evidence)
    assert evidence.violations() == []
    assert {run and run["status"] for run in evidence.polls.values()} == {"completed"}
    assert {reason for log in evidence.logs.values() for reason in reasons(log)} == {"started", "handed_over"}
    redis = Redis.from_url(server.url)
    assert {await field(redis, request_id, "fails") for request_id in evidence.logs} == {""}
    await redis.aclose()
