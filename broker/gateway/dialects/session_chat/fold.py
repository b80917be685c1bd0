"""The dialect `session_chat`: `data:` lines with text deltas, progress and tools, and the whole message at the end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, assert_never

from broker.fold import Rewind
from broker.gateway.dialects.one_way import OneWay
from broker.gateway.dialects.told import CANCELLED, Aside, Asides, Done, Failed, Piece, Stopped, Telling


class SessionChat(OneWay):
    """One run."""

    name = "session_chat"
    asides: ClassVar[Asides] = {
        "progress": lambda data: {"type": "progress", "percent": data["percent"], "message": data["message"]},
        "tool_call": lambda data: {"type": "tool_start", "tool": data["tool"], "args": data["args"]},
        "tool_result": lambda data: {"type": "tool_result", "tool": data["tool"], "result": data["result"]},
    }

    def __init__(self, created_at_ms: int, rewinds: tuple[Rewind, ...] = ()) -> None:
        """When the run was accepted, in milliseconds since 1970."""
        super().__init__(rewinds)
        self._created_at_ms = created_at_ms

    def objects(self, telling: Telling, epoch: int) -> Sequence[dict[str, Any]]:
        match telling:
            case Piece(text):
                return ({"type": "text_delta", "content": text, "timestamp": self._timestamp(epoch)},)
            case Aside(value):
                return (value,)
            case Done(answer):
                return ({"type": "done", "finalMessage": answer},)
            case Failed(code, message):
                return ({"type": "error", "message": message, "code": code},)
            case Stopped():
                return self.objects(CANCELLED, epoch)
            case _:
                assert_never(telling)

    def _timestamp(self, epoch: int) -> int:
        """When the attempt began that says this: an epoch is made of the milliseconds since the run was accepted
        (PROTOCOL 1.3). The log has no other times, and every gateway must tell the same."""
        return self._created_at_ms + epoch
