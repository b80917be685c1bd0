"""The queue on a real Redis: what a job is, when it is due, and what is left of it."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator

import pytest
from redis.asyncio import Redis

from broker.runs import keys
from broker.runs.queue import Queue, job_id, parse_job
from tests.kit.redis_server import RedisServer
from tests.kit.runs import Ears, now_ms

RID = "ab" * 16


@pytest.fixture
async def queue(redis: Redis, redis_server: RedisServer) -> AsyncIterator[Queue]:
    made = Queue(redis_server.url)
    yield made
    await made.close()


async def test_a_job_is_json_with_the_request_id_and_the_attempt_and_nothing_else(redis: Redis, queue: Queue) -> None:
    assert await queue.enqueue(RID, 3, enqueues=2, now_ms=now_ms())
    raw = await redis.get(f"arq:job:{RID}:3:2")
    job = json.loads(raw)
    [payload] = job["a"]
    assert json.loads(payload) == {"request_id": RID, "attempt": 3}
    assert parse_job(payload) == (RID, 3)


async def test_a_job_is_due_at_once_whatever_the_submitters_clock_says(
    monkeypatch: pytest.MonkeyPatch, redis: Redis, queue: Queue
) -> None:
    redis_now = now_ms()
    monkeypatch.setattr(time, "time", lambda: redis_now / 1000 + 3600)
    await queue.enqueue(RID, 1, enqueues=0, now_ms=redis_now)
    score = await redis.zscore(keys.QUEUE, job_id(RID, 1, 0))
    assert score is not None
    assert redis_now - 60_000 < score <= redis_now
    assert await redis.pttl(f"arq:job:{RID}:1:0") > 24 * 3600 * 1000


async def test_jobs_are_due_in_the_order_of_their_times(redis: Redis, queue: Queue) -> None:
    begun = now_ms()
    ids = [f"{n:032x}" for n in (7, 3, 9, 1)]
    for n, request_id in enumerate(ids):
        await queue.enqueue(request_id, 1, enqueues=0, now_ms=begun + n)
    assert await redis.zrange(keys.QUEUE, 0, -1) == [f"{request_id}:1:0".encode() for request_id in ids]


async def test_the_same_enqueue_again_says_so_and_adds_nothing(redis: Redis, queue: Queue) -> None:
    assert await queue.enqueue(RID, 1, enqueues=0, now_ms=now_ms())
    assert not await queue.enqueue(RID, 1, enqueues=0, now_ms=now_ms())
    assert await redis.zcard(keys.QUEUE) == 1


async def test_another_attempt_and_another_enqueue_are_other_jobs(redis: Redis, queue: Queue) -> None:
    """arq refuses in silence an id whose job key is still there (PROTOCOL 4.1)."""
    for attempt, enqueues in [(1, 0), (1, 1), (2, 0)]:
        assert await queue.enqueue(RID, attempt, enqueues=enqueues, now_ms=now_ms())
    assert await redis.zcard(keys.QUEUE) == 3


async def test_every_enqueue_rings(redis: Redis, redis_server: RedisServer, queue: Queue) -> None:
    with Ears(redis_server.url, keys.DOORBELL) as ears:
        for _ in range(2):
            await queue.enqueue(RID, 1, enqueues=0, now_ms=now_ms())
        assert [channel for channel, _ in ears.heard()] == [keys.DOORBELL] * 2


async def test_taking_a_job_leaves_nothing_of_it_and_everything_of_the_others(redis: Redis, queue: Queue) -> None:
    for attempt in (1, 2):
        await queue.enqueue(RID, attempt, enqueues=0, now_ms=now_ms())
        await redis.set(f"arq:in-progress:{RID}:{attempt}:0", "1")
        await redis.set(f"arq:retry:{RID}:{attempt}:0", "1")
    await queue.take(RID, job_id(RID, 1, 0), None)
    left = {name.decode() for name in await redis.keys("*")}
    assert left == {keys.QUEUE, *(f"arq:{kind}:{RID}:2:0" for kind in ("job", "in-progress", "retry"))}
    assert await redis.zrange(keys.QUEUE, 0, -1) == [f"{RID}:2:0".encode()]
    await queue.take(RID, job_id(RID, 1, 0), None)
    assert await queue.enqueue(RID, 1, enqueues=0, now_ms=now_ms()), "its id is free again"


async def test_a_run_whose_job_is_taken_is_looked_at_when_its_lease_would_end(redis: Redis, queue: Queue) -> None:
    """However long it had waited in the queue: who took it may die before the claim, or right after it."""
    await redis.zadd(keys.LEASES, {RID: now_ms() + 300_000})
    await queue.enqueue(RID, 1, enqueues=0, now_ms=now_ms())
    await queue.take(RID, job_id(RID, 1, 0), 12_345)
    assert await redis.zscore(keys.LEASES, RID) == 12_345


STRANGE = ["", "x", "[]", "{}", '{"request_id":"a"}', '{"request_id":"a","attempt":1}']
STRANGE += [f'{{"request_id":"{RID}","attempt":"x"}}', f'{{"request_id":"{RID}\\n","attempt":1}}']


@pytest.mark.parametrize("payload", STRANGE)
def test_a_payload_that_we_did_not_write_is_an_error_that_names_itself(payload: str) -> None:
    with pytest.raises((ValueError, KeyError, TypeError)):
        parse_job(payload)
