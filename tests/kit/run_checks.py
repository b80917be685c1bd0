"""What must hold of a run and its readers after each thing that is done, and in the end."""

from __future__ import annotations

import json

from broker.events import Entry
from broker.fold import fold, is_void
from broker.runs.record import parse_rewinds
from tests.kit.checker import check_log, check_reader
from tests.kit.run_model import BEGINNING, CLOSED, Span
from tests.kit.run_play import SETTLE_MS, RunPlay, Worker
from tests.kit.run_reader import RunReader
from tests.kit.run_server import State
from tests.kit.runs import LEASE_MS


class CheckedPlay(RunPlay):
    """With what must hold after each thing that is done, and in the end."""

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

    def an_id_never_has_two_contents(self) -> None:
        """Not even over failovers: PROTOCOL 7 makes no exception."""
        for entry in self.model.log:
            assert self.contents.setdefault(entry.id, entry) == entry
        for reader in self.readers:
            for entry in reader.seen:
                assert self.contents[entry.id] == entry

    def who_has_read_everything_has_the_logs_fold(self) -> None:
        for reader in self.readers:
            if self.model.log and reader.position == self.model.end and not reader.gone:
                assert reader.view == fold(self.model.log)
            if not self.failovers and not reader.gone and self.model.log:
                check_reader(reader.seen, self.model.log[: len(reader.seen)])

    def settle(self) -> None:
        """No more faults: whoever lives repairs, then the run comes to its end, and the readers to the log's."""
        for _ in range(4):
            for worker in self.in_state("running"):
                self.write(worker, LEASE_MS, "once")
            for kept in self.to_send_again:
                if isinstance(kept, Worker) or kept.writer is not None or self.settled:
                    self.send_again(kept, "once")
            for worker in self.in_state("handing over"):
                self.hand_over(worker, "data_lost", "once")
            self.check()
        self.server.move(SETTLE_MS)
        for kept in self.to_send_again:
            self.send_again(kept, "once")
        self.end_the_run()
        self.check()
        for reader in self.readers:
            self.check_end(reader)

    def end_the_run(self) -> None:
        """It is worked on to its end."""
        for _ in range(3):
            if self.model.status == "running":
                self.server.move(LEASE_MS + 2 * 2000)
                self.fence(1_000_000, "once")
                self.close_spent("once") if self.spent else None
            if self.model.status == "queued":
                self.claim(self.model.attempt + 1, "once")
                worker = self.workers[-1]
                self.say(worker, 2, False, "final")
                self.write(worker, LEASE_MS, "once")
            self.check()
        assert self.model.status not in ("queued", "running"), self.model.status

    def check(self) -> None:
        self.hear()
        self.remember()
        self.the_log_is_a_log()
        self.an_id_never_has_two_contents()
        self.who_has_read_everything_has_the_logs_fold()

    def check_end(self, reader: RunReader) -> None:
        """Who reads on has the log's fold. Who had read a terminal and went has it too, but for the exception of
        PROTOCOL 7: a failover took that closing, and another one was written after it.
        """
        for _ in range(4):
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


def check_chain(entries: list[Entry]) -> None:
    """Each thing that survives stands on the one before it: nobody went on from what is void, or is missing."""
    before = BEGINNING
    for entry in fold(entries)[1:]:
        said = json.loads(entry.data)
        if "on" in said:
            assert said["on"] == str(before), f"{entry.id} stands on {said['on']}, not on {before}"
        before = entry.id
