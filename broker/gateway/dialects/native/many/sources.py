"""Which runs a stream of many is of: those that a request lists, or those of a session."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Mapping
from typing import Protocol

from broker import sse
from broker.errors import Unavailable
from broker.gateway.dialects.native.many.cursor import MAX_RUNS, Composite, Places
from broker.gateway.dialects.native.many.fold import NativeOfMany
from broker.gateway.dialects.native.many.multiplexer import Multiplexer
from broker.gateway.dialects.native.many.progress import Progress
from broker.ids import EventId, Owner
from broker.runs.record import Head
from broker.runs.store import Runs

LOOK_SECONDS = 1.0
"""How often a session's index is asked for new runs, at most."""
BEAT_SHARE = 0.75
_LOOK_ROWS = 2 * MAX_RUNS

Watched = Callable[[str, Head], Awaitable[None]]
"""Says that somebody reads a run. Raises Unavailable."""


class Source(Protocol):
    """Which runs a stream is of."""

    heads: dict[str, Head]
    """Of the runs that are begun next."""
    positions: dict[str, EventId]
    """Where the client stood in runs as it came."""

    @property
    def places(self) -> Places: ...

    async def begin(self, multiplexer: Multiplexer) -> None:
        """Begins runs; returns when there are no more to come."""

    def tick(self, multiplexer: Multiplexer) -> float:
        """Until then: a heartbeat where one is due. Seconds until it is to be called again."""


class Listed:
    """The runs that a request lists. `missing` are some that the client has a part of, and that are not there."""

    def __init__(self, cursor: Composite, heads: Mapping[str, Head], missing: list[str]) -> None:
        self.places = Places(cursor)
        self.heads = dict(heads)
        self.positions = cursor.positions
        self._missing = missing

    async def begin(self, multiplexer: Multiplexer) -> None:
        for request_id in self._missing:
            _tell_gone(multiplexer, request_id)
        for request_id in self.heads:
            multiplexer.begin(request_id)

    def tick(self, multiplexer: Multiplexer) -> float:
        return LOOK_SECONDS


class OfSession:
    """A session's runs: at first those that the client has a part of, then one by one those of the index."""

    def __init__(
        self,
        cursor: Composite,
        heads: Mapping[str, Head],
        missing: list[str],
        *,
        runs: Runs,
        watched: Watched,
        owner: Owner,
        session_id: str,
        heartbeat_seconds: float,
    ) -> None:
        self.places = Progress(cursor)
        self.heads = dict(heads)
        self.positions = cursor.positions
        self._missing = missing
        self._runs = runs
        self._watched = watched
        self._owner = owner
        self._session_id = session_id
        self._heartbeat = BEAT_SHARE * heartbeat_seconds
        self._pause = min(LOOK_SECONDS, heartbeat_seconds / 8)
        self._beat_at = 0.0

    async def begin(self, multiplexer: Multiplexer) -> None:
        """For ever."""
        for request_id in self._missing:
            _tell_gone(multiplexer, request_id)
        for request_id in [*self.heads]:
            multiplexer.begin(request_id)
        while True:
            with contextlib.suppress(Unavailable):  # what is under way goes on, and the next look may tell more
                await self._look(multiplexer)
            await asyncio.sleep(self._pause)

    async def _look(self, multiplexer: Multiplexer) -> None:
        progress = self.places
        rows, complete, now_ms = await self._runs.session_above(
            self._owner, self._session_id, progress.floor, limit=_LOOK_ROWS
        )
        fresh = progress.look(rows, complete=complete, now_ms=now_ms)
        for request_id, head in zip(fresh, await self._runs.heads(fresh), strict=True):
            if head is not None:
                await self._begin(multiplexer, request_id, head)
            elif progress.never_came(request_id, now_ms):
                progress.over(request_id)

    async def _begin(self, multiplexer: Multiplexer, request_id: str, head: Head) -> None:
        try:
            await self._watched(request_id, head)
        except Unavailable:
            multiplexer.cut()
            return
        self.heads[request_id] = head
        self.places.begin(request_id)
        multiplexer.begin(request_id)

    def tick(self, multiplexer: Multiplexer) -> float:
        """Runs that are under way beat by themselves."""
        now = asyncio.get_running_loop().time()
        if multiplexer.busy:
            self._beat_at = now + self._heartbeat
        elif now >= self._beat_at and not multiplexer.sink.paused:
            multiplexer.write_bytes(sse.comment("heartbeat"))
            self._beat_at = now + self._heartbeat
        return self._pause


def _tell_gone(multiplexer: Multiplexer, request_id: str) -> None:
    multiplexer.write(request_id, NativeOfMany(request_id).gone())
    multiplexer.places.over(request_id)
