"""The queue: arq, behind this one module. A job carries a request_id and an attempt, nothing else (PROTOCOL 4.1)."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from typing import Any

from arq.connections import ArqRedis
from arq.constants import in_progress_key_prefix, job_key_prefix, retry_key_prefix
from redis.exceptions import ConnectionError, WatchError

from broker.events import dumps
from broker.runs import keys
from broker.runs.connections import connect

FUNCTION = "run"
_DUE_MARGIN_MS = 2_000
_JOB_LIFE = timedelta(days=7)
_TRIES = 3


def _serialize(job: dict[str, Any]) -> bytes:
    """JSON, not pickle: who can write to Redis must not run code. An exception's repr is enough for arq."""
    return json.dumps(job, ensure_ascii=True, default=repr).encode("ascii")


def job_id(request_id: str, attempt: int, enqueues: int) -> str:
    """One id per enqueue: arq refuses, in silence, an id whose job or result key is still there."""
    return f"{request_id}:{attempt}:{enqueues}"


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
        """Makes the attempt due at once and rings. `now_ms` is Redis' time, not ours. False: it is queued already."""
        job = job_id(request_id, attempt, enqueues)
        for _ in range(_TRIES):
            added = await self._enqueue(job, dumps({"request_id": request_id, "attempt": attempt}), now_ms)
            # arq says None also where the connection was lost within its transaction: then there is no job.
            if added or await self.redis.exists(job_key_prefix + job):
                await self.redis.publish(keys.DOORBELL, b"")
                return added
        raise ConnectionError("the job could not be enqueued")

    async def _enqueue(self, job: str, payload: str, now_ms: int) -> bool:
        try:
            added = await self.redis.enqueue_job(
                FUNCTION,
                payload,
                _job_id=job,
                _defer_until=datetime.fromtimestamp((now_ms - _DUE_MARGIN_MS) / 1000, UTC),
                _expires=_JOB_LIFE,
            )
        except WatchError as error:  # redis-py's name for a connection that was lost while it watched a key
            raise ConnectionError(str(error)) from error
        return added is not None

    async def take(self, job: str) -> None:
        """Removes all of arq's traces of a job that starts: our lease covers its crash, arq's bookkeeping cannot."""
        async with self.redis.pipeline(transaction=True) as pipe:
            pipe.zrem(keys.QUEUE, job)
            pipe.delete(job_key_prefix + job, retry_key_prefix + job, in_progress_key_prefix + job)
            await pipe.execute()

    async def close(self) -> None:
        await self.redis.aclose(close_connection_pool=True)


def parse_job(payload: str) -> tuple[str, int]:
    """(request_id, attempt). Raises ValueError, KeyError or TypeError for what we did not write."""
    job = json.loads(payload)
    return str(job["request_id"]), int(job["attempt"])
