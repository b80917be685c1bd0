"""Taking jobs off the queue: arq's way through it, made fit for a loop that outlives errors."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from typing import Any

from arq.worker import Worker as ArqWorker
from arq.worker import func
from redis.exceptions import WatchError

from broker.runs import keys
from broker.runs.connections import is_away, until_answered
from broker.runs.queue import FUNCTION, Queue, parse_job

logger = logging.getLogger(__name__)

POLL_SECONDS = 1.0
"""The queue is looked at this often without a ring; a ring may be lost."""
_BACKOFF = (0.1, 0.2, 0.5, 1.0)
_START_SECONDS = 5.0
"""For which arq hides a job that it is starting. A worker that dies before it takes the job off holds it up so long."""


class Jobs:
    """Calls `run(request_id, attempt)` for each job, up to `max_jobs` at once."""

    def __init__(
        self,
        queue: Queue,
        run: Callable[[str, int], Awaitable[None]],
        *,
        max_jobs: int,
        job_seconds: float,
        look_at_ms: Callable[[], int | None],
    ) -> None:
        """`look_at_ms` says when, by Redis' clock, a reaper shall look at a run that is taken now."""
        self._queue = queue
        self._look_at_ms = look_at_ms
        self._run = run
        self._max_jobs = max_jobs
        self._job_seconds = job_seconds
        self._arq_tasks: dict[str, asyncio.Task[Any]] = {}
        self._running: set[asyncio.Task[None]] = set()
        self._rung = asyncio.Event()
        self._stopping = False

    def ring(self) -> None:
        """There may be a job."""
        self._rung.set()

    def stop(self) -> None:
        """No more are taken; `take` returns when those that it has begun to take are taken."""
        self._stopping = True
        self.ring()

    @property
    def running(self) -> int:
        """How many jobs are under way."""
        return len(self._running)

    @property
    def unfinished(self) -> set[asyncio.Task[Any]]:
        """The tasks of jobs, and what arq does after each."""
        return {task for task in (*self._running, *self._arq_tasks.values()) if not task.done()}

    def cancel(self) -> None:
        for task in self._running:
            task.cancel()

    async def take(self) -> None:
        """Until stopped. arq's own loop ends when Redis is away for some seconds; this one goes on."""
        arq = self._arq()
        self._arq_tasks = arq.tasks
        failures = 0
        while not self._stopping:
            try:
                await arq._poll_iteration()
                failures = 0
            except Exception as error:
                if not is_away(error) and not isinstance(error, WatchError):  # a connection that was lost under WATCH
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

    def _arq(self) -> _Taker:
        taker = _Taker(
            # arq counts a start whose reply was lost as a try, and would drop the job: taking it off is what counts.
            [func(self._job, name=FUNCTION, keep_result=0, max_tries=1000, timeout=self._job_seconds)],
            redis_pool=self._queue.redis,
            queue_name=keys.QUEUE,
            max_jobs=self._max_jobs,
            handle_signals=False,
            retry_jobs=False,
            keep_result=0,
            log_results=False,
            job_serializer=self._queue.redis.job_serializer,
            job_deserializer=self._queue.redis.job_deserializer,
        )
        taker.in_progress_timeout_s = _START_SECONDS
        taker.is_stopping, taker.on_free = lambda: self._stopping, self.ring
        taker.job_tasks = _ByJob()
        return taker

    async def _job(self, ctx: dict[str, Any], payload: str) -> None:
        """What arq calls. The job is off the queue before its run is claimed."""
        task = asyncio.current_task()
        assert task is not None
        self._running.add(task)
        try:
            job = ctx["job_id"]
            request_id, attempt = parse_job(payload)
            # The reply may be lost after the job is: so the claim comes whatever happened, and decides.
            await until_answered(
                lambda: self._queue.take(request_id, job, self._look_at_ms()), "taking a job", job_id=job
            )
            await self._run(request_id, attempt)
        except Exception as error:
            # arq would keep the exception's arguments for its own log; here the request_id stands with it.
            logger.exception("a job failed", extra={"job_id": ctx["job_id"], "error": repr(error)})
        finally:
            self._running.discard(task)


class _ByJob(dict[str, Any]):
    """What arq knows of jobs by their ids. One may come twice at once, from a queue that a failover has rolled back."""

    def __delitem__(self, job_id: str) -> None:
        self.pop(job_id, None)


class _Taker(ArqWorker):
    is_stopping: Callable[[], bool]
    on_free: Callable[[], None]
    """Called when a job has ended and its slot is free: arq would look for another one at the next poll."""

    async def start_jobs(self, job_ids: list[bytes]) -> None:
        for job_id in job_ids:
            if self.is_stopping():
                return
            running = self.tasks.get(job_id.decode("ascii", "replace"))
            if running is not None and running.done() and not running.cancelled():
                running.exception()  # Redis was away as it began: it begins again here, and arq forgets the first time
            elif running is not None and not running.done():
                # It came twice. arq keeps its books by this id, and the claim would refuse it.
                await self.pool.zrem(self.queue_name, job_id)
                continue
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
