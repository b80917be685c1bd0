"""What a user writes: an agent is an async generator function that takes a Run and yields events."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

from broker.events import Event


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """State from which a later attempt may continue; it covers every event yielded before it.

    `state` is JSON, at most 64 KiB of it.
    """

    state: Any


@dataclass(frozen=True, kw_only=True)
class Run:
    """One execution of a query, as its agent sees it."""

    request_id: str
    query: str
    parameters: dict[str, Any] = field(default_factory=dict)
    session_id: str = ""
    tenant: str = ""
    subject: str = ""
    attempt: int = 1
    deadline: float = 0.0
    """When the run must have ended: seconds since the epoch."""
    restored: Any = None
    """The state of the last Checkpoint that survived, or None."""


Agent = Callable[[Run], AsyncIterator[Event | Checkpoint]]
