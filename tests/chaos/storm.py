"""Storms: a load of runs and readers, and faults at random times. Judged by the checker; what is excused is counted."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Collection, Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.conftest import Launcher
from tests.kit.checker import Allowed, Violation
from tests.kit.load import NO_ANSWER, Evidence, Load, Plan
from tests.kit.processes import Gateway, Worker

LEASE_SECONDS = 1.5
SETTINGS = {"lease_seconds": LEASE_SECONDS, "heartbeat_seconds": 1, "grace_seconds": 1, "max_attempts": 1000}
PLAN = Plan(runs=14, readers=3, count=120, pause=0.04, spread=8, silence=6, limit=120)
STORM_SECONDS = 14.0


class Site:
    """Two gateways and two workers on a primary with a replica. A fault mends what it broke."""

    def __init__(self, launch: Launcher, durability: str) -> None:
        self._launch = launch
        self.durability = durability
        self._settings: dict[str, Any] = {**SETTINGS, "durability": durability}
        self.pair = launch.pair()
        self.gateways = [launch.gateway(self.pair.url, **self._settings) for _ in range(2)]
        self.workers = [self.new_worker() for _ in range(2)]
        self.exits: list[str] = []
        """What ended otherwise than it should."""

    def new_worker(self) -> Worker:
        return self._launch.worker(self.pair.url, **self._settings)

    def new_gateway(self, port: int) -> Gateway:
        """Ready as soon as Redis is."""
        return self._launch.gateway(self.pair.url, ready="/healthz", port=port, **self._settings)

    def expect(self, code: int, process: Gateway | Worker) -> None:
        if code != 0:
            self.exits.append(f"{process.log_path.name} ended with {code}")


Fault = Callable[[Site, Load, random.Random], Coroutine[None, None, None]]


async def worker_killed(site: Site, load: Load, chance: random.Random) -> None:
    n = chance.randrange(len(site.workers))
    site.workers[n].kill()
    site.workers[n] = await asyncio.to_thread(site.new_worker)


async def worker_stopped(site: Site, load: Load, chance: random.Random) -> None:
    """Shorter and longer than its lease."""
    worker = chance.choice(site.workers)
    worker.signal(signal.SIGSTOP)
    await asyncio.sleep(chance.uniform(0.2, 2.0) * LEASE_SECONDS)
    worker.signal(signal.SIGCONT)


async def worker_replaced(site: Site, load: Load, chance: random.Random) -> None:
    n = chance.randrange(len(site.workers))
    old, site.workers[n] = site.workers[n], await asyncio.to_thread(site.new_worker)
    site.expect(await asyncio.to_thread(old.stop, 40), old)


async def gateway_killed(site: Site, load: Load, chance: random.Random) -> None:
    n = chance.randrange(len(site.gateways))
    site.gateways[n].kill()
    site.gateways[n] = await asyncio.to_thread(site.new_gateway, site.gateways[n].port)


async def gateway_replaced(site: Site, load: Load, chance: random.Random) -> None:
    n = chance.randrange(len(site.gateways))
    old = site.gateways[n]
    site.expect(await asyncio.to_thread(old.stop, 20), old)
    site.gateways[n] = await asyncio.to_thread(site.new_gateway, old.port)


async def connections_reset(site: Site, load: Load, chance: random.Random) -> None:
    site.pair.address.reset()


async def network_slow(site: Site, load: Load, chance: random.Random) -> None:
    site.pair.address.delay(chance.uniform(0.01, 0.1))
    await asyncio.sleep(chance.uniform(0.5, 2))
    site.pair.address.heal()


async def redis_killed(site: Site, load: Load, chance: random.Random) -> None:
    """Loses nothing: the kernel has what was written."""
    site.pair.primary.kill()
    await asyncio.sleep(chance.uniform(0, 2))
    await asyncio.to_thread(site.pair.primary.start)


async def redis_stopped(site: Site, load: Load, chance: random.Random) -> None:
    site.pair.primary.pause()
    await asyncio.sleep(chance.uniform(0.2, 4))
    site.pair.primary.resume()


async def redis_cut(site: Site, load: Load, chance: random.Random) -> None:
    """A power cut takes what was written in the last second; the replica forgets it too, when the primary is back."""
    before = site.pair.primary.aof.stat().st_size
    await asyncio.sleep(chance.random())
    written = max(site.pair.primary.aof.stat().st_size - before, 1)
    await asyncio.to_thread(site.pair.primary.restart, cut=chance.randint(1, written))


async def failed_over(site: Site, load: Load, chance: random.Random) -> None:
    """What was written since the replica heard the last is acknowledged, and lost."""
    site.pair.link.pause()
    await asyncio.sleep(chance.uniform(0, 0.6))
    await site.pair.fail_over()
    await site.pair.rejoin()


async def run_cancelled(site: Site, load: Load, chance: random.Random) -> None:
    if load.runs:
        request_id = chance.choice(list(load.runs.values()))
        with contextlib.suppress(*NO_ANSWER):
            await load.ask("POST", f"/api/v1/runs/{request_id}/cancel")


PROCESSES: tuple[Fault, ...] = (worker_killed, worker_stopped, worker_replaced, gateway_killed, gateway_replaced)
REDIS: tuple[Fault, ...] = (connections_reset, network_slow, redis_killed, redis_stopped)
LOSSES: tuple[Fault, ...] = (redis_cut, failed_over)
CLIENTS: tuple[Fault, ...] = (run_cancelled,)


@dataclass
class Report:
    """What one storm did, and what came of it."""

    seed: int
    durability: str
    evidence: Evidence
    violations: list[Violation]
    excused: Counter[str] = field(default_factory=Counter)
    """What PROTOCOL 7 does not promise, by kind."""
    exits: list[str] = field(default_factory=list)

    @property
    def sound(self) -> bool:
        return not self.violations and not self.exits

    def __str__(self) -> str:
        lines = [f"seed {self.seed}, {self.durability}: {self.evidence}; {len(self.violations)} violations"]
        if self.excused:
            lines[0] += f"; not promised: {dict(self.excused)}"
        return "\n".join(lines + [f"  {text}" for text in (*map(str, self.violations), *self.exits)])


async def storm(
    launch: Launcher, faults: Collection[Fault], seed: int, *, seconds: float = STORM_SECONDS, plan: Plan = PLAN
) -> Report:
    """One storm of `faults` under a load; its history is a file in the launcher's folder."""
    chance = random.Random(seed)
    site = Site(launch, chance.choice(["fast", "replicated"]))
    urls = [gateway.url for gateway in site.gateways]
    async with Load(urls, site.pair.url, plan, chance=chance, folder=launch.folder) as load:
        ends = time.monotonic() + seconds
        under_way: dict[str, asyncio.Task[None]] = {}
        while time.monotonic() < ends and not load.done:
            await asyncio.sleep(chance.uniform(0.2, 2))
            fault = chance.choice(list(faults))
            place = fault.__name__.partition("_")[0].replace("failed", "redis").replace("network", "redis")
            if place in under_way and not under_way[place].done():
                continue  # of one kind of thing only one is broken at a time
            load.history.fault(fault.__name__)
            under_way[place] = asyncio.create_task(fault(site, load, chance))
        await asyncio.gather(*under_way.values())
        evidence = await load.finish()
    return _judged(seed, site, evidence)


