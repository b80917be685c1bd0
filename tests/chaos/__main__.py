"""`python -m tests.chaos` lets storms pass over the service, for minutes or hours, and tells what broke.

`make chaos` calls it. Each storm prints its seed; `--seed` repeats the schedule of one.
"""

from __future__ import annotations

import asyncio
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import click

from tests.chaos import cluster_site, pair_site, sentinel_site
from tests.chaos.report import Recoveries, Report
from tests.chaos.site import Fault, Site
from tests.chaos.storm import CLIENTS, PROCESSES, folder_of, storm

SITES: dict[str, tuple[type[Site], tuple[Fault[Any], ...], tuple[Fault[Any], ...]]] = {
    "pair": (pair_site.PairSite, pair_site.REDIS, pair_site.LOSSES),
    "sentinel": (sentinel_site.SentinelSite, sentinel_site.REDIS, sentinel_site.LOSSES),
    "cluster": (cluster_site.ClusterSite, cluster_site.REDIS, cluster_site.LOSSES),
}


@click.command()
@click.option("--minutes", default=60.0, show_default=True, help="For how long storms are begun.")
@click.option("--seed", type=int, help="Only the storm of this seed.")
@click.option("--redis", type=click.Choice(list(SITES)), default="pair", show_default=True, help="What holds the runs.")
@click.option(
    "--faults",
    type=click.Choice(["all", "processes", "redis", "losses", "clients"]),
    multiple=True,
    default=["all"],
    help="What may break.",
)
def main(minutes: float, seed: int | None, redis: str, faults: tuple[str, ...]) -> None:
    site, of_redis, losses = SITES[redis]
    groups = {"processes": PROCESSES, "redis": of_redis, "losses": losses, "clients": CLIENTS}
    groups["all"] = tuple(fault for group in groups.values() for fault in group)
    chosen = [fault for name in faults for fault in groups[name]]
    base = Path(tempfile.mkdtemp(prefix="storms-"))
    ends = time.monotonic() + minutes * 60
    totals: Counter[str] = Counter()
    recoveries = Recoveries()
    while True:
        current = seed if seed is not None else random.randrange(2**32)
        folder = folder_of(base, current)
        report = asyncio.run(one(site, folder, chosen, current))
        print(report, flush=True)
        _add(totals, report)
        recoveries.add(report.recoveries)
        if report.sound:
            shutil.rmtree(folder)
        else:
            print(f"  its history and logs are in {folder}", flush=True)
        if seed is not None or time.monotonic() >= ends:
            break
    print(f"in all: {dict(totals)}")
    print(recoveries)
    sys.exit(1 if totals["violations"] or totals["wrong exits and errors"] else 0)


async def one(kind: type[Site], folder: Path, faults: list[Fault[Any]], seed: int) -> Report:
    async with kind(folder, random.Random(seed).choice(["fast", "replicated"])) as site:
        return await storm(site, faults, seed)


def _add(totals: Counter[str], report: Report) -> None:
    evidence = report.evidence
    totals["storms"] += 1
    totals["faults"] += len(evidence.history.faults)
    totals["runs"] += len(evidence.logs)
    totals["rewinds"] += evidence.rewinds
    totals["events checked"] += sum(len(reading.frames) for reading in evidence.history.readings.values())
    totals["violations"] += len(report.violations)
    totals["wrong exits and errors"] += len(report.exits)
    totals += Counter(f"fault: {fault.kind}" for fault in evidence.history.faults)
    totals += report.healed
    totals += Counter({f"not promised: {kind}": count for kind, count in report.excused.items()})


if __name__ == "__main__":
    main()
