"""PROTOCOL 5.2: what a client was told of the end of a run, and a failover then took, is there again. Who told it keeps
it, and a drain waits for that; only its death may lose it, and that is PROTOCOL 7."""

from __future__ import annotations

import asyncio
import json
import signal
import time
from typing import Any

import pytest

from broker.runs import keys
from tests.conftest import Launcher
from tests.kit.api import Api
from tests.kit.checker import check_log, surviving_text
from tests.kit.fleet import reasons
from tests.kit.http import Client
from tests.kit.pair import Pair

LEASE = 2.0
SETTINGS: dict[str, Any] = {"heartbeat_seconds": 1, "lease_seconds": LEASE, "grace_seconds": 1}


@pytest.fixture
def pair(launch: Launcher) -> Pair:
    return launch.pair()


def status(pair: Pair, request_id: str) -> str:
    """As the replica has it, which is what the failover will leave."""
    value: bytes = pair.replica.ask("HGET", f"sb:{{{request_id}}}:run", "status")
    return value.decode()


async def test_ends_that_were_told_and_then_lost_are_there_again(launch: Launcher, pair: Pair) -> None:
    lost_worker = launch.worker(pair.url, **SETTINGS, max_jobs=1)
    gateways = [launch.gateway(pair.url, **SETTINGS) for _ in range(2)]
    async with Api(gateways[0].url) as api, Api(gateways[1].url) as other:
        reaped = await api.running("reaped", "tokens", count=10_000, pause=0.05)
        # No attempt is left to this run alone: with one for all, the reaper might close a cancelled run before its
        # cancel is made anew, which is another closing after the failover (PROTOCOL 7).
        pair.primary.ask("HSET", keys.run(reaped), "fails", 2)
        worker = launch.worker(pair.url, **SETTINGS)
        idle, erased = [await api.running(f"idle {n}", "hangs") for n in range(2)]
        talking = await api.running("talking", "tokens", count=10_000, pause=0.05)
        completed = await api.running("completed", "tokens", count=40, pause=0.05)
        await asyncio.to_thread(pair.until_synchronised)
        pair.link.pause()

        lost_worker.kill()
        told = {
            "idle": (await api.cancel(idle)).json(),
            "talking": (await other.cancel(talking)).json(),
            "completed": await api.until(completed, "completed"),
            "reaped": await api.until(reaped, "failed"),
        }
        assert (await other.erase(erased)).status_code == 204
        for request_id in (idle, talking, completed, reaped, erased):
            assert status(pair, request_id) == "running"
        await pair.fail_over()

        began = time.monotonic()
        back: dict[str, float] = {}
        found: dict[str, dict[str, Any]] = {}
        for what, request_id, end in (
            ("completed", completed, "completed"),
            ("idle", idle, "cancelled"),
            ("talking", talking, "cancelled"),
            ("reaped", reaped, "failed"),
        ):
            found[what] = await other.until(request_id, end)
            back[what] = time.monotonic() - began
        await api.until_gone(erased)
        print(", ".join(f"{what} back after {seconds:.2f} s" for what, seconds in back.items()))
        for what in ("completed", "idle"):
            # Under its own ids, since nothing that it stands on was lost; only the time is the repair's.
            assert {**found[what], "finished_at": None} == {**told[what], "finished_at": None}
        for what in ("talking", "reaped"):
            assert found[what]["error"] == told[what]["error"]
        with Client(gateways[1].url) as client:
            logs = {
                request_id: await asyncio.to_thread(client.log, request_id)
                for request_id in (completed, idle, talking, reaped)
            }
    for log in logs.values():
        check_log(log)
    assert reasons(logs[reaped])[-1] == "worker_lost"
    assert json.loads(logs[idle][-1].data) == {"reason": "client"}
    assert worker.popen.poll() is None


@pytest.mark.parametrize("heals", [True, False])
async def test_a_gateway_that_drains_waits_for_what_it_cancelled_to_be_safe(
    launch: Launcher, pair: Pair, heals: bool
) -> None:
    """But not for ever."""
    gateway = launch.gateway(pair.url, **SETTINGS)
    launch.worker(pair.url, **SETTINGS)
    async with Api(gateway.url) as api:
        request_id = await api.running("cancelled", "hangs")
        await asyncio.to_thread(pair.until_synchronised)
        pair.link.pause()
        assert (await api.cancel(request_id)).status_code == 200
    gateway.signal(signal.SIGTERM)
    await asyncio.sleep(1.5)
    assert gateway.popen.poll() is None
    if heals:
        pair.link.resume()
    assert await asyncio.to_thread(gateway.wait, 10) == 0
    assert status(pair, request_id) == ("cancelled" if heals else "running")


async def test_a_worker_that_drains_waits_for_what_it_completed_to_be_safe(launch: Launcher, pair: Pair) -> None:
    gateway = launch.gateway(pair.url, **SETTINGS)
    worker = launch.worker(pair.url, **SETTINGS)
    async with Api(gateway.url) as api:
        request_id = await api.running("completed", "tokens", count=20, pause=0.05)
        await asyncio.to_thread(pair.until_synchronised)
        pair.link.pause()
        await api.until(request_id, "completed")
    worker.signal(signal.SIGTERM)
    await asyncio.sleep(1.5)
    assert worker.popen.poll() is None
    pair.link.resume()
    assert await asyncio.to_thread(worker.wait, 10) == 0
    assert status(pair, request_id) == "completed"


async def test_an_end_that_was_lost_with_its_writer_is_not_promised_and_the_run_goes_on(
    launch: Launcher, pair: Pair
) -> None:
    """PROTOCOL 7: who read the end may differ from the log; but the log is sound, and the run ends."""
    gateways = [launch.gateway(pair.url, **SETTINGS) for _ in range(2)]
    worker = launch.worker(pair.url, **SETTINGS, max_jobs=2)
    async with Api(gateways[0].url) as api, Api(gateways[1].url) as other:
        cancelled = await api.running("cancelled", "tokens", count=100, pause=0.03)
        completed = await api.running("completed", "tokens", count=20, pause=0.05)
        await asyncio.to_thread(pair.until_synchronised)
        pair.link.pause()
        assert (await api.cancel(cancelled)).json()["status"] == "cancelled"
        await api.until(completed, "completed")
        gateways[0].kill()
        worker.kill()
        await pair.fail_over()
        launch.worker(pair.url, **SETTINGS)
        for request_id in (cancelled, completed):
            run = await other.until(request_id, "completed", "cancelled", "failed")
            assert (run["status"], run["attempt"]) == ("completed", 2)
        with Client(gateways[1].url) as client:
            logs = [await asyncio.to_thread(client.log, request_id) for request_id in (cancelled, completed)]
    for log, count in zip(logs, (100, 20), strict=True):
        check_log(log)
        assert surviving_text(log) == "".join(f"{n} " for n in range(count))
        assert reasons(log) == ["started", "worker_lost"]
