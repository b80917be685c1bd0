"""Reapers (PROTOCOL 4.2 to 4.7)."""

from __future__ import annotations

from broker.runs.scripts import Answer
from tests.model.closing import Closing
from tests.model.processes import Job, Mode, Reaper
from tests.model.rules import Rule
from tests.model.scripts import LEASE_MS, LIVE, Record

FORGET_MS = 120_000
MAX_ENQUEUES = 5


class Reaping(Closing):
    """They see what is due in the index, and what a scan of all records finds."""

    def step_reap(self, n: int, order: int, mode: Mode) -> None:
        reaper = self.reapers[n % len(self.reapers)]
        if reaper.to_enqueue:
            if self.enqueue(mode, reaper.to_enqueue[0]):
                reaper.to_enqueue.pop(0)
        elif reaper.spent is not None:
            self._close_spent(reaper, mode)
        elif due := sorted(name for name, at in self.index.state.items() if at <= self.index_time):
            self.now += 1
            self._look_at(reaper, due[order % len(due)], mode)

    def _look_at(self, reaper: Reaper, request_id: str, mode: Mode) -> None:
        record = self.runs.state.get(request_id)
        if record is None or record.status not in LIVE:
            since = reaper.ended.setdefault(request_id, self.now)
            if self.now - since >= FORGET_MS or Rule.FORGET_LATE in self.dropped:
                self.index.put(request_id, None)
                del reaper.ended[request_id]
            else:
                self.index.put(request_id, self.index_time + 5000)
            return
        reaper.ended.pop(request_id, None)
        self.index.put(request_id, self.index_time + 1000)
        if record.status == "running":
            if (self.now < reaper.patient_until and Rule.PATIENCE not in self.dropped) or not self.settled:
                return
            fenced = self.call(mode, self.runs, lambda: self.scripts.fence(request_id))
            if isinstance(fenced, int):
                self._reenqueue(reaper, Job(request_id, fenced, 0))
            elif fenced is not None and fenced.answer is Answer.SPENT:
                reaper.spent = (request_id, record.deadline)
        else:
            self._look_at_queued(reaper, request_id, record, mode)

    def _look_at_queued(self, reaper: Reaper, request_id: str, record: Record, mode: Mode) -> None:
        following = record.attempt + 1
        there = any((job.request_id, job.attempt) == (request_id, following) for job in self.queue.state)
        if there or Rule.REQUEUE in self.dropped:
            return
        if record.enqueues < MAX_ENQUEUES:
            times = self.call(mode, self.runs, lambda: self.scripts.requeue(request_id, following, record.enqueues))
            if isinstance(times, int):
                self.index.put(request_id, self.index_time + 10_000)
                self._reenqueue(reaper, Job(request_id, following, times))
        elif self.settled:
            token = f"r{self.unique()}"
            closed = self.call(
                mode,
                self.runs,
                lambda: self.scripts.close(request_id, "error", token, if_attempt=record.attempt),
            )
            self.keep_closing(reaper.name, request_id, "error", token, closed)

    def _reenqueue(self, reaper: Reaper, job: Job) -> None:
        if Rule.REQUEUE not in self.dropped:
            reaper.to_enqueue.append(job)

    def _close_spent(self, reaper: Reaper, mode: Mode) -> None:
        assert reaper.spent is not None
        request_id, deadline = reaper.spent
        if self.settled:
            token = f"r{self.unique()}"
            closed = self.call(
                mode, self.runs, lambda: self.scripts.close(request_id, "error", token, if_deadline=deadline)
            )
            self.keep_closing(reaper.name, request_id, "error", token, closed)
        reaper.spent = None

    def step_scan(self) -> None:
        if Rule.SCAN not in self.dropped:
            for request_id, record in self.runs.state.items():
                if record.status in LIVE and request_id not in self.index.state:
                    self.index.put(request_id, self.index_time)

    def step_reaper_dies(self, n: int) -> None:
        n %= len(self.reapers)
        self.forget(self.reapers[n].name)
        self.reapers[n] = Reaper(f"reaper {n}, after {self.unique()}", self.now + LEASE_MS)
