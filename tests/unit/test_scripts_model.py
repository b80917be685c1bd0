"""P3, P7, P11: the scripts on a real Redis against a model in plain Python, under lost replies, zombies, rollbacks.

Workers, reapers and gateways do what PROTOCOL says, in any order, with several writers alive; late copies of old
requests come between. A failover takes record and log back to an earlier state. After each step Redis must hold what
the model holds, and in the end every reader's fold must be the log's, unless the reader was told.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from broker.events import TERMINAL, Attempt, AttemptReason, Entry
from broker.fold import fold, is_void
from broker.ids import START, EventId
from broker.runs import keys, log
from broker.runs.record import parse_rewinds
from broker.runs.scripts import Answer, Batch, Lease, Reply, Scripts
from tests.kit import run_model, runs
from tests.kit.checker import check_log, check_reader
from tests.kit.redis_server import VERSIONS, server_of
from tests.kit.run_model import BEGINNING, CLOSED, RunModel, Span, Writer
from tests.kit.run_reader import RunReader
from tests.kit.run_server import ELSEWHERE, RunServer, State
from tests.kit.runs import HOUR_MS, LEASE_MS
from tests.kit.scale import scaled

SETTLE_MS = 5000
MAX_RUN_MS = 120_000
Heard = Literal["once", "twice", "never"]
"""Of a call: it is answered; its reply is lost, so it is made again; it is done, but nobody hears of it."""
HEARD = st.sampled_from(["once", "once", "once", "twice", "never"])
WAITS = st.sampled_from([1000, 6000, 16_000, 61_000])


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


class Machine(RuleBasedStateMachine):
    url: str
    """Of the Redis; a subclass says it."""
    counts: ClassVar[Counter[str]]

    def __init__(self) -> None:
        super().__init__()
        self.server = RunServer(self.url)
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
        self.steps = 0
        self.done: Counter[str] = Counter()
        self.ears = runs.Ears(self.url, keys.channel(self.request_id))
        self.mirror: list[Entry] = []
        """The log as the messages tell it."""

    def teardown(self) -> None:
        try:
            if sys.exc_info()[0] is None:
                self.settle()
        finally:
            type(self).counts.update(self.done)
            self.ears.__exit__()
            self.server.close()

    # -- calls -----------------------------------------------------------------------------------------------

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

    def seldom(self, what: str, after: int) -> bool:
        """Keeps the rules that say the same nearly always, or end nearly everything, from filling the schedule."""
        return self.steps >= after * (1 + self.done[what])

    # -- submit, claim ---------------------------------------------------------------------------------------

    @initialize(claimed=st.sampled_from([True, True, True, False]), replicated=st.booleans())
    def begin(self, claimed: bool, replicated: bool) -> None:
        """Most of what is interesting comes after the claim."""
        if claimed:
            self.submit("once")
            self.remember()
            if replicated:
                self.floor = len(self.history) - 1
            self.claim(1, "once")

    @precondition(lambda self: self.seldom("submit", 10 if self.model.status else 3))
    @rule(heard=HEARD)
    def submit(self, heard: Heard) -> None:
        self.done["submit"] += 1
        start = json.dumps({"request_id": self.request_id, "session_id": "s"}, separators=(",", ":"))
        self.call(
            lambda scripts: runs.create(
                scripts, self.request_id, claimed_at_ms=self.server.real(self.claimed_at), query="q"
            ),
            lambda reply, now: self.model.create(start, self.claimed_at, now, stale=reply.answer is Answer.STALE),
            heard,
        )

    @precondition(lambda self: self.model.status == "queued" or self.seldom("claim", 8))
    @rule(ahead=st.sampled_from([1, 1, 1, 1, 0, 2]), heard=HEARD)
    def claim(self, ahead: int, heard: Heard) -> None:
        self.done["claim"] += 1
        attempt, token, replid = self.model.attempt + ahead, self.token(), self.replid
        self.call_claim(attempt, token, replid, heard)

    def call_claim(self, attempt: int, token: str, replid: str, heard: Heard) -> None:
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

    @precondition(lambda self: self.workers and self.seldom("late claim", 12))
    @rule(data=st.data())
    def claim_that_comes_late(self, data: Any) -> None:
        """A second copy of an old request: nobody hears its answer, so only what it does to the run matters."""
        self.done["late claim"] += 1
        writer, replid = data.draw(st.sampled_from(self.workers)).writer, self.replid
        reply, now = self.server.call(
            lambda scripts: scripts.claim(self.request_id, writer.attempt, writer.token, LEASE_MS, replid)
        )
        epoch = reply.epoch if isinstance(reply, Lease) else 0
        expected = self.model.claim(writer.attempt, writer.token, epoch, now, LEASE_MS, settled=replid != ELSEWHERE)
        assert isinstance(reply, Lease) == isinstance(expected, Writer)

    # -- a worker --------------------------------------------------------------------------------------------

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

    @precondition(lambda self: self.in_state("running"))
    @rule(
        data=st.data(),
        count=st.integers(1, 3),
        checkpoint=st.booleans(),
        lease_ms=st.sampled_from([LEASE_MS, 0]),
        heard=HEARD,
    )
    def work(self, data: Any, count: int, checkpoint: bool, lease_ms: int, heard: Heard) -> None:
        self.done["work"] += 1
        self.go_on(data.draw(st.sampled_from(self.in_state("running"))), count, checkpoint, "", lease_ms, heard)

    @precondition(lambda self: self.in_state("running"))
    @rule(data=st.data(), checkpoint=st.booleans(), heard=HEARD)
    def work_more(self, data: Any, checkpoint: bool, heard: Heard) -> None:
        """So that it is chosen more often."""
        self.work(data, 1, checkpoint, LEASE_MS, heard)

    @precondition(lambda self: self.in_state("running") and self.seldom("renew", 6))
    @rule(data=st.data(), checkpoint=st.booleans(), heard=HEARD)
    def renew(self, data: Any, checkpoint: bool, heard: Heard) -> None:
        self.done["renew"] += 1
        self.go_on(data.draw(st.sampled_from(self.in_state("running"))), 0, checkpoint, "", LEASE_MS, heard)

    @precondition(lambda self: self.in_state("running") and self.seldom("finish", 12))
    @rule(data=st.data(), count=st.integers(1, 2), ends=st.sampled_from(["final", "final", "error"]), heard=HEARD)
    def finish(self, data: Any, count: int, ends: str, heard: Heard) -> None:
        self.done["finish"] += 1
        self.go_on(data.draw(st.sampled_from(self.in_state("running"))), count, False, ends, LEASE_MS, heard)

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

    @precondition(lambda self: self.in_state("running") and self.seldom("forget", 8))
    @rule(data=st.data())
    def forget_the_tail(self, data: Any) -> None:
        """What is in the log, up to some entry: it is replicated, or too much."""
        self.done["forget"] += 1
        worker = data.draw(st.sampled_from(self.in_state("running")))
        worker.kept_from = data.draw(st.integers(worker.kept_from, max(worker.kept_from, worker.written)))

    @precondition(lambda self: self.in_state("running") and self.seldom("drain", 10))
    @rule(data=st.data())
    def drain(self, data: Any) -> None:
        self.done["drain"] += 1
        data.draw(st.sampled_from(self.in_state("running"))).state = "handing over"

    @precondition(lambda self: self.in_state("handing over"))
    @rule(data=st.data(), reason=st.sampled_from(["handed_over", "data_lost"]), heard=HEARD)
    def hand_over(self, data: Any, reason: str, heard: Heard) -> None:
        self.done["hand over"] += 1
        worker = data.draw(st.sampled_from(self.in_state("handing over")))
        self.call_hand_over(worker, reason, heard)

    def call_hand_over(self, worker: Worker, reason: str, heard: Heard) -> None:
        lease = lease_of(self.request_id, worker.writer)
        reply = self.call(
            lambda scripts: scripts.hand_over(lease, reason),
            lambda *_: self.model.hand_over(worker.writer, reason),
            heard,
        )
        if reply is not None:
            worker.state = "stopped"

    @precondition(lambda self: self.workers and self.seldom("crash", 15))
    @rule(data=st.data())
    def crash(self, data: Any) -> None:
        """With what it keeps."""
        self.done["crash"] += 1
        data.draw(st.sampled_from(self.workers)).state = "stopped"

    @precondition(lambda self: self.workers and self.seldom("late copy", 3))
    @rule(data=st.data(), checkpoint=st.booleans(), heard=HEARD)
    def a_copy_comes_late(self, data: Any, checkpoint: bool, heard: Heard) -> None:
        """Any stretch of any tail, with or without a hole before it: what a slow network does, and a zombie."""
        self.done["late copy"] += 1
        worker = data.draw(st.sampled_from(self.workers))
        first = data.draw(st.integers(1, len(worker.tail) + 1))
        last = data.draw(st.integers(max(first - 1, 1), len(worker.tail)))
        covered = last if checkpoint and last in worker.states else 0
        self.send(worker, first, last, data.draw(st.integers(1, first)), covered, heard, 0 if last % 2 else LEASE_MS)

    @precondition(lambda self: self.in_state("ended") and self.seldom("write after the end", 10))
    @rule(data=st.data(), heard=HEARD)
    def write_after_the_end(self, data: Any, heard: Heard) -> None:
        self.done["write after the end"] += 1
        worker = data.draw(st.sampled_from(self.in_state("ended")))
        seq = len(worker.tail) + 1
        worker.tail.append(Entry(EventId(worker.epoch, seq), "token", '{"text":"more","on":"0-0"}'))
        self.send(worker, seq, seq, data.draw(st.integers(1, seq)), 0, heard, LEASE_MS)
        worker.tail.pop()

    @property
    def lease_holds(self) -> bool:
        return self.model.status == "running" and not self.lease_is_over

    @property
    def lease_is_over(self) -> bool:
        return self.model.status == "running" and (self.deadline or 0) < self.server.now()

    @property
    def deadline(self) -> int | None:
        """None in a record that its owner's tail has taken over without a lease."""
        deadline = self.model.times.get("deadline")
        return deadline.most if deadline else None

    # -- reapers ---------------------------------------------------------------------------------------------

    @precondition(lambda self: self.lease_is_over or self.seldom("fence", 8))
    @rule(max_attempts=st.sampled_from([1, 2, 100, 100]), heard=HEARD)
    def reap(self, max_attempts: int, heard: Heard) -> None:
        self.done["fence"] += 1
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

    @precondition(lambda self: self.spent)
    @rule(heard=HEARD)
    def reaper_closes(self, heard: Heard) -> None:
        self.done["reaper closes"] += 1
        why, deadline = self.spent.pop()
        reason: AttemptReason = "worker_lost" if why == "SPENT" else "timeout"
        closing = Closing("error", '{"code":"x","message":"y"}', reason, self.token())
        stored = "" if deadline is None else str(self.server.real(deadline))
        self.close(closing, ("deadline", stored), self.deadline == deadline, heard)

    @precondition(lambda self: self.seldom("requeue", 5 if self.model.status == "queued" else 15))
    @rule(ahead=st.sampled_from([1, 1, 1, 0, 2]), behind=st.sampled_from([0, 0, 1]), heard=HEARD)
    def requeue(self, ahead: int, behind: int, heard: Heard) -> None:
        self.done["requeue"] += 1
        attempt, enqueues = self.model.attempt + ahead, max((self.model.enqueues or 0) - behind, 0)
        self.call(
            lambda scripts: scripts.requeue(self.request_id, attempt, enqueues),
            lambda *_: self.model.requeue(attempt, enqueues),
            heard,
        )

    # -- gateways --------------------------------------------------------------------------------------------

    @precondition(lambda self: self.seldom("watch", 8))
    @rule(heard=HEARD)
    def watch(self, heard: Heard) -> None:
        self.done["watch"] += 1
        self.call(lambda scripts: scripts.watch(self.request_id), lambda _, now: self.model.watch(now), heard)

    @precondition(lambda self: self.seldom("cancel", 25))
    @rule(heard=HEARD, again=st.booleans())
    def cancel(self, heard: Heard, again: bool) -> None:
        self.done["cancel"] += 1
        known = [closing for closing in self.closings if closing.reason == "cancelled"]
        if again and known:
            self.close(known[-1], ("", ""), True, heard)
        else:
            self.close(Closing("cancelled", '{"reason":"client"}', "cancelled", self.token()), ("", ""), True, heard)

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

    @precondition(lambda self: self.seldom("delete", 40))
    @rule(heard=HEARD)
    def delete(self, heard: Heard) -> None:
        self.done["delete"] += 1
        reply = self.call_erase(heard)
        if reply is not None and reply.answer is Answer.OK:
            self.erased_in = self.failovers

    def call_erase(self, heard: Heard) -> Reply | None:
        reply = self.call(
            lambda scripts: scripts.erase(self.request_id, tombstone_ms=HOUR_MS), lambda *_: self.model.erase(), heard
        )
        assert not isinstance(reply, Lease)
        self.hear()
        return reply

    # -- time, failovers, and what is kept -------------------------------------------------------------------

    @precondition(lambda self: self.seldom("wait", 6))
    @rule(ms=WAITS)
    def wait(self, ms: int) -> None:
        self.done["wait"] += 1
        self.server.move(ms)

    @precondition(lambda self: self.model.status in (*CLOSED, "erased") and self.seldom("expire", 30))
    @rule()
    def expire(self) -> None:
        """Retention is longer than any tail is kept: by then the replicas have it all."""
        self.done["expire"] += 1
        self.server.move(HOUR_MS)
        self.server.expire()
        self.model.expire()
        self.mirror.clear()
        self.history.clear()
        self.floor = 0
        self.closings, self.erased_in = [], None

    @precondition(lambda self: self.seldom("replicate", 12))
    @rule()
    def replicate(self) -> None:
        """What was confirmed before is safe: nobody keeps it any longer."""
        self.done["replicate"] += 1
        self.floor = len(self.history) - 1
        self.closings = [closing for closing in self.closings if closing.confirmed_in != self.failovers]
        for worker in self.in_state("ended"):
            if worker.confirmed_in == self.failovers:
                worker.state = "stopped"

    @precondition(lambda self: len(self.history) > self.floor + 1 and self.seldom("fail over", 5))
    @rule(back=st.sampled_from([1, 1, 2, 3, 4, 6, 9, 30]), clock_offset=st.sampled_from([0, 0, 0, -2000, 2000]))
    def fail_over(self, back: int, clock_offset: int) -> None:
        """Another server goes on from an earlier state, by its own clock."""
        self.done["fail over"] += 1
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

    @precondition(lambda self: self.in_state("running") and self.seldom("lose at once", 6))
    @rule(data=st.data(), writes=st.integers(1, 3), forgets=st.booleans(), back=st.integers(1, 5), ends=st.booleans())
    def lose_what_was_just_read(self, data: Any, writes: int, forgets: bool, back: int, ends: bool) -> None:
        self.done["lose at once"] += 1
        worker = data.draw(st.sampled_from(self.in_state("running")))
        for n in range(writes):
            if worker.state == "running":
                self.go_on(worker, 1, n == 0, "final" if ends and n == writes - 1 else "", LEASE_MS, "once")
                self.check()
        if forgets:
            worker.kept_from = max(worker.kept_from, worker.written)
        for reader in self.readers:
            if self.model.status and not reader.ended and not reader.gone:
                self.look(reader, 50)
        if len(self.history) > self.floor + 1:
            self.fail_over(back, 0)

    @precondition(lambda self: self.in_state("running") and self.lease_holds and self.seldom("next attempt", 8))
    @rule(data=st.data(), back=st.integers(0, 4), turns=st.lists(st.sampled_from(["old", "old", "new"]), max_size=5))
    def lose_the_worker(self, data: Any, back: int, turns: list[str]) -> None:
        """It is only slow: the next attempt's claim may be lost, and then both write."""
        self.done["next attempt"] += 1
        old = data.draw(st.sampled_from(self.in_state("running")))
        self.wait(16_000)
        self.reap(1_000_000, "once")
        self.check()
        if self.model.status == "queued":
            self.claim(1, "once")
            self.check()
            if back and len(self.history) > self.floor + 1:
                self.fail_over(back, 0)
                self.check()
        for turn in turns:
            worker = old if turn == "old" else self.workers[-1]
            if worker.state == "running":
                self.go_on(worker, 1, turn == "old", "", LEASE_MS, "once")
                self.check()

    @property
    def to_send_again(self) -> list[Worker | Closing]:
        """What is kept from before the last failover."""
        closings = [closing for closing in self.closings if closing.confirmed_in != self.failovers]
        return [*(worker for worker in self.in_state("ended") if worker.confirmed_in != self.failovers), *closings]

    @precondition(lambda self: self.to_send_again or self.erased_in not in (None, self.failovers))
    @rule(data=st.data(), heard=HEARD)
    def send_again(self, data: Any, heard: Heard) -> None:
        self.done["send again"] += 1
        if self.erased_in not in (None, self.failovers):
            if self.call_erase(heard) is not None:
                self.erased_in = self.failovers
            return
        kept = data.draw(st.sampled_from(self.to_send_again))
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

    # -- readers ---------------------------------------------------------------------------------------------

    @rule(at=st.integers(0, 1), count=st.sampled_from([1, 2, 3, 50]))
    def read(self, at: int, count: int) -> None:
        self.done["read"] += 1
        reader = self.readers[at]
        if not reader.ended and not reader.gone and self.model.status:
            self.look(reader, count)

    def look(self, reader: RunReader, count: int) -> None:
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

    @precondition(lambda self: any(reader.ended for reader in self.readers) and self.seldom("come back", 6))
    @rule()
    def come_back(self) -> None:
        """With the terminal's id as its cursor: there may be more."""
        self.done["come back"] += 1
        for reader in self.readers:
            reader.ended = False

    # -- what holds always -----------------------------------------------------------------------------------

    def hear(self) -> None:
        for message in self.ears.appended():
            if message is None:
                self.mirror.clear()
                continue
            end = self.mirror[-1].id if self.mirror else EventId(0, 0)
            assert message.prev == end, f"a message follows {message.prev}, the log ended at {end}"
            assert message.entries, "an empty message"
            self.mirror += message.entries

    @invariant()
    def redis_holds_what_the_model_holds(self) -> None:
        self.steps += 1
        self.hear()
        self.remember()

    def remember(self) -> None:
        """Checks the state, and keeps it: a failover may go back to it."""
        state = self.server.state()
        assert state.log == self.model.log
        self.check_record(state)
        if not self.history or state.dumps != self.history[-1][1].dumps:
            self.history.append((self.model.copy(), state))

    def check_record(self, state: State) -> None:
        expected = self.model.fields
        assert {name: state.fields.get(name, "") for name in expected} == {**expected}
        if self.model.gone:
            assert state.fields == {name: value for name, value in expected.items() if value}
        assert state.times.keys() == self.model.times.keys()
        for name, time in state.times.items():
            least, most = self.model.times[name]
            assert least <= time <= most, f"{name} is {time}, must be {least} to {most}"
            self.model.times[name] = Span(time, time)
        for ttl in state.ttls:
            ends = self.model.status in (*CLOSED, "erased")
            assert ttl == -2 or (ttl > 0) == ends, "a live key expires, or a dead one stays"

    @invariant()
    def the_log_is_a_log(self) -> None:
        """Contiguous, with one terminal, which came with the status; a fold of what one agent has said."""
        assert self.mirror == self.model.log, "what the messages told"
        if not self.model.log:
            return
        check_log(self.model.log, finished=self.model.status in CLOSED)
        check_chain(self.model.log)
        rewinds = parse_rewinds(self.model.fields["rewinds"])
        marked = [entry for entry in self.model.log if entry.type != "attempt" and not is_void(entry.id, rewinds)]
        assert marked == fold(self.model.log), "what is marked as void is not what the fold leaves out"

    @invariant()
    def an_id_never_has_two_contents(self) -> None:
        """Not even over failovers: PROTOCOL 7 makes no exception."""
        for entry in self.model.log:
            assert self.contents.setdefault(entry.id, entry) == entry
        for reader in self.readers:
            for entry in reader.seen:
                assert self.contents[entry.id] == entry

    @invariant()
    def who_has_read_everything_has_the_logs_fold(self) -> None:
        for reader in self.readers:
            if self.model.log and reader.position == self.model.end and not reader.gone:
                assert reader.view == fold(self.model.log)
            if not self.failovers and not reader.gone and self.model.log:
                check_reader(reader.seen, self.model.log[: len(reader.seen)])

    # -- the end ---------------------------------------------------------------------------------------------

    def settle(self) -> None:
        """No more faults: whoever lives repairs, then the run comes to its end, and the readers to the log's."""
        for _ in range(4):
            for worker in self.in_state("running"):
                self.write(worker, LEASE_MS, "once")
            for kept in self.to_send_again:
                if isinstance(kept, Worker):
                    self.send_end_again(kept, "once")
                elif kept.writer is not None or self.settled:
                    self.send_closing_again(kept, "once")
            for worker in self.in_state("handing over"):
                self.call_hand_over(worker, "data_lost", "once")
            self.check()
        self.server.move(SETTLE_MS)
        for kept in self.to_send_again:
            if isinstance(kept, Closing):
                self.send_closing_again(kept, "once")
        self.end_the_run()
        self.check()
        for reader in self.readers:
            self.check_end(reader)

    def end_the_run(self) -> None:
        """It is worked on to its end."""
        for _ in range(3):
            if self.model.status == "running":
                self.server.move(LEASE_MS + 2 * 2000)
                self.reap(1_000_000, "once")
                self.reaper_closes("once") if self.spent else None
            if self.model.status == "queued":
                self.claim(1, "once")
                worker = self.workers[-1]
                self.say(worker, 2, False, "final")
                self.write(worker, LEASE_MS, "once")
            self.check()
        assert self.model.status not in ("queued", "running"), self.model.status

    def check(self) -> None:
        self.redis_holds_what_the_model_holds()
        self.the_log_is_a_log()
        self.an_id_never_has_two_contents()
        self.who_has_read_everything_has_the_logs_fold()

    def check_end(self, reader: RunReader) -> None:
        """Who reads on has the log's fold. Who had read a terminal and went has it too, but for the exception of
        PROTOCOL 7: a failover took that closing, and another one was written after it.
        """
        for _ in range(4):
            if self.model.status and not reader.ended and not reader.gone:
                self.look(reader, 1000)
        if reader.gone or self.model.gone:
            return
        assert reader.ended, f"it stands at {reader.position}, the log ends at {self.model.end}"
        if reader.position == self.model.end:
            assert reader.view == fold(self.model.log)
            self.done["agreed"] += 1
        else:
            assert reader.position.epoch in self.taken, "it has read an end that no failover took"
            self.done["excused"] += 1


