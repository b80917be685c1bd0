"""P9: any gateway will do, also for a run that goes through several attempts. What a reader saw is judged whole."""

from __future__ import annotations

import asyncio
import random
import signal
from typing import Any

import pytest

from tests.conftest import Launcher
from tests.kit.load import Load, Plan
from tests.kit.scale import LONG, scaled

LEASE = 1.0
SETTINGS: dict[str, Any] = {"lease_seconds": LEASE, "heartbeat_seconds": 1, "grace_seconds": 0, "max_attempts": 1000}


@pytest.mark.timeout(1800 if LONG else 180)
async def test_three_gateways_are_killed_in_turn_while_runs_change_their_workers(launch: Launcher) -> None:
    """No affinity: each connection goes to any of the three, the dead one included. A round kills each of them, and
    ends two workers, one by SIGKILL and one by SIGTERM.
    """
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    server = launch.redis()
    gateways = [await asyncio.to_thread(launch.gateway, server.url, **SETTINGS) for _ in range(3)]
    workers = [await asyncio.to_thread(launch.worker, server.url, **SETTINGS) for _ in range(2)]
    enough = launch.folder / "enough"
    plan = Plan(runs=16, count=20, until=enough, pause=0.05, torn=0, limit=600 if LONG else 90)
    urls = [gateway.url for gateway in gateways]
    async with Load(urls, server.url, plan, chance=chance, folder=launch.folder) as load:

        async def kill_a_gateway(n: int) -> None:
            load.history.fault("gateway killed")
            gateways[n].signal(signal.SIGKILL)
            await asyncio.to_thread(gateways[n].wait)
            await asyncio.sleep(chance.random() * 0.3)
            gateways[n] = await asyncio.to_thread(launch.gateway, server.url, port=gateways[n].port, **SETTINGS)

        async def end_a_worker(number: signal.Signals) -> None:
            load.history.fault(f"worker ended by {number.name}")
            old = workers.pop(0)
            old.signal(number)
            await asyncio.to_thread(old.wait)
            workers.append(await asyncio.to_thread(launch.worker, server.url, **SETTINGS))

        for _ in range(scaled(10)):
            for n in range(3):
                await asyncio.sleep(0.5 + chance.random() * 0.5)
                await kill_a_gateway(n)
                if n:
                    await end_a_worker((signal.SIGKILL, signal.SIGTERM)[n - 1])
        await asyncio.sleep(3 * LEASE)  # the runs of the last one are taken up again
        enough.touch()
        evidence = await load.finish()
    print(f"{evidence}, {load.history.cut_streams} streams hit")
    assert evidence.violations() == []
    assert load.history.cut_streams > plan.runs, "the kills have hit too few streams to prove anything"
    assert evidence.rewinds > plan.runs / 2, "too few runs have changed their workers"
    assert len(evidence.texts) == plan.runs
