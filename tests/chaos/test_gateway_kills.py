"""P9: any gateway will do. Three of them, no affinity, each killed in turn; what a client has seen is the log."""

from __future__ import annotations

import asyncio
import random
from dataclasses import replace

from tests.conftest import Launcher
from tests.kit.load import Load, Plan
from tests.kit.processes import Gateway
from tests.kit.scale import LONG

GATEWAYS = 3
ROUNDS = 3 if LONG else 1
PLAN = Plan(runs=25, readers=2, count=150, pause=0.02, torn=0, slow=0.1, hurry=15, limit=110)


async def test_while_each_gateway_is_killed_in_turn_every_client_sees_the_whole_log_once(launch: Launcher) -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    server = launch.redis()

    def start(port: int | None = None) -> Gateway:
        return launch.gateway(server.url, port=port, heartbeat_seconds=1)

    gateways = [await asyncio.to_thread(start) for _ in range(GATEWAYS)]
    await asyncio.to_thread(launch.worker, server.url)
    urls = [gateway.url for gateway in gateways]
    plan = replace(PLAN, until=launch.folder / "enough")
    async with Load(urls, server.url, plan, chance=chance, folder=launch.folder) as load:
        killed = 0
        # Each in its turn, and on until every reader has lost its stream, on the average.
        while killed < ROUNDS * GATEWAYS or load.history.cut_streams < ROUNDS * plan.runs * plan.readers:
            await asyncio.sleep(0.2 + chance.random() * 0.3)
            at = killed % GATEWAYS
            load.history.fault("gateway killed", url=gateways[at].url)
            gateways[at].kill()
            await asyncio.sleep(chance.random() * 0.3)
            gateways[at] = await asyncio.to_thread(start, gateways[at].port)
            killed += 1
        (launch.folder / "enough").touch()
        evidence = await load.finish()
    print(f"seed {seed}: {evidence}, {load.history.cut_streams} streams hit")
    assert evidence.violations() == []
    assert len(evidence.texts) == plan.runs and evidence.rewinds == 0
