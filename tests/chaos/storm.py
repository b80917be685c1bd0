"""Storms: a load of runs and readers, and faults at random times. Judged by the checker; what is excused is counted."""

from __future__ import annotations

import asyncio
import contextlib
import random
import signal
import time
from collections.abc import Collection
from pathlib import Path

from tests.chaos.report import Report, judge
from tests.chaos.site import LEASE_SECONDS, Fault, S, Site
from tests.kit.load import NO_ANSWER, Load, Plan

PLAN = Plan(runs=14, readers=3, count=120, pause=0.04, spread=8, silence=6, limit=120)
STORM_SECONDS = 14.0


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


async def run_cancelled(site: Site, load: Load, chance: random.Random) -> None:
    if load.runs:
        request_id = chance.choice(list(load.runs.values()))
        with contextlib.suppress(*NO_ANSWER):
            status, run = await load.ask("POST", f"/api/v1/runs/{request_id}/cancel")
            if status == 200 and run["status"] == "cancelled":
                site.cancelled.add(request_id)


async def run_erased(site: Site, load: Load, chance: random.Random) -> None:
    if load.runs:
        request_id = chance.choice(list(load.runs.values()))
        site.perhaps_erased.add(request_id)
        with contextlib.suppress(*NO_ANSWER):
            status, _ = await load.ask("DELETE", f"/api/v1/runs/{request_id}")
            if status == 204:
                site.erased.add(request_id)


PROCESSES: tuple[Fault[Site], ...] = (worker_killed, worker_stopped, worker_replaced, gateway_killed, gateway_replaced)
CLIENTS: tuple[Fault[Site], ...] = (run_cancelled, run_erased)


async def storm(
    site: S, faults: Collection[Fault[S]], seed: int, *, seconds: float = STORM_SECONDS, plan: Plan = PLAN
) -> Report:
    """One storm of `faults` under a load, for so many seconds and until each has come; none comes twice
    before all have come. Its history is a file in the site's folder.
    """
    chance = random.Random(seed)
    urls = [gateway.url for gateway in site.gateways]
    site.begin()
    async with Load(urls, site.redis_url, plan, chance=chance, folder=site.folder) as load:
        ends = time.monotonic() + seconds
        under_way: dict[str, asyncio.Task[None]] = {}
        cards: list[Fault[S]] = []
        missing = set(faults)
        while (time.monotonic() < ends or missing) and not load.done:
            await asyncio.sleep(chance.uniform(0.2, 2))
            cards = cards or chance.sample(list(faults), len(faults))
            fault = next((card for card in cards if _is_free(under_way.get(_part(card)))), None)
            if fault is not None:
                cards.remove(fault)
                missing.discard(fault)
                load.history.fault(fault.__name__)
                under_way[_part(fault)] = asyncio.create_task(fault(site, load, chance))
        await asyncio.gather(*under_way.values())
        return judge(seed, site, await load.finish())


def _part(fault: Fault[S]) -> str:
    return fault.__name__.partition("_")[0]


def _is_free(task: asyncio.Task[None] | None) -> bool:
    """Of one part only one thing is broken at a time."""
    return task is None or task.done()


def folder_of(base: Path, seed: int) -> Path:
    folder = base / f"storm-{seed}"
    folder.mkdir(parents=True)
    return folder
