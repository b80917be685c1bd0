"""P3, P7, P11: the scripts on a real Redis against a model in plain Python, under lost replies, zombies, rollbacks.

Workers, reapers and gateways do what PROTOCOL says, in any order, with several writers alive; late copies of old
requests come between. A failover takes record and log back to an earlier state. After each step Redis must hold what
the model holds, and in the end every reader's fold must be the log's, unless the reader was told.
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import Any, ClassVar

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

from broker.events import Entry
from broker.ids import EventId
from broker.runs.scripts import Answer
from tests.kit.redis_server import VERSIONS, server_of
from tests.kit.run_checks import CheckedPlay
from tests.kit.run_model import CLOSED
from tests.kit.run_play import Closing, Heard, Worker
from tests.kit.runs import LEASE_MS
from tests.kit.scale import LONG, scaled

HEARD = st.sampled_from(["once", "once", "once", "twice", "never"])
WAITS = st.sampled_from([1000, 6000, 16_000, 61_000])
MANY = 1_000_000


class Machine(RuleBasedStateMachine):
    """Chooses what is done. Rules that end nearly everything, or say the same nearly always, are seldom chosen."""

    url: str
    """Of the Redis; a subclass says it."""
    counts: ClassVar[Counter[str]]

    def __init__(self) -> None:
        super().__init__()
        self.play = CheckedPlay(self.url)
        self.steps = 0

    def teardown(self) -> None:
        try:
            if sys.exc_info()[0] is None:
                self.play.settle()
        finally:
            type(self).counts.update(self.play.done)
            self.play.end()

    @invariant()
    def everything_holds(self) -> None:
        self.steps += 1
        self.play.check()

    def seldom(self, what: str, every: int) -> bool:
        return self.steps >= every * (1 + self.play.done[what])

    def any_of(self, data: Any, *states: str) -> Worker:
        worker: Worker = data.draw(st.sampled_from(self.play.in_state(*states)))
        return worker

    # -- submit, claim ---------------------------------------------------------------------------------------

    @initialize(claimed=st.sampled_from([True, True, True, False]), replicated=st.booleans())
    def begin(self, claimed: bool, replicated: bool) -> None:
        """Most of what is interesting comes after the claim."""
        if claimed:
            self.play.create("once")
            self.play.check()
            if replicated:
                self.play.replicate()
            self.play.claim(1, "once")

    @precondition(lambda self: self.seldom("submit", 10 if self.play.model.status else 3))
    @rule(heard=HEARD)
    def submit(self, heard: Heard) -> None:
        self.play.done["submit"] += 1
        self.play.create(heard)

    @precondition(lambda self: self.play.model.status == "queued" or self.seldom("claim", 8))
    @rule(ahead=st.sampled_from([1, 1, 1, 1, 0, 2]), heard=HEARD)
    def claim(self, ahead: int, heard: Heard) -> None:
        self.play.done["claim"] += 1
        self.play.claim(self.play.model.attempt + ahead, heard)

    @precondition(lambda self: self.play.workers and self.seldom("late claim", 12))
    @rule(data=st.data())
    def claim_that_comes_late(self, data: Any) -> None:
        self.play.done["late claim"] += 1
        self.play.claim_late(data.draw(st.sampled_from(self.play.workers)))

    # -- a worker --------------------------------------------------------------------------------------------

    @precondition(lambda self: self.play.in_state("running"))
    @rule(
        data=st.data(),
        count=st.integers(1, 3),
        checkpoint=st.booleans(),
        lease_ms=st.sampled_from([LEASE_MS, 0]),
        heard=HEARD,
    )
    def work(self, data: Any, count: int, checkpoint: bool, lease_ms: int, heard: Heard) -> None:
        self.play.done["work"] += 1
        self.play.go_on(self.any_of(data, "running"), count, checkpoint, "", lease_ms, heard)

    @precondition(lambda self: self.play.in_state("running"))
    @rule(data=st.data(), checkpoint=st.booleans(), heard=HEARD)
    def work_more(self, data: Any, checkpoint: bool, heard: Heard) -> None:
        """So that it is chosen more often."""
        self.work(data, 1, checkpoint, LEASE_MS, heard)

    @precondition(lambda self: self.play.in_state("running") and self.seldom("renew", 6))
    @rule(data=st.data(), checkpoint=st.booleans(), heard=HEARD)
    def renew(self, data: Any, checkpoint: bool, heard: Heard) -> None:
        self.play.done["renew"] += 1
        self.play.go_on(self.any_of(data, "running"), 0, checkpoint, "", LEASE_MS, heard)

    @precondition(lambda self: self.play.in_state("running") and self.seldom("finish", 12))
    @rule(data=st.data(), count=st.integers(1, 2), ends=st.sampled_from(["final", "final", "error"]), heard=HEARD)
    def finish(self, data: Any, count: int, ends: str, heard: Heard) -> None:
        self.play.done["finish"] += 1
        self.play.go_on(self.any_of(data, "running"), count, False, ends, LEASE_MS, heard)

    @precondition(lambda self: self.play.in_state("running") and self.seldom("forget", 8))
    @rule(data=st.data())
    def forget_the_tail(self, data: Any) -> None:
        """What is in the log, up to some entry: it is replicated, or too much."""
        self.play.done["forget"] += 1
        worker = self.any_of(data, "running")
        worker.kept_from = data.draw(st.integers(worker.kept_from, max(worker.kept_from, worker.written)))

    @precondition(lambda self: self.play.in_state("running") and self.seldom("drain", 10))
    @rule(data=st.data())
    def drain(self, data: Any) -> None:
        self.play.done["drain"] += 1
        self.any_of(data, "running").state = "handing over"

    @precondition(lambda self: self.play.in_state("handing over"))
    @rule(data=st.data(), reason=st.sampled_from(["handed_over", "data_lost"]), heard=HEARD)
    def hand_over(self, data: Any, reason: str, heard: Heard) -> None:
        self.play.done["hand over"] += 1
        self.play.hand_over(self.any_of(data, "handing over"), reason, heard)

    @precondition(lambda self: self.play.workers and self.seldom("crash", 15))
    @rule(data=st.data())
    def crash(self, data: Any) -> None:
        """With what it keeps."""
        self.play.done["crash"] += 1
        data.draw(st.sampled_from(self.play.workers)).state = "stopped"

    @precondition(lambda self: self.play.workers and self.seldom("late copy", 3))
    @rule(data=st.data(), checkpoint=st.booleans(), heard=HEARD)
    def a_copy_comes_late(self, data: Any, checkpoint: bool, heard: Heard) -> None:
        """Any stretch of any tail, with or without a hole before it: what a slow network does, and a zombie."""
        self.play.done["late copy"] += 1
        worker = data.draw(st.sampled_from(self.play.workers))
        first = data.draw(st.integers(1, len(worker.tail) + 1))
        last = data.draw(st.integers(max(first - 1, 1), len(worker.tail)))
        kept_from = data.draw(st.integers(1, first))
        covered = last if checkpoint and last in worker.states else 0
        self.play.send(worker, first, last, kept_from, covered, heard, 0 if last % 2 else LEASE_MS)

    @precondition(lambda self: self.play.in_state("ended") and self.seldom("write after the end", 10))
    @rule(data=st.data(), heard=HEARD)
    def write_after_the_end(self, data: Any, heard: Heard) -> None:
        self.play.done["write after the end"] += 1
        worker = self.any_of(data, "ended")
        seq = len(worker.tail) + 1
        worker.tail.append(Entry(EventId(worker.epoch, seq), "token", '{"text":"more","on":"0-0"}'))
        self.play.send(worker, seq, seq, data.draw(st.integers(1, seq)), 0, heard, LEASE_MS)
        worker.tail.pop()

    # -- reapers, gateways -----------------------------------------------------------------------------------

    @precondition(lambda self: self.play.lease_is_over or self.seldom("fence", 8))
    @rule(max_attempts=st.sampled_from([1, 2, 100, 100]), heard=HEARD)
    def fence(self, max_attempts: int, heard: Heard) -> None:
        self.play.done["fence"] += 1
        self.play.fence(max_attempts, heard)

    @precondition(lambda self: self.play.spent)
    @rule(heard=HEARD)
    def close_what_is_spent(self, heard: Heard) -> None:
        self.play.done["reaper closes"] += 1
        self.play.close_spent(heard)

    @precondition(lambda self: self.play.lease_holds and self.seldom("spend", 10))
    @rule(data=st.data(), max_attempts=st.sampled_from([1, MANY]), between=st.sampled_from(["", "renew", "hand over"]))
    def spend(self, data: Any, max_attempts: int, between: str) -> None:
        """The last lease expires, or the time is over; its owner may come back just before the run is closed."""
        self.play.done["spend"] += 1
        self.play.server.move(16_000 if max_attempts == 1 else 130_000)
        self.play.fence(max_attempts, "once")
        self.play.check()
        owners = [worker for worker in self.play.in_state("running") if worker.epoch == self.play.model.epoch]
        if owners and between == "renew":
            self.play.go_on(owners[0], 0, False, "", LEASE_MS, "once")
        elif owners and between == "hand over":
            self.play.hand_over(owners[0], "handed_over", "once")
        self.play.check()
        if self.play.spent:
            self.play.close_spent("once")

    @precondition(lambda self: self.seldom("requeue", 5 if self.play.model.status == "queued" else 15))
    @rule(ahead=st.sampled_from([1, 1, 1, 0, 2]), behind=st.sampled_from([0, 0, 1]), heard=HEARD)
    def requeue(self, ahead: int, behind: int, heard: Heard) -> None:
        self.play.done["requeue"] += 1
        model = self.play.model
        self.play.requeue(model.attempt + ahead, max((model.enqueues or 0) - behind, 0), heard)

    @precondition(lambda self: self.seldom("watch", 8))
    @rule(heard=HEARD)
    def watch(self, heard: Heard) -> None:
        self.play.done["watch"] += 1
        self.play.watch(heard)

    @precondition(lambda self: self.seldom("cancel", 25))
    @rule(heard=HEARD, again=st.booleans())
    def cancel(self, heard: Heard, again: bool) -> None:
        self.play.done["cancel"] += 1
        known = [closing for closing in self.play.closings if closing.reason == "cancelled"]
        new = Closing("cancelled", '{"reason":"client"}', "cancelled", self.play.token())
        self.play.close(known[-1] if again and known else new, ("", ""), True, heard)

    @precondition(lambda self: self.seldom("delete", 40))
    @rule(heard=HEARD)
    def delete(self, heard: Heard) -> None:
        self.play.done["delete"] += 1
        reply = self.play.erase(heard)
        if reply is not None and reply.answer is Answer.OK:
            self.play.erased_in = self.play.failovers

    # -- time, failovers, and what is kept -------------------------------------------------------------------

    @precondition(lambda self: self.seldom("wait", 6))
    @rule(ms=WAITS)
    def wait(self, ms: int) -> None:
        self.play.done["wait"] += 1
        self.play.server.move(ms)

    @precondition(lambda self: self.play.model.status in (*CLOSED, "erased") and self.seldom("expire", 30))
    @rule()
    def expire(self) -> None:
        self.play.done["expire"] += 1
        self.play.expire()

    @precondition(lambda self: self.seldom("replicate", 12))
    @rule()
    def replicate(self) -> None:
        self.play.done["replicate"] += 1
        self.play.replicate()

    @precondition(lambda self: self.play.can_fail_over and self.seldom("fail over", 5))
    @rule(back=st.sampled_from([1, 1, 2, 3, 4, 6, 9, 30]), clock_offset=st.sampled_from([0, 0, 0, -2000, 2000]))
    def fail_over(self, back: int, clock_offset: int) -> None:
        self.play.done["fail over"] += 1
        self.play.fail_over(back, clock_offset)

    @precondition(lambda self: self.play.in_state("running") and self.seldom("lose at once", 6))
    @rule(data=st.data(), writes=st.integers(1, 3), forgets=st.booleans(), back=st.integers(1, 5), ends=st.booleans())
    def lose_what_was_just_read(self, data: Any, writes: int, forgets: bool, back: int, ends: bool) -> None:
        self.play.done["lose at once"] += 1
        worker = self.any_of(data, "running")
        for n in range(writes):
            if worker.state == "running":
                last = n == writes - 1
                self.play.go_on(worker, 1, n == 0, "final" if ends and last else "", LEASE_MS, "once")
                self.play.check()
        if forgets:
            worker.kept_from = max(worker.kept_from, worker.written)
        for reader in self.play.readers:
            self.play.look(reader, 50)
        if self.play.can_fail_over:
            self.play.fail_over(back, 0)

    @precondition(
        lambda self: self.play.in_state("running") and self.play.lease_holds and self.seldom("next attempt", 8)
    )
    @rule(data=st.data(), back=st.integers(0, 4), turns=st.lists(st.sampled_from(["old", "old", "new"]), max_size=5))
    def lose_the_worker(self, data: Any, back: int, turns: list[str]) -> None:
        """It is only slow: the next attempt's claim may be lost, and then both write."""
        self.play.done["next attempt"] += 1
        old = self.any_of(data, "running")
        self.play.server.move(16_000)
        self.play.fence(MANY, "once")
        self.play.check()
        if self.play.model.status == "queued":
            self.play.claim(self.play.model.attempt + 1, "once")
            self.play.check()
            if back and self.play.can_fail_over:
                self.play.fail_over(back, 0)
                self.play.check()
        for turn in turns:
            worker = old if turn == "old" else self.play.workers[-1]
            if worker.state == "running":
                self.play.go_on(worker, 1, turn == "old", "", LEASE_MS, "once")
                self.play.check()

    @precondition(lambda self: self.play.to_send_again or self.play.erased_in not in (None, self.play.failovers))
    @rule(data=st.data(), heard=HEARD)
    def send_again(self, data: Any, heard: Heard) -> None:
        """What is kept from before the last failover."""
        self.play.done["send again"] += 1
        if self.play.erased_in not in (None, self.play.failovers):
            if self.play.erase(heard) is not None:
                self.play.erased_in = self.play.failovers
        else:
            self.play.send_again(data.draw(st.sampled_from(self.play.to_send_again)), heard)

    # -- readers ---------------------------------------------------------------------------------------------

    @rule(at=st.integers(0, 1), count=st.sampled_from([1, 2, 3, 50]))
    def read(self, at: int, count: int) -> None:
        self.play.done["read"] += 1
        self.play.look(self.play.readers[at], count)

    @precondition(lambda self: any(reader.ended for reader in self.play.readers) and self.seldom("come back", 6))
    @rule()
    def come_back(self) -> None:
        """With the terminal's id as its cursor: there may be more."""
        self.play.done["come back"] += 1
        for reader in self.play.readers:
            reader.ended = False


@pytest.mark.timeout(1800 if LONG else 180)
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
