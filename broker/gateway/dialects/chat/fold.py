"""The dialect `chat`: each event is one line `data: {"type": …}`, for clients that read lines and stop at `done`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, assert_never

from broker.fold import Rewind
from broker.gateway.dialects.one_way import OneWay
from broker.gateway.dialects.told import CANCELLED, Aside, Asides, Done, Failed, Piece, Stopped, Telling


def _typed(kind: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """An event's own fields; its text, if it has one, as `content`."""

    def show(data: dict[str, Any]) -> dict[str, Any]:
        return {"type": kind, **{"content" if name == "text" else name: value for name, value in data.items()}}

    return show


class Chat(OneWay):
    """One run."""

    name = "chat"
    asides: ClassVar[Asides] = {
        kind: _typed(kind)
        for kind in ("tool_call", "tool_result", "reasoning", "message", "progress", "sources", "data")
    }

    def __init__(self, request_id: str, session_id: str, rewinds: tuple[Rewind, ...] = ()) -> None:
        super().__init__(rewinds)
        self._names = {"request_id": request_id, "session_id": session_id}

    def objects(self, telling: Telling, epoch: int) -> Sequence[dict[str, Any]]:
        match telling:
            case Piece(text):
                return ({"type": "token", "content": text},)
            case Aside(value):
                return (value,)
            case Done(answer, citations, usage):
                end = {"type": "done", "content": answer, "citations": citations, "usage": usage}
                return ({**end, **self._names},)
            case Failed(code, message):
                return ({"type": "error", "code": code, "message": message},)
            case Stopped():
                return self.objects(CANCELLED, epoch)
            case _:
                assert_never(telling)
