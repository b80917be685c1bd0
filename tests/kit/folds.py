"""A log in a dialect, without a gateway."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from broker.events import Entry
from broker.gateway.dialects.agent.fold import Agent
from broker.gateway.dialects.aisdk.fold import AiSdk
from broker.gateway.dialects.chat.fold import Chat
from broker.gateway.dialects.dialect import Dialect, Frame
from broker.gateway.dialects.native.fold import Native
from broker.gateway.dialects.openai.fold import Responses
from broker.gateway.dialects.openai.response import Profile
from broker.gateway.dialects.prompt.fold import Prompt
from broker.gateway.dialects.session_chat.fold import SessionChat
from tests.kit.logs import REQUEST_ID

FOLDS: dict[str, list[Dialect]] = {
    "native": [Native(REQUEST_ID, long_ids=False), Native(REQUEST_ID, long_ids=True)],
    "chat": [Chat(REQUEST_ID, "s")],
    "session_chat": [SessionChat(1_700_000_000_000)],
    "agent": [Agent("s")],
    "prompt": [Prompt(REQUEST_ID)],
    "aisdk": [AiSdk(REQUEST_ID, reset_step=False), AiSdk(REQUEST_ID, reset_step=True)],
    "openai": [Responses(Profile(request_id=REQUEST_ID, created_at=1_700_000_000, agent="chat"))],
}
"""Every dialect, in all its variants, of the run that `logs` makes logs of."""


def frames_of(dialect: Dialect, entries: Iterable[Entry]) -> list[Frame]:
    """Of a whole log, or of its beginning."""
    return folded(dialect, entries)[1]


def body_of(dialect: Dialect, entries: Iterable[Entry]) -> bytes:
    return b"".join(frame.data for frame in frames_of(dialect, entries))


def folded(dialect: Dialect, entries: Iterable[Entry]) -> tuple[Any, list[Frame]]:
    """The state after the entries, and their frames."""
    state, frames = dialect.start, list[Frame]()
    for entry in entries:
        if dialect.ended(state):
            break
        state, more = dialect.step(state, entry)
        frames += more
    return state, frames
