"""The queue: arq, behind this one module. A job carries a request_id and an attempt, nothing else (PROTOCOL 4.1)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

from arq.connections import ArqRedis
from arq.constants import in_progress_key_prefix, job_key_prefix, retry_key_prefix
from arq.jobs import serialize_job

from broker.events import dumps
from broker.ids import REQUEST_ID
from broker.runs import keys
from broker.runs.connections import connect

FUNCTION = "run"
DUE_MARGIN_MS = 2_000
"""A job's score in the queue is its time less this, so that no worker's clock finds it in the future."""
_JOB_LIFE = timedelta(days=7)


def _serialize(job: dict[str, Any]) -> bytes:
    """JSON, not pickle: who can write to Redis must not run code. An exception's repr is enough for arq."""
    return json.dumps(job, ensure_ascii=True, default=repr).encode("ascii")


def job_id(request_id: str, attempt: int, enqueues: int) -> str:
    """One id per enqueue: arq refuses, in silence, an id whose job or result key is still there."""
    return f"{request_id}:{attempt}:{enqueues}"


def job_keys(job: str) -> tuple[str, str, str]:
    """All that arq keeps of a job beside its place in the queue."""
    return job_key_prefix + job, retry_key_prefix + job, in_progress_key_prefix + job


class Queue:
    """Enqueues attempts, and takes them off as they start."""

    def __init__(self, url: str, *, connections: int = 2) -> None:
        client = connect(url, connections=connections)
        self.redis: ArqRedis = ArqRedis(
            pool_or_conn=client.connection_pool,
            job_serializer=_serialize,
            job_deserializer=json.loads,
            default_queue_name=keys.QUEUE,
        )

    async def enqueue(self, request_id: str, attempt: int, *, enqueues: int, now_ms: int) -> bool:
        """Makes the attempt due at once and rings. `now_ms` is Redis' time, not ours. False: it is queued already.

        Not by arq's enqueue_job: it answers alike where the job is there, where another one came while it looked, and
        where the connection was lost.
        """
        job = job_id(request_id, attempt, enqueues)
        payload = dumps({"request_id": request_id, "attempt": attempt})
        data = serialize_job(FUNCTION, (payload,), {}, None, now_ms, serializer=_serialize)
        async with self.redis.pipeline(transaction=True) as pipe:
            pipe.set(job_key_prefix + job, data, nx=True, px=_JOB_LIFE)
            pipe.zadd(keys.QUEUE, {job: now_ms - DUE_MARGIN_MS}, nx=True)
            pipe.publish(keys.DOORBELL, b"")
            added, _, _ = await pipe.execute()
        return bool(added)

    async def holds(self, jobs: Sequence[str]) -> list[bool]:
        """Whether each job, by its id, is still there."""
        async with self.redis.pipeline(transaction=False) as pipe:
            for job in jobs:
                pipe.exists(job_key_prefix + job)
                pipe.zscore(keys.QUEUE, job)
            found = await pipe.execute()
        return [bool(there) and score is not None for there, score in zip(found[::2], found[1::2], strict=True)]

    async def take(self, request_id: str, job: str, look_at_ms: int | None) -> None:
        """Removes all of arq's traces of a job that starts: our lease covers its crash, arq's bookkeeping cannot.

        Until there is a lease a reaper does: it is to look at the run at `look_at_ms` (PROTOCOL 4.2).
        """
        async with self.redis.pipeline(transaction=True) as pipe:
            pipe.zrem(keys.QUEUE, job)
            pipe.delete(*job_keys(job))
            if look_at_ms is not None:
                pipe.zadd(keys.LEASES, {request_id: look_at_ms})
            await pipe.execute()

    async def close(self) -> None:
        await self.redis.aclose(close_connection_pool=True)


def parse_job(payload: str) -> tuple[str, int]:
    """(request_id, attempt). Raises ValueError, KeyError or TypeError for what we did not write."""
    job = json.loads(payload)
    request_id, attempt = str(job["request_id"]), int(job["attempt"])
    if not REQUEST_ID.fullmatch(request_id):
        raise ValueError("not a request_id")
    return request_id, attempt
