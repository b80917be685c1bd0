"""An agent process, as its worker sees it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import subprocess
import sys
import threading
from dataclasses import replace
from itertools import count
from typing import Any, NamedTuple

from broker.errors import Misconfigured
from broker.settings import Settings
from worker.agent import Run, no_history
from worker.processes import frames
from worker.processes.execution import Execution, within
from worker.processes.messages import (
    Begun,
    Call,
    Closed,
    Ended,
    Execute,
    Load,
    Misfit,
    Ping,
    Pong,
    Ready,
    Saved,
    Yielded,
)

logger = logging.getLogger(__name__)

_CODE = "import sys; sys.path[:] = {path!r}; from worker.processes.child import main; main()"
"""Not `-m`, which would look for our package in the working directory first."""
END_SECONDS = 2.0
"""How long a process lives whose socket is closed, and a socket whose process has ended."""
PING_SECONDS = 0.5


class AgentProcess:
    """One process, from its start to its end."""

    def __init__(self, popen: subprocess.Popen[bytes], writer: asyncio.StreamWriter) -> None:
        loop = asyncio.get_running_loop()
        self._popen = popen
        self._writer = writer
        self._numbers = count()
        self._executions: dict[int, Execution] = {}
        self._loaded: asyncio.Future[Ready | Misfit] = loop.create_future()
        self._pong = asyncio.Event()
        self._pinged_at = 0.0
        self._exited: asyncio.Future[int] = loop.create_future()
        self._living: asyncio.Task[int] | None = None

    @classmethod
    async def start(cls, settings: Settings) -> AgentProcess:
        """Returns when it has loaded its agents. Raises Misconfigured where it cannot."""
        ours, theirs = socket.socketpair()
        with theirs:
            popen = _spawn(theirs.fileno())
        reader, writer = await asyncio.open_unix_connection(sock=ours)
        process = cls(popen, writer)
        process._living = asyncio.create_task(process._live(reader))
        process.send(Load(settings))
        parties: list[asyncio.Future[Any]] = [process._loaded, process._exited]
        try:
            await asyncio.wait(parties, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            process.kill()
            raise
        if process._loaded.done() and isinstance(process._loaded.result(), Ready):
            return process
        code = await process.ended()
        if process._loaded.done():
            misfit = process._loaded.result()
            assert isinstance(misfit, Misfit)
            raise Misconfigured(misfit.reason)
        raise Misconfigured(f"an agent process ended with code {code} while it loaded the agents")

    @property
    def agents(self) -> tuple[str, ...]:
        ready = self._loaded.result()
        assert isinstance(ready, Ready)
        return ready.agents

    @property
    def pid(self) -> int:
        return self._popen.pid

    @property
    def alive(self) -> bool:
        return not self._exited.done()

    @property
    def blocked(self) -> bool:
        """Whether its event loop has not turned lately."""
        return not self._pong.is_set() and asyncio.get_running_loop().time() - self._pinged_at > PING_SECONDS

    @property
    def runs(self) -> list[str]:
        """The request_ids of what it executes."""
        return [execution.request_id for execution in self._executions.values() if not execution.abandoned]

    def begin(self, agent: str, run: Run) -> Execution:
        number = next(self._numbers)
        execution = self._executions[number] = Execution(self, number, run)
        self.send(Execute(number, agent, replace(run, recall=no_history)))
        return execution

    def send(self, message: NamedTuple) -> None:
        if not self._writer.is_closing():
            self._writer.write(frames.encode(message))

    async def turns(self, seconds: float) -> bool:
        """Whether its event loop turns within this time."""
        self._ping()
        return await within(seconds, self._pong)

    def _ping(self) -> None:
        self._pong.clear()
        self._pinged_at = asyncio.get_running_loop().time()
        self.send(Ping())

    def kill(self) -> None:
        self._popen.kill()

    async def ended(self) -> int:
        """Its exit code, when it has ended and what it has still said is read; negative for a signal."""
        assert self._living is not None
        return await asyncio.shield(self._living)

    async def stop(self) -> None:
        """Tells it that nobody wants it any more, and waits for its end; it is killed where that does not come."""
        self._writer.close()
        await self.ended()

    async def _live(self, reader: asyncio.StreamReader) -> int:
        threading.Thread(target=self._wait, args=(asyncio.get_running_loop(),), daemon=True).start()
        reading, pinging = asyncio.create_task(self._read(reader)), asyncio.create_task(self._keep_pinging())
        parties: list[asyncio.Future[Any]] = [reading, self._exited]
        # Either may come without the other: a program that an agent has forked holds the socket open.
        await asyncio.wait(parties, return_when=asyncio.FIRST_COMPLETED)
        await asyncio.wait(parties, timeout=END_SECONDS)
        if not self._exited.done():
            self.kill()
            await asyncio.wait([self._exited])
        reading.cancel()
        pinging.cancel()
        self._writer.close()
        for execution in self._executions.values():
            execution.closed(lost=True)
        return self._exited.result()

    async def _keep_pinging(self) -> None:
        await asyncio.wait([self._loaded])
        while True:
            self._ping()
            await self._pong.wait()
            await asyncio.sleep(PING_SECONDS)

    def _wait(self, loop: asyncio.AbstractEventLoop) -> None:
        code = self._popen.wait()
        with contextlib.suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(self._has_exited, code)

    def _has_exited(self, code: int) -> None:
        if not self._exited.done():
            self._exited.set_result(code)

    async def _read(self, reader: asyncio.StreamReader) -> None:
        decoder = frames.Decoder(upward=True)
        try:
            while data := await reader.read(65536):
                for message in decoder.feed(data):
                    self._take(message)
        except OSError:
            pass  # it has ended, which is seen elsewhere
        except Exception:
            logger.exception("an agent process is not understood: it is killed", extra={"pid": self.pid})
            self.kill()

    def _take(self, message: Any) -> None:
        match message:
            case Ready() | Misfit():
                self._loaded.set_result(message)
            case Pong():
                self._pong.set()
            case Begun():
                self._executions[message.number].has_begun()
            case Closed():
                self._executions.pop(message.number).closed()
            case Yielded() | Saved() | Ended():
                self._executions[message.number].take(message)
            case Call():
                self._executions[message.number].answer(message)


def _spawn(fd: int) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", _CODE.format(path=sys.path), str(fd)],
        pass_fds=[fd],
        stdin=subprocess.DEVNULL,
        process_group=0,  # Ctrl-C is for the worker
    )
