"""The run's scripts and the servers they run on. What is stored is immutable: a state is kept by a reference."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Generic, NamedTuple, Protocol, TypeVar

from broker.ids import START, EventId
from broker.runs.scripts import Answer
from tests.model.rules import Rule

LEASE_MS = 15_000
STALE_MS = 60_000
MAX_ATTEMPTS = 3

CLOSED = {"final": "completed", "error": "failed", "cancelled": "cancelled"}
LIVE = ("queued", "running")

Content = int | str
K = TypeVar("K")
V = TypeVar("V")


class Entry(NamedTuple):
    id: EventId
    type: str
    content: Content
    """Unique, except that `start` is always the same."""
    stands_on: Content | None = None
    """The content of the entry before it in the agent's mind: so a fold can be judged without knowing the agent."""
    resume_from: EventId | None = None
    """Of an `attempt`."""
    attempt: int = 0
    """Of an `attempt` that a claim wrote."""
    checkpoint: bool = False


class Checkpoint(NamedTuple):
    id: EventId
    content: Content


BEGINNING = Checkpoint(EventId(0, 1), "start")
START_ENTRY = Entry(BEGINNING.id, "start", BEGINNING.content)


class Record(NamedTuple):
    """A run's hash and log together: they are in one slot, and go back together."""

    status: str
    epoch: int = 0
    token: str = ""
    attempt: int = 0
    fails: int = 0
    deadline: int = 0
    claimed_at: int = 0
    finished_at: int = 0
    checkpoint: Checkpoint = BEGINNING
    log: tuple[Entry, ...] = ()
    enqueues: int = 0
    handed: str = ""

    @property
    def end(self) -> EventId:
        return self.log[-1].id if self.log else START


def fold(log: Iterable[Entry]) -> list[Entry]:
    kept: list[Entry] = []
    for entry in log:
        if entry.resume_from is None:
            kept.append(entry)
        else:
            kept = [other for other in kept if other.id <= entry.resume_from]
    return kept


class Reply(NamedTuple):
    answer: Answer
    end: EventId
    status: str


class Granted(NamedTuple):
    """The answer to a claim that was granted."""

    epoch: int
    attempt: int
    checkpoint: Checkpoint
    resume_from: EventId
    opening: tuple[Entry, ...]
    """The `attempt` entry; empty where a planted bug leaves it out."""


class ClosedBy(NamedTuple):
    """The answer to a closing that was made, now or before: what its maker sends again."""

    epoch: int
    attempt: int
    resume_from: EventId
    entries: tuple[Entry, ...]


@dataclass
class Server(Generic[K, V]):
    """One of the servers; `history` is every state that it has had."""

    name: str
    state: dict[K, V] = field(default_factory=dict)
    history: list[dict[K, V]] = field(default_factory=list)
    floor: int = 0
    """How much of the history every replica has."""
    generation: int = 0
    """How often it has failed over: connections of an earlier one are broken."""
    clock_offset: int = 0

    def put(self, key: K, value: V | None) -> None:
        self.history.append(self.state)
        self.state = dict(self.state)
        if value is None:
            self.state.pop(key, None)
        else:
            self.state[key] = value

    def replicate(self) -> None:
        self.floor = len(self.history)

    def fall_back(self, states: int, clock_offset: int) -> None:
        to = max(self.floor, len(self.history) - states)
        self.generation += 1
        self.clock_offset = clock_offset
        if to < len(self.history):
            self.state = self.history[to]
            del self.history[to:]


class Witness(Protocol):
    """Who sees what the scripts do, and says what time it is."""

    dropped: frozenset[Rule]

    def run_time(self) -> int: ...

    def unique(self) -> int: ...

    def wrote(self, request_id: str, previous: EventId, entries: tuple[Entry, ...]) -> None: ...

    def heard(self, request_id: str, epoch: int) -> None: ...

    def displaced(self, request_id: str, epoch: int) -> None: ...

    def fenced(self, request_id: str) -> None: ...

    def created(self, request_id: str) -> None: ...


