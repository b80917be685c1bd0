"""One run on a real Redis, its model, and all who have to do with it: workers, reapers, gateways, readers."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from broker.events import TERMINAL, Attempt, AttemptReason, Entry
from broker.ids import START, EventId
from broker.runs import keys, log
from broker.runs.scripts import Answer, Batch, Lease, Reply, Scripts
from tests.kit import run_model, runs
from tests.kit.run_model import BEGINNING, CLOSED, RunModel, Span, Writer
from tests.kit.run_reader import RunReader
from tests.kit.run_server import ELSEWHERE, RunServer, State
from tests.kit.runs import HOUR_MS, LEASE_MS

SETTLE_MS = 5000
MAX_RUN_MS = 120_000
Heard = Literal["once", "twice", "never"]
"""Of a call: it is answered; its reply is lost, so it is made again; it is done, but nobody hears of it."""


@dataclass(eq=False)
class Worker:
    """An attempt, as its worker knows it; after its end, what the worker keeps of it (PROTOCOL 5.2)."""

    writer: Writer
    tip: EventId
    """The last thing that the agent said, or goes on from."""
    tail: list[Entry]
    """All that was said: an id of one writer has one content."""
    states: dict[int, str] = field(default_factory=dict)
    """The checkpoint that an entry's seq would have."""
    checkpoints: set[int] = field(default_factory=set)
    kept_from: int = 1
    written: int = 1
    state: Literal["running", "handing over", "ended", "stopped"] = "running"
    confirmed_in: int = 0
    """After how many failovers its end was confirmed."""

    @property
    def epoch(self) -> int:
        return self.writer.epoch

    @property
    def done(self) -> bool:
        return self.tail[-1].type in TERMINAL


@dataclass(eq=False)
class Closing:
    """A cancel's or a reaper's, kept by who made it."""

    kind: str
    data: str
    reason: AttemptReason
    token: str
    writer: Writer | None = None
    confirmed_in: int = 0
    """After how many failovers it was confirmed."""


