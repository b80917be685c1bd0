"""What ends a run from outside, and how ends are kept until they are safe (PROTOCOL 5)."""

from __future__ import annotations

from typing import Literal

from broker.ids import START, EventId
from broker.runs.scripts import Answer
from tests.model.core import MAX_CLOCK_OFFSET, Core
from tests.model.processes import Gateway, Kept, Mode
from tests.model.rules import Rule
from tests.model.scripts import LIVE, STALE_MS, Checkpoint, ClosedBy, Entry, Reply

RETENTION_MS = STALE_MS + 2 * MAX_CLOCK_OFFSET


class Closing(Core):
    """Cancels, erasures, expiry, and all closings that are sent again."""

    def keep(
        self,
        keeper: str,
        type: Literal["final", "cancelled", "error", "erasure"],
        request_id: str,
        epoch: int = 0,
        token: str = "",
        attempt: int = 0,
        resume_from: EventId = START,
        tail: tuple[Entry, ...] = (),
    ) -> None:
        if tail:
            self.judge.closed(request_id, epoch)
        if Rule.KEEP not in self.dropped:
            generation = self.runs.generation
            self.kept.append(Kept(keeper, request_id, type, generation, epoch, token, attempt, resume_from, tail))

    def step_send_again(self, n: int, mode: Mode) -> None:
        """What a process keeps from before a failover."""
        if not self.kept:
            return
        kept = self.kept[n % len(self.kept)]
        if kept.generation == self.runs.generation:
            return
        if kept.type == "erasure":
            if self.call(mode, self.runs, lambda: self.scripts.erase(kept.request_id)) is not None:
                kept.generation = self.runs.generation
        elif kept.anew:
            self._close_anew(kept, mode)
        else:
            self._send_tail(kept, mode)

    def _close_anew(self, kept: Kept, mode: Mode) -> None:
        if not self.settled:
            return
        token = f"{kept.token}'"
        closed = self.call(mode, self.runs, lambda: self.scripts.close(kept.request_id, kept.type, token))
        if isinstance(closed, ClosedBy):
            kept.epoch, kept.attempt, kept.resume_from, kept.tail = closed
            kept.token, kept.anew, kept.generation = token, False, self.runs.generation
        elif closed is not None:
            self._let_go(kept)

    def _send_tail(self, kept: Kept, mode: Mode) -> None:
        first = kept.tail[0].id.seq
        covered = [entry for entry in kept.tail if entry.checkpoint]
        checkpoint = Checkpoint(covered[-1].id, covered[-1].content) if covered else None
        epoch, token, attempt, resume_from, tail = kept.epoch, kept.token, kept.attempt, kept.resume_from, kept.tail
        reply = self.call(
            mode,
            self.runs,
            lambda: self.scripts.append(
                kept.request_id, epoch, token, attempt, resume_from, first, first, tail, checkpoint
            ),
        )
        if reply is None:
            return
        if reply.answer in (Answer.OK, Answer.DUP):
            kept.generation = self.runs.generation
            return
        lost = reply.answer is Answer.LOST
        if lost or (kept.type != "final" and reply.answer is Answer.FENCED):
            self.judge.excused.add((kept.request_id, epoch))
        self.judge.closing_failed(kept.request_id, epoch)
        if kept.type == "final":
            if lost:
                self.scripts.hand_over(kept.request_id, epoch, token, attempt)
            self._let_go(kept)
        elif reply.answer in (Answer.LOST, Answer.FENCED) and Rule.CLOSE_ANEW not in self.dropped:
            kept.anew = True
        else:
            self._let_go(kept)

    def _let_go(self, kept: Kept) -> None:
        """What closed the run meanwhile stands."""
        self.kept.remove(kept)
        if kept.type == "cancelled" and Rule.CLOSE_ANEW not in self.dropped:
            self.judge.cancelled.pop(kept.request_id, None)

    def step_replicate(self, name: str) -> None:
        """Every replica has caught up: what is kept for the runs' servers is safe."""
        server = next(server for server in self.servers if server.name == name)
        server.replicate()
        if server is self.runs:
            self.kept = [kept for kept in self.kept if kept.generation != self.runs.generation]

    def forget(self, name: str) -> None:
        self.judge.process_died(name)
        self.kept = [kept for kept in self.kept if kept.keeper != name]

    def keep_closing(
        self,
        keeper: str,
        request_id: str,
        type: Literal["cancelled", "error"],
        token: str,
        closed: ClosedBy | Reply | None,
    ) -> None:
        if isinstance(closed, ClosedBy):
            self.keep(keeper, type, request_id, closed.epoch, token, closed.attempt, closed.resume_from, closed.entries)

    def step_cancel(self, n: int, mode: Mode) -> None:
        """A gateway does it; on an error it repeats it with the same token."""
        live = sorted(request_id for request_id, record in self.runs.state.items() if record.status in LIVE)
        if not live or not self.settled:
            return
        gateway, request_id, token = self.gateways[n % len(self.gateways)], live[0], f"c{self.unique()}"

        def work() -> Reply | ClosedBy:
            return self.scripts.close(request_id, "cancelled", token)

        closed = self.call(mode, self.runs, work) or self.call("ok", self.runs, work)
        if isinstance(closed, ClosedBy):
            self.keep_closing(gateway.name, request_id, "cancelled", token, closed)
            self.judge.cancelled[request_id] = gateway.name

    def step_erase(self, n: int, mode: Mode) -> None:
        gateway, names = self.gateways[n % len(self.gateways)], sorted(self.runs.state)
        if names:
            reply = self.call(mode, self.runs, lambda: self.scripts.erase(names[0]))
            if reply is not None and reply.answer is Answer.OK:
                self.judge.erased[names[0]] = gateway.name
                if Rule.KEEP_ERASURE not in self.dropped:
                    self.keep(gateway.name, "erasure", names[0])

    def step_expire(self) -> None:
        """The retention of what has ended is over. It is longer than a key's claim can be young, and by then what was
        written before is on every replica.
        """
        for request_id, record in tuple(self.runs.state.items()):
            if record.finished_at and self.run_time() - record.finished_at >= RETENTION_MS:
                self.judge.expired.add(request_id)
                self.judge.run_lost.add(request_id)
                self.runs.put(request_id, None)
                self.step_replicate(self.runs.name)

    def step_gateway_dies(self, n: int) -> None:
        n %= len(self.gateways)
        name = self.gateways[n].name
        self.judge.gateway_died(name)
        self.kept = [kept for kept in self.kept if kept.keeper != name]
        self.gateways[n] = Gateway(f"gateway {n}, after {self.unique()}")
        for reader in self.readers:
            if reader.gateway == n:
                reader.gateway = None
