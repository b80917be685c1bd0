"""The AI SDK dialect: a run as the UI message stream of one assistant message, whose id is the request_id.

A client that resumes is given the message from its `start` again, or what follows the first N chunks; so a frame's
position is the number of chunks up to it. `id:` is the event that a chunk shows.
"""

from __future__ import annotations

from collections.abc import Sequence

from broker.events import Entry
from broker.gateway.dialects.aisdk.chunks import loose
from broker.gateway.dialects.aisdk.scribe import Scribe
from broker.gateway.dialects.aisdk.state import State, open_calls
from broker.gateway.dialects.dialect import Frame, SseConnection

_GONE = "This run no longer exists."
_LOST = "What was shown was lost in a failover. Load the page again for the answer."


class AiSdk(SseConnection):
    """A run as a UI message. After a rewind nothing is shown again that the message has. Where the new attempt differs,
    a part `data-rewind` takes back the text before it, and a new text part begins with all that survives; or, with
    `reset_step`, the client drops what it has and gets all that survives anew (ai 7.0.70 and later).
    """

    seekable = False
    exact = False
    may_be_ahead = True
    start = State()

    def __init__(self, request_id: str, *, reset_step: bool) -> None:
        self.key = ("aisdk", reset_step)
        self._request_id = request_id
        self._reset_step = reset_step

    def step(self, state: State, entry: Entry) -> tuple[State, Sequence[Frame]]:
        if state.ended:
            return state, ()
        scribe = Scribe(state, entry.id, self._request_id, reset_step=self._reset_step)
        scribe.show(entry)
        return scribe.state._replace(chunks=scribe.pen.count, part=scribe.pen.part), scribe.pen.frames

    def ended(self, state: State) -> bool:
        return state.ended

    def gone(self, state: State) -> bytes:
        return _broken(state, _GONE)

    def lost(self, state: State) -> bytes:
        return _broken(state, _LOST)


def _broken(state: State, why: str) -> bytes:
    """An error as the end, in which nothing is left open: a part without its end stays `streaming` for ever."""
    ends = [{"type": f"{state.part.kind}-end", "id": state.part.id}] if state.part is not None else []
    calls = [{"type": "tool-output-error", "toolCallId": call, "errorText": why} for call in open_calls(state.beside)]
    return loose(*ends, *calls, {"type": "error", "errorText": why}, {"type": "finish"})
