"""The processes that a worker's agents run in, instead of the worker (BROKER_AGENT_PROCESSES).

To whatever drives them they are agents like others: what they yield comes from a process. A process that dies takes its
runs with it, as a worker does, and is started again.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import cast

from broker.errors import Misconfigured
from broker.events import Error, Event, Final
from broker.settings import Settings
from worker.agent import Agent, Checkpoint, Run
from worker.attempt import Encoded
from worker.processes.execution import Execution
from worker.processes.process import PING_SECONDS, AgentProcess

logger = logging.getLogger(__name__)

RESTART_SECONDS = (0.1, 0.5, 1.0, 2.0, 5.0)
_STABLE_SECONDS = 10.0


class Pool:
    """A run is executed by the process that has the fewest, of those that are not blocked."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._processes: list[AgentProcess] = []
        self._changed = asyncio.Event()
        self._keeping: list[asyncio.Task[None]] = []

    async def start(self) -> dict[str, Agent]:
        """The agents by name. Raises Misconfigured where they cannot be loaded."""
        starting = [
            asyncio.create_task(AgentProcess.start(self._settings)) for _ in range(self._settings.agent_processes)
        ]
        try:
            processes = await asyncio.gather(*starting)
        except BaseException:
            for task in starting:
                task.cancel()
            for ended in await asyncio.gather(*starting, return_exceptions=True):
                if isinstance(ended, AgentProcess):
                    await ended.stop()
            raise
        self._processes = list(processes)
        self._keeping = [asyncio.create_task(self._keep(process)) for process in processes]
        logger.info("agent processes started", extra={"pids": [process.pid for process in processes]})
        return {name: self._agent(name) for name in processes[0].agents}

    async def close(self) -> None:
        for task in self._keeping:
            task.cancel()
        await asyncio.gather(*self._keeping, return_exceptions=True)
        await asyncio.gather(*(process.stop() for process in self._processes))

    def _agent(self, name: str) -> Agent:
        async def agent(run: Run) -> AsyncIterator[Encoded | Event | Checkpoint]:
            execution = await self._begin(name, run)
            event: Encoded | Event | Checkpoint | None = None
            try:
                while not isinstance(event, (Final, Error)):
                    event = await execution.next()
                    yield event
            finally:
                await execution.close()

        return cast("Agent", agent)  # users' agents have nothing to do with what is Encoded

    async def _begin(self, name: str, run: Run) -> Execution:
        """Executes it where it begins soon: a process may have been blocked just when it was chosen.

        One that turns again at the very moment when another is chosen may begin the agent too, and closes it at once.
        """
        while True:
            process = await self._free()
            execution = process.begin(name, run)
            try:
                while not await execution.begins(PING_SECONDS) and not execution.lost:
                    if process.blocked and any(not other.blocked for other in self._processes):
                        break
                if execution.begun:
                    return execution
            finally:
                if not execution.begun:
                    execution.abandon()

    async def _free(self) -> AgentProcess:
        while True:
            if alive := [process for process in self._processes if process.alive]:
                return min(alive, key=lambda process: (process.blocked, len(process.runs)))
            self._changed.clear()
            await self._changed.wait()

    async def _keep(self, process: AgentProcess) -> None:
        """Until cancelled: when the process ends, another one takes its place."""
        loop = asyncio.get_running_loop()
        deaths = 0
        while True:
            began = loop.time()
            code = await process.ended()
            self._processes.remove(process)
            logger.warning("an agent process ended", extra={"pid": process.pid, "code": code, "runs": process.runs})
            deaths = 0 if loop.time() - began > _STABLE_SECONDS else deaths + 1
            process = await self._another(deaths)
            self._processes.append(process)
            self._changed.set()

    async def _another(self, deaths: int) -> AgentProcess:
        while True:
            await asyncio.sleep(RESTART_SECONDS[min(deaths, len(RESTART_SECONDS) - 1)])
            try:
                process = await AgentProcess.start(self._settings)
            except (Misconfigured, OSError) as error:
                logger.error("an agent process cannot be started", extra={"reason": str(error)})
                deaths += 1
            else:
                logger.info("an agent process was started again", extra={"pid": process.pid})
                return process
