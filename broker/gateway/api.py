"""The native API's request and response bodies."""

from __future__ import annotations

import sys
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, Strict, WithJsonSchema
from pydantic_core import PydanticKnownError

from broker.fold import Outcome
from broker.runs.record import Record
from broker.status import Status

PREFIX = "/api/v1"
MAX_SESSION_ID = 255

Object = dict[str, Any]


def _length(least: int, most: int) -> AfterValidator:
    """In characters. pydantic's own bounds refuse lone surrogates too, which JSON can carry."""

    def check(text: str) -> str:
        if len(text) < least:
            raise PydanticKnownError("string_too_short", {"min_length": least})
        if len(text) > most:
            raise PydanticKnownError("string_too_long", {"max_length": most})
        return text

    return AfterValidator(check)


Query = Annotated[str, Strict(), _length(1, sys.maxsize), WithJsonSchema({"type": "string", "minLength": 1})]
SessionId = Annotated[
    str,
    Strict(),
    _length(1, MAX_SESSION_ID),
    WithJsonSchema({"type": "string", "minLength": 1, "maxLength": MAX_SESSION_ID}),
]


class RunOptions(BaseModel):
    """What may be said of a run beside its query."""

    agent: Annotated[str, Strict()] | None = Field(None, description="One of the configured agents.")
    session_id: SessionId | None = Field(None, description="Groups runs; made up when absent.")
    parameters: Object = Field(default_factory=dict, description="The agent's own parameters; part of the query.")
    metadata: Object = Field(default_factory=dict, description="Kept with the run; not part of the query.")
    cancel_if_unwatched: float | None = Field(
        None,
        ge=0,
        le=86400,
        strict=True,
        description="Cancel the run when nobody has read it or asked for it for so many seconds. Off by default.",
    )


class SubmitBody(RunOptions):
    """A query for an agent. The same query by the same owner joins the run that is under way."""

    model_config = ConfigDict(extra="forbid")

    query: Query = Field(description="What the agent shall do.")


class Links(BaseModel):
    self: str
    stream: str
    events: str
    cancel: str


def links(request_id: str) -> Links:
    base = f"{PREFIX}/runs/{request_id}"
    return Links(self=base, stream=f"{base}/stream", events=f"{base}/events", cancel=f"{base}/cancel")


class Accepted(BaseModel):
    """A run was started (202) or joined (200). It will end."""

    request_id: str
    session_id: str
    status: Status
    links: Links


class Ticket(BaseModel):
    """Permission to read one run's stream."""

    ticket: str
    expires_at: datetime
    stream: str = Field(description="The stream's path with the ticket in it, for an EventSource.")


def ticket(request_id: str, text: str, expires_at: int) -> Ticket:
    """`expires_at` in Unix seconds."""
    stream = f"{links(request_id).stream}?ticket={text}"
    return Ticket(ticket=text, expires_at=datetime.fromtimestamp(expires_at, UTC), stream=stream)


class RunSummary(BaseModel):
    """A run without what it has come to."""

    request_id: str
    session_id: str
    status: Status
    agent: str
    attempt: int = Field(description="0 until a worker has taken the run.")
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    last_event_id: str
    metadata: Object
    links: Links


class RunError(BaseModel):
    code: str
    message: str


class Run(RunSummary):
    """A run with what it has come to so far."""

    answer: str | None = Field(description="The final answer, else the tokens that survive.")
    citations: list[Object]
    usage: Object
    error: RunError | None


class RunList(BaseModel):
    runs: list[RunSummary]
    next: str | None = Field(description="`cursor` of the next page.")


class LogEvent(BaseModel):
    id: str
    type: str
    data: Object
    void: bool = Field(description="A later attempt took it back.")


class EventList(BaseModel):
    events: list[LogEvent]
    next: str | None = Field(description="`cursor` of the next page; null where the log ends for now.")


class FieldError(BaseModel):
    field: str
    message: str


class Problem(BaseModel):
    """RFC 9457. `code` is stable."""

    type: str
    title: str
    status: int
    code: str
    detail: str
    errors: list[FieldError] | None = None


class Health(BaseModel):
    status: Literal["ok", "ready"]


def _time(milliseconds: int | None) -> datetime | None:
    return datetime.fromtimestamp(milliseconds / 1000, UTC) if milliseconds is not None else None


def summary(record: Record) -> RunSummary:
    return RunSummary.model_validate(_summary(record))


def run(record: Record, outcome: Outcome) -> Run:
    return Run.model_validate({**_summary(record), **outcome._asdict()})


def _summary(record: Record) -> dict[str, Any]:
    return {
        "request_id": record.request_id,
        "session_id": record.session_id,
        "status": record.status,
        "agent": record.agent,
        "attempt": record.attempt,
        "created_at": _time(record.created_at_ms),
        "started_at": _time(record.started_at_ms),
        "finished_at": _time(record.finished_at_ms),
        "last_event_id": str(record.end),
        "metadata": record.metadata,
        "links": links(record.request_id),
    }
