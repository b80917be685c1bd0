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

import click

from tests.chaos.storm import ALL, CLIENTS, LOSSES, PROCESSES, REDIS, Report, folder_of, storm
from tests.conftest import Launcher

FAULTS = {"all": ALL, "processes": PROCESSES, "redis": REDIS, "losses": LOSSES, "clients": CLIENTS}


@click.command()
@click.option("--minutes", default=60.0, show_default=True, help="For how long storms are begun.")
@click.option("--seed", type=int, help="Only the storm of this seed.")
@click.option("--faults", type=click.Choice(list(FAULTS)), multiple=True, default=["all"], help="What may break.")
def main(minutes: float, seed: int | None, faults: tuple[str, ...]) -> None:
    base = Path(tempfile.mkdtemp(prefix="storms-"))
    ends = time.monotonic() + minutes * 60
    chosen = [fault for name in faults for fault in FAULTS[name]]
    totals: Counter[str] = Counter()
    while True:
        current = seed if seed is not None else random.randrange(2**32)
        folder = folder_of(base, current)
        launch = Launcher(folder)
        try:
            report = asyncio.run(storm(launch, chosen, current))
        finally:
            launch.close()
        print(report, flush=True)
        _add(totals, report)
        if report.sound:
            shutil.rmtree(folder)
        else:
            print(f"  its history and logs are in {folder}", flush=True)
        if seed is not None or time.monotonic() >= ends:
            break
    print(f"in all: {dict(totals)}")
    sys.exit(1 if totals["violations"] or totals["wrong exits"] else 0)


def _add(totals: Counter[str], report: Report) -> None:
    evidence = report.evidence
    totals["storms"] += 1
    totals["faults"] += len(evidence.history.faults)
    totals["runs"] += len(evidence.logs)
    totals["rewinds"] += evidence.rewinds
    totals["events checked"] += sum(len(reading.frames) for reading in evidence.history.readings.values())
    totals["violations"] += len(report.violations)
    totals["wrong exits"] += len(report.exits)
    totals += Counter(f"fault: {fault.kind}" for fault in evidence.history.faults)
    totals += Counter({f"not promised: {kind}": count for kind, count in report.excused.items()})


if __name__ == "__main__":
    main()
