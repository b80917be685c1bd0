"""Which runs a stream of many is of: those that a request lists, or those of a session."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Collection, Mapping
from functools import partial

from broker.errors import Unavailable
from broker.gateway.dialects.native.many.cursor import MAX_RUNS, Composite, Places
from broker.gateway.dialects.native.many.multiplexer import Multiplexer
from broker.gateway.dialects.native.many.progress import Progress
from broker.ids import EventId, Owner
from broker.runs.record import Head
from broker.runs.store import Runs

_LOOK_ROWS = 2 * MAX_RUNS
_WATCH_PAGES = 100
"""A session's runs that wait are watched as well: so many looks further on."""

Watched = Callable[[str, Head], Awaitable[None]]
"""Says that somebody reads a run. Raises Unavailable."""


class Listed:
    """The runs that a request lists. `missing` are some that the client has a part of, and that are not there."""

    def __init__(self, cursor: Composite, heads: Mapping[str, Head], missing: Collection[str]) -> None:
        self.places = Places(cursor)
        self._begin = partial(_begin, positions=cursor.positions, heads=heads, missing=missing)

    async def begin(self, multiplexer: Multiplexer) -> None:
        self._begin(multiplexer)


class OfSession:
    """A session's runs: at first those that the client has a part of, then one by one those of the index."""

    def __init__(
        self,
        cursor: Composite,
        heads: Mapping[str, Head],
        missing: Collection[str],
        *,
        runs: Runs,
        watched: Watched,
        owner: Owner,
        session_id: str,
    ) -> None:
        self.places = Progress(cursor)
        self._begin = partial(_begin, positions=cursor.positions, heads=heads, missing=missing)
        self._runs = runs
        self._watched = watched
        self._owner = owner
        self._session_id = session_id

    async def begin(self, multiplexer: Multiplexer) -> None:
        """For ever."""
        self._begin(multiplexer)
        loop, watch_at = asyncio.get_running_loop(), 0.0
        while True:
            with contextlib.suppress(Unavailable):  # what is under way goes on, and the next look may tell more
                await self._look(multiplexer)
                if self.places.crowded and loop.time() >= watch_at:
                    await self._watch_waiting()
                    watch_at = loop.time() + multiplexer.heartbeat
            await asyncio.sleep(multiplexer.pause)

    async def _look(self, multiplexer: Multiplexer) -> None:
        progress = self.places
        rows, complete, now_ms = await self._runs.session_above(
            self._owner, self._session_id, progress.floor, limit=_LOOK_ROWS
        )
        fresh = progress.look(rows, complete=complete, now_ms=now_ms)
        for request_id, head in zip(fresh, await self._runs.heads(fresh), strict=True):
            if head is not None:
                await self._begin_new(multiplexer, request_id, head)
            elif progress.never_came(request_id, now_ms):
                progress.over(request_id)

    async def _watch_waiting(self) -> None:
        """Lest `cancel_if_unwatched` cancels runs that have no room yet, under the client that waits for them."""
        floor = self.places.floor
        for _ in range(_WATCH_PAGES):
            rows, complete, _ = await self._runs.session_above(self._owner, self._session_id, floor, limit=_LOOK_ROWS)
            names = self.places.waiting(rows)
            heads = zip(names, await self._runs.heads(names), strict=True)
            counted = [name for name, head in heads if head and head.cancel_if_unwatched and not head.finished]
            if counted:
                await self._runs.watched(counted)
            if complete:
                return
            floor = rows[-1][1]

    async def _begin_new(self, multiplexer: Multiplexer, request_id: str, head: Head) -> None:
        try:
            await self._watched(request_id, head)
        except Unavailable:
            multiplexer.cut()
            return
        self.places.begin(request_id)
        multiplexer.begin(request_id, head)


def _begin(
    multiplexer: Multiplexer, *, positions: Mapping[str, EventId], heads: Mapping[str, Head], missing: Collection[str]
) -> None:
    """What a request names: what of it is not there any more, and what is, each from where the client stands in it."""
    for request_id in missing:
        multiplexer.gone(request_id)
    for request_id, head in heads.items():
        multiplexer.begin(request_id, head, positions.get(request_id))
