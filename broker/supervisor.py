"""Several processes as one: started together, started again when one dies, stopped together."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

logger = logging.getLogger(__name__)

RESTART_SECONDS = (0.2, 0.5, 1.0, 2.0, 5.0)
_STABLE_SECONDS = 10.0
_QUICK_DEATHS = 5


@dataclass(frozen=True, kw_only=True)
class Program:
    """A child process. It is restarted whenever it ends, except when it cannot start several times in a row."""

    name: str
    command: Sequence[str]
    pass_fds: Sequence[int] = ()
    log: Path | None = None
    """Where its output is appended to; without one it has its parent's."""
    stop_last: bool = False
    """Stopped when all the others have ended: they need it until then."""


class Supervisor:
    """Runs programs until SIGTERM, SIGINT or SIGHUP, and ends them with SIGTERM. A second SIGTERM or SIGINT kills.

    `on_death(program, exit code, whether it is started again)` is called for each end that nobody asked for.
    """

    def __init__(
        self,
        programs: Sequence[Program],
        *,
        stop_seconds: float,
        restart_seconds: Sequence[float] = RESTART_SECONDS,
        on_death: Callable[[Program, int, bool], None] = lambda *_: None,
    ) -> None:
        self._stages = [_Stage([p for p in programs if p.stop_last is last]) for last in (False, True)]
        self._stop_seconds = stop_seconds
        self._restart_seconds = restart_seconds
        self._on_death = on_death
        self._failed = False

    async def run(self) -> int:
        """Returns 0, or 1 when a program could not be kept running."""
        loop = asyncio.get_running_loop()
        heard = self._listen(loop)
        keeping = [
            [asyncio.create_task(self._keep(program, stage)) for program in stage.programs] for stage in self._stages
        ]
        try:
            for stage, tasks in zip(self._stages, keeping, strict=True):
                if stage is not self._stages[0]:
                    stage.stop(self._stop_seconds)
                await asyncio.gather(*tasks)
        finally:
            self._kill()
            for number in heard:
                loop.remove_signal_handler(number)
        return 1 if self._failed else 0

    @property
    def stopping(self) -> bool:
        return self._stages[0].stopping.is_set()

    def stop(self, *, failed: bool = False) -> None:
        """Once is enough. `failed` is for a reason that makes the exit code 1."""
        self._failed = self._failed or failed
        self._stages[0].stop(self._stop_seconds)

    def _listen(self, loop: asyncio.AbstractEventLoop) -> list[signal.Signals]:
        """The signals that are heard from now on."""
        actions: dict[signal.Signals, Callable[[], None]] = {
            signal.SIGTERM: self._signalled,
            signal.SIGINT: self._signalled,
        }
        # A terminal that is closed is told by the shell and by the kernel: twice is no impatience. Under nohup, never.
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
            actions[signal.SIGHUP] = self.stop
        for number, action in actions.items():
            loop.add_signal_handler(number, action)
        return list(actions)

    def _signalled(self) -> None:
        if self.stopping:
            self._kill()
        self.stop()

    def _kill(self) -> None:
        for stage in self._stages:
            stage.stopping.set()
            stage.send(signal.SIGKILL)

    async def _keep(self, program: Program, stage: _Stage) -> None:
        deaths = 0
        while not stage.stopping.is_set():
            began = time.monotonic()
            code = await stage.run(program)
            if stage.stopping.is_set():
                return
            deaths = 0 if time.monotonic() - began > _STABLE_SECONDS else deaths + 1
            again = deaths < _QUICK_DEATHS
            logger.warning("a process ended", extra={"program": program.name, "code": code, "quick_deaths": deaths})
            self._on_death(program, code, again)
            if not again:
                logger.error("a process cannot be kept running", extra={"program": program.name})
                self.stop(failed=True)
                return
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._restart_seconds[min(deaths, len(self._restart_seconds) - 1)]):
                    await stage.stopping.wait()


class _Stage:
    """Programs that are stopped at the same time, and their processes."""

    def __init__(self, programs: Sequence[Program]) -> None:
        self.programs = programs
        self.stopping = asyncio.Event()
        self._children: dict[str, asyncio.subprocess.Process] = {}

    async def run(self, program: Program) -> int:
        """Until its process ends. Returns the exit code: negative for a signal, 127 where it cannot be started."""
        try:
            with program.log.open("ab") if program.log else contextlib.nullcontext() as output:
                child = await asyncio.create_subprocess_exec(
                    *program.command,
                    pass_fds=program.pass_fds,
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    # Ctrl-C goes to this process only: it decides what the others hear, and when.
                    process_group=0,
                )
        except OSError as error:
            logger.error("a process cannot be started", extra={"program": program.name, "error": str(error)})
            return 127
        self._children[program.name] = child
        if self.stopping.is_set():
            child.terminate()
        return await child.wait()

    def stop(self, seconds: float) -> None:
        """SIGTERM now, SIGKILL after `seconds`."""
        if not self.stopping.is_set():
            self.stopping.set()
            self.send(signal.SIGTERM)
            asyncio.get_running_loop().call_later(seconds, self.send, signal.SIGKILL)

    def send(self, number: signal.Signals) -> None:
        for child in self._children.values():
            if child.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    child.send_signal(number)
