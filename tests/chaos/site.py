"""What storms pass over: two gateways and two workers on a Redis of some kind. A fault mends what it broke."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from tests.conftest import Launcher
from tests.kit.load import Load
from tests.kit.processes import Gateway, Process, Worker

LEASE_SECONDS = 1.5
SETTINGS = {"lease_seconds": LEASE_SECONDS, "heartbeat_seconds": 1, "grace_seconds": 1, "max_attempts": 1000}
_ERRORS = ("ERROR", "CRITICAL")


@dataclass(frozen=True)
class Outage:
    """A primary went, and another one took over. Times are those of the load's history."""

    kind: str
    at: float
    over_at: float
    """When the other one took writes."""
    slots: frozenset[int] | None = None
    """Those that it had; None where it had all."""


class Site:
    """An async context manager."""

    may_lose = False
    """Whether Redis may have lost what it had confirmed."""
    may_lose_runs = False
    """The same of what was on a replica too."""

    def __init__(self, folder: Path, durability: str) -> None:
        self.folder = folder
        self.durability = durability
        self.redis_url = ""
        self.gateways: list[Gateway] = []
        self.workers: list[Worker] = []
        self.processes: list[Process] = []
        """All that were ever started."""
        self.exits: list[str] = []
        """What ended otherwise than it should."""
        self.outages: list[Outage] = []
        self.cancelled: set[str] = set()
        """Runs whose cancel was confirmed to a client."""
        self.erased: set[str] = set()
        self.perhaps_erased: set[str] = set()
        """Runs for whose erasure a client has asked."""
        self._launcher = Launcher(folder)
        self._parts = contextlib.AsyncExitStack()

    async def start_redis(self, parts: contextlib.AsyncExitStack) -> dict[str, Any]:
        """Returns the settings that name it; `parts` closes what was started."""
        raise NotImplementedError

    async def __aenter__(self) -> Self:
        try:
            urls = await self.start_redis(self._parts)
            self._parts.callback(self._launcher.close)  # before Redis, or they would wait for it
            self.redis_url = urls.pop("redis_url")
            self._settings = {**SETTINGS, "durability": self.durability, **urls}
            for _ in range(2):
                self.gateways.append(await asyncio.to_thread(self.new_gateway))
                self.workers.append(await asyncio.to_thread(self.new_worker))
        except BaseException:
            await self._parts.aclose()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._parts.aclose()

    def begin(self) -> None:
        """Another storm: what was noted of the one before is forgotten."""
        self.may_lose = self.may_lose_runs = False
        self.outages.clear()
        for noted in (self.cancelled, self.erased, self.perhaps_erased):
            noted.clear()

    def new_worker(self) -> Worker:
        worker = self._launcher.worker(self.redis_url, **self._settings)
        self.processes.append(worker)
        return worker

    def new_gateway(self, port: int | None = None) -> Gateway:
        """One that takes the place of another is ready as soon as Redis is."""
        ready = "/readyz" if port is None else "/healthz"
        gateway = self._launcher.gateway(self.redis_url, ready=ready, port=port, **self._settings)
        self.processes.append(gateway)
        return gateway

    def expect(self, code: int, process: Process) -> None:
        if code != 0:
            self.exits.append(f"{process.log_path.name} ended with {code}")

    def errors(self) -> list[dict[str, Any]]:
        return [line for process in self.processes for line in process.log_lines() if line["level"] in _ERRORS]

    def logged(self, message: str, **fields: object) -> list[dict[str, Any]]:
        return [line for process in self.processes for line in process.logged(message, **fields)]


S = TypeVar("S", bound=Site)
Fault = Callable[[S, Load, random.Random], Coroutine[None, None, None]]
"""Its name begins with the part that it breaks: of each part only one thing is broken at a time."""
