"""PROTOCOL 5.6: a run that is watched is not cancelled, whatever happens to Redis, to gateways and to workers.

Each run has one watcher, and the least limit that the settings allow.
"""

from __future__ import annotations

import asyncio
import json
import random
import signal
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from broker.runs import keys
from tests.conftest import Launcher
from tests.kit.checker import check_log
from tests.kit.http import Client
from tests.kit.processes import Gateway, Worker, wait_for
from tests.kit.scale import scaled
from tests.kit.watchers import KINDS

LEASE, HEARTBEAT = 2.0, 0.5
SETTINGS: dict[str, Any] = {"lease_seconds": LEASE, "heartbeat_seconds": HEARTBEAT, "grace_seconds": 0}
LIMIT = 3 + LEASE
LONGER = LIMIT + 1.5
Fault = Callable[[], Awaitable[None]]
SLOTS = 5
"""Of each of two workers: for two runs of each kind of watcher. One more of each kind waits in the queue."""


class House:
    """Two gateways, two workers, a primary with its replica, and what befalls them."""

    def __init__(self, launch: Launcher, chance: random.Random) -> None:
        self.launch, self.chance = launch, chance
        self.pair = launch.pair()
        self.gateways = [self._gateway() for _ in range(2)]
        self.workers = [self._worker() for _ in range(2)]
        self.up = [gateway.url for gateway in self.gateways]
        """What a load balancer knows."""

    def _gateway(self, port: int | None = None) -> Gateway:
        return self.launch.gateway(self.pair.url, ready="/healthz", port=port, **SETTINGS)

    def _worker(self) -> Worker:
        return self.launch.worker(self.pair.url, **SETTINGS, max_jobs=SLOTS, max_attempts=1000)

    def door(self) -> str:
        return self.chance.choice(self.up)

    def field(self, request_id: str, name: str) -> str:
        with self.pair.primary.client() as client:
            value = client.hget(keys.run(request_id), name)
        assert value is None or isinstance(value, bytes)
        return value.decode() if value else ""

    # -- faults ----------------------------------------------------------------------------------------------

    async def redis_is_away(self) -> None:
        await asyncio.to_thread(self.pair.primary.kill)
        await asyncio.sleep(LONGER)
        await asyncio.to_thread(self.pair.primary.start)

    async def redis_stands_still(self) -> None:
        self.pair.primary.pause()
        await asyncio.sleep(LONGER)
        self.pair.primary.resume()

    async def redis_fails_over(self) -> None:
        await self.pair.fail_over()
        await asyncio.sleep(1)
        await self.pair.rejoin()

    async def redis_and_a_gateway_are_away(self) -> None:
        await asyncio.to_thread(self.pair.primary.kill)
        await asyncio.sleep(self.chance.random())
        await self.a_gateway_is_killed()
        await asyncio.sleep(LONGER / 2)
        await asyncio.to_thread(self.pair.primary.start)

    async def a_gateway_is_killed(self) -> None:
        await self._replace(self.chance.randrange(2), signal.SIGKILL)

    async def a_gateway_is_restarted(self) -> None:
        await self._replace(self.chance.randrange(2), signal.SIGTERM)

    async def gateways_are_deployed(self) -> None:
        for n in range(2):
            await self._replace(n, signal.SIGTERM)

    async def _replace(self, n: int, number: signal.Signals) -> None:
        old = self.gateways[n]
        self.up.remove(old.url)
        old.signal(number)
        await asyncio.to_thread(old.wait)
        self.gateways[n] = await asyncio.to_thread(self._gateway, old.port)
        self.up.append(self.gateways[n].url)

    async def a_worker_is_restarted(self) -> None:
        old = self.workers.pop(0)
        old.signal(signal.SIGTERM)
        await asyncio.to_thread(old.wait)
        self.workers.append(await asyncio.to_thread(self._worker))

    async def a_worker_is_killed(self) -> None:
        old = self.workers.pop(0)
        await asyncio.to_thread(old.kill)
        self.workers.append(await asyncio.to_thread(self._worker))

    @property
    def faults(self) -> list[Fault]:
        return [
            self.redis_is_away,
            self.redis_stands_still,
            self.redis_fails_over,
            self.redis_and_a_gateway_are_away,
            self.a_gateway_is_killed,
            self.a_gateway_is_restarted,
            self.gateways_are_deployed,
            self.a_worker_is_restarted,
            self.a_worker_is_killed,
        ]


@pytest.mark.timeout(300)
@pytest.mark.parametrize("turn", range(scaled(20) // 2))
async def test_no_fault_cancels_a_run_that_is_watched(launch: Launcher, turn: int) -> None:
    """Two houses, each with one half of the faults, in any order."""
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    houses = [await asyncio.to_thread(House, launch, random.Random(chance.random())) for _ in range(2)]
    await asyncio.gather(*(live(house, house.faults[half::2]) for half, house in enumerate(houses)))


async def live(house: House, faults: list[Fault]) -> None:
    chance = house.chance
    chance.shuffle(faults)
    runs: dict[str, str] = {}
    bodies: dict[str, dict[str, Any]] = {}
    with Client(house.door()) as client:
        for name in [f"{kind} {n}" for n in range(3) for kind in KINDS]:
            bodies[name] = {"query": name, "agent": "hangs", "cancel_if_unwatched": LIMIT}
            runs[name] = await asyncio.to_thread(client.submit, **bodies[name])
    watching = [asyncio.create_task(KINDS[name[:-2]](house.door, runs[name], bodies[name])) for name in runs]
    try:
        for fault in faults:
            await asyncio.sleep(chance.random())
            began = time.monotonic()
            await fault()
            print(f"{fault.__name__}: {time.monotonic() - began:.1f} s")
        await asyncio.sleep(LEASE + LIMIT + 1)
        for name, request_id in runs.items():
            status = await asyncio.to_thread(house.field, request_id, "status")
            result = await asyncio.to_thread(house.field, request_id, "result")
            assert status in ("queued", "running"), f"{name}: {status} {result}"
        assert not [task for task in watching if task.done()], "a watcher has ended by itself"
    finally:
        for task in watching:
            task.cancel()
        await asyncio.gather(*watching, return_exceptions=True)

    # And all of that proves something only if they are cancelled now.
    def ended() -> bool:
        return all(house.field(request_id, "status") == "cancelled" for request_id in runs.values())

    await asyncio.to_thread(wait_for, ended, seconds=60)
    with Client(house.door()) as client:
        for request_id in runs.values():
            log = await asyncio.to_thread(client.log, request_id)
            check_log(log)
            assert json.loads(log[-1].data) == {"reason": "unwatched"}
