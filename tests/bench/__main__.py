"""`python -m tests.bench [--quick] [--repeat N] [--json FILE] [scenario …]`"""

from __future__ import annotations

import argparse
import contextlib
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType

from tests.bench import machine
from tests.bench.figures import Figures, median
from tests.bench.machine import Cores, Machine
from tests.bench.report import DISTURBED, Result, head, table, write_json
from tests.bench.scenarios import FULL, QUICK, Scenario
from tests.bench.targets import TARGETS, Target
from tests.bench.tools import build


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options(arguments)
    if sys.platform != "linux":
        sys.exit("The benchmark needs Linux: epoll, /proc and CPU affinity.")
    signal.signal(signal.SIGTERM, _terminated)
    machine.raise_open_files()
    for tool in ("sse_load", "sse_pub"):
        build(tool)
    cores = machine.cores()
    this = Machine.this()
    print(head(this, cores, aof=options.aof), end="\n\n", flush=True)
    results = []
    with machine.pinned(cores.others), contextlib.ExitStack() as stack:
        bench = Bench(cores, options, stack)
        for scenario in options.suite.scenarios:
            if not options.scenarios or scenario.name in options.scenarios:
                results.append(bench.run(scenario))
                print(table(results[-1]), end="\n\n", flush=True)
    if options.json:
        write_json(options.json, this, results)
    return 0


class Bench:
    """Measures scenarios on every target. Those that the targets share live as long as `stack`."""

    def __init__(self, cores: Cores, options: argparse.Namespace, stack: contextlib.ExitStack) -> None:
        self._cores = cores
        self._options = options
        self._stack = stack
        self._shared: dict[str, Target] = {}

    def run(self, scenario: Scenario) -> Result:
        """The targets take turns."""
        measured: dict[str, list[Figures]] = {name: [] for name in self._options.targets}
        for _ in range(self._options.repeat):
            for name, figures in measured.items():
                figures.append(self._undisturbed(name, scenario))
        medians = {name: median(figures) for name, figures in measured.items()}
        return Result(scenario.name, scenario.title, medians, measured)

    def _undisturbed(self, name: str, scenario: Scenario) -> Figures:
        """Of several tries the first that others left alone, else the one that they disturbed least."""
        tries: list[Figures] = []
        for _ in range(self._options.tries):
            machine.wait_until_quiet(self._options.patience)
            with self._target(name) as target:
                tries.append(scenario.measure(target))
            if tries[-1].disturbed <= DISTURBED:
                break
        return min(tries, key=lambda figures: figures.disturbed)

    @contextlib.contextmanager
    def _target(self, name: str) -> Iterator[Target]:
        if self._options.suite.own_target:
            with contextlib.ExitStack() as stack:
                yield self._start(name, stack)
        else:
            if name not in self._shared:
                self._shared[name] = self._start(name, self._stack)
            yield self._shared[name]

    def _start(self, name: str, stack: contextlib.ExitStack) -> Target:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="stream-broker-bench-")))
        target = TARGETS[name](folder, self._cores, aof=self._options.aof, heartbeat=self._options.suite.heartbeat)
        return stack.enter_context(target)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    names = [scenario.name for scenario in FULL.scenarios]
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description="This gateway beside a hand-written one")
    parser.add_argument("scenarios", nargs="*", metavar="scenario", help=f"of {', '.join(names)}; all by default")
    parser.add_argument(
        "--quick", dest="suite", action="store_const", const=QUICK, default=FULL, help="a smoke run of some seconds"
    )
    parser.add_argument("--target", dest="targets", action="append", choices=list(TARGETS), help="only this one")
    parser.add_argument("--repeat", type=int, default=1, help="measure this often and report medians")
    parser.add_argument("--tries", type=int, default=1, help="measurements of which the least disturbed counts")
    parser.add_argument("--patience", type=float, default=30, help="seconds to wait for a quiet machine")
    parser.add_argument("--aof", action="store_true", help="Redis with appendonly yes")
    parser.add_argument("--json", type=Path, help="write everything measured to this file")
    options = parser.parse_args(arguments)
    if unknown := set(options.scenarios) - set(names):
        parser.error(f"no such scenario: {', '.join(sorted(unknown))} (there are {', '.join(names)})")
    options.targets = options.targets or list(TARGETS)
    return options


def _terminated(number: int, frame: FrameType | None) -> None:
    """Unwinds, so that no process is left behind."""
    sys.exit(128 + number)


if __name__ == "__main__":
    sys.exit(main())
