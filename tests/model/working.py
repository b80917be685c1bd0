"""Workers: take a job, claim, write, hand over (PROTOCOL 4, 5.7)."""

from __future__ import annotations

from broker.ids import EventId
from broker.runs.scripts import Answer
from tests.model.closing import Closing
from tests.model.processes import Held, Job, Mode, Worker
from tests.model.rules import Rule
from tests.model.scripts import Checkpoint, Content, Entry, Granted


class Working(Closing):
    """The agents say numbers, each of which stands on the one before."""

    def step_worker(self, n: int, count: int, checkpoint: int, final: int, mode: Mode) -> None:
        """It does the next thing that it has to do. An agent says `count` things, the last with a checkpoint."""
        worker = self.workers[n % len(self.workers)]
        if worker.state == "idle":
            self._take_job(worker, count, mode)
        elif worker.state == "claiming":
            self._claim(worker, mode)
        elif worker.state == "running":
            self._write(worker, count, bool(checkpoint), bool(final), mode)
        elif worker.state == "handing over":
            self._hand_over(worker, mode)
        elif worker.job is not None and self.enqueue(mode, worker.job):
            worker.state = "idle"

    def _take_job(self, worker: Worker, n: int, mode: Mode) -> None:
        if jobs := sorted(self.queue.state):
            job = jobs[n % len(jobs)]
            self.now += 1
            if mode in ("ok", "lost reply"):
                self.queue.put(job, None)
            if mode == "ok":
                worker.state, worker.job, worker.token = "claiming", job, f"t{self.unique()}"

    def _claim(self, worker: Worker, mode: Mode) -> None:
        job, token = worker.job, worker.token
        assert job is not None
        if not self.settled:
            return
        granted = self.call(mode, self.runs, lambda: self.scripts.claim(job.request_id, job.attempt, token))
        if isinstance(granted, Granted):
            self.judge.owner[job.request_id, granted.epoch] = worker.name
            worker.state = "running"
            worker.held = Held(
                job.request_id,
                granted.epoch,
                token,
                granted.attempt,
                granted.resume_from,
                granted.checkpoint.content,
                list(granted.opening),
            )
        elif granted is not None:
            worker.state = "idle"

    def _write(self, worker: Worker, count: int, checkpoint: bool, final: bool, mode: Mode) -> None:
        held = worker.held
        assert held is not None
        if held.written == len(held.tail) and not held.done:
            self._say(held, count, checkpoint, final)
        epoch, token, attempt, resume_from = held.epoch, held.token, held.attempt, held.resume_from
        kept_from, first = held.kept_from, held.kept_from + held.written
        batch = tuple(held.tail[held.written :])
        covered = self._checkpoint_of(held, batch)
        reply = self.call(
            mode,
            self.runs,
            lambda: self.scripts.append(
                held.request_id, epoch, token, attempt, resume_from, kept_from, first, batch, covered
            ),
        )
        if reply is None:
            return
        if reply.answer in (Answer.OK, Answer.DUP):
            held.written = len(held.tail)
            if held.done:
                self.keep(worker.name, "final", held.request_id, epoch, token, attempt, resume_from, tuple(held.tail))
                self._idle(worker)
        elif reply.answer is Answer.GAP:
            held.resent_below = max(held.resent_below, first)
            held.written = sum(entry.id <= reply.end for entry in held.tail)
        elif reply.answer is Answer.LOST:
            if held.done:
                self.judge.excused.add((held.request_id, epoch))
            worker.state = "handing over"
        else:
            if held.done:
                self.judge.closing_failed(held.request_id, epoch)
            self._idle(worker)

    def _say(self, held: Held, count: int, checkpoint: bool, final: bool) -> None:
        for n in range(count + final):
            kind = "final" if n == count else "token"
            event_id = EventId(held.epoch, held.kept_from + len(held.tail))
            said: Content = self.unique()
            covers = checkpoint and n == count - 1
            held.tail.append(Entry(event_id, kind, said, held.tip, checkpoint=covers))
            held.tip = said
        held.done = final

    def _checkpoint_of(self, held: Held, batch: tuple[Entry, ...]) -> Checkpoint | None:
        lost = held.resent_below if Rule.CHECKPOINT_IN_TAIL in self.dropped else 0
        covered = [entry for entry in batch if entry.checkpoint and entry.id.seq >= lost]
        return Checkpoint(covered[-1].id, covered[-1].content) if covered else None

    def _hand_over(self, worker: Worker, mode: Mode) -> None:
        held = worker.held
        assert held is not None
        following = self.call(
            mode,
            self.runs,
            lambda: self.scripts.hand_over(held.request_id, held.epoch, held.token, held.attempt),
        )
        if isinstance(following, int):
            self._idle(worker)
            worker.state, worker.job = "enqueueing", Job(held.request_id, following, 0)
        elif following is not None:
            self._idle(worker)

    def _idle(self, worker: Worker) -> None:
        worker.state, worker.held, worker.job = "idle", None, None

    def step_drain(self, n: int) -> None:
        worker = self.workers[n % len(self.workers)]
        held = worker.held
        if worker.state == "running" and held is not None and held.written == len(held.tail) and not held.done:
            worker.state = "handing over"

    def step_trim(self, n: int) -> None:
        """Its buffer is bounded: it forgets what is in the log, except for the last entry."""
        held = self.workers[n % len(self.workers)].held
        if held is not None and held.written > 1:
            held.kept_from += held.written - 1
            held.tail = held.tail[held.written - 1 :]
            held.written = 1

    def step_worker_dies(self, n: int) -> None:
        n %= len(self.workers)
        self.forget(self.workers[n].name)
        self.workers[n] = Worker(f"worker {n}, after {self.unique()}")
