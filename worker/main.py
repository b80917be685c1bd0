"""The worker process: takes jobs off the queue, claims their runs and executes them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import secrets
import signal
import time
from collections.abc import Callable
from typing import Any

from arq.worker import Worker as ArqWorker
from arq.worker import func
from redis.asyncio import Redis

from broker.events import Error
from broker.runs import keys
from broker.runs.connections import connect, is_away, until_answered
from broker.runs.queue import FUNCTION, Queue, parse_job
from broker.runs.record import FINISHED
from broker.runs.scripts import Lease, Scripts, keep_key
from broker.runs.subscriber import Subscriber
from broker.settings import Settings
from worker.agent import Agent, Run
from worker.agents import load
from worker.attempt import execute, left_behind
from worker.publisher import Limits, Publisher

logger = logging.getLogger(__name__)

POLL_SECONDS = 1.0
"""The queue is looked at this often without a ring; a ring may be lost."""
COMMAND_CONNECTIONS = 16
_BACKOFF = (0.1, 0.2, 0.5, 1.0)
_TAKING_SECONDS = 2.0
_CLOSED_BY_OTHERS = FINISHED | {"erased"}
_START_SECONDS = 5.0
"""For which arq hides a job that it is starting. A worker that dies before it takes the job off holds it up so long."""


class Worker:
    """Executes up to `max_jobs` runs at once, until it is told to stop."""

    def __init__(self, settings: Settings, agents: dict[str, Agent]) -> None:
        self._settings = settings
        self._agents = agents
        self._limits = Limits(
            lease_ms=int(settings.lease_seconds * 1000), retention_ms=int(settings.retention_seconds * 1000)
        )
        self._redis: Redis = connect(settings.redis_url, connections=COMMAND_CONNECTIONS, wait=30)
        self._scripts = Scripts(self._redis)
        self._queue = Queue(settings.queue_url, connections=8)
        self._controls = Subscriber(connect(settings.redis_url, connections=1), on_message=self._control)
        self._doorbell = Subscriber(
            connect(settings.queue_url, connections=1),
            on_message=lambda *_: self._ring(),
            on_reset=self._ring,
            channels=[keys.DOORBELL],
        )
        self._stops: dict[str, set[asyncio.Future[str]]] = {}
        self._runs: set[asyncio.Task[None]] = set()
        self._jobs: dict[str, asyncio.Task[Any]] = {}
        self._rung = asyncio.Event()
        self._stopping = asyncio.Event()
        self._killed = asyncio.Event()

    # -- the process -----------------------------------------------------------------------------------------

    async def run(self) -> int:
        """Until SIGTERM or SIGINT: no new runs, and those under way have the grace period. Returns the exit code."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.stop)
        self._controls.start()
        self._doorbell.start()
        logger.info("worker started", extra={"agents": sorted(self._agents), "max_jobs": self._settings.max_jobs})
        taking = asyncio.create_task(self._take_jobs())
        await self._stopping.wait()
        await self._end_taking(taking)
        await self._drain()
        await self._close()
        logger.info("worker stopped")
        return 1 if self._killed.is_set() else 0

    def stop(self) -> None:
        """The first time: drain. The second time: now."""
        if self._stopping.is_set():
            self._killed.set()
        self._stopping.set()
        self._ring()

    async def _end_taking(self, taking: asyncio.Task[None]) -> None:
        """A job that is being taken is taken: cancelled half-way, it would be neither in the queue nor here."""
        await asyncio.wait([taking], timeout=_TAKING_SECONDS)
        taking.cancel()
        await asyncio.wait([taking])

    async def _drain(self) -> None:
        jobs = {task for task in (*self._runs, *self._jobs.values()) if not task.done()}
        if not jobs:
            return
        logger.info("draining", extra={"runs": len(jobs), "grace": self._settings.grace_seconds})
        killed = asyncio.create_task(self._killed.wait())
        ended = asyncio.create_task(asyncio.wait(jobs))
        await asyncio.wait([killed, ended], timeout=self._settings.grace_seconds, return_when=asyncio.FIRST_COMPLETED)
        for request_id in self._stops:
            self._stop(request_id, "worker_stopped")
        if not self._killed.is_set():
            await asyncio.wait([killed, ended], timeout=10, return_when=asyncio.FIRST_COMPLETED)
        for task in (killed, ended, *self._runs):
            task.cancel()
        # What arq does after a job: its connections must not be closed under it.
        await asyncio.wait(jobs, timeout=2)

    async def _close(self) -> None:
        await self._controls.close()
        await self._doorbell.close()
        await self._queue.close()
        await self._redis.aclose(close_connection_pool=True)

    # -- the queue -------------------------------------------------------------------------------------------

    async def _take_jobs(self) -> None:
        """arq's loop ends when Redis is away for some seconds; this one goes on."""
        arq = self._arq()
        self._jobs = arq.tasks
        failures = 0
        while not self._stopping.is_set():
            try:
                await arq._poll_iteration()
                failures = 0
            except Exception as error:
                if not is_away(error):
                    logger.exception("taking jobs failed")
                elif failures == 0:
                    logger.warning("the queue cannot be reached", extra={"error": repr(error)})
                await asyncio.sleep(_BACKOFF[min(failures, len(_BACKOFF) - 1)])
                failures += 1
                continue
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(POLL_SECONDS):
                    await self._rung.wait()
            self._rung.clear()

    def _arq(self) -> Taker:
        seconds = self._settings.max_run_seconds + 600
        taker = Taker(
            # arq counts a start whose reply was lost as a try, and would drop the job: taking it off is what counts.
            [func(self._job, name=FUNCTION, keep_result=0, max_tries=1000, timeout=seconds)],
            redis_pool=self._queue.redis,
            queue_name=keys.QUEUE,
            max_jobs=self._settings.max_jobs,
            handle_signals=False,
            retry_jobs=False,
            keep_result=0,
            log_results=False,
            job_serializer=self._queue.redis.job_serializer,
            job_deserializer=self._queue.redis.job_deserializer,
        )
        taker.in_progress_timeout_s = _START_SECONDS
        taker.is_stopping, taker.on_free = self._stopping.is_set, self._ring
        return taker

    def _ring(self) -> None:
        self._rung.set()

    async def _job(self, ctx: dict[str, Any], payload: str) -> None:
        """What arq calls. The job is off the queue before its run is claimed."""
        task = asyncio.current_task()
        assert task is not None
        self._runs.add(task)
        try:
            # The reply may be lost after the job is: so the claim comes whatever happened, and decides.
            await until_answered(lambda: self._queue.take(ctx["job_id"]), "taking a job", job_id=ctx["job_id"])
            request_id, attempt = parse_job(payload)
            await self._run(request_id, attempt)
        except Exception as error:
            # arq would keep the exception's arguments for its own log; here the request_id stands with it.
            logger.exception("a job failed", extra={"job_id": ctx["job_id"], "error": repr(error)})
        finally:
            self._runs.discard(task)

    # -- a run -----------------------------------------------------------------------------------------------

    async def _run(self, request_id: str, attempt: int) -> None:
        stop: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._stops.setdefault(request_id, set()).add(stop)
        control = keys.control(request_id)
        lease: Lease | None = None
        try:
            # Before the claim: a cancel that comes later is heard, an earlier one is the claim's answer.
            with contextlib.suppress(ConnectionError):
                await self._controls.subscribe(control)
            lease = await self._claim(request_id, attempt)
            if lease is not None:
                await self._execute(lease, stop)
        except Exception:
            if lease is None:
                raise
            logger.exception("a run cannot be executed", extra={"request_id": request_id, "attempt": attempt})
            await self._close_failed(request_id)
        finally:
            stops = self._stops[request_id]
            stops.discard(stop)
            if not stops:  # else the job came twice, and the other one still listens
                del self._stops[request_id]
                self._controls.unsubscribe(control)

    async def _claim(self, request_id: str, attempt: int) -> Lease | None:
        """The token makes a claim whose reply was lost safe to repeat."""
        token = secrets.token_hex(8)
        answer = await until_answered(
            lambda: self._scripts.claim(request_id, attempt, token, self._limits.lease_ms),
            "claim",
            request_id=request_id,
        )
        if isinstance(answer, Lease):
            return answer
        logger.info("claim refused", extra={"request_id": request_id, "attempt": attempt, "answer": answer.answer})
        return None

    async def _close_failed(self, request_id: str) -> None:
        """What was accepted ends, whatever went wrong here."""
        error = Error(code="internal", message="The worker failed; its log says why.")
        await until_answered(
            lambda: self._scripts.close(
                request_id,
                kind=error.type,
                data=error.json_data(),
                reason="worker_lost",
                token=secrets.token_hex(8),
                retention_ms=self._limits.retention_ms,
            ),
            "closing",
            request_id=request_id,
        )

    async def _execute(self, lease: Lease, stop: asyncio.Future[str]) -> None:
        began = time.perf_counter()
        run = self._make_run(lease)
        name = json.loads(lease.record["agent"])
        logger.info("run started", extra={"request_id": lease.request_id, "attempt": lease.attempt, "agent": name})
        await until_answered(
            lambda: keep_key(self._redis, lease.record["key"], self._settings.key_life_ms),
            "keeping the key",
            request_id=lease.request_id,
        )
        publisher = Publisher(self._scripts, lease, self._limits)
        agent = self._agents.get(name) or _unknown_agent
        outcome = await execute(lease, agent, publisher, run, stop)
        logger.info(
            "run ended",
            extra={
                "request_id": lease.request_id,
                "attempt": lease.attempt,
                "agent": name,
                "outcome": outcome.status,
                "events": outcome.events,
                "seconds": round(time.perf_counter() - began, 3),
            },
        )

    def _make_run(self, lease: Lease) -> Run:
        record = lease.record
        started_ms = int(record["started_at"] or lease.now_ms)
        left = started_ms / 1000 + self._settings.max_run_seconds - lease.now_ms / 1000
        return Run(
            request_id=lease.request_id,
            query=json.loads(record["query"]),
            parameters=json.loads(record["parameters"]),
            session_id=json.loads(record["session_id"]),
            tenant=json.loads(record["tenant"]),
            subject=json.loads(record["subject"]),
            attempt=lease.attempt,
            deadline=time.time() + left,
            restored=json.loads(record["checkpoint"]) if record["checkpoint"] else None,
        )

    def _control(self, channel: str, payload: bytes) -> None:
        request_id, why = keys.request_id_of(channel), payload.decode("ascii", "replace")
        if why in _CLOSED_BY_OTHERS:
            self._stop(request_id, why)
        else:  # of a newer version; what closes a run is in its record too, where the next renewal finds it
            logger.warning("a control message is not understood", extra={"request_id": request_id, "text": why})

    def _stop(self, request_id: str, why: str) -> None:
        for stop in self._stops.get(request_id, ()):
            if not stop.done():
                stop.set_result(why)


