"""The native dialect: each event as it is stored, its id as the SSE id."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

from broker import sse
from broker.events import Attempt, Entry, Error
from broker.gateway.dialects.dialect import Frame, SseConnection
from broker.ids import START

_new: Any = tuple.__new__
"""Half the time of a NamedTuple's own constructor."""
GONE = Error(code="gone", message="This run no longer exists.").json_data()
_LOST = Attempt(attempt=0, reason="cursor_lost", resume_from=str(START)).json_data()


class Native(SseConnection):
    """A run as it is stored."""

    seekable = True
    exact = False
    may_be_ahead = False
    start = None

    def __init__(self, request_id: str, *, long_ids: bool) -> None:
        """`long_ids`: cursors of the form `<request_id>/<event id>`."""
        self.key: Hashable = ("native", long_ids)
        self._prefix = f"{request_id}/" if long_ids else ""

    def step(self, state: None, entry: Entry) -> tuple[None, tuple[Frame]]:
        event_id, kind, data = entry
        frame: Frame = _new(Frame, (event_id, sse.frame(kind, data, f"{self._prefix}{event_id}")))
        return None, (frame,)

    def ended(self, state: None) -> bool:
        """The log itself tells."""
        return False

    def gone(self, state: Any) -> bytes:
        """Without an id: it is not an event of the log, and the client's cursor stays."""
        return sse.frame("error", GONE)

    def lost(self, state: Any) -> bytes:
        """Start again (PROTOCOL 6.5). Its id is the cursor that means so."""
        return sse.frame("attempt", _LOST, f"{self._prefix}{START}")
