"""A run's record as value objects: what a submit brings, what a poll shows. Text fields are stored as JSON."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import rfc8785

from broker.events import dumps
from broker.fold import Rewind
from broker.ids import EventId, Owner
from broker.status import STATUS_OF

LIVE = frozenset({"queued", "running"})
FINISHED = frozenset(STATUS_OF.values())


@dataclass(frozen=True, kw_only=True)
class Submission:
    """What a client asks for, defaults resolved. `session_id` is None where the client sent none."""

    query: str
    agent: str
    session_id: str | None = None
    parameters: dict[str, Any] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)
    cancel_if_unwatched: float | None = None
    """Seconds without a reader after which the run is cancelled."""

    def digest(self) -> str:
        """Names the query: equal digests of one owner are the same query (PROTOCOL 3.2)."""
        value = {
            "agent": self.agent,
            "session_id": self.session_id,
            "query": self.query,
            "parameters": self.parameters,
        }
        try:
            canonical = rfc8785.dumps(value)
        except ValueError:  # lone surrogates, integers above 2**53: RFC 8785 has no form for them
            canonical = json.dumps(value, sort_keys=True, ensure_ascii=True, separators=(",", ":")).encode("ascii")
        return hashlib.sha256(canonical).hexdigest()

    def fields(self, owner: Owner, session_id: str, digest: str, key: str) -> dict[str, str]:
        """The record's fields that never change."""
        return {
            "tenant": dumps(owner.tenant),
            "subject": dumps(owner.subject),
            "agent": dumps(self.agent),
            "query": dumps(self.query),
            "parameters": dumps(self.parameters),
            "metadata": dumps(self.metadata),
            "session_id": dumps(session_id),
            "digest": digest,
            "key": key,
            "unwatched_ms": "" if self.cancel_if_unwatched is None else str(int(self.cancel_if_unwatched * 1000)),
        }


HEAD_FIELDS = ["tenant", "subject", "status", "end", "digest", "session_id", "finished_at", "unwatched_ms"]


class Head(NamedTuple):
    """What is needed to decide who may see a run and where its log stands."""

    owner: Owner
    status: str
    end: EventId
    digest: str
    session_id: str
    finished_at_ms: int | None
    cancel_if_unwatched: bool = False

    @property
    def finished(self) -> bool:
        return self.status in FINISHED


def parse_head(values: list[bytes | None]) -> Head | None:
    """From HMGET of HEAD_FIELDS; None for a run that is missing or erased."""
    tenant, subject, status, end, digest, session_id, finished_at, unwatched_ms = values
    if status is None or status == b"erased" or tenant is None or subject is None or end is None:
        return None
    return Head(
        Owner(json.loads(tenant), json.loads(subject)),
        status.decode(),
        EventId.parse(end.decode()),
        (digest or b"").decode(),
        json.loads(session_id or b'""'),
        int(finished_at) if finished_at else None,
        bool(unwatched_ms),
    )


RECORD_FIELDS = [
    "status",
    "session_id",
    "agent",
    "attempt",
    "end",
    "created_at",
    "started_at",
    "finished_at",
    "metadata",
    "result",
    "rewinds",
]


@dataclass(frozen=True, kw_only=True)
class Record:
    """A run. Times are milliseconds since the epoch."""

    request_id: str
    session_id: str
    status: str
    agent: str
    attempt: int
    end: EventId
    created_at_ms: int
    started_at_ms: int | None
    finished_at_ms: int | None
    metadata: dict[str, Any]
    result: dict[str, Any] | None
    """The data of the terminal event."""
    rewinds: tuple[Rewind, ...]


def parse_record(request_id: str, values: list[bytes | None]) -> Record | None:
    """From HMGET of RECORD_FIELDS; None for a run that is missing or erased."""
    text = dict(zip(RECORD_FIELDS, (v.decode("ascii") if v is not None else "" for v in values), strict=True))
    if text["status"] in ("", "erased"):
        return None
    return Record(
        request_id=request_id,
        session_id=json.loads(text["session_id"]),
        status=text["status"],
        agent=json.loads(text["agent"]),
        attempt=int(text["attempt"]),
        end=EventId.parse(text["end"]),
        created_at_ms=int(text["created_at"]),
        started_at_ms=int(text["started_at"]) if text["started_at"] else None,
        finished_at_ms=int(text["finished_at"]) if text["finished_at"] else None,
        metadata=json.loads(text["metadata"]),
        result=json.loads(text["result"]) if text["result"] else None,
        rewinds=parse_rewinds(text["rewinds"]),
    )


QUESTION_FIELDS = ["status", "query", "agent", "parameters", "metadata", "created_at"]


@dataclass(frozen=True, kw_only=True)
class Question:
    """What a run was asked: nothing of it ever changes."""

    query: str
    agent: str
    parameters: dict[str, Any]
    metadata: dict[str, Any]
    created_at_ms: int


def parse_question(values: list[bytes | None]) -> Question | None:
    """From HMGET of QUESTION_FIELDS; None for a run that is missing or erased."""
    status, query, agent, parameters, metadata, created_at = (v.decode("ascii") if v else "" for v in values)
    if status in ("", "erased"):
        return None
    return Question(
        query=json.loads(query),
        agent=json.loads(agent),
        parameters=json.loads(parameters),
        metadata=json.loads(metadata),
        created_at_ms=int(created_at),
    )


def parse_rewinds(text: str) -> tuple[Rewind, ...]:
    """`<id>:<resume_from> <id>:<resume_from> …`"""
    pairs = (item.split(":") for item in text.split())
    return tuple(Rewind(EventId.parse(own), EventId.parse(resume)) for own, resume in pairs)
