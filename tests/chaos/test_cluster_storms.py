"""P11 and P16 on a Cluster: primaries go and slots move while runs stream; the queue is behind Sentinels."""

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

PLAN = Plan(runs=12, readers=3, count=70, pause=0.04, spread=4, silence=6, limit=90)
SECONDS = 4.5
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
        print(f"{report}\n  {site.moves} slots moved so far; connections {dict(site.connections)}")
        assert report.sound, report
        assert report.outages or not site.may_lose
        recoveries.add(report.recoveries)
    print(f"{site.durability}: {recoveries}")
    assert site.moves
    assert all(site.connections[kind] <= most for kind, most in MOST.items()), site.connections


@pytest.mark.timeout(3600)
async def test_while_slots_move_nothing_is_lost_and_while_primaries_go_all_readers_agree_with_the_log(
    tmp_path: Path,
) -> None:
    async with ClusterSite(tmp_path, "fast") as site:
        faults = [(slots_moved,), (redis_killed, slots_moved, queue_killed)]
        await storms(site, [*faults, (slots_moved, queue_stopped), (redis_stopped, slots_moved)], scaled(20))


@pytest.mark.timeout(3600)
async def test_while_primaries_go_no_run_is_lost_that_was_on_a_replica(tmp_path: Path) -> None:
    async with ClusterSite(tmp_path, "replicated") as site:
        await storms(site, [(redis_stopped, slots_moved), (redis_killed, slots_moved)], scaled(10))
