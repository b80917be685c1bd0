"""A run's scripts once more, in plain Python: what the state machine compares the real ones with (PROTOCOL 2).

Written from the protocol, not from the Lua. A log is a list here, and what is missing of a batch is found by ids.
Epochs are what the model says as long as the run's `claimed_at` lies in the future (1.3).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from broker.events import Entry
from broker.ids import START, EventId

CLOSED = ("completed", "failed", "cancelled")
STATUS_OF = {"final": "completed", "error": "failed", "cancelled": "cancelled"}
BEGINNING = EventId(0, 1)


@dataclass(frozen=True)
class Answer:
    answer: str
    end: EventId
    status: str


@dataclass(frozen=True)
class Writer:
    """A claim that was granted, as its worker holds it."""

    epoch: int
    token: str
    attempt: int
    resume_from: EventId
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

    def copy(self) -> RunModel:
        return replace(self, log=list(self.log))

    @property
    def end(self) -> EventId:
        return self.log[-1].id if self.log else START

    def _answer(self, answer: str) -> Answer:
        return Answer(answer, self.end, self.status)

    @property
    def _gone(self) -> bool:
        return self.status in ("", "erased")

    def _new_epoch(self) -> int:
        return max(self.epoch, self.end.epoch) + 1

    def _attempt_entry(self, epoch: int, attempt: int, reason: str, resume_from: EventId) -> Entry:
        data = {"attempt": attempt, "reason": reason, "resume_from": str(resume_from)}
        return Entry(EventId(epoch, 1), "attempt", json.dumps(data, separators=(",", ":")))

    def create(self, start: str) -> Answer:
        if self.status:
            return self._answer("EXISTS")
        self.status, self.log = "queued", [Entry(BEGINNING, "start", start)]
        return self._answer("CREATED")

    def claim(self, attempt: int, token: str) -> Answer | Writer:
        if self._gone:
            return self._answer("GONE")
        if self.status == "running" and self.token == token:
            opening = next(entry for entry in self.log if entry.id == EventId(self.epoch, 1))
            resume_from = EventId.parse(json.loads(opening.data)["resume_from"])
            return Writer(self.epoch, token, self.attempt, resume_from, opening)
        if self.status in CLOSED:
            return self._answer("CLOSED")
        if self.status == "running" or attempt != self.attempt + 1:
            return self._answer("REFUSED")
        resume_from = self.checkpoint[0] if self.checkpoint and attempt > 1 else BEGINNING
        reason = "started" if attempt == 1 else "worker_lost"
        opening = self._attempt_entry(self._new_epoch(), attempt, reason, resume_from)
        self.status, self.epoch, self.token, self.attempt = "running", opening.id.epoch, token, attempt
        self.log.append(opening)
        return Writer(self.epoch, token, attempt, resume_from, opening)

    def append(
        self,
        writer: Writer,
        batch: Sequence[Entry],
        *,
        upto: EventId,
        kept_from: int,
        checkpoint: tuple[EventId, str] | None,
    ) -> Answer:
        """`upto` is the id that the log ends with when the batch is in; `kept_from` the tail's lowest seq."""
        if self._gone:
            return self._answer("GONE")
        mine = (self.epoch, self.token) == (writer.epoch, writer.token)
        if mine and self.end.epoch == writer.epoch and self.end >= upto:
            if self.status == "running":
                self.checkpoint = checkpoint or self.checkpoint
            return self._answer("DUP")
        if self.epoch > writer.epoch or (self.epoch == writer.epoch and not mine):
            return self._answer("FENCED")
        if self.status in CLOSED:
            return self._answer("CLOSED")
        if self.end < writer.resume_from:
            return self._answer("LOST")
        if kept_from > 1 and self.end < EventId(writer.epoch, kept_from - 1):
            return self._answer("LOST")
        missing = [entry for entry in batch if entry.id > self.end]
        begins = missing[0].id.seq == 1 if missing else False
        follows = missing and EventId(writer.epoch, missing[0].id.seq - 1) == self.end
        if not (begins or follows):
            return self._answer("GAP")
        self.log += missing
        self.status = STATUS_OF.get(missing[-1].type, "running")
        self.epoch, self.token, self.attempt = writer.epoch, writer.token, max(self.attempt, writer.attempt)
        self.checkpoint = checkpoint or self.checkpoint
        return self._answer("OK")

    def cancel(self, token: str, data: str) -> Answer:
        if self._gone:
            return self._answer("GONE")
        if self.status in CLOSED:
            return self._answer("OK" if self.token == token else "CLOSED")
        opening = self._attempt_entry(self._new_epoch(), self.attempt, "cancelled", self.end)
        self.log += [opening, Entry(EventId(opening.id.epoch, 2), "cancelled", data)]
        self.status, self.epoch, self.token = "cancelled", opening.id.epoch, token
        return self._answer("OK")

    def erase(self) -> Answer:
        if self._gone:
            return self._answer("GONE")
        self.status, self.log, self.checkpoint = "erased", [], None
        self.epoch, self.token, self.attempt = 0, "", 0
        return self._answer("OK")

    def fence(self) -> None:
        """What a reaper does to a running run whose lease has ended."""
        if self.status == "running":
            self.status, self.token = "queued", ""
