"""A run's scripts once more, in plain Python: what the state machine compares the real ones with (PROTOCOL 2).

Written from the protocol, not from the Lua. A log is a list here, and what is missing of a batch is found by ids. What
depends on the clock is a span: a call was made at some time between two. Of an epoch the protocol says only what is the
least (1.3), so the model is told which one was taken, and judges it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from broker.events import Entry
from broker.ids import START, EventId

CLOSED = ("completed", "failed", "cancelled")
STATUS_OF = {"final": "completed", "error": "failed", "cancelled": "cancelled"}
BEGINNING = EventId(0, 1)
STALE_MS = 60_000


class Span(NamedTuple):
    """A time, in ms, that is not known exactly."""

    least: int
    most: int

    def later(self, ms: int) -> Span:
        return Span(self.least + ms, self.most + ms)


PAST = Span(-(10**15), 10**11)
"""Of a deadline that is none."""


@dataclass(frozen=True)
class Answer:
    answer: str
    end: EventId
    status: str
    rest: tuple[int | str, ...] = ()


@dataclass(frozen=True)
class Writer:
    """A claim that was granted, or a closing: under what its maker writes."""

    epoch: int
    token: str
    attempt: int
    resume_from: EventId
    reason: str
    opening: Entry
    """The `attempt` entry with which its tail begins."""


@dataclass
class RunModel:
    request_id: str
    status: str = ""
    epoch: int = 0
    token: str = ""
    attempt: int = 0
    log: list[Entry] = field(default_factory=list)
    checkpoint: tuple[EventId, str] | None = None
    fails: int | None = None
    enqueues: int | None = None
    handed: str | None = None
    reason: str | None = None
    times: dict[str, Span] = field(default_factory=dict)
    """`claimed_at`, `created_at`, `started_at`, `finished_at`, `deadline`, `watched_at`, where there is one."""

    def copy(self) -> RunModel:
        return replace(self, log=list(self.log), times=dict(self.times))

    @property
    def end(self) -> EventId:
        return self.log[-1].id if self.log else START

    @property
    def fields(self) -> dict[str, str]:
        """What the record must have, times and what was submitted left out; '' where there is nothing."""
        if self.gone:
            return {"status": self.status}
        attempts = [entry for entry in self.log if entry.type == "attempt"]
        numbers = {"fails": self.fails, "enqueues": self.enqueues}
        return {
            "status": self.status,
            "end": str(self.end),
            "epoch": str(self.epoch),
            "token": self.token,
            "attempt": str(self.attempt),
            "events": str(len(self.log)),
            "bytes": str(sum(len(entry.data) for entry in self.log)),
            "rewinds": "".join(f"{entry.id}:{json.loads(entry.data)['resume_from']} " for entry in attempts),
            "checkpoint_id": str(self.checkpoint[0]) if self.checkpoint else "",
            "checkpoint": self.checkpoint[1] if self.checkpoint else "",
            "handed": self.handed or "",
            "reason": self.reason or "",
            "result": self.log[-1].data if self.status in CLOSED else "",
            **{name: "" if number is None else str(number) for name, number in numbers.items()},
        }

    def _answer(self, answer: str, *rest: int | str) -> Answer:
        return Answer(answer, self.end, self.status, rest)

    @property
    def gone(self) -> bool:
        return self.status in ("", "erased")

    def _open(self, epoch: int, now: Span, attempt: int, reason: str, resume_from: EventId) -> Entry:
        """The `attempt` entry of a new epoch, which must be one that nobody has had (PROTOCOL 1.3)."""
        following = max(self.epoch, self.end.epoch) + 1
        claimed_at = self.times["claimed_at"]
        least, most = now.least - claimed_at.most, now.most - claimed_at.least
        assert max(following, least) <= epoch <= max(following, most), f"epoch {epoch}: {following}, {least} to {most}"
        data = {"attempt": attempt, "reason": reason, "resume_from": str(resume_from)}
        return Entry(EventId(epoch, 1), "attempt", json.dumps(data, separators=(",", ":")))

    # -- submit, claim ---------------------------------------------------------------------------------------

    def create(self, start: str, claimed_at: int, now: Span, *, stale: bool) -> Answer:
        """`stale` says what was answered, for a time that is not clear."""
        if self.status:
            return self._answer("EXISTS", self.attempt)
        if is_past(claimed_at + STALE_MS, now, stale):
            return self._answer("STALE")
        self.status, self.enqueues, self.log = "queued", 0, [Entry(BEGINNING, "start", start)]
        self.times = {"claimed_at": Span(claimed_at, claimed_at), "created_at": now}
        return self._answer("CREATED", 0)

    def claim(
        self, attempt: int, token: str, epoch: int, now: Span, lease_ms: int, *, settled: bool
    ) -> Answer | Writer:
        if self.gone:
            return self._answer("GONE")
        if self.status == "running" and self.token == token:
            self._renew(now, lease_ms)
            return self._writer(self.epoch)
        if self.status in CLOSED:
            return self._answer("CLOSED")
        if self.status == "running" or attempt != self.attempt + 1:
            return self._answer("REFUSED")
        if not settled:
            return self._answer("UNSETTLED")
        resume_from = self.checkpoint[0] if self.checkpoint and attempt > 1 else BEGINNING
        reason = "started" if attempt == 1 else self.reason or "worker_lost"
        self.log.append(self._open(epoch, now, attempt, reason, resume_from))
        self.status, self.epoch, self.token, self.attempt, self.enqueues = "running", epoch, token, attempt, 0
        self.times["deadline"] = now.later(lease_ms)
        self.times.setdefault("started_at", now)
        return self._writer(epoch)

    def _writer(self, epoch: int) -> Writer:
        opening = next(entry for entry in self.log if entry.id == EventId(epoch, 1))
        data = json.loads(opening.data)
        resume_from = EventId.parse(data["resume_from"])
        return Writer(epoch, self.token, data["attempt"], resume_from, data["reason"], opening)

    # -- what an owner does ----------------------------------------------------------------------------------

    def append(
        self,
        writer: Writer,
        batch: Sequence[Entry],
        now: Span,
        *,
        upto: EventId,
        kept_from: int,
        checkpoint: tuple[EventId, str] | None,
        lease_ms: int,
    ) -> Answer:
        """`upto` is the id that the log ends with when the batch is in; `kept_from` the tail's lowest seq."""
        if self.gone:
            return self._answer("GONE")
        mine = (self.epoch, self.token) == (writer.epoch, writer.token)
        if mine and self.end.epoch == writer.epoch and self.end >= upto:
            if self.status == "running":
                self._renew(now, lease_ms)
                if checkpoint and (self.checkpoint is None or checkpoint[0] >= self.checkpoint[0]):
                    self.checkpoint = checkpoint
            return self._answer("DUP")
        if self.epoch > writer.epoch or (self.epoch == writer.epoch and not mine):
            return self._answer("FENCED")
        if self.status in CLOSED:
            return self._answer("CLOSED")
        if self._cannot_stand(writer, kept_from):
            return self._answer("LOST")
        missing = [entry for entry in batch if entry.id > self.end]
        begins = missing[0].id.seq == 1 if missing else False
        follows = missing and EventId(writer.epoch, missing[0].id.seq - 1) == self.end
        if not (begins or follows):
            return self._answer("GAP")
        self.log += missing
        self.status = STATUS_OF.get(missing[-1].type, "running")
        self.epoch, self.token, self.attempt = writer.epoch, writer.token, max(self.attempt, writer.attempt)
        self._renew(now, lease_ms)
        if begins:
            self.times.setdefault("started_at", now)
            if self.checkpoint and self.checkpoint[0] > writer.resume_from:
                self.checkpoint = None
        self.checkpoint = checkpoint or self.checkpoint
        if self.status in CLOSED:
            self.times["finished_at"] = now
        return self._answer("OK")

    def _cannot_stand(self, writer: Writer, kept_from: int) -> bool:
        if self.end < writer.resume_from:
            return True
        if kept_from > 1 and self.end < EventId(writer.epoch, kept_from - 1):
            return True
        begun = any(entry.id.epoch == writer.epoch for entry in self.log)
        return not begun and self._is_void(writer.resume_from)

    def _is_void(self, event_id: EventId) -> bool:
        attempts = [entry for entry in self.log if entry.type == "attempt" and entry.id > event_id]
        return any(EventId.parse(json.loads(entry.data)["resume_from"]) < event_id for entry in attempts)

    def _renew(self, now: Span, lease_ms: int) -> None:
        if lease_ms:
            self.times["deadline"] = now.later(lease_ms)

    def hand_over(self, writer: Writer, reason: str) -> Answer:
        if self.gone:
            return self._answer("GONE")
        attempt = max(self.attempt, writer.attempt)
        if self.epoch == writer.epoch and self.status == "queued" and self.handed == writer.token:
            return self._answer("OK", attempt + 1)
        if self.epoch > writer.epoch or (self.epoch == writer.epoch and self.token != writer.token):
            return self._answer("FENCED")
        if self.status in CLOSED:
            return self._answer("CLOSED")
        self.status, self.epoch, self.token, self.attempt = "queued", writer.epoch, "", attempt
        self.handed, self.reason, self.enqueues = writer.token, reason, 0
        self.times["deadline"] = PAST
        return self._answer("OK", attempt + 1)

    # -- what a reaper does ----------------------------------------------------------------------------------

    def fence(
        self, now: Span, *, lease_ms: int, max_attempts: int, max_run_ms: int, settled: bool, answered: str
    ) -> Answer:
        """`answered` counts where the time is not clear."""
        if self.gone:
            return self._answer("GONE")
        if self.status in CLOSED:
            return self._answer("CLOSED")
        if self.status != "running":
            return self._answer("REFUSED")
        deadline = self.times.get("deadline", PAST)
        if not is_past(deadline.most, now, answered != "REFUSED"):
            ahead = now.later(lease_ms)
            if deadline.most > ahead.least:
                self.times["deadline"] = Span(min(ahead.least, deadline.least), min(ahead.most, deadline.most))
            return self._answer("REFUSED")
        if not settled:
            return self._answer("UNSETTLED")
        fails = (self.fails or 0) + 1
        if fails >= max_attempts:
            return self._answer("SPENT")
        if is_past(self.times["started_at"].most + max_run_ms, now, answered == "OVERDUE"):
            return self._answer("OVERDUE")
        self.status, self.token, self.handed, self.fails = "queued", "", "", fails
        self.enqueues, self.reason = 0, "worker_lost"
        return self._answer("OK", self.attempt + 1)

    def requeue(self, attempt: int, enqueues: int) -> Answer:
        if self.gone:
            return self._answer("GONE")
        if self.status in CLOSED:
            return self._answer("CLOSED")
        if self.status != "queued" or (self.attempt + 1, self.enqueues or 0) != (attempt, enqueues):
            return self._answer("REFUSED")
        self.enqueues = enqueues + 1
        return self._answer("OK", self.enqueues)

    # -- watch, close, erase ---------------------------------------------------------------------------------

    def watch(self, now: Span) -> Answer:
        if self.gone:
            return self._answer("GONE")
        if self.status in CLOSED:
            return self._answer("CLOSED")
        self.times["watched_at"] = now
        return self._answer("OK")

    def close(
        self, kind: str, data: str, reason: str, token: str, epoch: int, now: Span, *, unchanged: bool, settled: bool
    ) -> Answer | Writer:
        """A Writer where it was closed so, now or before. `unchanged`: the field that must be what it was is so."""
        if self.gone:
            return self._answer("GONE")
        if self.status in CLOSED:
            return self._writer(self.epoch) if self.token == token else self._answer("CLOSED")
        if not unchanged:
            return self._answer("REFUSED")
        if not settled:
            return self._answer("UNSETTLED")
        opening = self._open(epoch, now, self.attempt, reason, self.end)
        self.log += [opening, Entry(EventId(epoch, 2), kind, data)]
        self.status, self.epoch, self.token = STATUS_OF[kind], epoch, token
        self.times["finished_at"] = now
        return self._writer(epoch)

    def erase(self) -> Answer:
        if self.gone:
            return self._answer("GONE")
        erased = RunModel(self.request_id, status="erased")
        vars(self).update(vars(erased))
        return self._answer("OK")

    def expire(self) -> None:
        """Retention is over, of a run that has ended or of its tombstone."""
        vars(self).update(vars(RunModel(self.request_id)))


def is_past(at: int, now: Span, answered: bool) -> bool:
    """Whether `at` was past when the call was made; where that is not clear, what was `answered` counts."""
    if at <= now.least:
        return True
    return at <= now.most and answered
