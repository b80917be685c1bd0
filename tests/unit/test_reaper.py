"""PROTOCOL 4.2 to 4.7: what a reaper does and what it leaves alone. Several of them do each thing once (P6, P7)."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import pytest
from redis.asyncio import Redis
from redis.exceptions import ConnectionError

from broker.runs import keys, log, primaries
from broker.runs.queue import job_id
from broker.runs.scripts import Lease, Scripts
from broker.settings import Settings
from tests.kit.checker import check_log
from tests.kit.redis_server import RedisServer
from tests.kit.runs import append, cancel, claim, field, lose_worker, now_ms, queued, running, words
from worker import reaper as reaper_module
from worker.parts import Parts, make_parts
from worker.reaper import BATCH, MAX_ENQUEUES, QUEUED_MS, Reaper

LEASE = 0.2
LEASE_MS = int(LEASE * 1000)
HOUR = 3_600_000


@dataclass
class Worker:
    """The part of a worker process that reaps."""

    parts: Parts
    reaper: Reaper

    async def look(self) -> None:
        """At every run in the index, due or not."""
        members = await self.parts.queue.redis.zrange(keys.LEASES, 0, -1)
        await self.parts.leases.put({member.decode(): 1 for member in members})
        if self.parts.primaries.now_ms() is not None:  # as it does once a second
            await self.parts.primaries.look()
        await self.reaper.reap()

    async def calm(self) -> None:
        """It has been connected for a lease."""
        await self.parts.primaries.look()
        await asyncio.sleep(LEASE + 0.01)


Start = Callable[..., Awaitable[Worker]]


@pytest.fixture
async def start(redis: Redis, redis_server: RedisServer) -> AsyncIterator[Start]:
    """Workers of the same Redis. Those that are not `new` have been there for a lease."""
    started: list[Worker] = []

    async def begin(*, new: bool = False, **settings: Any) -> Worker:
        # Shorter than a setting may be.
        given = Settings(redis_url=redis_server.url, **settings).model_copy(update={"lease_seconds": LEASE})
        parts = make_parts(given)
        worker = Worker(parts, Reaper(parts))
        started.append(worker)
        if not new:
            await worker.calm()
        return worker

    yield begin
    for worker in started:
        await worker.parts.close()


@pytest.fixture
def scripts(redis: Redis) -> Scripts:
    return Scripts(redis)


async def put(redis: Redis, request_id: str, **fields: str | int) -> None:
    await redis.hset(keys.run(request_id), mapping=dict(fields))  # type: ignore[misc]


async def index(redis: Redis, *request_ids: str) -> None:
    await redis.zadd(keys.LEASES, dict.fromkeys(request_ids, 1))


async def indexed(redis: Redis) -> dict[str, int]:
    return {member.decode(): int(score) for member, score in await redis.zrange(keys.LEASES, 0, -1, withscores=True)}


async def expired(redis: Redis, scripts: Scripts, **submission: Any) -> Lease:
    """A run whose worker is gone."""
    lease = await running(scripts, **submission)
    await put(redis, lease.request_id, deadline=now_ms() - 1)
    await index(redis, lease.request_id)
    return lease


async def holds(redis: Redis, *job: Any) -> bool:
    name = job_id(*job)
    return bool(await redis.exists(f"arq:job:{name}")) and await redis.zscore(keys.QUEUE, name) is not None


async def jobs(redis: Redis) -> list[str]:
    return sorted(job.decode() for job in await redis.zrange(keys.QUEUE, 0, -1))


def done(caplog: pytest.LogCaptureFixture) -> Counter[str]:
    """What reapers have logged that they did."""
    return Counter(record.__dict__["done"] for record in caplog.records if record.getMessage() == "reaped")


# -- running -------------------------------------------------------------------------------------------------


async def test_of_many_reapers_one_fences_an_expired_run_and_enqueues_it(
    redis: Redis, scripts: Scripts, start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    workers = [await start() for _ in range(4)]
    leases = [await expired(redis, scripts) for _ in range(20)]
    await asyncio.gather(*(worker.look() for worker in workers for _ in range(3)))
    assert sum((worker.reaper.counts for worker in workers), Counter()) == {"fenced": 20}
    assert done(caplog) == {"fenced": 20}
    assert await jobs(redis) == sorted(job_id(lease.request_id, 2, 0) for lease in leases)
    for lease in leases:
        assert await field(redis, lease.request_id, "status") == "queued"
        second = await claim(scripts, lease.request_id, attempt=2)
        entries = await log.read_all(redis, lease.request_id)
        check_log(entries, finished=False)
        assert [entry.id.epoch for entry in entries] == [0, lease.epoch, second.epoch]


async def test_a_lease_that_holds_is_left_alone_and_looked_at_when_it_ends(
    redis: Redis, scripts: Scripts, start: Start
) -> None:
    worker = await start()
    lease = await expired(redis, scripts)
    deadline = now_ms() + LEASE_MS - 20
    await put(redis, lease.request_id, deadline=deadline)
    await worker.reaper.reap()
    assert not worker.reaper.counts
    assert await indexed(redis) == {lease.request_id: deadline}


async def test_an_owner_that_renews_keeps_its_run_however_late(redis: Redis, scripts: Scripts, start: Start) -> None:
    """PROTOCOL 4.5: only fencing ends a lease."""
    worker = await start()
    lease = await expired(redis, scripts)
    await append(scripts, lease, 2, *words("late"), lease_ms=LEASE_MS)
    await worker.look()
    assert not worker.reaper.counts
    assert await field(redis, lease.request_id, "status") == "running"


async def test_a_deadline_further_ahead_than_a_lease_is_set_back(redis: Redis, scripts: Scripts, start: Start) -> None:
    """PROTOCOL 4.7: as of a clock that was set back. Then it is a lease like any other."""
    worker = await start()
    lease = await expired(redis, scripts)
    await put(redis, lease.request_id, deadline=now_ms() + HOUR, lease=LEASE_MS)
    await worker.look()
    assert int(await field(redis, lease.request_id, "deadline")) <= now_ms() + LEASE_MS
    assert not worker.reaper.counts
    await asyncio.sleep(LEASE)
    await worker.look()
    assert worker.reaper.counts == {"fenced": 1}


async def test_a_run_that_has_lost_too_many_workers_is_closed_once(
    redis: Redis, scripts: Scripts, start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    workers = [await start(max_attempts=2) for _ in range(3)]
    lease = await expired(redis, scripts)
    await workers[0].look()
    await claim(scripts, lease.request_id, attempt=2)
    await put(redis, lease.request_id, deadline=now_ms() - 1)
    await asyncio.gather(*(worker.look() for worker in workers))
    entries = await log.read_all(redis, lease.request_id)
    check_log(entries)
    assert [entry.type for entry in entries] == ["start", "attempt", "attempt", "attempt", "error"]
    assert '"worker_lost"' in entries[-1].data
    assert done(caplog) == {"fenced": 1, "closed_worker_lost": 1}


async def test_a_run_that_has_taken_too_long_is_closed(redis: Redis, scripts: Scripts, start: Start) -> None:
    worker = await start(max_run_seconds=60)
    lease = await expired(redis, scripts)
    await put(redis, lease.request_id, started_at=now_ms() - 60_000)
    await worker.look()
    entries = await log.read_all(redis, lease.request_id)
    check_log(entries)
    assert '"timeout"' in entries[-1].data
    assert worker.reaper.counts == {"closed_timeout": 1}


# -- patience ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"max_attempts": 1}])
async def test_nothing_is_fenced_or_closed_for_a_lease_after_the_start(
    redis: Redis, scripts: Scripts, start: Start, settings: dict[str, int]
) -> None:
    """PROTOCOL 4.7: the owner may not have had the time to renew either."""
    began = asyncio.get_running_loop().time()
    worker = await start(new=True, **settings)
    lease = await expired(redis, scripts)
    await worker.parts.primaries.look()
    while not worker.reaper.counts:
        assert await field(redis, lease.request_id, "status") == "running"
        await worker.look()
        assert asyncio.get_running_loop().time() - began < 10
    assert asyncio.get_running_loop().time() - began >= LEASE


async def test_no_queued_run_is_closed_for_a_lease_after_the_start(
    redis: Redis, scripts: Scripts, start: Start
) -> None:
    began = asyncio.get_running_loop().time()
    worker = await start(new=True)
    request_id = await queued(scripts)
    await put(redis, request_id, enqueues=MAX_ENQUEUES)
    await index(redis, request_id)
    await worker.parts.primaries.look()
    while await field(redis, request_id, "status") == "queued":
        await worker.look()
        assert asyncio.get_running_loop().time() - began < 10
    assert asyncio.get_running_loop().time() - began >= LEASE
    assert worker.reaper.counts == {"closed_not_started": 1}


async def test_a_worker_that_has_not_yet_asked_the_primary_fences_nothing(
    redis: Redis, scripts: Scripts, start: Start
) -> None:
    worker = await start(new=True)
    lease = await expired(redis, scripts)
    for _ in range(3):
        await worker.look()
    assert not worker.reaper.counts
    assert await field(redis, lease.request_id, "status") == "running"


@pytest.mark.parametrize("how", ["full", "gone"])
async def test_nothing_is_fenced_for_a_lease_after_an_owner_could_not_renew(
    redis: Redis, redis_server: RedisServer, scripts: Scripts, start: Start, how: str
) -> None:
    """Also where this reaper had nothing to write meanwhile."""
    worker = await start()
    await expired(redis, scripts)
    if how == "full":
        redis_server.fill_memory()
        await worker.parts.primaries.look()
        redis_server.free_memory()
    else:
        looking = asyncio.create_task(look_until_it_fails(worker))
        while not looking.done():  # a connection that is lost while nobody uses it is no break
            await asyncio.to_thread(redis_server.drop_clients)
        with pytest.raises(ConnectionError):
            await looking
    await worker.parts.primaries.look()
    await worker.look()
    assert not worker.reaper.counts
    await asyncio.sleep(LEASE)
    await worker.look()
    assert worker.reaper.counts == {"fenced": 1}


async def look_until_it_fails(worker: Worker) -> None:
    while True:
        await worker.parts.primaries.look()


async def test_nothing_is_fenced_for_a_lease_after_the_reaper_itself_was_refused(
    redis: Redis, redis_server: RedisServer, scripts: Scripts, start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    worker = await start()
    lease = await expired(redis, scripts)
    loop = asyncio.get_running_loop()
    redis_server.fill_memory()
    reaping = asyncio.create_task(worker.reaper.run())
    try:
        while "the reaper cannot reach Redis" not in caplog.text:
            await asyncio.sleep(0.01)
        redis_server.free_memory()
        freed = loop.time()
        while await field(redis, lease.request_id, "status") == "running":
            await asyncio.sleep(0.01)
        assert loop.time() - freed >= LEASE - LEASE / 5, "the last refusal was within a tick before"
    finally:
        reaping.cancel()
        await asyncio.wait([reaping])


# -- queued --------------------------------------------------------------------------------------------------


async def test_a_queued_run_whose_job_is_there_waits(redis: Redis, scripts: Scripts, start: Start) -> None:
    worker = await start()
    request_id = await queued(scripts)
    await worker.parts.queue.enqueue(request_id, 1, enqueues=0, now_ms=now_ms())
    await index(redis, request_id)
    for _ in range(3):
        await worker.look()
    assert not worker.reaper.counts
    assert await jobs(redis) == [job_id(request_id, 1, 0)]


@pytest.mark.parametrize("lost", ["queue", "job", "both"])
async def test_a_queued_run_whose_job_is_gone_is_enqueued_again_by_one_of_many_reapers(
    redis: Redis, scripts: Scripts, start: Start, lost: str, caplog: pytest.LogCaptureFixture
) -> None:
    workers = [await start() for _ in range(3)]
    request_ids = [await queued(scripts) for _ in range(20)]
    for request_id in request_ids:
        await workers[0].parts.queue.enqueue(request_id, 1, enqueues=0, now_ms=now_ms())
    await index(redis, *request_ids)
    if lost != "job":
        await redis.delete(keys.QUEUE)
    if lost != "queue":
        await redis.delete(*[f"arq:job:{job_id(request_id, 1, 0)}" for request_id in request_ids])
    await asyncio.gather(*(worker.look() for worker in workers for _ in range(2)))
    assert done(caplog) == {"requeued": 20}
    for request_id in request_ids:
        assert await holds(redis, request_id, 1, 1)
        assert not await holds(redis, request_id, 1, 2)


async def test_while_a_primary_settles_no_queued_run_is_enqueued_again(
    redis: Redis, scripts: Scripts, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever has taken its job waits for just this, and five are too many."""
    monkeypatch.setattr(primaries, "SETTLE_SECONDS", 3 * LEASE)
    await redis.hset(keys.PRIMARIES, "another", "0")  # type: ignore[misc]
    worker = await start()
    await index(redis, await queued(scripts))
    await worker.look()
    assert not worker.reaper.counts
    await asyncio.sleep(2 * LEASE)
    await worker.look()
    assert worker.reaper.counts == {"requeued": 1}


