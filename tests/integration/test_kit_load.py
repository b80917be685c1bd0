"""The kit's load: what it records of a sound service is sound, and what goes wrong is found."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

from tests.conftest import Launcher, Service
from tests.kit.checker import Allowed
from tests.kit.history import History
from tests.kit.load import Load, Plan

PLAN = Plan(runs=6, readers=4, count=40, spread=0.5, limit=40)


def seeded() -> random.Random:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    return random.Random(seed)


async def test_all_is_well_where_nothing_fails(service: Service, tmp_path: Path) -> None:
    urls = [gateway.url for gateway in service.gateways]
    async with Load(urls, service.redis.url, PLAN, chance=seeded(), folder=tmp_path) as load:
        evidence = await load.finish()
    print(evidence)
    assert evidence.violations() == []
    assert len(evidence.logs) == PLAN.runs and len(evidence.texts) == PLAN.runs
    assert len(load.history.readings) == PLAN.runs * PLAN.readers
    assert {reading.end for reading in load.history.readings.values()} == {"terminal", "204"}
    assert all(len(entries) == PLAN.count + 3 for entries in evidence.logs.values())


async def test_the_history_in_the_file_is_the_one_that_was_judged(service: Service, tmp_path: Path) -> None:
    urls = [gateway.url for gateway in service.gateways]
    async with Load(urls, service.redis.url, PLAN, chance=seeded(), folder=tmp_path) as load:
        load.history.fault("none", text="é\\u2028")
        await load.finish()
    loaded = History.load(tmp_path / "history.jsonl")
    for name in ("readings", "submits", "faults", "polls", "notes"):
        assert getattr(loaded, name) == getattr(load.history, name), name


async def test_an_entry_that_vanishes_from_redis_is_found(launch: Launcher, tmp_path: Path) -> None:
    server = launch.redis()
    gateway, _ = launch.gateway(server.url), launch.worker(server.url)
    async with Load([gateway.url], server.url, PLAN, chance=seeded(), folder=tmp_path) as load:
        while not load.done:
            await asyncio.sleep(0.1)
        victim = next(iter(load.runs.values()))
        entries = server.ask("XRANGE", f"sb:{{{victim}}}:log", "-", "+")
        server.ask("XDEL", f"sb:{{{victim}}}:log", entries[5][0])
        evidence = await load.finish()
    found = evidence.violations()
    assert {violation.request_id for violation in found} == {victim}
    assert {violation.kind for violation in found} == {"lost", "foreign", "text"}
    assert {violation.kind for violation in evidence.violations(Allowed(rolled_back=True))} >= {"lost", "fold"}
