"""Taking jobs off the queue."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import time

import pytest
from redis.asyncio import Redis
from redis.exceptions import ConnectionError

from broker.ids import new_request_id
from broker.runs.queue import Queue, job_id
from tests.kit.redis_server import RedisServer
from worker.jobs import Jobs


async def fails() -> None:
    raise ConnectionError("Redis went away as the job began")


async def test_a_job_that_failed_to_begin_and_comes_again_is_run_and_leaves_no_error(
    redis: Redis, redis_server: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    ran = asyncio.Event()

    async def run(request_id: str, attempt: int) -> None:
        ran.set()

    queue, request_id = Queue(redis_server.url), new_request_id()
    async with contextlib.AsyncExitStack() as stack:
        stack.push_async_callback(queue.close)
        taker = Jobs(queue, run, max_jobs=2, job_seconds=10, look_at_ms=lambda: None)._arq()
        await queue.enqueue(request_id, 1, enqueues=0, now_ms=int(time.time() * 1000))
        job = job_id(request_id, 1, 0)
        taker.tasks[job] = asyncio.create_task(fails())
        await asyncio.wait([taker.tasks[job]])
        await taker.start_jobs([job.encode()])
        async with asyncio.timeout(10):
            await ran.wait()
            await taker.tasks[job]
    gc.collect()
    assert [record.getMessage() for record in caplog.records if record.levelname == "ERROR"] == []
