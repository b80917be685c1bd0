"""A worker says that it is there, and what it is (PROTOCOL 4.8)."""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from broker import __version__
from broker.runs.connections import is_away
from broker.runs.workers import WorkerInfo, Workers

logger = logging.getLogger(__name__)

EVERY_SECONDS = 5.0
_LEAVE_SECONDS = 1.0


class Presence:
    """`running()` is how many runs it executes."""

    def __init__(self, workers: Workers, *, agents: Sequence[str], max_jobs: int, running: Callable[[], int]) -> None:
        self._workers = workers
        self._running = running
        host, pid = socket.gethostname(), os.getpid()
        self._info = WorkerInfo(
            id=f"{host}:{pid}:{secrets.token_hex(4)}",
            host=host,
            pid=pid,
            version=__version__,
            started_at_ms=int(time.time() * 1000),
            runs=0,
            max_jobs=max_jobs,
            agents=tuple(agents),
        )

    async def run(self) -> None:
        """Until cancelled. Redis being away is told by others."""
        while True:
            try:
                await self._workers.put(replace(self._info, runs=self._running()))
            except Exception as error:
                if not is_away(error):
                    logger.exception("the worker cannot say that it is there")
            await asyncio.sleep(EVERY_SECONDS)

    async def leave(self) -> None:
        """What Redis does not hear of is forgotten soon."""
        try:
            async with asyncio.timeout(_LEAVE_SECONDS):
                await self._workers.remove(self._info.id)
        except Exception as error:
            if not is_away(error):
                logger.exception("the worker cannot say that it is gone")
