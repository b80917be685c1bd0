"""The worker process: takes jobs off the queue and executes their runs, until it is told to stop."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from broker.runs import keys
from broker.runs.subscriber import Subscriber
from broker.runs.workers import Workers
from broker.settings import Settings
from worker.agent import Agent
from worker.agents import load
from worker.attempt import left_behind
from worker.jobs import Jobs
from worker.keeper import LeaseKeeper
from worker.parts import make_parts
from worker.presence import Presence
from worker.processes.pool import Pool
from worker.reaper import Reaper
from worker.runner import Runner
from worker.tasks import guard
from worker.threads import Threads
from worker.watchdog import Keeper, Watchdog

logger = logging.getLogger(__name__)

_FIRST_LOOK_SECONDS = 0.2
_TAKING_SECONDS = 2.0
HAND_OVER_SECONDS = 10.0
_CLOSINGS_SECONDS = 3.0
END_SECONDS = HAND_OVER_SECONDS + 10.0
"""From the grace period's end to the exit, at most: a job that is being taken, agents that are slow to stop, what was
closed (PROTOCOL 5.2)."""


class Worker:
    """Executes up to `max_jobs` runs at once, until it is told to stop."""

    def __init__(self, settings: Settings, agents: dict[str, Agent]) -> None:
        self._settings = settings
        self._parts = make_parts(settings)
        self._runner = Runner(self._parts, agents)
        self._reaper = Reaper(self._parts)
        self._jobs = Jobs(
            self._parts.queue,
            self._runner.run,
            max_jobs=settings.max_jobs,
            job_seconds=settings.max_run_seconds + 600,
            look_at_ms=self._in_a_lease,
        )
        self._doorbell = Subscriber(
            self._parts.queue.redis,
            on_message=lambda *_: self._jobs.ring(),
            on_reset=lambda _: self._jobs.ring(),
            channels=[keys.DOORBELL],
        )
        self._presence = Presence(
            Workers(self._parts.queue.redis),
            agents=self._runner.agent_names,
            max_jobs=settings.max_jobs,
            running=lambda: self._jobs.running,
        )
        self._watchdog = Watchdog(self._keeper())
        self._stopping = asyncio.Event()
        self._killed = asyncio.Event()

    async def run(self) -> int:
        """Until SIGTERM or SIGINT: no new runs, those under way have the grace period, and then are handed over.

        Returns the exit code.
        """
        loop = asyncio.get_running_loop()
        guard(loop)
        loop.set_default_executor(Threads("call of an agent"))
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.stop)
        self._watchdog.start()
        self._runner.start()
        self._doorbell.start()
        background = [
            asyncio.create_task(work)
            for work in (
                self._parts.primaries.run(),
                self._parts.closings.run(),
                self._reaper.run(),
                self._runner.keep_index(),
                self._presence.run(),
            )
        ]
        logger.info("worker started", extra={"agents": self._runner.agent_names, "max_jobs": self._settings.max_jobs})
        taking = asyncio.create_task(self._take())
        await self._stopping.wait()
        await self._end_taking(taking)
        await self._drain()
        for task in background:
            task.cancel()
        await asyncio.wait(background)
        await self._presence.leave()
        await self._runner.close()
        await self._doorbell.close()
        await self._parts.close()
        await self._watchdog.close()
        logger.info("worker stopped", extra={"reaped": dict(self._reaper.counts)})
        return 1 if self._killed.is_set() else 0

    @property
    def busy(self) -> bool:
        """Whether something of a run is still going on here."""
        return bool(self._jobs.unfinished)

    def stop(self) -> None:
        """The first time: drain. The second time: now; what is under way is a reaper's then."""
        if self._stopping.is_set():
            self._killed.set()
        self._stopping.set()
        self._jobs.stop()

    async def _take(self) -> None:
        """Not before a primary has answered: nothing can be claimed until then, and its time is needed."""
        while self._parts.primaries.now_ms() is None:
            try:
                await self._parts.primaries.look()
            except Exception:  # which Primaries.run finds too, and tells
                await asyncio.sleep(_FIRST_LOOK_SECONDS)
        await self._jobs.take()

    def _keeper(self) -> Keeper | None:
        """The demo's fake Redis is in this very loop: nobody else could take the runs."""
        if self._settings.redis_url.startswith("fakeredis://"):
            return None
        keeper = LeaseKeeper(self._settings, lambda: self._runner.leases)
        return Keeper(keeper.after, keeper.keep)

    def _in_a_lease(self) -> int:
        now_ms = self._parts.primaries.now_ms()
        assert now_ms is not None
        return now_ms + self._parts.lease_ms

    async def _end_taking(self, taking: asyncio.Task[None]) -> None:
        """A job that is being taken is taken: cancelled half-way, it would be neither in the queue nor here."""
        await asyncio.wait([taking], timeout=_TAKING_SECONDS)
        taking.cancel()
        await asyncio.wait([taking])

    async def _drain(self) -> None:
        loop = asyncio.get_running_loop()
        grace_ends = loop.time() + self._settings.grace_seconds
        killed = asyncio.create_task(self._killed.wait())
        if jobs := self._jobs.unfinished:
            logger.info("draining", extra={"runs": self._jobs.running, "grace": self._settings.grace_seconds})
            ended = asyncio.create_task(asyncio.wait(jobs))
            for seconds in (self._settings.grace_seconds, HAND_OVER_SECONDS):
                if not self._killed.is_set():
                    await asyncio.wait([killed, ended], timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
                self._runner.hand_over()
            ended.cancel()
            self._jobs.cancel()
            # What arq does after a job: its connections must not be closed under it.
            await asyncio.wait(jobs, timeout=2)
        if not self._killed.is_set():
            left = max(grace_ends - loop.time(), _CLOSINGS_SECONDS)
            settled = asyncio.create_task(self._parts.closings.settle(left))
            await asyncio.wait([killed, settled], return_when=asyncio.FIRST_COMPLETED)
            settled.cancel()
        killed.cancel()


@asynccontextmanager
async def open_agents(settings: Settings) -> AsyncIterator[dict[str, Agent]]:
    """The agents by name: in this process, or in those that the settings ask for. Raises Misconfigured."""
    if not settings.agent_processes:
        yield load(settings)
        return
    pool = Pool(settings)
    agents = await pool.start()
    try:
        yield agents
    finally:
        await pool.close()


async def serve(settings: Settings) -> int:
    """Runs a worker. Returns its exit code, unless an agent that does not end keeps the process from ending."""
    async with open_agents(settings) as agents:
        worker = Worker(settings, agents)
        code = await worker.run()
    if left_behind() or worker.busy:
        # asyncio would wait for the agent's task without a limit.
        logging.shutdown()
        os._exit(code)
    return code