def lease_of(request_id: str, writer: Writer) -> Lease:
    return Lease(
        request_id=request_id,
        epoch=writer.epoch,
        token=writer.token,
        attempt=writer.attempt,
        resume_from=writer.resume_from,
    )


def check_chain(entries: list[Entry]) -> None:
    """Each thing that survives stands on the one before it: nobody went on from what is void, or is missing."""
    before = BEGINNING
    for entry in fold(entries)[1:]:
        said = json.loads(entry.data)
        if "on" in said:
            assert said["on"] == str(before), f"{entry.id} stands on {said['on']}, not on {before}"
        before = entry.id


@pytest.mark.parametrize("version", VERSIONS)
def test_the_scripts_do_what_the_model_does(tmp_path: Path, version: str) -> None:
    """PROTOCOL 2, on the installed server and on the oldest that is promised."""
    server = server_of(version, tmp_path)
    try:
        server.start()
        found = server.info("server")["redis_version"]
        assert version == "installed" or found.startswith("6.2"), found

        class Here(Machine):
            url = server.url
            counts: ClassVar[Counter[str]] = Counter()

        run_state_machine_as_test(
            Here,
            settings=settings(
                max_examples=scaled(800),
                stateful_step_count=50,
                deadline=None,
                database=None,
                print_blob=True,
                report_multiple_bugs=False,
                suppress_health_check=list(HealthCheck),
            ),
        )
        print(dict(sorted(Here.counts.items())))
    finally:
        server.close()
