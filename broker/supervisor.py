"""Several processes as one: started together, started again when one dies, stopped together."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

logger = logging.getLogger(__name__)

_RESTART_SECONDS = (0.2, 0.5, 1.0, 2.0, 5.0)
_STABLE_SECONDS = 10.0
_QUICK_DEATHS = 5


@dataclass(frozen=True, kw_only=True)
class Program:
    """A child process. It is restarted whenever it ends, except when it cannot start several times in a row."""

    name: str
    command: Sequence[str]
    environment: dict[str, str] = field(default_factory=dict)
    pass_fds: Sequence[int] = ()


class Supervisor:
    """Runs programs until SIGTERM or SIGINT, which it passes on; a second one kills."""

    def __init__(self, programs: Sequence[Program], *, stop_seconds: float) -> None:
        self._programs = programs
        self._stop_seconds = stop_seconds
        self._children: dict[str, asyncio.subprocess.Process] = {}
        self._stopping = asyncio.Event()
        self._failed = False

    async def run(self) -> int:
        """Returns 0, or 1 when a program could not be kept running."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._signalled)
        await asyncio.gather(*(self._keep(program) for program in self._programs))
        return 1 if self._failed else 0

    def _signalled(self) -> None:
        if self._stopping.is_set():
            self._send(signal.SIGKILL)
            return
        self._stop()

    def _stop(self) -> None:
        self._stopping.set()
        self._send(signal.SIGTERM)
        asyncio.get_running_loop().call_later(self._stop_seconds, self._send, signal.SIGKILL)

    def _send(self, number: signal.Signals) -> None:
        for child in self._children.values():
            if child.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    child.send_signal(number)

    async def _keep(self, program: Program) -> None:
        deaths = 0
        while not self._stopping.is_set():
            began = time.monotonic()
            child = await asyncio.create_subprocess_exec(
                *program.command,
                env={**os.environ, **program.environment},
                pass_fds=program.pass_fds,
                # Ctrl-C goes to this process only: it decides what the others hear, and when.
                process_group=0,
            )
            self._children[program.name] = child
            if self._stopping.is_set():
                self._send(signal.SIGTERM)
            code = await child.wait()
            if self._stopping.is_set():
                return
            deaths = 0 if time.monotonic() - began > _STABLE_SECONDS else deaths + 1
            logger.warning("a process ended", extra={"process": program.name, "code": code, "quick_deaths": deaths})
            if deaths >= _QUICK_DEATHS:
                logger.error("a process cannot be kept running", extra={"process": program.name})
                self._failed = True
                self._stop()
                return
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_RESTART_SECONDS[min(deaths, len(_RESTART_SECONDS) - 1)]):
                    await self._stopping.wait()
