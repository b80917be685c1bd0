"""What the processes of the model know."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from broker.ids import START, EventId
from tests.model.scripts import Content, Entry

Mode = Literal["ok", "lost reply", "lost request", "late"]
"""Of a call: done and answered; done, but the caller hears an error; not done; done later, when nobody listens."""
Step = tuple[str | int, ...]
"""The name of one of the World's steps, and its arguments."""


class KeyClaim(NamedTuple):
    request_id: str
    claimed_at: int


class Job(NamedTuple):
    request_id: str
    attempt: int
    enqueues: int


@dataclass
class Submitter:
    state: Literal["claim", "claim anew", "index", "create", "enqueue"] = "claim"
    claim: KeyClaim | None = None


@dataclass
class Held:
    """A claim that a worker holds, and its tail: what it has written and could send again, and what it has not yet."""

    request_id: str
    epoch: int
    token: str
    attempt: int
    resume_from: EventId
    tip: Content
    """The last thing that the agent said."""
    tail: list[Entry]
    kept_from: int = 1
    written: int = 1
    """How many of the tail are in the log, as far as the worker knows."""
    resent_below: int = 0
    """What is below was in the log once, and is gone."""
    done: bool = False


@dataclass
class Worker:
    name: str
    state: Literal["idle", "claiming", "running", "handing over", "enqueueing"] = "idle"
    job: Job | None = None
    token: str = ""
    held: Held | None = None


@dataclass
class Kept:
    """A closing or an erasure that a failover could take, with the process that keeps it (PROTOCOL 5.2)."""

    keeper: str
    request_id: str
    type: Literal["final", "cancelled", "error", "erasure"]
    generation: int
    epoch: int = 0
    token: str = ""
    attempt: int = 0
    resume_from: EventId = START
    tail: tuple[Entry, ...] = ()
    anew: bool = False


@dataclass
class Reaper:
    name: str
    patient_until: int
    to_enqueue: list[Job] = field(default_factory=list)
    spent: tuple[str, int] | None = None
    """A run without attempts left, and its deadline."""
    ended: dict[str, int] = field(default_factory=dict)
    """Since when it knows of each run that it has ended."""


@dataclass
class Hub:
    """What a gateway holds of a run that it has readers of: a ring of what came since it has last read the record."""

    base: EventId = START
    """The log's end then. A reader below it reads the log."""
    ring: list[Entry] = field(default_factory=list)
    end: EventId | None = None
    """None until the record was read."""
    inbox: list[tuple[EventId, tuple[Entry, ...]]] = field(default_factory=list)


@dataclass
class Gateway:
    name: str
    hubs: dict[str, Hub] = field(default_factory=dict)


@dataclass
class Reader:
    request_id: str | None = None
    gateway: int | None = None
    cursor: EventId = START
    """What it would come back with."""
    position: EventId = START
    view: list[Entry] = field(default_factory=list)
    """The fold of what it has read."""
    frames: list[EventId] = field(default_factory=list)
    waiting_since: int | None = None
    terminal: EventId | None = None
    ended: Literal["", "terminal", "gone", "204"] = ""
