"""What the dialects share whose clients cannot take text back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Sequence
from typing import Any, ClassVar

from broker import sse
from broker.events import Entry, dumps
from broker.fold import Rewind, is_void
from broker.gateway.dialects.dialect import Frame
from broker.gateway.dialects.place import Place, places
from broker.gateway.dialects.told import GONE, LOST, Asides, Telling, Told, tell


class OneWay(ABC):
    """One run, as objects in `data:` lines. As it is: for readers that split on lines or on blank lines, without ids.

    Such readers lose an event that follows a lone line in its block, so everything here ends with a blank line, and
    there is no `retry:`.
    """

    name: ClassVar[str]
    asides: ClassVar[Asides]
    seekable = False
    exact = True
    may_be_ahead = False
    start: Any = Told()

    def __init__(self, rewinds: tuple[Rewind, ...] = ()) -> None:
        """`rewinds` are those of the log when the client came: it has seen nothing of what they void, and is shown
        nothing of it. So one that was told `restarted`, and asks again, gets the answer as it is now. Not for clients
        with cursors, who may have been there before.
        """
        self._rewinds = rewinds if len(rewinds) > 1 else ()  # the first voids nothing
        self.key: Hashable = (self.name, self._rewinds)

    @abstractmethod
    def objects(self, telling: Telling, epoch: int) -> Sequence[dict[str, Any]]:
        """What the client gets for what it is told by an entry of this epoch: one JSON object for each frame."""

    def frame(self, data: str, place: Place | None) -> bytes:
        """`place` is None for what is no part of the log."""
        return sse.unnamed(data)

    def step(self, state: Any, entry: Entry) -> tuple[Any, Sequence[Frame]]:
        told, tellings = self._tell(state, entry)
        if not tellings:
            return told, ()
        objects = [dumps(each) for telling in tellings for each in self.objects(telling, entry.id.epoch)]
        return told, [Frame(place, self.frame(data, place)) for place, data in places(entry.id, objects)]

    def _tell(self, told: Told, entry: Entry) -> tuple[Told, Sequence[Telling]]:
        if told.over or told.attempts == len(self._rewinds):
            return tell(told, entry, self.asides)
        if entry.type == "attempt":
            if entry.id != self._rewinds[told.attempts].id:
                return told._replace(over=True), (LOST,)  # a failover took the one that is known
            return told._replace(attempts=told.attempts + 1), ()
        if not is_void(entry.id, self._rewinds):
            return tell(told, entry, self.asides)
        return (told._replace(over=True), (LOST,)) if entry.terminal else (told, ())

    def ended(self, state: Any) -> bool:
        over: bool = state.over
        return over

    def opening(self, retry_ms: int) -> bytes:
        return self.heartbeat("open")

    def heartbeat(self, text: str) -> bytes:
        return sse.comment(text) + b"\n"

    def gone(self, state: Any) -> bytes:
        return self._unplaced(GONE)

    def lost(self, state: Any) -> bytes:
        return self._unplaced(LOST)

    def closing(self, retry_ms: int) -> bytes:
        return self.heartbeat("cut")

    def _unplaced(self, telling: Telling) -> bytes:
        return b"".join(self.frame(dumps(each), None) for each in self.objects(telling, 0))
