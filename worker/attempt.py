"""One attempt at a run: drives the agent, publishes what it yields, and ends the run."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import json
import logging
import time
from collections.abc import AsyncGenerator
from typing import Any, NamedTuple, Protocol, cast

from broker.events import AGENT, Error, Event, Final, Token, dumps
from broker.ids import EventId
from broker.runs.scripts import Answer, Lease
from worker.agent import MAX_EVENT_BYTES, Agent, Checkpoint, Run
from worker.publisher import Publisher, Stopped

logger = logging.getLogger(__name__)

MAX_LOG_EVENTS = 50_000
MAX_LOG_BYTES = 64 * 1024 * 1024
RESERVED_EVENTS = 16
"""Room that is kept for `attempt` entries and a terminal (PROTOCOL 1.6)."""
CLOSE_SECONDS = 5.0
"""How long a cancelled agent may take to close."""


_TYPES = frozenset(kind.type for kind in AGENT)
_PASSED = _TYPES - {Final.type, Error.type}
"""What may be Encoded: an end is an event here too."""


class Refused(Exception):
    """The agent did what ends its run with `error`; `code` and the message are for the client."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.event = Error(code=code, message=message)


class WorkerLost(Exception):
    """What executes the agent has died: the run goes on as if its worker had (PROTOCOL 4.4)."""


class Encoded(NamedTuple):
    """An event of an agent that is driven elsewhere, as that driver has checked and encoded it. `data` is taken as it
    is, if it can be what such a driver makes.
    """

    type: str
    data: str


class Sink(Protocol):
    """Takes what an agent yields, encoded. Both wait while there is no room."""

    async def put(self, kind: str, data: str) -> object: ...

    async def checkpoint(self, state: str) -> None: ...


class Outcome(NamedTuple):
    """How an attempt ended. `status` is the terminal's type, or what the log answered instead of taking it."""

    status: str
    events: int


class Driver:
    """Takes what the agent yields, checks it and puts it into the log. Once shut, it takes nothing more."""

    def __init__(self, sink: Sink, *, events: int = 0, bytes: int = 0, from_the_start: bool = True) -> None:
        """`events` and `bytes` are in the log already. `from_the_start`: this attempt's tokens are the whole answer."""
        self._sink = sink
        self._events = events
        self._bytes = bytes
        self._from_the_start = from_the_start
        self._tokens: list[str] = []
        self._generator: AsyncGenerator[object, None] | None = None
        self.count = 0
        self.shut = False

    async def drive(self, agent: Agent, run: Run) -> Event:
        """Runs the agent to its end. Returns the terminal event; raises Stopped when the log takes no more, and
        WorkerLost."""
        try:
            events = agent(run)
            if not hasattr(events, "__anext__") or not hasattr(events, "aclose"):
                if inspect.iscoroutine(events):
                    events.close()
                raise Refused("invalid_agent", "The agent is not an async generator function.")
            self._generator = cast("AsyncGenerator[object, None]", events)
            return await self._consume(self._generator)
        except (Stopped, WorkerLost):
            raise
        except Refused as refused:
            logger.warning(
                "an agent's run was refused",
                extra={"request_id": run.request_id, "code": refused.event.code, "reason": str(refused)},
            )
            return refused.event
        except asyncio.CancelledError:
            if self.shut:
                raise
            return _failed(run)  # the agent's own doing: something of its was cancelled, and it let that through
        except BaseException:  # whatever it is, it is the agent's, and no reason to end the worker
            return _failed(run)

    async def _consume(self, events: AsyncGenerator[object, None]) -> Event:
        async for item in events:
            if self.shut:
                raise asyncio.CancelledError
            if isinstance(item, Checkpoint):
                await self._checkpoint(item)
            elif isinstance(item, Final):
                return self._final(item)
            elif isinstance(item, Error):
                _sized(item)
                return item
            else:
                await self._event(item)
        return self._final(Final())

    async def close(self, run: Run) -> None:
        """Closes the generator, so that its `finally` runs. What it does there changes nothing in how the run ended."""
        if self._generator is not None:
            try:
                await self._generator.aclose()
            except asyncio.CancelledError:
                raise
            except BaseException:
                logger.exception("an agent's cleanup failed", extra={"request_id": run.request_id})

    async def _event(self, item: object) -> None:
        if isinstance(item, Encoded):
            kind, data, text = _checked(item)
        elif isinstance(item, AGENT):
            kind, data, text = item.type, _sized(item), item.text if isinstance(item, Token) else None
        else:
            raise Refused("invalid_event", f"The agent yielded {type(item).__name__}, which is not an event.")
        self._events += 1
        self._bytes += len(data)
        if self._events > MAX_LOG_EVENTS - RESERVED_EVENTS or self._bytes > MAX_LOG_BYTES - 2 * MAX_EVENT_BYTES:
            raise Refused("log_full", f"The run has {MAX_LOG_EVENTS} events or {MAX_LOG_BYTES} bytes, the most it may.")
        if text is not None:
            self._tokens.append(text)
        await self._sink.put(kind, data)
        self.count += 1

    async def _checkpoint(self, item: Checkpoint) -> None:
        try:
            state = dumps(item.state)
        except (TypeError, ValueError, RecursionError):
            raise Refused("invalid_event", "The agent yielded a Checkpoint whose state is not JSON.") from None
        if len(state) > MAX_EVENT_BYTES:
            raise Refused(
                "event_too_large",
                f"The agent yielded a Checkpoint of {len(state)} bytes, above the {MAX_EVENT_BYTES} allowed.",
            )
        await self._sink.checkpoint(state)

    def _final(self, final: Final) -> Final:
        """Without an answer it gets the tokens'; an answer that only repeats many tokens is left to them."""
        tokens = "".join(self._tokens)
        if final.answer is None and tokens and self._from_the_start:
            final = final.model_copy(update={"answer": tokens})
        if len(_json(final)) > MAX_EVENT_BYTES and final.answer == tokens:
            final = final.model_copy(update={"answer": None})
        _sized(final)
        return final