async def test_a_run_that_no_worker_can_start_is_enqueued_five_times_and_then_closed(
    redis: Redis, scripts: Scripts, start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    """The poison payload: whoever takes its job does not come to the claim."""
    worker = await start()
    request_id = await queued(scripts)
    await index(redis, request_id)
    for times in range(1, MAX_ENQUEUES + 1):
        await worker.look()
        assert await holds(redis, request_id, 1, times)
        await worker.parts.queue.take(request_id, job_id(request_id, 1, times), None)
    await worker.look()
    entries = await log.read_all(redis, request_id)
    check_log(entries)
    assert [entry.type for entry in entries] == ["start", "attempt", "error"]
    assert '"not_started"' in entries[1].data
    assert '"not_started"' in entries[2].data
    assert done(caplog) == {"requeued": 5, "closed_not_started": 1}
    assert [record.__dict__["count"] for record in caplog.records if record.getMessage() == "reaped"] == [
        *range(1, 6),
        1,
    ]


async def test_enqueues_are_counted_anew_for_each_attempt(redis: Redis, scripts: Scripts, start: Start) -> None:
    worker = await start()
    lease = await expired(redis, scripts)
    await worker.look()
    for _ in range(MAX_ENQUEUES - 1):
        await redis.delete(keys.QUEUE)
        await worker.look()
    await claim(scripts, lease.request_id, attempt=2)
    await lose_worker(redis, scripts, lease.request_id)
    await redis.delete(keys.QUEUE)
    await worker.look()
    assert await jobs(redis) == [job_id(lease.request_id, 3, 1)]


async def test_a_run_that_waits_is_looked_at_less_and_less_often(redis: Redis, scripts: Scripts, start: Start) -> None:
    worker = await start()
    waits: dict[str, int] = {}
    for waited in (0, 10_000, 100_000, HOUR):
        request_id = await queued(scripts)
        await put(redis, request_id, created_at=now_ms() - waited)
        waits[request_id] = waited
    await index(redis, *waits)
    await worker.look()
    ahead = {waits[request_id]: score - now_ms() for request_id, score in (await indexed(redis)).items()}
    least, most = QUEUED_MS
    # Each was enqueued again: its job was gone. That is looked at soon, to see whether it helps.
    assert all(least - 1000 < ms <= most for ms in ahead.values())
    assert ahead[0] < ahead[100_000] < ahead[HOUR]
    assert ahead[HOUR] == pytest.approx(most, abs=1000)


async def test_a_queued_run_keeps_its_idempotency_key(redis: Redis, scripts: Scripts, start: Start) -> None:
    """PROTOCOL 3.3: the key outlives the record by an hour, however long the run waits for a worker."""
    worker = await start(retention_seconds=7200, max_run_seconds=600)
    request_id = await queued(scripts)
    await index(redis, request_id)
    await redis.set("k", "claim", px=500)  # the key that the kit gives its runs
    await worker.look()
    assert await redis.pttl("k") / 1000 == pytest.approx(7200 + 600 + 3600, abs=5)


# -- unwatched -----------------------------------------------------------------------------------------------


async def watched(redis: Redis, request_id: str) -> None:
    await put(redis, request_id, watched_at=now_ms())


async def test_a_queued_run_that_nobody_reads_is_cancelled(
    redis: Redis, scripts: Scripts, start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    """PROTOCOL 5.6: its job is there, and no worker has room for it."""
    worker = await start()
    request_id = await queued(scripts, cancel_if_unwatched=0.3)
    await worker.parts.queue.enqueue(request_id, 1, enqueues=0, now_ms=now_ms())
    await index(redis, request_id)
    for _ in range(6):
        await watched(redis, request_id)
        await worker.look()
        await asyncio.sleep(0.1)
    assert await field(redis, request_id, "status") == "queued", "it was read all the time"
    while await field(redis, request_id, "status") == "queued":
        await worker.look()
        await asyncio.sleep(0.02)
    entries = await log.read_all(redis, request_id)
    check_log(entries)
    assert [entry.type for entry in entries] == ["start", "attempt", "cancelled"]
    assert entries[-1].data == '{"reason":"unwatched"}'
    assert done(caplog) == {"closed_unwatched": 1}


async def test_a_queued_run_that_nobody_has_read_yet_has_a_minute(redis: Redis, scripts: Scripts, start: Start) -> None:
    worker = await start()
    young, old = [await queued(scripts, cancel_if_unwatched=0.1) for _ in range(2)]
    for request_id, age in ((young, 50_000), (old, 61_000)):
        await worker.parts.queue.enqueue(request_id, 1, enqueues=0, now_ms=now_ms())
        await put(redis, request_id, created_at=now_ms() - age)
    await index(redis, young, old)
    for _ in range(8):
        await worker.look()
        await asyncio.sleep(0.05)
    assert await field(redis, young, "status") == "queued"
    assert await field(redis, old, "status") == "cancelled"


async def test_a_reader_that_comes_between_the_look_and_the_closing_keeps_the_run(
    redis: Redis, scripts: Scripts, start: Start
) -> None:
    worker = await start()
    request_id = await queued(scripts, cancel_if_unwatched=0.1)
    await worker.parts.queue.enqueue(request_id, 1, enqueues=0, now_ms=now_ms())
    await put(redis, request_id, created_at=now_ms() - 61_000)
    await index(redis, request_id)
    await worker.look()
    await asyncio.sleep(0.2)
    holds = worker.parts.queue.holds

    async def comes(names: list[str]) -> list[bool]:
        await watched(redis, request_id)
        return await holds(names)

    worker.parts.queue.holds = comes  # type: ignore[assignment, method-assign]  # after the records were read
    await worker.look()
    assert await field(redis, request_id, "status") == "queued"
    assert not worker.reaper.counts


async def test_each_attempt_begins_a_new_count(redis: Redis, scripts: Scripts, start: Start) -> None:
    """What was counted while the run waited for its first worker does not count while it waits for the second."""
    worker = await start()
    request_id = await queued(scripts, cancel_if_unwatched=0.4)
    await watched(redis, request_id)
    await worker.parts.queue.enqueue(request_id, 1, enqueues=0, now_ms=now_ms())
    await index(redis, request_id)
    await worker.look()
    lease = await claim(scripts, request_id)
    await asyncio.sleep(0.45)
    await scripts.hand_over(lease, "handed_over")
    await worker.parts.queue.enqueue(request_id, 2, enqueues=0, now_ms=now_ms())
    await worker.look()
    assert await field(redis, request_id, "status") == "queued"
    await asyncio.sleep(0.45)
    await worker.look()
    assert await field(redis, request_id, "status") == "cancelled"


# -- the index -----------------------------------------------------------------------------------------------


async def test_an_entry_is_removed_two_minutes_after_the_end_of_its_run_and_never_before(
    redis: Redis, scripts: Scripts, start: Start
) -> None:
    worker = await start()
    fresh, old = [await queued(scripts) for _ in range(2)]
    for request_id in (fresh, old):
        await cancel(scripts, request_id)
    await put(redis, fresh, finished_at=now_ms() - 118_000)
    await put(redis, old, finished_at=now_ms() - 120_000)
    live = await expired(redis, scripts)
    waiting = await queued(scripts)
    await index(redis, fresh, old, waiting)
    for _ in range(3):
        await worker.look()
    assert (await indexed(redis)).keys() == {fresh, live.request_id, waiting}


async def test_an_entry_without_a_record_is_removed_after_the_same_time(
    redis: Redis, scripts: Scripts, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A submit that has not come to its record, a record that has expired, an erased run."""
    monkeypatch.setattr(reaper_module, "FORGET_MS", 300)
    worker = await start()
    missing, erased, back = "ab" * 16, await queued(scripts), await queued(scripts)
    await scripts.erase(erased, tombstone_ms=60_000)
    await index(redis, missing, erased)
    began = asyncio.get_running_loop().time()
    while asyncio.get_running_loop().time() - began < 0.25:
        await worker.look()
        assert len(await indexed(redis)) == 2
        await asyncio.sleep(0.05)
    await asyncio.sleep(0.1)
    await worker.look()
    assert await indexed(redis) == {}
    # What a failover brings back is a run like any other, and its next end counts from then on.
    kept = await redis.dump(keys.run(back))
    await redis.delete(keys.run(back))
    await index(redis, back)
    await worker.look()
    await redis.restore(keys.run(back), 0, kept)
    await asyncio.sleep(0.31)
    await worker.look()
    await redis.delete(keys.run(back))
    await worker.look()
    assert (await indexed(redis)).keys() == {back}


async def test_a_lost_index_is_made_whole_from_the_records_in_time(
    redis: Redis, scripts: Scripts, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here within ten seconds instead of ten minutes; the ticks are counted."""
    monkeypatch.setattr(reaper_module, "SCAN_SECONDS", 10.0)
    worker = await start()
    live = {await queued(scripts) for _ in range(150)} | {(await running(scripts)).request_id for _ in range(50)}
    for _ in range(50):
        await cancel(scripts, await queued(scripts))
        await scripts.erase(await queued(scripts), tombstone_ms=60_000)
    await redis.set(keys.run("something else"), "x")
    await redis.hset(keys.run("cd" * 16), mapping={"status": "running", "deadline": "soon"})  # type: ignore[misc]
    tick = LEASE / 5
    calls = 0
    while (await indexed(redis)).keys() != live:
        await worker.reaper.scan()
        calls += 1
        assert calls * tick <= 10, f"{len(live) - len(await indexed(redis))} are missing after {calls} ticks"
    assert calls > 20, "in slices"
    await worker.look()
    assert worker.reaper.counts["requeued"] == 150


async def test_a_score_that_is_too_far_ahead_is_set_back(redis: Redis, scripts: Scripts, start: Start) -> None:
    """The clock was a day ahead when it was written; nobody would look for a day."""
    worker = await start()
    ahead, due = await queued(scripts), await queued(scripts)
    await redis.zadd(keys.LEASES, {ahead: now_ms() + 24 * HOUR, due: 5})
    for _ in range(20):
        await worker.reaper.scan()
    scores = await indexed(redis)
    assert scores[ahead] <= now_ms() + QUEUED_MS[1] + 1000
    assert scores[due] == 5


# -- what must not stand in its way --------------------------------------------------------------------------


async def test_what_is_no_run_leaves_the_index_and_keeps_no_run_from_being_reaped(
    redis: Redis, scripts: Scripts, start: Start
) -> None:
    worker = await start()
    foreign = [b"\xff\x00", "ü".encode(), b"", b"AB" * 16, b"*", *(b"member %d" % n for n in range(BATCH))]
    await redis.zadd(keys.LEASES, dict.fromkeys(foreign, 0))
    lease = await expired(redis, scripts)
    for _ in range(3):
        await worker.reaper.reap()
    assert worker.reaper.counts == {"fenced": 1}
    assert (await indexed(redis)).keys() == {lease.request_id}


async def test_a_record_with_garbage_in_it_keeps_no_other_run_from_being_reaped(
    redis: Redis, scripts: Scripts, start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    worker = await start()
    broken: list[str] = []
    for name, value in [
        ("deadline", "soon"),
        ("attempt", b"\xff"),
        ("fails", "x"),  # its script fails
        ("end", "nowhere"),
        ("status", "dreaming"),
        ("epoch", ""),
    ]:
        broken.append((await expired(redis, scripts)).request_id)
        await redis.hset(keys.run(broken[-1]), mapping={name: value})  # type: ignore[misc]
    broken.append("ab" * 16)
    await redis.rpush(keys.run(broken[-1]), "a list")  # type: ignore[misc]
    broken.append(await queued(scripts))
    await redis.hset(keys.run(broken[-1]), "enqueues", "many")  # type: ignore[misc]
    lease, waiting = await expired(redis, scripts), await queued(scripts)
    await redis.zadd(keys.LEASES, {lease.request_id: 9, waiting: 9} | dict.fromkeys(broken, 1))
    await worker.reaper.reap()
    assert await field(redis, lease.request_id, "status") == "queued"
    assert await holds(redis, waiting, 1, 1)
    named = {record.__dict__.get("request_id") for record in caplog.records if record.levelno == logging.ERROR}
    assert {broken[0], broken[1], broken[2]} <= named
    assert lease.request_id not in named
    await worker.look()
    assert (await indexed(redis)).keys() >= {lease.request_id, waiting}


async def test_what_other_reapers_have_dealt_with_is_forgotten(
    redis: Redis, scripts: Scripts, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """P14: none of what it remembers of a run outlives the run for long."""
    worker = await start()
    for _ in range(10):
        request_id = await queued(scripts, cancel_if_unwatched=60)
        await index(redis, request_id, f"{_:032x}")
    await worker.look()
    await redis.delete(keys.LEASES)
    reaper = worker.reaper
    assert (len(reaper._watches), len(reaper._ended)) == (10, 10)
    monkeypatch.setattr(reaper_module, "STALE_SECONDS", 0.1)
    await asyncio.sleep(0.15)
    await worker.reaper.reap()
    assert (reaper._watches, reaper._ended) == ({}, {})