class RunPlay:
    """One run, and all who have to do with it. Each method is one thing that one of them does."""

    def __init__(self, url: str) -> None:
        self.server = RunServer(url)
        self.request_id = self.server.request_id
        self.model = RunModel(self.request_id)
        self.history: list[tuple[RunModel, State]] = []
        self.floor = 0
        """What every replica has of the history."""
        self.failovers = 0
        self.settles_at = 0
        self.clock_offset = 0
        self.claimed_at = self.server.now()
        self.tokens = 0
        self.workers: list[Worker] = []
        self.closings: list[Closing] = []
        self.spent: list[tuple[str, int | None]] = []
        """Runs that a reaper has found spent or overdue: why, and the deadline."""
        self.erased_in: int | None = None
        self.readers = [RunReader(), RunReader()]
        self.contents: dict[EventId, Entry] = {}
        self.taken: set[int] = set()
        """Epochs whose closing a failover took."""
        self.done: Counter[str] = Counter()
        self.ears = runs.Ears(url, keys.channel(self.request_id))
        self.mirror: list[Entry] = []
        """The log as the messages tell it."""

    def end(self) -> None:
        self.ears.__exit__()
        self.server.close()

    def call(
        self,
        make: Callable[[Scripts], Awaitable[Reply | Lease]],
        expect: Callable[[Any, Span], run_model.Answer | Writer],
        heard: Heard = "once",
    ) -> Reply | Lease | None:
        """Makes the call, and compares what it answers. None where nobody hears the answer."""
        for _ in range(2 if heard == "twice" else 1):
            reply, now = self.server.call(make)
            self.compare(reply, expect(reply, now))
        return None if heard == "never" else reply

    def compare(self, reply: Reply | Lease, expected: run_model.Answer | Writer) -> None:
        if isinstance(expected, run_model.Answer):
            assert isinstance(reply, Reply), f"{reply}, expected {expected}"
            answered = run_model.Answer(str(reply.answer), reply.end, reply.status, expected.rest and tuple(reply.rest))
            assert answered == expected, f"{answered}, expected {expected}"
        elif isinstance(reply, Lease):
            granted = (reply.epoch, reply.token, reply.attempt, reply.resume_from, reply.reason)
            assert granted == (expected.epoch, expected.token, expected.attempt, expected.resume_from, expected.reason)
            assert reply.opening == expected.opening[1:]
            covered = self.model.checkpoint if expected.attempt > 1 else None
            assert reply.record["checkpoint"] == (covered[1] if covered else "")
        else:
            assert reply.answer is Answer.OK, f"{reply}, expected {expected}"
            attempt, before = reply.rest
            opening = Attempt(attempt=attempt, reason=expected.reason, resume_from=before.decode())
            assert (opening.type, opening.json_data()) == expected.opening[1:]
            assert reply.end == EventId(expected.epoch, 2)

    @property
    def settled(self) -> bool:
        return self.server.now() - self.clock_offset >= self.settles_at

    @property
    def replid(self) -> str:
        """Of the primary that has settled, as everybody knows it."""
        return self.server.replid if self.settled else ELSEWHERE

    def token(self) -> str:
        self.tokens += 1
        return f"t{self.tokens}"

    # -- submit, claim ------------------------------------------------------------------------------------------

    def create(self, heard: Heard) -> None:
        start = json.dumps({"request_id": self.request_id, "session_id": "s"}, separators=(",", ":"))
        self.call(
            lambda scripts: runs.create(
                scripts, self.request_id, claimed_at_ms=self.server.real(self.claimed_at), query="q"
            ),
            lambda reply, now: self.model.create(start, self.claimed_at, now, stale=reply.answer is Answer.STALE),
            heard,
        )

    def claim(self, attempt: int, heard: Heard) -> None:
        token, replid = self.token(), self.replid
        lease = self.call(
            lambda scripts: scripts.claim(self.request_id, attempt, token, LEASE_MS, replid),
            lambda reply, now: self.model.claim(
                attempt, token, getattr(reply, "epoch", 0), now, LEASE_MS, settled=replid != ELSEWHERE
            ),
            heard,
        )
        if isinstance(lease, Lease):
            writer = Writer(
                lease.epoch,
                token,
                lease.attempt,
                lease.resume_from,
                lease.reason,
                Entry(EventId(lease.epoch, 1), *lease.opening),
            )
            tip = json.loads(lease.record["checkpoint"])["tip"] if lease.record["checkpoint"] else str(BEGINNING)
            self.workers.append(Worker(writer, EventId.parse(tip), [writer.opening]))

    def claim_late(self, worker: Worker) -> None:
        """A second copy of an old request: nobody hears its answer, so only what it does to the run matters."""
        writer, replid = worker.writer, self.replid
        reply, now = self.server.call(
            lambda scripts: scripts.claim(self.request_id, writer.attempt, writer.token, LEASE_MS, replid)
        )
        epoch = reply.epoch if isinstance(reply, Lease) else 0
        expected = self.model.claim(writer.attempt, writer.token, epoch, now, LEASE_MS, settled=replid != ELSEWHERE)
        assert isinstance(reply, Lease) == isinstance(expected, Writer)

    # -- a worker -----------------------------------------------------------------------------------------------

    def in_state(self, *states: str) -> list[Worker]:
        return [worker for worker in self.workers if worker.state in states]

    def send(
        self, worker: Worker, first: int, last: int, kept_from: int, covered: int, heard: Heard, lease_ms: int
    ) -> Reply | None:
        """The tail's entries first..last, with the checkpoint of entry `covered`, if it is not 0."""
        writer = worker.writer
        batch = worker.tail[first - 1 : last]
        checkpoint = (EventId(writer.epoch, covered), worker.states[covered]) if covered else None
        entries = [(entry.type, entry.data) for entry in batch]
        upto = EventId(writer.epoch, first + len(batch) - 1)
        reply = self.call(
            lambda scripts: scripts.append(
                lease_of(self.request_id, writer),
                Batch(first, entries, kept_from, checkpoint),
                lease_ms=lease_ms,
                retention_ms=HOUR_MS,
            ),
            lambda _, now: self.model.append(
                writer, batch, now, upto=upto, kept_from=kept_from, checkpoint=checkpoint, lease_ms=lease_ms
            ),
            heard,
        )
        assert not isinstance(reply, Lease)
        return reply

    def say(self, worker: Worker, count: int, checkpoint: bool, ends: str) -> None:
        """The agent says some things, each of which stands on the one before."""
        worker.states.setdefault(1, json.dumps({"tip": str(worker.tip)}))
        for n in range(count):
            event_id = EventId(worker.epoch, len(worker.tail) + 1)
            kind = ends if ends and n == count - 1 else "token"
            said = {"text": f"{worker.writer.token}/{event_id}", "on": str(worker.tip)}
            worker.tail.append(Entry(event_id, kind, json.dumps(said)))
            worker.tip = event_id
            worker.states[event_id.seq] = json.dumps({"tip": str(event_id)})
        if checkpoint and not worker.done:
            worker.checkpoints.add(len(worker.tail))

    def go_on(self, worker: Worker, count: int, checkpoint: bool, ends: str, lease_ms: int, heard: Heard) -> None:
        """It appends what it has, or renews, and does what the answer says (PROTOCOL 2)."""
        if worker.written == len(worker.tail) and not worker.done:
            self.say(worker, count, checkpoint, ends)
        self.write(worker, lease_ms, heard)

    def write(self, worker: Worker, lease_ms: int, heard: Heard) -> None:
        first, last = worker.written + 1, len(worker.tail)
        covered = max([seq for seq in worker.checkpoints if seq >= worker.written], default=0)
        reply = self.send(worker, first, last, worker.kept_from, covered, heard, lease_ms)
        if reply is None:
            return
        if reply.answer in (Answer.OK, Answer.DUP):
            worker.written = last
            if worker.done:
                worker.state, worker.confirmed_in = "ended", self.failovers
        elif reply.answer is Answer.GAP:
            worker.written = reply.end.seq if reply.end.epoch == worker.epoch else 0
            assert worker.written >= worker.kept_from - 1, "a GAP that it cannot fill"
            self.done["repair"] += 1
        elif reply.answer is Answer.LOST:
            worker.state = "handing over"
            self.done["lost"] += 1
        else:
            worker.state = "stopped"

    def hand_over(self, worker: Worker, reason: str, heard: Heard) -> None:
        lease = lease_of(self.request_id, worker.writer)
        reply = self.call(
            lambda scripts: scripts.hand_over(lease, reason),
            lambda *_: self.model.hand_over(worker.writer, reason),
            heard,
        )
        if reply is not None:
            worker.state = "stopped"

    # -- reapers and gateways -----------------------------------------------------------------------------------

    @property
    def deadline(self) -> int | None:
        """None in a record that its owner's tail has taken over without a lease."""
        deadline = self.model.times.get("deadline")
        return deadline.most if deadline else None

    @property
    def lease_is_over(self) -> bool:
        return self.model.status == "running" and (self.deadline or 0) < self.server.now()

    @property
    def lease_holds(self) -> bool:
        return self.model.status == "running" and not self.lease_is_over

    def fence(self, max_attempts: int, heard: Heard) -> None:
        replid = self.replid
        reply = self.call(
            lambda scripts: runs.fence(
                scripts, self.request_id, max_attempts=max_attempts, max_run_ms=MAX_RUN_MS, replid=replid
            ),
            lambda reply, now: self.model.fence(
                now,
                lease_ms=LEASE_MS,
                max_attempts=max_attempts,
                max_run_ms=MAX_RUN_MS,
                settled=replid != ELSEWHERE,
                answered=str(reply.answer),
            ),
            heard,
        )
        if isinstance(reply, Reply) and reply.answer in (Answer.SPENT, Answer.OVERDUE):
            deadline = int(reply.rest[0]) + self.server.moved if reply.rest[0] else None
            assert deadline == self.deadline
            self.spent.append((str(reply.answer), deadline))

    def close_spent(self, heard: Heard) -> None:
        why, deadline = self.spent.pop()
        reason: AttemptReason = "worker_lost" if why == "SPENT" else "timeout"
        closing = Closing("error", '{"code":"x","message":"y"}', reason, self.token())
        stored = "" if deadline is None else str(self.server.real(deadline))
        self.close(closing, ("deadline", stored), self.deadline == deadline, heard)

    def requeue(self, attempt: int, enqueues: int, heard: Heard) -> None:
        self.call(
            lambda scripts: scripts.requeue(self.request_id, attempt, enqueues),
            lambda *_: self.model.requeue(attempt, enqueues),
            heard,
        )

    def watch(self, heard: Heard) -> None:
        self.call(lambda scripts: scripts.watch(self.request_id), lambda _, now: self.model.watch(now), heard)

    def close(self, closing: Closing, if_still: tuple[str, str], unchanged: bool, heard: Heard) -> Answer | None:
        replid = self.replid
        reply = self.call(
            lambda scripts: scripts.close(
                self.request_id,
                kind=closing.kind,
                data=closing.data,
                reason=closing.reason,
                token=closing.token,
                retention_ms=HOUR_MS,
                replid=replid,
                if_still=if_still,
            ),
            lambda reply, now: self.model.close(
                closing.kind,
                closing.data,
                closing.reason,
                closing.token,
                reply.end.epoch,
                now,
                unchanged=unchanged,
                settled=replid != ELSEWHERE,
            ),
            heard,
        )
        if not isinstance(reply, Reply):
            return None
        if reply.answer is Answer.OK:
            attempt, before = reply.rest
            writer = Writer(
                reply.end.epoch,
                closing.token,
                attempt,
                EventId.parse(before.decode()),
                closing.reason,
                Entry(
                    EventId(reply.end.epoch, 1),
                    "attempt",
                    Attempt(attempt=attempt, reason=closing.reason, resume_from=before.decode()).json_data(),
                ),
            )
            closing.writer, closing.confirmed_in = writer, self.failovers
            if closing not in self.closings:
                self.closings.append(closing)
        return reply.answer

    def erase(self, heard: Heard) -> Reply | None:
        reply = self.call(
            lambda scripts: scripts.erase(self.request_id, tombstone_ms=HOUR_MS), lambda *_: self.model.erase(), heard
        )
        assert not isinstance(reply, Lease)
        return reply

    def hear(self) -> None:
        """What was published since."""
        for message in self.ears.appended():
            if message is None:
                self.mirror.clear()
                continue
            end = self.mirror[-1].id if self.mirror else EventId(0, 0)
            assert message.prev == end, f"a message follows {message.prev}, the log ended at {end}"
            assert message.entries, "an empty message"
            self.mirror += message.entries

    # -- time, failovers, and what is kept ----------------------------------------------------------------------

    def expire(self) -> None:
        """Retention is longer than any tail is kept: by then the replicas have it all."""
        self.server.move(HOUR_MS)
        self.server.expire()
        self.model.expire()
        self.mirror.clear()
        self.history.clear()
        self.floor = 0
        self.closings, self.erased_in = [], None

    def replicate(self) -> None:
        """What was confirmed before is safe: nobody keeps it any longer."""
        self.floor = len(self.history) - 1
        self.closings = [closing for closing in self.closings if closing.confirmed_in != self.failovers]
        for worker in self.in_state("ended"):
            if worker.confirmed_in == self.failovers:
                worker.state = "stopped"

    def fail_over(self, back: int, clock_offset: int) -> None:
        """Another server goes on from an earlier state, by its own clock."""
        self.hear()
        before = self.model
        to = max(self.floor, len(self.history) - 1 - back)
        model, state = self.history[to]
        del self.history[to + 1 :]
        self.model = model.copy()
        self.server.moved += clock_offset - self.clock_offset
        self.clock_offset = clock_offset
        self.server.fall_back(state)
        self.mirror = list(self.model.log)
        self.failovers += 1
        self.settles_at = self.server.now() - clock_offset + SETTLE_MS
        if before.status in CLOSED and before.end not in [entry.id for entry in self.model.log]:
            self.taken.add(before.end.epoch)

    @property
    def can_fail_over(self) -> bool:
        return len(self.history) > self.floor + 1

    @property
    def to_send_again(self) -> list[Worker | Closing]:
        """What is kept from before the last failover."""
        closings = [closing for closing in self.closings if closing.confirmed_in != self.failovers]
        return [*(worker for worker in self.in_state("ended") if worker.confirmed_in != self.failovers), *closings]

    def send_again(self, kept: Worker | Closing, heard: Heard) -> None:
        if isinstance(kept, Worker):
            self.send_end_again(kept, heard)
        else:
            self.send_closing_again(kept, heard)

    def send_end_again(self, worker: Worker, heard: Heard) -> None:
        last = len(worker.tail)
        reply = self.send(worker, worker.kept_from, last, worker.kept_from, 0, heard, 0)
        if reply is not None:
            if reply.answer in (Answer.OK, Answer.DUP):
                worker.confirmed_in = self.failovers
            else:
                worker.state = "handing over" if reply.answer is Answer.LOST else "stopped"

    def send_closing_again(self, closing: Closing, heard: Heard) -> None:
        """Where it does not fit any more, its script is run anew."""
        if closing.writer is None:
            if self.close(closing, ("", ""), True, heard) not in (None, Answer.OK, Answer.UNSETTLED):
                self.closings.remove(closing)
            return
        end = Entry(EventId(closing.writer.epoch, 2), closing.kind, closing.data)
        tail = Worker(closing.writer, BEGINNING, [closing.writer.opening, end])
        reply = self.send(tail, 1, 2, 1, 0, heard, 0)
        if reply is None:
            return
        if reply.answer in (Answer.OK, Answer.DUP):
            closing.confirmed_in = self.failovers
        elif reply.answer in (Answer.LOST, Answer.FENCED):
            closing.writer, closing.token = None, self.token()
        else:
            self.closings.remove(closing)

    # -- readers ------------------------------------------------------------------------------------------------

    def look(self, reader: RunReader, count: int) -> None:
        if reader.ended or reader.gone or not self.model.status:
            return

        async def ask() -> tuple[list[bytes | None], bool, list[Entry]]:
            redis = self.server.redis
            head: list[bytes | None] = await redis.hmget(self.server.names[0], ["status", "end"])  # type: ignore[misc]
            known = await log.has_epoch(redis, self.request_id, reader.position.epoch)
            return head, known, await log.read(redis, self.request_id, reader.position, count)

        (status, end), known, page = self.server.run(ask())
        told = reader.told
        end_id = EventId.parse(end.decode()) if end else START
        reader.look((status or b"").decode(), end_id, known, page, self.server.now())
        self.done["told"] += reader.told - told


def lease_of(request_id: str, writer: Writer) -> Lease:
    return Lease(
        request_id=request_id,
        epoch=writer.epoch,
        token=writer.token,
        attempt=writer.attempt,
        resume_from=writer.resume_from,
    )
