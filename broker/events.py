"""The events of a run, and their JSON: what agents yield, what the log stores, what clients read."""

from __future__ import annotations

import json
from typing import Any, ClassVar, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from broker.ids import EventId
from broker.status import STATUS_OF

TERMINAL = frozenset(STATUS_OF)

AttemptReason = Literal[
    "started",
    "worker_lost",
    "handed_over",
    "data_lost",
    "cancelled",
    "timeout",
    "not_started",
    "cursor_lost",
]


_ENCODER = json.JSONEncoder(ensure_ascii=True, allow_nan=False, separators=(",", ":"))


def dumps(value: Any) -> str:
    """Compact ASCII JSON on one line. Raises ValueError for NaN and infinities, TypeError for foreign types.

    ASCII, because line readers split on raw U+2028 and U+0085, and because UTF-8 has no lone surrogates.
    """
    return _ENCODER.encode(value)


class Entry(NamedTuple):
    """One entry of a log, as stored: `data` is the JSON text of an object."""

    id: EventId
    type: str
    data: str

    @property
    def terminal(self) -> bool:
        return self.type in TERMINAL


class Event(BaseModel):
    """The base of every event. Unknown fields are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    type: ClassVar[str]

    def json_data(self) -> str:
        """The event's `data`. Raises ValueError or TypeError for what JSON cannot carry."""
        return dumps(self.model_dump())


class Start(Event):
    """The first event of every run, written when it is submitted."""

    type = "start"
    request_id: str
    session_id: str


class Attempt(Event):
    """A worker begins (again): everything above `resume_from` and below this event is void."""

    type = "attempt"
    attempt: int
    reason: AttemptReason
    resume_from: str


class Message(Event):
    """Something to tell the user that is not part of the answer."""

    type = "message"
    text: str


class Progress(Event):
    """`percent` is 0 to 100."""

    type = "progress"
    percent: float = Field(ge=0, le=100)
    message: str = ""


class Sources(Event):
    """What a stage of the research left over."""

    type = "sources"
    stage: Literal["discovered", "screened", "analyzed"]
    count: int
    items: list[dict[str, Any]] = Field(default_factory=list)


class Reasoning(Event):
    """A piece of the model's reasoning."""

    type = "reasoning"
    text: str


class Token(Event):
    """A piece of the answer."""

    type = "token"
    text: str


class ToolCall(Event):
    """A tool is called; `id` names the call."""

    type = "tool_call"
    id: str
    tool: str
    args: Any = None


class ToolResult(Event):
    """A tool's result; `id` is its call's."""

    type = "tool_result"
    id: str
    tool: str
    result: Any = None


class Data(Event):
    """An agent's own event."""

    type = "data"
    name: str
    value: Any = None


class Final(Event):
    """The end of a run that succeeded. Without `answer` the surviving tokens are the answer."""

    type = "final"
    answer: str | None = None
    citations: list[dict[str, Any]] = Field(default_factory=list)
    usage: dict[str, Any] = Field(default_factory=dict)


class Error(Event):
    """The end of a run that failed. `code` is stable, `message` is safe to show."""

    type = "error"
    code: str
    message: str


class Cancelled(Event):
    """The end of a run that was stopped."""

    type = "cancelled"
    reason: str


AGENT: tuple[type[Event], ...] = (
    Message,
    Progress,
    Sources,
    Reasoning,
    Token,
    ToolCall,
    ToolResult,
    Data,
    Final,
    Error,
)
"""What an agent may yield; the others are the broker's."""

NATIVE: tuple[type[Event], ...] = (Start, Attempt, Cancelled, *AGENT)
"""Every type of event that a log may hold."""
