"""An agent process: executes the runs that its worker gives it, any number at once, on an event loop of its own.

It lives exactly as long as its worker holds the other end of the socket. Signals that a terminal or a service manager
sends to all processes are the worker's to understand: it drains, and then closes the socket.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from broker import logs, loop
from broker.errors import Misconfigured
from broker.events import Event, dumps
from worker.agent import Agent, Turn
from worker.agents import load
from worker.attempt import Driver
from worker.processes import frames
from worker.processes.messages import (
    WINDOW,
    Begun,
    Call,
    Close,
    Closed,
    Credit,
    Ended,
    Execute,
    Load,
    Misfit,
    Ping,
    Pong,
    Ready,
    Result,
    Saved,
    Yielded,
)
from worker.tasks import guard
from worker.threads import Threads
from worker.watchdog import Watchdog, Work, current

logger = logging.getLogger(__name__)

END_SECONDS = 1.0
"""How long agents may take to close when the worker is gone."""
_PR_SET_PDEATHSIG = 1


class Socket:
    """This end of it. Read in a thread, so that the worker's end is noticed however busy the event loop is; written
    directly, so that what an agent has yielded is gone before it blocks."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._decoder = frames.Decoder(upward=False)

    def send(self, message: NamedTuple) -> None:
        with contextlib.suppress(OSError):  # the worker is gone, and this process is about to be
            self._sock.sendall(frames.encode(message))

    def receive(self) -> list[Any]:
        """The next messages, some at least. Raises EOFError when the worker is gone."""
        while True:
            try:
                data = self._sock.recv(65536)
            except OSError:
                data = b""
            if not data:
                raise EOFError
            if found := self._decoder.feed(data):
                return found


class Execution:
    """A run that is executed here; the Sink of its driver."""

    def __init__(self, message: Execute, agent: Agent, send: Callable[[NamedTuple], None]) -> None:
        self._number = message.number
        self._send = send
        self._run = replace(message.run, recall=self._recall)
        self._work = Work(message.run.request_id, message.agent, message.run.attempt)
        self._credit = WINDOW
        self._room = asyncio.Event()
        self._calls: dict[int, asyncio.Future[Any]] = {}
        self._driver = Driver(self, from_the_start=False)
        self._driving = asyncio.create_task(self._drive(agent))

    async def _drive(self, agent: Agent) -> Event:
        current.set(self._work)
        self._send(Begun(self._number))
        terminal = await self._driver.drive(agent, self._run)
        self._send(Ended(self._number, terminal.type, terminal.json_data()))
        return terminal

    async def put(self, kind: str, data: str) -> None:
        await self._has_room()
        self._send(Yielded(self._number, kind, data))

    async def checkpoint(self, state: str) -> None:
        await self._has_room()
        self._send(Saved(self._number, state))

    async def _has_room(self) -> None:
        while not self._credit:
            self._room.clear()
            await self._room.wait()
        self._credit -= 1

    def has_credit(self, events: int) -> None:
        self._credit += events
        self._room.set()

    async def _recall(self, tokens: int) -> Sequence[Turn]:
        turns: Sequence[Turn] = await self.call("recall", tokens)
        return turns

    async def call(self, name: str, *arguments: Any) -> Any:
        """What the worker answers. Raises RuntimeError for what it raised, and TypeError for arguments that JSON cannot
        carry."""
        if self._driver.shut:
            raise RuntimeError("the run is over")
        number = len(self._calls)
        asked = dumps(arguments)
        answer = self._calls[number] = asyncio.get_running_loop().create_future()
        self._send(Call(self._number, number, name, asked))
        return await answer

    def answered(self, result: Result) -> None:
        answer = self._calls[result.call]
        if answer.done():  # whoever asked was cancelled
            return
        if result.error is not None:
            answer.set_exception(RuntimeError(result.error))
        else:
            answer.set_result(result.value)

    def cancel(self) -> None:
        """An agent that has not begun never does."""
        self._driver.shut = True
        self._driving.cancel()

    async def close(self) -> None:
        current.set(self._work)
        await asyncio.gather(self._driving, return_exceptions=True)
        await self._driver.close(self._run)
        self._send(Closed(self._number))


class Child:
    """The executions of this process."""

    def __init__(self, agents: dict[str, Agent], send: Callable[[NamedTuple], None]) -> None:
        self._agents = agents
        self._send = send
        self._executions: dict[int, Execution] = {}
        self._closing: dict[int, asyncio.Task[None]] = {}

    def handle(self, message: Any) -> None:
        match message:
            case Execute():
                agent = self._agents[message.agent]
                self._executions[message.number] = Execution(message, agent, self._send)
            case Credit():
                self._executions[message.number].has_credit(message.events)
            case Result():
                if execution := self._executions.get(message.number):
                    execution.answered(message)
            case Close():
                self._close(message.number)
            case Ping():
                self._send(Pong())

    def _close(self, number: int) -> None:
        if number not in self._closing:
            self._executions[number].cancel()
            self._closing[number] = asyncio.create_task(self._executions[number].close())
            self._closing[number].add_done_callback(lambda _: self._forget(number))

    def _forget(self, number: int) -> None:
        del self._executions[number], self._closing[number]

    async def close(self) -> None:
        """Closes all agents, and waits for them, but not for long."""
        for number in list(self._executions):
            self._close(number)
        if self._closing:
            await asyncio.wait(self._closing.values(), timeout=END_SECONDS / 2)


async def _execute(sock: Socket, agents: dict[str, Agent]) -> None:
    turning = asyncio.get_running_loop()
    guard(turning)
    turning.set_default_executor(Threads("call of an agent"))
    gone = asyncio.Event()
    child = Child(agents, sock.send)
    watchdog = Watchdog()
    watchdog.start()
    reading = threading.Thread(target=_read, args=(sock, turning, child.handle, gone.set), name="reading", daemon=True)
    reading.start()
    sock.send(Ready(tuple(agents)))
    await gone.wait()
    await child.close()
    await watchdog.close()


def _read(
    sock: Socket,
    turning: asyncio.AbstractEventLoop,
    handle: Callable[[Any], None],
    gone: Callable[[], None],
) -> None:
    """Until the worker is gone. Nothing that an agent does keeps this process alive then."""
    with contextlib.suppress(EOFError):
        while True:
            for message in sock.receive():
                turning.call_soon_threadsafe(handle, message)
    with contextlib.suppress(RuntimeError):
        turning.call_soon_threadsafe(gone)
    time.sleep(END_SECONDS)
    os._exit(1)


def _die_with_the_worker() -> None:
    """The kernel's help, for an agent that holds Python's lock for ever: no thread could end this process then."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def main() -> None:
    """Its only argument is the number of an inherited socket."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)  # not SIG_IGN, which programs that agents start would inherit
    _die_with_the_worker()
    inherited = socket.socket(fileno=int(sys.argv[1]))
    inherited.set_inheritable(False)
    logs.configure()
    sock = Socket(inherited)
    try:
        [first] = sock.receive()
        assert isinstance(first, Load)
        agents = load(first.settings)
    except EOFError:
        return
    except Misconfigured as error:
        sock.send(Misfit(str(error)))
        return
    with loop.make_runner() as runner:
        try:
            runner.run(_execute(sock, agents))
        except BaseException:
            # Leaving the runner would cancel all agents, and tell their runs' failure, which is none of theirs.
            logger.critical("an agent has ended the event loop of its process", exc_info=True)
            logging.shutdown()
            os._exit(1)