def _json(event: Event) -> str:
    try:
        return event.json_data()
    except (TypeError, ValueError, RecursionError):
        raise Refused("invalid_event", f"The agent yielded a {event.type} that JSON cannot carry.") from None


def _sized(event: Event) -> str:
    """The event's data. Raises Refused where the log cannot take it."""
    if event.type not in _TYPES:
        raise Refused("invalid_event", f"The agent yielded a {type(event).__name__} whose type is not one of ours.")
    data = _json(event)
    _bounded(event.type, data)
    return data


def _bounded(kind: str, data: str) -> None:
    if len(data) > MAX_EVENT_BYTES:
        raise Refused(
            "event_too_large",
            f"The agent yielded a {kind} of {len(data)} bytes, above the {MAX_EVENT_BYTES} allowed.",
        )


def _checked(item: Encoded) -> tuple[str, str, str | None]:
    """The event's type, its data, and a token's text. Raises Refused for what is no event on one line of ASCII: one
    broken frame would break the streams of everyone who reads the run.
    """
    kind, data = item
    _bounded(kind, data)
    try:
        fields = json.loads(data) if data.isascii() and data.isprintable() else None
    except (ValueError, RecursionError):
        fields = None
    text = fields.get("text") if isinstance(fields, dict) else None
    if kind not in _PASSED or not isinstance(fields, dict) or (kind == Token.type and not isinstance(text, str)):
        raise Refused("invalid_event", "The agent's process sent what is not an event.")
    return kind, data, text if kind == Token.type else None


def _failed(run: Run) -> Error:
    """To be called where the exception is handled: the traceback goes to the log, and nothing of it to the client."""
    logger.exception("an agent failed", extra={"request_id": run.request_id, "attempt": run.attempt})
    return Error(code="agent_failed", message="The agent failed; the log of the worker says why.")


async def execute(lease: Lease, agent: Agent, publisher: Publisher, run: Run, stop: asyncio.Future[str]) -> Outcome:
    """Runs the attempt until it has ended. `stop` is resolved by whoever ends it from outside: with `erased` or the
    status of a closing, with HANDED_OVER by this worker, which then gives the run back.
    """
    if stop.done():  # while it was claimed: its agent is not begun for nothing
        return Outcome(stop.result(), 0)
    record = lease.record
    driver = Driver(
        publisher,
        events=int(record["events"]),
        bytes=int(record["bytes"]),
        from_the_start=lease.resume_from <= EventId(0, 1),
    )
    publishing = asyncio.create_task(publisher.run())
    driving = asyncio.create_task(driver.drive(agent, run))
    try:
        parties: list[asyncio.Future[Any]] = [publishing, driving, stop]
        left = max(run.deadline - time.time(), 0)
        await asyncio.wait(parties, timeout=left, return_when=asyncio.FIRST_COMPLETED)
        if driving.done():
            try:
                terminal = driving.result()
            except WorkerLost:
                await _flush(publisher)
                return Outcome(WORKER_LOST, driver.count)
        else:
            await _close(run, driver, driving)
            if stop.done():
                if stop.result() == HANDED_OVER:
                    await _flush(publisher)
                return Outcome(stop.result(), driver.count)
            terminal = _TIMEOUT
        await publisher.put(terminal.type, terminal.json_data())
        await publisher.finish()
        return Outcome(terminal.type, driver.count)
    except Stopped as stopped:
        reply = stopped.reply
        if reply.answer is Answer.LOST:
            return Outcome(LOST, driver.count)
        told = reply.status in ("cancelled", "erased")
        return Outcome(reply.status if told else reply.answer.lower(), driver.count)
    finally:
        await publisher.close(publishing)
        await _close(run, driver, driving)


HANDED_OVER = "handed_over"
WORKER_LOST = "worker_lost"
LOST = "lost"
"""A failover took more of the log than this attempt can mend."""
_FLUSH_SECONDS = 1.0


async def _flush(publisher: Publisher) -> None:
    """The next attempt begins at the last checkpoint that is in the log."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_FLUSH_SECONDS):
            await publisher.finish()


_TIMEOUT = Error(code="timeout", message="The run took longer than it may.")


async def _close(run: Run, driver: Driver, driving: asyncio.Task[Event]) -> None:
    """Cancels the agent and closes it; one that does not end then is left behind, and can write nothing."""
    if driver.shut:
        return
    driver.shut = True
    driving.cancel()
    closing = asyncio.create_task(_end(run, driver, driving))
    done, _ = await asyncio.wait([closing], timeout=CLOSE_SECONDS)
    if not done:
        _left_behind.add(closing)
        closing.add_done_callback(_left_behind.discard)
        logger.warning(
            "a cancelled agent does not end; it is left behind and can write nothing",
            extra={"request_id": run.request_id, "attempt": run.attempt},
        )


_left_behind: set[asyncio.Task[None]] = set()
"""A task that nobody refers to may be collected in the middle of its work."""


def left_behind() -> int:
    """How many agents were cancelled and have not ended."""
    return len(_left_behind)


async def _end(run: Run, driver: Driver, driving: asyncio.Task[Event]) -> None:
    await asyncio.gather(driving, return_exceptions=True)
    await driver.close(run)
