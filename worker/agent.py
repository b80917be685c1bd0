"""What a user writes: an agent is an async generator function that takes a Run and yields events."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from broker.events import Event

MAX_EVENT_BYTES = 64 * 1024
"""Of an event's data, and of a checkpoint's state, as ASCII JSON."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """State from which a later attempt may continue; it covers every event yielded before it.

    `state` is JSON, at most MAX_EVENT_BYTES of it.
    """

    state: Any


@dataclass(frozen=True, kw_only=True)
class Turn:
    """An earlier run of a session: what was asked and what was answered."""

    request_id: str
    agent: str
    query: str
    answer: str
    created_at: float
    """Seconds since the epoch, as everywhere here."""
    cut: bool = False
    """Whether `answer` is only the beginning of what was answered: it alone is above the budget."""


def estimated_tokens(text: str) -> int:
    """What a text costs a model, about: a token for four bytes of UTF-8. Each model counts differently."""
    return -(-len(text.encode("utf-8", "surrogatepass")) // 4)


Recall = Callable[[int], Awaitable[Sequence[Turn]]]
"""Looks a session's earlier runs up, at most so many tokens of them."""


async def no_history(tokens: int) -> Sequence[Turn]:
    return ()


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
    created_at: float = 0.0
    deadline: float = 0.0
    """When the run must have ended: seconds since the epoch."""
    restored: Any = None
    """The state of the last Checkpoint that survived, or None."""
    recall: Recall = field(default=no_history, repr=False, compare=False)
    """What `history` asks."""

    async def history(self, *, tokens: int = 8000) -> list[Turn]:
        """The earlier runs of the same owner and session, oldest first: those that were completed, with an answer,
        before this run was submitted, so that every attempt gets the same.

        The newest ones within the budget, of queries and answers together, by `estimated_tokens`. Where the newest
        alone is above it, its answer is cut.
        """
        return list(await self.recall(tokens))


Agent = Callable[[Run], AsyncIterator[Event | Checkpoint]]
