"""Notices that an event loop stands still, from a thread beside it, and says whose doing that is.

An agent that computes, or waits without `await`, keeps every other run of its process from going on. Nobody on the
loop can say so; a thread can, unless the agent's library holds Python's lock all the while.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import sys
import threading
import time
import traceback
from collections.abc import Awaitable, Callable
from contextvars import Context, ContextVar
from itertools import islice
from types import FrameType
from typing import Any, NamedTuple

logger = logging.getLogger(__name__)

BLOCKED_SECONDS = 1.0
"""A loop that has not turned for so long is told of."""
AGAIN_SECONDS = 30.0
LONG_SECONDS = 10.0
"""A run that was told of within AGAIN_SECONDS is told of again only when it blocks for so long."""
STOOD_STILL_SECONDS = 0.5
"""A thread that runs so much later than it should was kept from it, and the loop perhaps too."""
EVERY_SECONDS = 0.25
FRAMES = 6


class Work(NamedTuple):
    """The run that a task works for, and all tasks that it starts."""

    request_id: str
    agent: str
    attempt: int


current: ContextVar[Work | None] = ContextVar("current", default=None)


class Keeper(NamedTuple):
    """What is done while the loop stands still: `keep()` is begun after so many `seconds`, in the thread's own event
    loop, and cancelled when the loop turns."""

    seconds: float
    keep: Callable[[], Awaitable[None]]


class _Blocked(NamedTuple):
    since: float
    fields: dict[str, Any]


class Watchdog:
    """Of the event loop in which it is started."""

    def __init__(self, keeper: Keeper | None = None) -> None:
        self._keeper = keeper
        self._every = min(EVERY_SECONDS, keeper.seconds / 4) if keeper else EVERY_SECONDS
        self._turned_at = 0.0
        self._told: dict[str, float] = {}
        """When a run, or the process, was told of."""
        self._blocked: _Blocked | None = None
        self._keeping: asyncio.Task[None] | None = None
        self._closing = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._watch()), name="watchdog", daemon=True)

    def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._watched = threading.get_ident()
        self._turn()
        self._thread.start()

    async def close(self) -> None:
        self._closing.set()
        self._timer.cancel()
        await asyncio.to_thread(self._thread.join, 2)

    def _turn(self) -> None:
        self._turned_at = time.monotonic()
        self._timer = self._loop.call_later(self._every, self._turn)

    # -- in the thread ---------------------------------------------------------------------------------------

    async def _watch(self) -> None:
        looked_at = since = time.monotonic()
        while not self._closing.is_set():
            await asyncio.sleep(self._every)
            now = time.monotonic()
            if now - looked_at > self._every + STOOD_STILL_SECONDS:
                since = now  # what kept this thread from running kept the loop too, and is no agent's `sleep`
                self._tell_of_standing_still(now - looked_at, now)
            looked_at = now
            turned_at = self._turned_at
            if self._blocked is not None and turned_at != self._blocked.since:
                self._turns_again(turned_at)
            self._look(turned_at, now - max(turned_at, since), now)
        if self._keeping is not None:
            await _end(self._keeping)

    def _look(self, turned_at: float, silence: float, now: float) -> None:
        if silence > BLOCKED_SECONDS + self._every and self._blocked is None:
            self._tell(turned_at, silence, now)
        if self._keeper is None:
            return
        if silence < self._keeper.seconds:
            if self._keeping is not None:
                self._keeping.cancel()
                self._keeping = None
        elif self._keeping is None:
            self._keeping = asyncio.create_task(self._keep(self._keeper))

    async def _keep(self, keeper: Keeper) -> None:
        try:
            await keeper.keep()
        except Exception:
            logger.exception("the leases of a blocked worker cannot be kept")

    def _tell(self, turned_at: float, silence: float, now: float) -> None:
        fields = self._culprit()
        name = fields.get("request_id", "")
        if self._was_told(name, now) and silence < LONG_SECONDS:
            return
        self._told[name] = now
        self._blocked = _Blocked(turned_at, fields)
        logger.warning("the event loop is blocked", extra={"seconds": round(silence, 1), **fields})

    def _tell_of_standing_still(self, seconds: float, now: float) -> None:
        if not self._was_told("process", now):
            self._told["process"] = now
            logger.warning(
                "the process stood still: it was stopped, or a library held Python's lock",
                extra={"seconds": round(seconds, 1), **self._culprit()},
            )

    def _was_told(self, name: str, now: float) -> bool:
        """Within AGAIN_SECONDS."""
        self._told = {who: at for who, at in self._told.items() if now - at < AGAIN_SECONDS}
        return name in self._told

    def _turns_again(self, turned_at: float) -> None:
        assert self._blocked is not None
        fields = {name: value for name, value in self._blocked.fields.items() if name != "place"}
        logger.warning(
            "the event loop turns again", extra={"seconds": round(turned_at - self._blocked.since, 1), **fields}
        )
        self._blocked = None

    def _culprit(self) -> dict[str, Any]:
        """The run whose task is running, where one is, and the place, the innermost frame first."""
        task = asyncio.current_task(self._loop)
        work = _context(task).get(current) if task is not None else None
        frame = sys._current_frames().get(self._watched)
        return {**(work._asdict() if work is not None else {}), "place": _place(frame)}


def _context(task: asyncio.Task[Any]) -> Context:
    if sys.version_info >= (3, 12):
        return task.get_context()
    # A task of Python 3.11 does not tell; of what it refers to, its own context comes first.
    return next(item for item in gc.get_referents(task) if isinstance(item, Context))


def _place(frame: FrameType | None) -> list[str]:
    if frame is None:
        return []
    return [
        f"{frame.f_code.co_filename}:{line} {frame.f_code.co_qualname}"
        for frame, line in islice(traceback.walk_stack(frame), FRAMES)
    ]


async def _end(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.wait([task])
