"""What must hold, at every step and in the end, and what the judge notes to know it. No process sees it."""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import TYPE_CHECKING

from broker.ids import START, EventId
from tests.model.scripts import CLOSED, LEASE_MS, LIVE, Content, Entry, Record, fold

if TYPE_CHECKING:
    from tests.model.core import Core
    from tests.model.processes import Reader

REPAIR_MS = 5000
"""For so long after a failover nobody opens an epoch (PROTOCOL 4.6)."""


class Violation(Exception):
    """`kind` names what was violated, to tell violations apart when schedules are shortened."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(f"{kind}: {text}")
        self.kind = kind


class Judge:
    def __init__(self, world: Core) -> None:
        self._world = world
        self._written: dict[tuple[str, EventId], Content] = {}
        self._heard: dict[tuple[str, int], int] = {}
        """When the owner of an epoch was last heard by Redis."""
        self._fences: Counter[str] = Counter()
        self.owner: dict[tuple[str, int], str] = {}
        self.cancelled: dict[str, str] = {}
        """Runs whose cancel was confirmed, and by whom."""
        self.erased: dict[str, str] = {}
        self.excused: set[tuple[str, int]] = set()
        """Closings, by the epoch of their terminal, of which a client may have read what the log does not say in the
        end: the exceptions of PROTOCOL 7.
        """
        self._closings: defaultdict[str, set[tuple[str, int]]] = defaultdict(set)
        self.closing_lost: dict[str, int] = {}
        """Runs whose end a failover took, and when it first did."""
        self.run_lost: set[str] = set()
        self.expired: set[str] = set()

    # -- what the scripts do ---------------------------------------------------------------------------------

    def wrote(self, request_id: str, entries: tuple[Entry, ...]) -> None:
        for entry in entries:
            if self._written.setdefault((request_id, entry.id), entry.content) != entry.content:
                raise Violation("two contents", f"{entry.id} of {request_id}")

    def heard(self, request_id: str, epoch: int) -> None:
        self._heard[request_id, epoch] = self._world.now

    def displaced(self, request_id: str, epoch: int) -> None:
        """A running run is taken from its owner. Clocks of servers may differ by 2 s."""
        silent = self._world.now - self._heard.get((request_id, epoch), -(10**9))
        if silent < LEASE_MS - 2100:
            raise Violation("living owner displaced", f"{request_id}, heard {silent} ms ago")

    def fenced(self, request_id: str) -> None:
        self._fences[request_id] += 1

    def created(self, request_id: str) -> None:
        if request_id in self.expired:
            raise Violation("made again", f"{request_id} had ended and expired")

    # -- exceptions (PROTOCOL 7) -----------------------------------------------------------------------------

    def closing_failed(self, request_id: str, epoch: int) -> None:
        """It was sent again and refused: excused if its keeper came back too late."""
        now = self._world.now
        if now - self.closing_lost.get(request_id, now) > REPAIR_MS:
            self.excused.add((request_id, epoch))

    def closed(self, request_id: str, epoch: int) -> None:
        """Another closing, after a failover took one: whoever has read one of them is excused."""
        self._closings[request_id].add((request_id, epoch))
        if request_id in self.closing_lost:
            self.excused |= self._closings[request_id]

    def process_died(self, name: str) -> None:
        """What it kept is lost, if a failover has taken it or takes it now."""
        world = self._world
        for kept in world.kept:
            if kept.keeper == name and kept.generation != world.runs.generation:
                self.excused.add((kept.request_id, kept.epoch))
        for worker in world.workers:
            if worker.name == name and worker.held is not None and worker.held.done:
                self.excused.add((worker.held.request_id, worker.held.epoch))

    def gateway_died(self, name: str) -> None:
        for kept in self._world.kept:
            if kept.keeper == name:
                self.cancelled.pop(kept.request_id, None)
                self.erased.pop(kept.request_id, None)
                self.excused.add((kept.request_id, kept.epoch))

    def failed_over(self, before: dict[str, Record]) -> None:
        world = self._world
        for request_id, old in before.items():
            new = world.runs.state.get(request_id)
            if new is None:
                self.cancelled.pop(request_id, None)
                self.erased.pop(request_id, None)
                self.run_lost.add(request_id)
            elif old.status == "erased" != new.status:
                self.closing_lost.setdefault(request_id, world.now)
                self.run_lost.add(request_id)
            if old.status in CLOSED.values() and (new is None or new.status not in CLOSED.values()):
                self._closing_taken(request_id, old)

    def _closing_taken(self, request_id: str, old: Record) -> None:
        world = self._world
        again = request_id in self.closing_lost
        self.closing_lost.setdefault(request_id, world.now)
        kept = any(kept.tail for kept in world.kept_of(request_id))
        alive = any(worker.name == self.owner.get((request_id, old.epoch)) for worker in world.workers)
        if again or old.log[-1].type != "final" or not (kept or alive):
            self.excused.add((request_id, old.epoch))

    # -- at every step ---------------------------------------------------------------------------------------

    def check(self) -> None:
        world, unfinished = self._world, 0
        for request_id, record in world.runs.state.items():
            if record.status == "erased":
                continue
            unfinished += record.status in LIVE and request_id not in self.closing_lost
            self._check_log(record)
            if record.fails > self._fences[request_id]:
                raise Violation("counted as lost", f"{request_id} counts {record.fails} losses")
        if unfinished > 1 and not world.keys.generation:
            raise Violation("two runs", f"unfinished under one key: {sorted(world.runs.state)}")
        for reader in world.readers:
            found = world.runs.state.get(reader.request_id or "")
            if reader.ended == "204" and found is not None and found.status in CLOSED.values():
                self._check_view(reader, found)

    def _check_log(self, record: Record) -> None:
        previous = START
        for entry in record.log:
            follows = EventId(previous.epoch, previous.seq + 1)
            opens = EventId(entry.id.epoch, 1)
            if entry.id != (follows if entry.id.epoch == previous.epoch else opens) or entry.id < previous:
                raise Violation("not contiguous", f"{entry.id} after {previous}")
            if entry.id.epoch and entry.id.seq == 1 and entry.type != "attempt":
                raise Violation("no attempt", f"epoch {entry.id.epoch} begins with {entry.type}")
            if entry.type in CLOSED and entry is not record.log[-1]:
                raise Violation("terminals", f"something follows {entry.id}")
            if entry.attempt > record.attempt:
                raise Violation("attempts fall", f"the record has {record.attempt}, {entry.id} is {entry.attempt}")
            previous = entry.id
        if record.status != CLOSED.get(record.log[-1].type, record.status) or (
            record.status in CLOSED.values() and record.log[-1].type not in CLOSED
        ):
            raise Violation("terminals", f"status {record.status}, the log ends with {record.log[-1].type}")
        self._check_chain(record)
        covered = [entry.id for entry in record.log if entry.checkpoint and entry.id.epoch == record.epoch]
        if covered and record.checkpoint.id != covered[-1]:
            raise Violation("checkpoint lost", f"{covered[-1]} was covered, the record has {record.checkpoint.id}")

    def _check_chain(self, record: Record) -> None:
        """The fold is what one agent said, each thing after the one before it."""
        before: Content | None = None
        for entry in fold(record.log):
            if entry.type not in ("error", "cancelled") and entry.stands_on != before:
                raise Violation("not a fold", f"{entry.type} {entry.id} stands on {entry.stands_on}, not on {before}")
            before = entry.content

    def _check_view(self, reader: Reader, record: Record) -> None:
        seen, said = reader.view, fold(record.log)
        if [entry.content for entry in seen] == [entry.content for entry in said]:
            return
        read = reader.terminal
        if read is not None and (reader.request_id in self.run_lost or (reader.request_id, read.epoch) in self.excused):
            return
        raise Violation("reader", f"holds {[str(e.id) for e in seen]}, the log says {[str(e.id) for e in said]}")

    # -- when all faults are over ----------------------------------------------------------------------------

    def check_end(self) -> None:
        world = self._world
        state = world.runs.state
        for request_id, record in state.items():
            if record.status in LIVE:
                raise Violation("never ends", f"{request_id}: {record.status}, attempt {record.attempt}")
            if request_id in self.erased and record.status != "erased":
                raise Violation("erased run is back", request_id)
        for request_id in self.cancelled:
            if request_id in state and state[request_id].status not in ("cancelled", "erased"):
                raise Violation("cancelled run goes on", f"{request_id} is {state[request_id].status}")
        for reader in world.readers:
            if reader.request_id is None:
                continue
            if not reader.ended:
                raise Violation("never told", f"a reader stands at {reader.position}")
            found = state.get(reader.request_id)
            if found is None or found.status == "erased" or reader.ended == "gone":
                continue
            self._check_view(reader, found)
            if not world.runs.generation and reader.frames != [entry.id for entry in found.log]:
                raise Violation("reader", f"without a failover it read {reader.frames}")
