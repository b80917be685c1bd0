"""The model: all the steps that a schedule is made of, and its fair end."""

from __future__ import annotations

from tests.model.processes import Step
from tests.model.reading import Reading
from tests.model.reaping import Reaping
from tests.model.scripts import LIVE
from tests.model.submitting import Submitting
from tests.model.working import Working


class World(Submitting, Working, Reaping, Reading):
    """Runs a schedule. Raises Violation as soon as something does not hold."""

    def step(self, step: Step) -> None:
        self.now += 1
        name, *arguments = step
        getattr(self, f"step_{name}")(*arguments)
        self.judge.check()

    def settle(self, ticks: int = 700) -> None:
        """All faults are over, and everything that lives has its turn; then everything must have come to its end."""
        self._late = []
        for tick in range(ticks):
            self.now += 500 if tick < 300 else 1000
            self._fair_turn(tick)
            self.judge.check()
            if tick % 10 == 9 and self._is_over():
                break
        self.judge.check_end()

    def _fair_turn(self, tick: int) -> None:
        for n in range(len(self.submitters)):
            self.step_submitter(n, "ok")
        for n in range(len(self.kept)):
            self.step_send_again(n, "ok")
        for n in range(len(self.workers)):
            self.step_worker(n, 1, 0, tick % 5 == 4, "ok")
        for n in range(len(self.reapers)):
            self.step_reap(n, tick, "ok")
        for n in range(len(self.gateways)):
            self.step_pump(n)
            if tick % 10 == 0:
                self.step_beat(n)
        if tick % 100 == 99:
            self.step_scan()
        for n, reader in enumerate(self.readers):
            if not reader.ended:
                if reader.gateway is None:
                    self.step_connect(n, n)
                self.step_deliver(n, 50)

    def _is_over(self) -> bool:
        return (
            not self.submitters
            and all(record.status not in LIVE for record in self.runs.state.values())
            and all(reader.ended or reader.request_id is None for reader in self.readers)
            and all(kept.generation == self.runs.generation for kept in self.kept)
        )