def _judged(seed: int, site: Site, evidence: Evidence) -> Report:
    """Only where Redis has lost something, and only what PROTOCOL 7 names, is anything excused."""
    kinds = {fault.kind for fault in evidence.history.faults}
    excused: Counter[str] = Counter()
    allowed = Allowed()
    if kinds & {fault.__name__ for fault in LOSSES}:
        lost = _lost_runs(evidence) if site.durability == "fast" or redis_cut.__name__ in kinds else set()
        closings = {request_id for request_id in evidence.logs if _closing_may_be_lost(evidence, request_id, kinds)}
        excused.update({"runs lost with the primary": len(lost), "closings lost": len(closings)})
        allowed = Allowed(rolled_back=True, lost_keys=True, lost_runs=lost, lost_closings=closings)
    violations = [found for found in evidence.violations(allowed) if found.request_id not in allowed.lost_runs]
    return Report(seed, site.durability, evidence, violations, +excused, site.exits)


def _lost_runs(evidence: Evidence) -> set[str]:
    """Runs that are gone, or were until a repeated submit made them anew (PROTOCOL 5.3)."""
    missed = {reading.request_id for reading in evidence.history.readings.values() if reading.end in ("gone", "404")}
    missed |= {request_id for _, request_id, run in evidence.history.polls if run is None}
    return missed | {request_id for request_id, run in evidence.polls.items() if run is None}


def _closing_may_be_lost(evidence: Evidence, request_id: str, kinds: set[str]) -> bool:
    """Whether a reader has seen an end that the log does not have, and PROTOCOL 7 says that this can be."""
    stored = {str(entry.id) for entry in evidence.logs[request_id]}
    unknown = [
        frame
        for reading in evidence.history.readings.values()
        if reading.request_id == request_id
        for frame in reading.frames
        if frame.type in ("final", "error", "cancelled") and frame.id.rpartition("/")[2] not in stored
    ]
    writer_gone = bool(kinds & {"worker_killed", "worker_stopped", "worker_replaced"})
    return any(frame.type != "final" or writer_gone for frame in unknown) or any(
        json.loads(entry.data)["reason"] == "data_lost"
        for entry in evidence.logs[request_id]
        if entry.type == "attempt" and unknown
    )


ALL = (*PROCESSES, *REDIS, *LOSSES, *CLIENTS)


def folder_of(base: Path, seed: int) -> Path:
    folder = base / f"storm-{seed}"
    folder.mkdir(parents=True)
    return folder
