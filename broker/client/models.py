"""What the calls return. Fields that this version does not know are left out."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, PlainSerializer, PlainValidator

from broker.client.received import typed
from broker.errors import BadCursor
from broker.events import Event
from broker.ids import EventId


def _event_id(value: Any) -> EventId:
    try:
        return value if isinstance(value, EventId) else EventId.parse(value)
    except (BadCursor, TypeError) as error:
        raise ValueError(str(error)) from None


Id = Annotated[EventId, PlainValidator(_event_id), PlainSerializer(str, when_used="json")]
"""An event's id; in JSON its text."""


class _Model(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)


class Accepted(_Model):
    """A run that was started, or joined. It will end."""

    request_id: str
    session_id: str
    status: str
    joined: bool
    """Whether the run was there before."""


class Links(_Model):
    """Paths of the service."""

    self: str
    stream: str
    events: str
    cancel: str


class RunSummary(_Model):
    """A run without what it has come to."""

    request_id: str
    session_id: str
    status: str
    """`queued`, `running`, `completed`, `failed` or `cancelled`."""
    agent: str
    attempt: int
    """0 until a worker has taken the run."""
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    last_event_id: Id
    metadata: dict[str, Any]
    links: Links

    @property
    def finished(self) -> bool:
        """Whether nothing follows."""
        return self.finished_at is not None


class RunError(_Model):
    """Why a run failed. `code` is stable, `message` is safe to show."""

    code: str
    message: str


class Run(RunSummary):
    """A run with what it has come to so far."""

    answer: str | None
    """The final answer, else the tokens that survive."""
    citations: list[dict[str, Any]]
    usage: dict[str, Any]
    error: RunError | None


class LogEvent(_Model):
    """An event of a run's log, those included that a later attempt took back."""

    id: Id
    type: str
    data: dict[str, Any]
    void: bool
    """A later attempt took it back."""

    @property
    def event(self) -> Event:
        """One of the classes of broker.events, or Unknown."""
        return typed(self.type, self.data)


class RunPage(_Model):
    runs: list[RunSummary]
    next: str | None


class EventPage(_Model):
    events: list[LogEvent]
    next: str | None