class Taker(ArqWorker):
    """arq's way through the queue, made fit for a loop that outlives errors."""

    is_stopping: Callable[[], bool]
    on_free: Callable[[], None]
    """Called when a job has ended and its slot is free: arq would look for another one at the next poll."""

    async def start_jobs(self, job_ids: list[bytes]) -> None:
        for job_id in job_ids:
            if self.is_stopping():
                return
            try:
                await super().start_jobs([job_id])
            except UnicodeDecodeError:
                super()._release_sem_dec_counter_on_complete()
                logger.error("a job with an unreadable id was removed", extra={"job_id": repr(job_id)})
                await self.pool.zrem(self.queue_name, job_id)
            except Exception:
                # arq keeps the slot of a job that it failed to start, since its own loop ends here.
                super()._release_sem_dec_counter_on_complete()
                raise

    def _release_sem_dec_counter_on_complete(self) -> None:
        super()._release_sem_dec_counter_on_complete()
        self.on_free()


async def _unknown_agent(run: Run) -> Any:
    """For a run whose agent this worker does not have: gateways and workers must have the same BROKER_AGENTS."""
    yield Error(code="unknown_agent", message="The worker that took this run does not have its agent.")


async def serve(settings: Settings) -> int:
    """Runs a worker. Returns its exit code, unless an agent that does not end keeps the process from ending."""
    code = await Worker(settings, load(settings)).run()
    if left_behind():
        # asyncio would wait for the agent's task without a limit.
        logging.shutdown()
        os._exit(code)
    return code
