"""P11 and P16 on a Cluster: primaries are killed and slots are moved while runs stream."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from tests.chaos.cluster_site import (
    ClusterSite,
    queue_killed,
    queue_stopped,
    redis_killed,
    redis_stopped,
    slots_moved,
)
from tests.chaos.report import Recoveries
from tests.chaos.site import Fault
from tests.chaos.storm import CLIENTS, storm
from tests.kit.load import Plan
from tests.kit.scale import scaled

PLAN = Plan(runs=15, readers=3, count=100, pause=0.04, spread=5, silence=6, limit=90)
SECONDS = 7.0
MOST = {"gateway": 6, "worker": 19, "node": 50}
"""Connections to a node: a gateway has four for commands, one for subscriptions, and for a moment one to ask how the
Cluster looks; a worker has sixteen, and those of its subscriber beside. Two gateways and two workers together."""


async def storms(site: ClusterSite, faults: Sequence[Sequence[Fault[ClusterSite]]], count: int) -> None:
    """Each with some of the `faults`, and with clients that cancel and erase."""
    recoveries = Recoveries()
    for n in range(count):
        seed = random.randrange(2**32)
        print(f"seed {seed}")
        chosen = (*faults[n % len(faults)], *CLIENTS)
        report = await storm(site, chosen, seed, seconds=SECONDS, plan=replace(PLAN, name=f"{n}-"))
        print(f"{report}\n  {site.moves} slots moved; connections {dict(site.connections)}")
        assert report.sound, report
        recoveries.add(report.recoveries)
    print(f"{site.durability}: {recoveries}")
    assert all(site.connections[kind] <= most for kind, most in MOST.items()), site.connections


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("durability", "faults"),
    [
        ("fast", ((redis_killed, slots_moved), (redis_stopped, slots_moved))),
        ("replicated", ((redis_stopped, slots_moved), (redis_killed, slots_moved))),
    ],
    ids=["fast", "replicated"],
)
async def test_while_a_primary_goes_and_slots_move_all_readers_agree_with_the_log(
    durability: str, faults: Sequence[Sequence[Fault[ClusterSite]]], tmp_path: Path
) -> None:
    async with ClusterSite(tmp_path, durability) as site:
        await storms(site, faults, scaled(10))


@pytest.mark.timeout(600)
async def test_while_only_slots_move_nothing_is_lost(tmp_path: Path) -> None:
    async with ClusterSite(tmp_path, "fast") as site:
        await storms(site, [(slots_moved,)], scaled(10))


@pytest.mark.timeout(600)
async def test_the_queue_may_be_watched_by_sentinels_and_fail_over_as_well(tmp_path: Path) -> None:
    async with ClusterSite(tmp_path, "fast", sentinels=True) as site:
        await storms(site, [(queue_killed, redis_killed), (queue_stopped, redis_killed)], scaled(10))