class Scripts:
    """As broker/runs/lua has them, except for what is not modelled."""

    def __init__(self, server: Server[str, Record], witness: Witness) -> None:
        self._server = server
        self._witness = witness
        self._dropped = witness.dropped

    def _find(self, request_id: str) -> Record | Reply:
        record = self._server.state.get(request_id)
        if record is None or record.status == "erased":
            return Reply(Answer.GONE, START, record.status if record else "")
        return record

    def _save(self, request_id: str, record: Record, entries: tuple[Entry, ...] = ()) -> None:
        if entries:
            self._witness.wrote(request_id, record.end, entries)
            record = record._replace(log=record.log + entries)
        self._server.put(request_id, record)

    def _new_epoch(self, record: Record) -> int:
        following = max(record.epoch, record.end.epoch) + 1
        if Rule.EPOCH_BASE in self._dropped:
            return following
        return max(following, self._witness.run_time() - record.claimed_at)

    def create(self, request_id: str, claimed_at: int) -> Reply:
        record = self._server.state.get(request_id)
        if record is not None:
            return Reply(Answer.EXISTS, record.end, record.status)
        now = self._witness.run_time()
        if Rule.STALE not in self._dropped and now - claimed_at >= STALE_MS:
            return Reply(Answer.STALE, START, "")
        self._witness.created(request_id)
        base = now if Rule.CLAIMED_AT in self._dropped else claimed_at
        self._save(request_id, Record("queued", claimed_at=base), (START_ENTRY,))
        return Reply(Answer.CREATED, START_ENTRY.id, "queued")

    def claim(self, request_id: str, attempt: int, token: str) -> Reply | Granted:
        record = self._find(request_id)
        if isinstance(record, Reply):
            return record
        checkpoint = BEGINNING if attempt == 1 else record.checkpoint
        resume_from = BEGINNING.id if Rule.RESUME in self._dropped else checkpoint.id
        if record.status == "running" and record.token == token:
            opening = tuple(entry for entry in record.log if entry.id == (record.epoch, 1))
            return Granted(record.epoch, record.attempt, checkpoint, resume_from, opening)
        if record.status in CLOSED.values():
            return Reply(Answer.CLOSED, record.end, record.status)
        queued = record.status == "queued" or Rule.QUEUED_ONLY in self._dropped
        following = record.attempt + 1 == attempt or Rule.NEXT_ATTEMPT in self._dropped or record.status == "running"
        if not (queued and following):
            return Reply(Answer.REFUSED, record.end, record.status)
        if record.status == "running":
            self._witness.displaced(request_id, record.epoch)
        epoch = self._new_epoch(record)
        opening = (Entry(EventId(epoch, 1), "attempt", f"{epoch}.{token}", resume_from=resume_from, attempt=attempt),)
        deadline = self._witness.run_time() + LEASE_MS
        running = record._replace(
            status="running", epoch=epoch, token=token, attempt=attempt, deadline=deadline, enqueues=0
        )
        self._save(request_id, running, opening)
        self._witness.heard(request_id, epoch)
        return Granted(epoch, attempt, checkpoint, resume_from, opening)

    def append(
        self,
        request_id: str,
        epoch: int,
        token: str,
        attempt: int,
        resume_from: EventId,
        kept_from: int,
        first: int,
        entries: tuple[Entry, ...],
        checkpoint: Checkpoint | None,
    ) -> Reply:
        """`entries` are first, first + 1, …; an empty batch is a renewal. `kept_from` is the lowest seq kept."""
        record = self._find(request_id)
        if isinstance(record, Reply):
            return record
        end, mine = record.end, (record.epoch, record.token) == (epoch, token)
        deadline = self._witness.run_time() + LEASE_MS
        upto = first + len(entries) - 1
        if Rule.DUP not in self._dropped and mine and end.epoch == epoch and end.seq >= upto:
            if record.status == "running":
                late = checkpoint is None or (
                    checkpoint.id < record.checkpoint.id and Rule.CHECKPOINT_RISES not in self._dropped
                )
                covered = record.checkpoint if late or checkpoint is None else checkpoint
                self._save(request_id, record._replace(deadline=deadline, checkpoint=covered))
                self._witness.heard(request_id, epoch)
            return Reply(Answer.DUP, end, record.status)
        if record.epoch > epoch and Rule.FENCED_EPOCH not in self._dropped:
            return Reply(Answer.FENCED, end, record.status)
        if record.epoch == epoch and not mine:
            return Reply(Answer.FENCED, end, record.status)
        if record.status in CLOSED.values() and Rule.CLOSED not in self._dropped:
            return Reply(Answer.CLOSED, end, record.status)
        have = end.seq if end.epoch == epoch else 0
        if Rule.LOST not in self._dropped and (
            end < resume_from or (kept_from > 1 and (end.epoch < epoch or have < kept_from - 1))
        ):
            return Reply(Answer.LOST, end, record.status)
        if Rule.LOST_VOID not in self._dropped and have == 0 and is_void(record.log, resume_from):
            return Reply(Answer.LOST, end, record.status)
        if end.epoch > epoch and Rule.FENCED_EPOCH not in self._dropped:
            return Reply(Answer.FENCED, end, record.status)
        if have < first - 1 and Rule.GAP not in self._dropped:
            return Reply(Answer.GAP, end, record.status)
        new = entries[max(have + 1 - first, 0) :]
        covered = record.checkpoint
        if have == 0 and covered.id > resume_from and Rule.CHECKPOINT_NOT_VOID not in self._dropped:
            covered = BEGINNING
        status = CLOSED.get(new[-1].type, "running") if new else record.status
        owned = record._replace(
            status=status,
            epoch=epoch,
            token=token,
            attempt=max(attempt, record.attempt),
            deadline=deadline,
            checkpoint=checkpoint or covered,
            finished_at=self._witness.run_time() if status in CLOSED.values() else 0,
        )
        self._save(request_id, owned, new)
        self._witness.heard(request_id, epoch)
        return Reply(Answer.OK, new[-1].id if new else end, status)

    def close(
        self, request_id: str, type: str, token: str, *, if_deadline: int | None = None, if_attempt: int | None = None
    ) -> Reply | ClosedBy:
        record = self._find(request_id)
        if isinstance(record, Reply):
            return record
        end = record.end
        if record.status in CLOSED.values():
            if record.token != token:
                return Reply(Answer.CLOSED, end, record.status)
            return ClosedBy(record.epoch, record.attempt, record.log[-2].resume_from or START, record.log[-2:])
        if (if_deadline is not None and record.deadline != if_deadline) or (
            if_attempt is not None and (record.status, record.attempt) != ("queued", if_attempt)
        ):
            return Reply(Answer.REFUSED, end, record.status)
        if Rule.OWN_EPOCH in self._dropped:
            epoch = max(record.epoch, end.epoch)
            entries: tuple[Entry, ...] = (Entry(EventId(epoch, end.seq + 1), type, type),)
        else:
            epoch = self._new_epoch(record)
            opening = Entry(EventId(epoch, 1), "attempt", self._witness.unique(), resume_from=end)
            entries = (opening, Entry(EventId(epoch, 2), type, type))
        now = self._witness.run_time()
        self._save(request_id, record._replace(status=CLOSED[type], epoch=epoch, token=token, finished_at=now), entries)
        return ClosedBy(epoch, record.attempt, end, entries)

    def hand_over(self, request_id: str, epoch: int, token: str, attempt: int) -> Reply | int:
        """The next attempt, where it was done, now or before."""
        record = self._find(request_id)
        if isinstance(record, Reply):
            return record
        attempt = max(attempt, record.attempt)
        if record.epoch == epoch and record.status == "queued" and record.handed == token:
            return attempt + 1
        if record.epoch > epoch or (record.epoch == epoch and record.token != token):
            return Reply(Answer.FENCED, record.end, record.status)
        if record.status in CLOSED.values():
            return Reply(Answer.CLOSED, record.end, record.status)
        fails = record.fails + (Rule.HAND_OVER_IS_FREE in self._dropped)
        queued = record._replace(
            status="queued", token="", handed=token, epoch=epoch, attempt=attempt, enqueues=0, fails=fails, deadline=0
        )
        self._save(request_id, queued)
        return attempt + 1

    def fence(self, request_id: str) -> Reply | int:
        """The next attempt."""
        record = self._find(request_id)
        if isinstance(record, Reply):
            return record
        now = self._witness.run_time()
        if record.status != "running" or record.deadline > now:
            if record.status == "running" and record.deadline > now + LEASE_MS:
                self._save(request_id, record._replace(deadline=now + LEASE_MS))
            return Reply(Answer.REFUSED, record.end, record.status)
        self._witness.displaced(request_id, record.epoch)
        if record.fails + 1 >= MAX_ATTEMPTS:
            return Reply(Answer.SPENT, record.end, record.status)
        self._witness.fenced(request_id)
        queued = record._replace(status="queued", token="", handed="", fails=record.fails + 1, enqueues=0)
        self._save(request_id, queued)
        return record.attempt + 1

    def requeue(self, request_id: str, attempt: int, enqueues: int) -> Reply | int:
        """How often it was enqueued, with this time."""
        record = self._find(request_id)
        if isinstance(record, Reply):
            return record
        if record.status != "queued" or (record.attempt + 1, record.enqueues) != (attempt, enqueues):
            return Reply(Answer.REFUSED, record.end, record.status)
        self._save(request_id, record._replace(enqueues=enqueues + 1))
        return enqueues + 1

    def erase(self, request_id: str) -> Reply:
        record = self._find(request_id)
        if isinstance(record, Reply):
            return record
        self._server.put(request_id, None if Rule.TOMBSTONE in self._dropped else Record("erased"))
        return Reply(Answer.OK, START, "erased")


def is_void(log: Iterable[Entry], event_id: EventId) -> bool:
    """Whether an `attempt` of the log voids `event_id`."""
    return any(entry.resume_from is not None and entry.resume_from < event_id < entry.id for entry in log)
