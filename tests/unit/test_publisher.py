"""Group commit on a real Redis: what is put is in the log once and in order, whatever happens to the connection."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator

import pytest
from redis.asyncio import Redis

from broker.events import Entry, dumps
from broker.ids import EventId
from broker.runs import keys, log
from broker.runs.connections import connect
from broker.runs.primaries import Primaries
from broker.runs.scripts import MAX_BATCH_BYTES, MAX_BATCH_ENTRIES, Lease, Scripts
from tests.kit.checker import check_log
from tests.kit.proxy import Proxy, calls
from tests.kit.redis_server import RedisServer
from tests.kit.runs import Ears, cancel, channels, now_ms, running, texts, words
from tests.kit.scale import scaled
from worker.publisher import BUFFER_ENTRIES, Limits, Publisher, Stopped

LIMITS = Limits(lease_ms=15_000, retention_ms=60_000)


class Writing:
    """A publisher of a run that is under way, over a connection of its own."""

    def __init__(self, redis: Redis, through: Redis, lease: Lease, limits: Limits) -> None:
        self.redis = redis
        self.lease = lease
        self.publisher = Publisher(Scripts(through), lease, limits, Primaries(redis, redis))
        self.running = asyncio.create_task(self.publisher.run())

    @property
    def request_id(self) -> str:
        return self.lease.request_id

    async def put(self, *texts: str) -> list[EventId]:
        return [await self.publisher.put(*entry) for entry in words(*texts)]

    async def finish(self, seconds: float = 20) -> list[Entry]:
        """The log, once all is in it."""
        async with asyncio.timeout(seconds):
            await self.publisher.finish()
        return await log.read_all(self.redis, self.request_id)

    async def stored(self, name: str) -> str:
        value = await self.redis.hget(keys.run(self.request_id), name)  # type: ignore[misc]
        return (value or b"").decode()


@pytest.fixture
def proxy(redis_server: RedisServer) -> Iterator[Proxy]:
    with Proxy(redis_server.port) as proxy:
        yield proxy


@pytest.fixture
def limits() -> Limits:
    return LIMITS


@pytest.fixture
async def writing(redis: Redis, proxy: Proxy, limits: Limits) -> AsyncIterator[Writing]:
    through = connect(proxy.url, connections=2)
    made = Writing(redis, through, await running(Scripts(redis)), limits)
    yield made
    made.running.cancel()
    await asyncio.gather(made.running, return_exceptions=True)
    await through.aclose(close_connection_pool=True)


async def test_what_is_put_is_in_the_log_under_the_ids_that_were_told(writing: Writing) -> None:
    ids = await writing.put("a", "b")
    await writing.finish()
    ids += await writing.put("c")
    entries = await writing.finish()
    check_log(entries, finished=False)
    assert [entry.id for entry in entries[2:]] == ids
    assert texts(entries) == ["a", "b", "c"]


async def test_what_is_put_while_an_append_is_under_way_goes_out_with_the_next(
    writing: Writing, proxy: Proxy, redis_server: RedisServer
) -> None:
    await writing.put("warm")
    await writing.finish()
    proxy.delay(0.1)
    with Ears(redis_server.url, *channels(writing.request_id)) as ears:
        for n in range(100):
            await writing.put(f"{n}")
            await asyncio.sleep(0.001)
        await writing.finish()
        batches = [len(message.entries) for message in ears.appended() if message]
    assert sum(batches) == 100
    assert len(batches) < 20


async def test_events_are_never_merged_or_split(writing: Writing) -> None:
    put = ["", "a", "", "b" * 60_000, "", "c\nd", "é\u2028\ud800"] * 20
    await writing.put(*put)
    entries = await writing.finish()
    check_log(entries, finished=False)
    assert texts(entries) == put


async def test_a_batch_is_bounded_in_entries_and_in_bytes(
    writing: Writing, proxy: Proxy, redis_server: RedisServer
) -> None:
    proxy.pause()
    await writing.put(*["x"] * 900)
    with Ears(redis_server.url, *channels(writing.request_id)) as ears:
        proxy.resume()
        await writing.finish()
        proxy.pause()
        await writing.put(*["y" * 60_000] * 12)
        proxy.resume()
        await writing.finish()
        messages = [message for message in ears.appended() if message]
    assert max(len(message.entries) for message in messages) == MAX_BATCH_ENTRIES
    sizes = [sum(len(entry.data) for entry in message.entries) for message in messages]
    assert max(sizes) <= MAX_BATCH_BYTES
    assert max(sizes) > MAX_BATCH_BYTES // 2


@pytest.mark.parametrize(("size", "most"), [(1, BUFFER_ENTRIES), (60_000, 18)])
async def test_an_agent_that_outruns_redis_waits(writing: Writing, proxy: Proxy, size: int, most: int) -> None:
    proxy.pause()
    taken = 0

    async def put() -> None:
        nonlocal taken
        for _ in range(most * 3):
            await writing.put("x" * size)
            taken += 1

    putting = asyncio.create_task(put())
    await asyncio.sleep(0.3)
    assert most // 2 <= taken <= most
    proxy.resume()
    async with asyncio.timeout(20):
        await putting
    entries = await writing.finish()
    check_log(entries, finished=False)
    assert len(texts(entries)) == most * 3


@pytest.mark.parametrize("before", [False, True])
async def test_every_third_reply_that_is_lost_changes_nothing_in_the_log(
    writing: Writing, proxy: Proxy, before: bool
) -> None:
    """P4, without a worker process: replies lost, or the batches themselves."""
    proxy.swallow(calls("append"), every=3, before=before)
    put = [f"{n} " for n in range(scaled(300))]
    for text in put:
        await writing.put(text)
        await writing.finish()
    entries = await writing.finish()
    check_log(entries, finished=False)
    assert texts(entries) == put
    assert proxy.swallowed >= len(put) // 3


async def test_while_redis_is_away_it_keeps_what_it_has_and_goes_on_afterwards(writing: Writing, proxy: Proxy) -> None:
    await writing.put("before ")
    await writing.finish()
    proxy.refuse()
    ids = await writing.put(*(f"{n} " for n in range(50)))
    await asyncio.sleep(0.5)
    assert writing.publisher.stopped is None
    proxy.accept()
    entries = await writing.finish()
    check_log(entries, finished=False)
    assert [entry.id for entry in entries[3:]] == ids


async def test_memory_that_is_full_is_an_outage_and_not_the_end(redis: Redis, writing: Writing) -> None:
    await redis.config_set("maxmemory", "1")
    try:
        await writing.put("a")
        await asyncio.sleep(0.3)
        assert writing.publisher.stopped is None
        assert not writing.running.done()
    finally:
        await redis.config_set("maxmemory", "0")
    assert texts(await writing.finish()) == ["a"]


@pytest.mark.parametrize("limits", [Limits(lease_ms=300, retention_ms=60_000)])
async def test_an_idle_run_is_renewed_in_a_third_of_its_lease(redis: Redis, writing: Writing) -> None:
    deadlines = set()
    for _ in range(60):
        deadlines.add(int(await writing.stored("deadline")))
        await asyncio.sleep(0.01)
    assert len(deadlines) >= 3
    assert max(deadlines) > now_ms() - 5_000
    assert len(await writing.finish()) == 2, "a renewal writes nothing"


@pytest.mark.parametrize("limits", [Limits(lease_ms=300, retention_ms=60_000)])
async def test_a_run_that_was_closed_by_somebody_else_is_noticed_at_the_next_renewal(
    redis: Redis, writing: Writing
) -> None:
    await cancel(Scripts(redis), writing.request_id)
    async with asyncio.timeout(5):
        await writing.running
    assert writing.publisher.stopped is not None
    assert writing.publisher.stopped.reply.status == "cancelled"
    with pytest.raises(Stopped):
        await writing.put("too late")
    with pytest.raises(Stopped):
        await writing.publisher.finish()


async def test_whoever_waits_for_room_or_for_the_end_is_told_that_the_run_is_closed(
    redis: Redis, writing: Writing, proxy: Proxy
) -> None:
    proxy.pause()
    putting = asyncio.create_task(writing.put(*["x"] * (BUFFER_ENTRIES * 2)))
    finishing = asyncio.create_task(writing.publisher.finish())
    await asyncio.sleep(0.1)
    await cancel(Scripts(redis), writing.request_id)
    before = await log.read_all(redis, writing.request_id)
    proxy.resume()
    async with asyncio.timeout(10):
        for waiting in (putting, finishing):
            with pytest.raises(Stopped):
                await waiting
    assert await log.read_all(redis, writing.request_id) == before


async def test_a_checkpoint_covers_what_was_put_before_it(writing: Writing) -> None:
    ids = await writing.put("a", "b")
    await writing.publisher.checkpoint(dumps({"n": 2}))
    await writing.put("c")
    await writing.finish()
    assert await writing.stored("checkpoint_id") == str(ids[-1])
    assert await writing.stored("checkpoint") == '{"n":2}'


async def test_of_several_checkpoints_the_last_one_stands(writing: Writing, proxy: Proxy) -> None:
    """PROTOCOL 5.7: also within one batch, and over batches."""
    proxy.pause()
    ids = []
    for n in range(600):
        ids += await writing.put(f"{n}")
        await writing.publisher.checkpoint(dumps({"n": n}))
    proxy.resume()
    await writing.finish()
    assert await writing.stored("checkpoint_id") == str(ids[-1])
    assert await writing.stored("checkpoint") == '{"n":599}'


async def test_a_checkpoint_after_everything_is_written_still_goes_out(writing: Writing) -> None:
    ids = await writing.put("a")
    await writing.finish()
    await writing.publisher.checkpoint(dumps([1, 2]))
    await writing.finish()
    assert await writing.stored("checkpoint_id") == str(ids[-1])
    assert await writing.stored("checkpoint") == "[1,2]"


async def test_a_checkpoint_never_covers_what_is_not_in_the_log(writing: Writing, proxy: Proxy) -> None:
    """Whatever the moment at which Redis is looked at: its checkpoint's id is at or below the log's end."""
    proxy.delay(0.005)

    async def produce() -> None:
        for n in range(60):
            await writing.put(*[f"{n}"] * 10)
            await writing.publisher.checkpoint(dumps(n))
            await asyncio.sleep(0)

    producing = asyncio.create_task(produce())
    while not producing.done():
        end, checkpoint_id = await writing.stored("end"), await writing.stored("checkpoint_id")
        assert not checkpoint_id or EventId.parse(checkpoint_id) <= EventId.parse(await writing.stored("end")), end
        await asyncio.sleep(0.002)
    await writing.finish()
    assert await writing.stored("checkpoint") == "59"
