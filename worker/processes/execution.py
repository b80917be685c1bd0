"""A run that is executed in an agent process, as its worker sees it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

from broker.events import Error, Event, Final
from worker.agent import Checkpoint, Run
from worker.attempt import CLOSE_SECONDS, Encoded, WorkerLost
from worker.processes.messages import WINDOW, Call, Close, Credit, Ended, Result, Saved, Yielded

if TYPE_CHECKING:
    from worker.processes.process import AgentProcess

logger = logging.getLogger(__name__)

_ENDS: dict[str, type[Final | Error]] = {Final.type: Final, Error.type: Error}


class Execution:
    """A run that is executed in a process."""

    def __init__(self, process: AgentProcess, number: int, run: Run) -> None:
        self.request_id = run.request_id
        self._process = process
        self._number = number
        self._calls: dict[str, Callable[..., Awaitable[Any]]] = {"recall": run.recall}
        """What the agent may ask the worker for."""
        self._items: asyncio.Queue[Yielded | Saved | Ended | None] = asyncio.Queue()
        """At most WINDOW and the end. None: the process has ended."""
        self._taken = 0
        self._answering: set[asyncio.Task[None]] = set()
        self.begun = False
        self._decided = asyncio.Event()
        """It has begun, or never will."""
        self._closed = asyncio.Event()
        self.abandoned = False

    async def begins(self, seconds: float) -> bool:
        """Whether it begins within this time; an agent process that is blocked begins nothing."""
        await within(seconds, self._decided)
        return self.begun

    @property
    def lost(self) -> bool:
        return self._closed.is_set()

    def abandon(self) -> None:
        """Before it has begun: then it never does."""
        self.abandoned = True
        self._process.send(Close(self._number))

    async def next(self) -> Encoded | Event | Checkpoint:
        """What the agent yields next. Raises WorkerLost where its process has ended before."""
        if self._taken == WINDOW // 2:
            self._process.send(Credit(self._number, self._taken))
            self._taken = 0
        item = await self._items.get()
        if item is None:
            raise WorkerLost
        self._taken += 1
        return _decoded(item)

    async def close(self) -> None:
        """Has the agent closed, and waits for that. A process that is blocked by a run which is over is killed."""
        for task in self._answering:
            task.cancel()
        if not self._closed.is_set():
            self._process.send(Close(self._number))
        if not await within(CLOSE_SECONDS, self._closed) and not await self._process.turns(CLOSE_SECONDS):
            logger.error(
                "an agent process is blocked by a run that is over: it is killed",
                extra={"pid": self._process.pid, "request_id": self.request_id},
            )
            self._process.kill()
        await self._closed.wait()

    def has_begun(self) -> None:
        self.begun = True
        self._decided.set()

    def take(self, message: Yielded | Saved | Ended) -> None:
        self._items.put_nowait(message)

    def closed(self, *, lost: bool = False) -> None:
        """`lost`: because its process has ended."""
        if lost:
            self._items.put_nowait(None)
        self._decided.set()
        self._closed.set()

    def answer(self, call: Call) -> None:
        task = asyncio.create_task(self._answer(call))
        self._answering.add(task)
        task.add_done_callback(self._answering.discard)

    async def _answer(self, call: Call) -> None:
        value, error = None, None
        try:
            value = await self._calls[call.name](*json.loads(call.arguments))
        except Exception as raised:
            logger.exception("a call of an agent failed", extra={"call": call.name, "request_id": self.request_id})
            error = f"{type(raised).__name__}: {raised}"
        self._process.send(Result(self._number, call.call, value, error))


def _decoded(item: Yielded | Saved | Ended) -> Encoded | Event | Checkpoint:
    """Checked already, by the driver in the process."""
    if isinstance(item, Yielded):
        return Encoded(item.type, item.data)
    if isinstance(item, Saved):
        return Checkpoint(state=json.loads(item.state))
    return _ENDS[item.type].model_construct(**json.loads(item.data))


async def within(seconds: float, event: asyncio.Event) -> bool:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await event.wait()
    return event.is_set()
