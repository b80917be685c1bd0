"""P11 behind Sentinels: the primary is killed, or stands still until another one has taken over, under a load."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from tests.chaos.report import Recoveries
from tests.chaos.sentinel_site import SentinelSite, redis_killed, redis_stopped
from tests.chaos.site import Fault
from tests.chaos.storm import CLIENTS, storm
from tests.kit.load import Plan
from tests.kit.scale import scaled
from tests.kit.tls import make_certificates

PLAN = Plan(runs=10, readers=3, count=60, pause=0.04, spread=4, silence=6, limit=90)
SECONDS = 4.0


async def storms(site: SentinelSite, faults: Sequence[Fault[SentinelSite]], count: int) -> None:
    """Each with one of the `faults`, and with clients that cancel and erase."""
    recoveries = Recoveries()
    for n in range(count):
        seed = random.randrange(2**32)
        print(f"seed {seed}")
        chosen = (faults[n % len(faults)], *CLIENTS)
        report = await storm(site, chosen, seed, seconds=SECONDS, plan=replace(PLAN, name=f"{n}-"))
        print(report)
        assert report.sound, report
        assert report.outages
        recoveries.add(report.recoveries)
    print(f"{site.durability}: {recoveries}")


@pytest.mark.timeout(1800)
async def test_after_a_failover_all_readers_agree_with_the_log(tmp_path: Path) -> None:
    async with SentinelSite(tmp_path, "fast") as site:
        await storms(site, (redis_killed, redis_stopped), scaled(10))


@pytest.mark.timeout(1800)
async def test_after_a_failover_no_run_is_lost_that_was_on_a_replica(tmp_path: Path) -> None:
    """Over TLS."""
    certificates = make_certificates(tmp_path / "certificates")
    async with SentinelSite(tmp_path, "replicated", certificates) as site:
        await storms(site, (redis_stopped, redis_killed), scaled(10))
