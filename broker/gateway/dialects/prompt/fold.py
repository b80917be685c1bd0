"""The dialect `prompt`: for an EventSource that asks by GET, and asks again whenever its connection ends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, assert_never

from broker import sse
from broker.events import dumps
from broker.gateway.dialects.dialect import SseConnection
from broker.gateway.dialects.one_way import OneWay
from broker.gateway.dialects.place import Place
from broker.gateway.dialects.told import CANCELLED, LOST, Aside, Asides, Done, Failed, Piece, Stopped, Telling

TOLD_LOST = Place(0, 0, 1)
"""Where a client stands that was told that its cursor is lost: there is nothing more for it."""
_END = {"lifecycle": "done"}


class Prompt(SseConnection, OneWay):
    """One run. Each id names it, so that a client that asks again never starts a second one."""

    name = "prompt"
    asides: ClassVar[Asides] = {
        # A client that is cut before the first word asks again, and shall already have an id.
        "start": lambda data: {"token": ""},
        "tool_call": lambda data: {"tool_call": data},
        "tool_result": lambda data: {"tools_called": [data]},
    }

    def __init__(self, request_id: str) -> None:
        super().__init__()
        self._request_id = request_id

    def objects(self, telling: Telling, epoch: int) -> Sequence[dict[str, Any]]:
        match telling:
            case Piece(text):
                return ({"token": text},)
            case Aside(value):
                return (value,)
            case Done():
                return (_END,)
            case Failed(code, message):
                return {"error": message, "code": code}, _END
            case Stopped():
                return self.objects(CANCELLED, epoch)
            case _:
                assert_never(telling)

    def frame(self, data: str, place: Place | None) -> bytes:
        return sse.unnamed(data, f"{self._request_id}/{place}" if place else "")

    def lost(self, state: Any) -> bytes:
        return b"".join(self.frame(dumps(each), TOLD_LOST) for each in self.objects(LOST, 0))
