"""Which runs a stream of many is of: those that a request lists, or those of a session."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Collection, Mapping
from functools import partial

from broker.errors import Unavailable
from broker.gateway.dialects.native.many.cursor import Composite, Places
from broker.gateway.dialects.native.many.lookout import LOOK_ROWS, Look, Lookout, Lookouts
from broker.gateway.dialects.native.many.multiplexer import Multiplexer
from broker.gateway.dialects.native.many.progress import Progress
from broker.ids import EventId, Owner
from broker.runs.record import Head
from broker.runs.store import Runs

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
        lookouts: Lookouts,
        watched: Watched,
        owner: Owner,
        session_id: str,
    ) -> None:
        self.places = Progress(cursor)
        self._begin = partial(_begin, positions=cursor.positions, heads=heads, missing=missing)
        self._runs = runs
        self._lookouts = lookouts
        self._watched = watched
        self._owner = owner
        self._session_id = session_id

    async def begin(self, multiplexer: Multiplexer) -> None:
        """For ever."""
        self._begin(multiplexer)
        with self._lookouts.of(self._owner, self._session_id, multiplexer.pause) as lookout:
            await self._look(lookout, multiplexer)

    async def _look(self, lookout: Lookout, multiplexer: Multiplexer) -> None:
        loop, watch_at, first = asyncio.get_running_loop(), 0.0, True
        while True:
            asked, first = lookout.above(self.places.floor, at_once=first), False
            with contextlib.suppress(Unavailable):  # what is under way goes on, and the next look may tell more
                await self._take(await asked, multiplexer)
                if self.places.crowded and loop.time() >= watch_at:
                    await self._watch_waiting()
                    watch_at = loop.time() + multiplexer.heartbeat

    async def _take(self, look: Look, multiplexer: Multiplexer) -> None:
        progress = self.places
        fresh = progress.look(look.rows, complete=look.complete, now_ms=look.now_ms)
        for request_id, head in zip(fresh, await self._runs.heads(fresh), strict=True):
            if head is not None:
                await self._begin_new(multiplexer, request_id, head)
            elif progress.never_came(request_id, look.now_ms):
                progress.over(request_id)

    async def _watch_waiting(self) -> None:
        """Lest `cancel_if_unwatched` cancels runs that have no room yet, under the client that waits for them."""
        floor = self.places.floor
        for _ in range(_WATCH_PAGES):
            rows, complete, _ = await self._runs.session_above(self._owner, self._session_id, floor, limit=LOOK_ROWS)
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
