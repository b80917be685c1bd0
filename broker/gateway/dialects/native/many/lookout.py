"""New runs of a session: one look at its index is for all streams of the session that a gateway has."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from typing import NamedTuple

from broker.gateway.dialects.native.many.cursor import MAX_RUNS
from broker.ids import Owner

LOOK_ROWS = 2 * MAX_RUNS


class Look(NamedTuple):
    rows: list[tuple[str, int]]
    """The index's first (request_id, submitted at) above a floor, the lowest first, and never a part of one
    millisecond."""
    complete: bool
    """Whether they are all."""
    now_ms: int
    """Redis' time."""

    def above(self, floor: int) -> Look | None:
        """The same look from higher up; None where it does not reach so far."""
        rows = [row for row in self.rows if row[1] > floor]
        return self._replace(rows=rows) if rows or self.complete else None


class Lookout:
    """Of one session. Who asks is answered at the next tick, together with all others."""

    def __init__(self, look: Callable[[int], Awaitable[Look]], pause: float) -> None:
        """`look(floor)` asks Redis; `pause` is seconds between two ticks."""
        self._look = look
        self._pause = pause
        self._asked: list[tuple[int, asyncio.Future[Look]]] = []
        self._hurry = asyncio.Event()

    async def above(self, floor: int, *, at_once: bool = False) -> Look:
        """What is above the floor. Raises what the look did, as Unavailable."""
        answer: asyncio.Future[Look] = asyncio.get_running_loop().create_future()
        self._asked.append((floor, answer))
        if at_once:
            self._hurry.set()
        return await answer

    async def run(self) -> None:
        """For ever."""
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._pause):
                    await self._hurry.wait()
            self._hurry.clear()
            asked, self._asked = self._asked, []
            try:
                await self._answer(asked)
            except Exception as error:  # theirs to judge
                for _, answer in asked:
                    if not answer.done():
                        answer.set_exception(error)

    async def _answer(self, asked: list[tuple[int, asyncio.Future[Look]]]) -> None:
        """From the lowest floor; those whom a long index does not let it reach have another look."""
        while asked := [(floor, answer) for floor, answer in asked if not answer.done()]:
            look = await self._look(min(floor for floor, _ in asked))
            for floor, answer in asked:
                part = look.above(floor)
                if part is not None and not answer.done():
                    answer.set_result(part)


class Lookouts:
    """Those of a gateway: there is one as long as a session has a stream."""

    def __init__(self, above: Callable[..., Awaitable[tuple[list[tuple[str, int]], bool, int]]]) -> None:
        """`above` is Runs.session_above."""
        self._above = above
        self._lookouts: dict[tuple[Owner, str], Lookout] = {}
        self._tasks: dict[Lookout, asyncio.Task[None]] = {}
        self._users: dict[Lookout, int] = {}

    @contextlib.contextmanager
    def of(self, owner: Owner, session_id: str, pause: float) -> Iterator[Lookout]:
        key = (owner, session_id)
        lookout = self._lookouts.get(key)
        if lookout is None:
            lookout = self._lookouts[key] = Lookout(partial(self._look, owner, session_id), pause)
            self._tasks[lookout] = asyncio.create_task(lookout.run())
        self._users[lookout] = self._users.get(lookout, 0) + 1
        try:
            yield lookout
        finally:
            self._users[lookout] -= 1
            if not self._users[lookout]:
                del self._lookouts[key], self._users[lookout]
                self._tasks.pop(lookout).cancel()

    async def _look(self, owner: Owner, session_id: str, floor: int) -> Look:
        return Look(*await self._above(owner, session_id, floor, limit=LOOK_ROWS))
