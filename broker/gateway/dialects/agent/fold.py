"""The dialect `agent`: `event: token` with ids that count them, and `event: done` with all of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, NamedTuple, assert_never

from broker import sse
from broker.events import Entry, dumps
from broker.gateway.dialects.dialect import Frame, SseConnection
from broker.gateway.dialects.place import JUMP
from broker.gateway.dialects.told import GONE, LOST, Aside, Done, Failed, Piece, Stopped, Telling, Told, tell

TOLD_LOST = 10**15 - 1
"""The id of a client that was told that its cursor is lost: there is nothing more for it."""


class Counted(NamedTuple):
    told: Told = Told()
    id: int = 0
    """The last one that was given."""
    tokens: int = 0
    """How many were shown."""


class Agent(SseConnection):
    """One run."""

    key = "agent"
    seekable = False
    exact = True
    may_be_ahead = False
    start = Counted()

    def __init__(self, session_id: str) -> None:
        self._session_id = session_id

    def step(self, state: Counted, entry: Entry) -> tuple[Counted, Sequence[Frame]]:
        (told, tellings), (_, count, tokens) = tell(state.told, entry, {}), state
        if entry.type == "attempt":
            number = json.loads(entry.data)["attempt"]
            # A cancel's attempt has the number of the one that it ends.
            return Counted(told, max(count, number * JUMP) if number > 1 else count, tokens), ()
        frames = []
        for telling in tellings:
            count, tokens = count + 1, tokens + isinstance(telling, Piece)
            kind, value = self._event(telling, tokens)
            frames.append(Frame(count, sse.frame(kind, dumps(value), str(count))))
        return Counted(told, count, tokens), frames

    def _event(self, telling: Telling, tokens: int) -> tuple[str, dict[str, Any]]:
        match telling:
            case Piece(text):
                return "token", {"content": text}
            case Done(answer):
                return "done", self._done(answer, tokens, "complete")
            case Stopped(answer):
                return "done", self._done(answer, tokens, "cancelled")
            case Failed(code, message):
                return "error", {"code": code, "message": message}
            case Aside():
                raise AssertionError("this dialect shows nothing but tokens")
            case _:
                assert_never(telling)

    def _done(self, answer: str, tokens: int, status: str) -> dict[str, Any]:
        return {"content": answer, "session_id": self._session_id, "total_tokens": tokens, "status": status}

    def ended(self, state: Counted) -> bool:
        return state.told.over

    def gone(self, state: Any) -> bytes:
        """Without an id: it is no part of the log."""
        kind, value = self._event(GONE, 0)
        return sse.frame(kind, dumps(value))

    def lost(self, state: Any) -> bytes:
        kind, value = self._event(LOST, 0)
        return sse.frame(kind, dumps(value), str(TOLD_LOST))
