"""Results as a table for people and as JSON for programs."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from tests.bench.figures import ROWS, Figures
from tests.bench.machine import Cores, Machine

DISTURBED = 0.05
"""Of a core: above this, what others did may have changed a measurement."""


class Result(NamedTuple):
    """One scenario: the median of each target, and the single measurements."""

    scenario: str
    title: str
    medians: Mapping[str, Figures]
    measured: Mapping[str, Sequence[Figures]]


def head(machine: Machine, cores: Cores, *, aof: bool) -> str:
    """Where and with what the figures were measured."""
    return (
        f"{machine.cpu}, {machine.core_count} cores, {machine.kernel}; {cores}\n{machine.versions}\n"
        f"loopback, events of 120 bytes, Redis without snapshots, {'with' if aof else 'without'} AOF"
    )


def table(result: Result) -> str:
    """The targets side by side."""
    names = list(result.medians)
    lines = [f"{result.scenario}: {result.title}", " " * 46 + "".join(f"{name:>14}" for name in names)]
    for field, label, form in ROWS:
        values = [getattr(result.medians[name], field) for name in names]
        if any(value is not None for value in values):
            cells = ("–" if value is None else format(value, form) for value in values)
            lines.append(f"  {label:<44}" + "".join(f"{cell:>14}" for cell in cells))
    for name, figures in result.medians.items():
        if not figures.complete:
            lines.append(f"  {name}: not every client got everything")
        if figures.disturbed > DISTURBED:
            lines.append(f"  {name}: disturbed, other processes took {figures.disturbed:.0%} of a core")
    return "\n".join(lines)


def write_json(path: Path, machine: Machine, results: Sequence[Result]) -> None:
    document = {
        "machine": dataclasses.asdict(machine),
        "results": [
            {
                "scenario": result.scenario,
                "title": result.title,
                "medians": {name: dataclasses.asdict(figures) for name, figures in result.medians.items()},
                "measured": {
                    name: [dataclasses.asdict(figures) for figures in every] for name, every in result.measured.items()
                },
            }
            for result in results
        ],
    }
    path.write_text(json.dumps(document, indent=2) + "\n", "utf-8")
