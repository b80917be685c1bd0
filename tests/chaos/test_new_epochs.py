"""PROTOCOL 4.6 and 4.7: after a break nobody opens a new epoch too soon, and nobody is taken for dead who could not
renew his lease. When an epoch was opened is told by its number: milliseconds since the run's `claimed_at`."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

from broker.events import Entry
from broker.runs import keys
from broker.runs.primaries import SETTLE_SECONDS
from tests.conftest import Launcher
from tests.kit.api import Api
from tests.kit.checker import check_log
from tests.kit.clock import Clock
from tests.kit.fleet import reasons
from tests.kit.http import Client
from tests.kit.pair import Pair
from tests.kit.proxy import Proxy
from tests.kit.redis_server import RedisServer


def settings(lease: float) -> dict[str, Any]:
    return {"heartbeat_seconds": 1, "lease_seconds": lease, "grace_seconds": 1}


def opened_ms(pair: Pair, request_id: str, log: list[Entry]) -> list[int]:
    """When each epoch after 0 was opened, by Redis' clock."""
    claimed_at = int(pair.primary.ask("HGET", keys.run(request_id), "claimed_at"))
    return [claimed_at + entry.id.epoch for entry in log if entry.type == "attempt"]


async def test_after_a_promotion_new_epochs_wait_and_appends_go_on(launch: Launcher) -> None:
    """Claims, cancels and fences; the fence for one lease in addition, whenever its owner died (4.7)."""
    lease = SETTLE_SECONDS + 1
    pair = launch.pair()
    gateway = launch.gateway(pair.url, **settings(lease))
    doomed = launch.worker(pair.url, **settings(lease), max_jobs=1)
    async with Api(gateway.url) as api:
        lost = await api.running("its worker dies", "steps", count=200, pause=0.05, every=1)
        launch.worker(pair.url, **settings(lease))
        going, stopped = [await api.running(f"{n}", "tokens", count=10_000, pause=0.05) for n in range(2)]
        with Client(gateway.url) as client:
            assert client.log(lost)[1].id.epoch < SETTLE_SECONDS * 1000 / 2, "on a server that is new nobody waits"
            await asyncio.to_thread(pair.until_synchronised)
            stream = await api.stream(going)
            await stream.until(lambda: len(stream.events) > 3)
            doomed.kill()
            await pair.fail_over()
            seen = len(stream.events)
            cancelling = asyncio.create_task(api.cancel(stopped))
            queued = await api.submit("queued")
            await stream.until(lambda: len(stream.events) > seen + 3)
            assert not cancelling.done(), "appends do not wait, and a cancel does"
            assert (await api.poll(queued)).json()["status"] == "queued"

            assert (await cancelling).json()["status"] == "cancelled"
            await api.until(queued, "completed")
            await api.until(lost, "completed", seconds=60)
            await api.cancel(going)

            replid = pair.primary.info("replication")["master_replid"]
            assert pair.primary.ask("HLEN", keys.PRIMARIES) == 2
            since = int(pair.primary.ask("HGET", keys.PRIMARIES, replid))
            claim = opened_ms(pair, queued, client.log(queued))[0]
            cancel = opened_ms(pair, stopped, client.log(stopped))[1]
            fence = opened_ms(pair, lost, client.log(lost))[1]
            for opened, after in ((claim, SETTLE_SECONDS), (cancel, SETTLE_SECONDS), (fence, lease)):
                assert opened >= since + after * 1000
            print(
                f"after the promotion: claim {claim - since} ms, cancel {cancel - since} ms, fence {fence - since} ms"
            )
            for request_id in (going, stopped, lost, queued):
                check_log(client.log(request_id))
            assert reasons(client.log(lost)) == ["started", "worker_lost"]
        await stream.ended()


async def test_a_worker_that_alone_is_cut_off_loses_its_runs_after_a_lease_and_learns_of_it(launch: Launcher) -> None:
    """Redis has heard nothing of it, and all others: its leases have expired. It is fenced, and stops (4.5, P5)."""
    lease = 2.0
    server = launch.redis()
    gateway = launch.gateway(server.url, **settings(lease))
    with Proxy(server.port) as way:
        cut_off = launch.worker(way.url, **settings(lease), max_jobs=3)
        async with Api(gateway.url) as api:
            marks = [launch.folder / f"mark-{n}" for n in range(3)]
            query = {"count": 80, "pause": 0.05, "every": 1}
            runs = [await api.running(mark.name, "steps", **query, mark=str(mark)) for mark in marks]
            other = launch.worker(server.url, **settings(lease))
            undisturbed = await api.running("undisturbed", "tokens", count=10_000, pause=0.05)
            way.refuse()
            await asyncio.sleep(1.5 * lease)
            way.accept()
            for request_id in runs:
                run = await api.until(request_id, "completed", "failed", seconds=60)
                assert (run["status"], run["attempt"]) == ("completed", 2)
            await api.cancel(undisturbed)
        with Client(gateway.url) as client:
            for request_id in runs:
                log = client.log(request_id)
                check_log(log)
                assert reasons(log) == ["started", "worker_lost"]
            assert reasons(client.log(undisturbed)) == ["started", "cancelled"]
        fenced = [line for line in cut_off.logged("run ended") if line["outcome"] == "fenced"]
        assert {line["request_id"] for line in fenced} >= set(runs)
        assert all(mark.with_suffix(".1").exists() for mark in marks), "its agents were closed"
    assert other.popen.poll() is None


async def test_a_clock_that_is_set_takes_no_run_and_leaves_none_behind(launch: Launcher) -> None:
    """Forward, all leases have expired at once; backward, a dead worker's holds for an hour longer."""
    lease = 2.0
    clock = Clock(launch.folder)
    server = RedisServer(launch.folder, prefix=clock.prefix)
    with contextlib.closing(server.start()):
        await set_the_clock(launch, clock, server, lease)


async def set_the_clock(launch: Launcher, clock: Clock, server: RedisServer, lease: float) -> None:
    gateway = launch.gateway(server.url, **settings(lease))
    doomed = launch.worker(server.url, **settings(lease), max_jobs=1)
    async with Api(gateway.url) as api:
        lost = await api.running("its worker dies", "steps", count=240, pause=0.05, every=1)
        launch.worker(server.url, **settings(lease))
        kept = await api.running("goes on", "tokens", count=300, pause=0.05)
        await asyncio.sleep(lease)
        clock.set(3600)
        await asyncio.sleep(lease)
        assert (await api.poll(kept)).json()["attempt"] == (await api.poll(lost)).json()["attempt"] == 1
        doomed.kill()
        clock.set(0)
        run = await api.until(lost, "completed", "failed", seconds=60)
        assert (run["status"], run["attempt"]) == ("completed", 2)
        run = await api.until(kept, "completed", "failed", seconds=60)
        assert (run["status"], run["attempt"]) == ("completed", 1)
    with Client(gateway.url) as client:
        for request_id in (lost, kept):
            check_log(client.log(request_id))
