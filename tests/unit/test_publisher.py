"""Group commit on a real Redis: what is put is in the log once and in order, whatever happens to the connection."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Iterator

import pytest
from redis.asyncio import Redis

from broker.events import Entry, dumps
from broker.ids import EventId
from broker.runs import keys, log, primaries
from broker.runs.connections import connect
from broker.runs.primaries import Primaries
from broker.runs.scripts import MAX_BATCH_BYTES, MAX_BATCH_ENTRIES, Answer, Lease, Scripts
from tests.kit.checker import check_log
from tests.kit.proxy import Proxy, calls
from tests.kit.redis_server import RedisServer
from tests.kit.runs import Ears, cancel, channels, claim, lose_worker, now_ms, roll_back, running, texts, words
from tests.kit.scale import scaled
from worker import publisher as publisher_module
from worker.publisher import BUFFER_ENTRIES, TAIL_BYTES, Limits, Publisher, Stopped

LIMITS = Limits(lease_ms=15_000, retention_ms=60_000)


class Writing:
    """A publisher of a run that is under way, over a connection of its own."""

    def __init__(self, redis: Redis, through: Redis, lease: Lease, limits: Limits) -> None:
        self.redis = redis
        self.lease = lease
        self.primaries = Primaries(redis, redis)
        self.publisher = Publisher(Scripts(through), lease, limits, self.primaries)
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

    async def fail_over(self, to: EventId, **fields: str) -> None:
        """Redis forgets what came after `to`, and the worker notices that it is another one."""
        await roll_back(self.redis, self.request_id, to, **fields)
        self.publisher.renew()

    async def settled(self) -> list[Entry]:
        """The log, once something more is in it."""
        await self.put("more")
        return await self.finish()

    async def stopped(self) -> Stopped:
        async with asyncio.timeout(10):
            await self.running
        assert self.publisher.stopped is not None
        return self.publisher.stopped

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


# -- repair: what a failover took is appended again (PROTOCOL 2, 4.5) ---------------------------------------------


@pytest.mark.parametrize("kept", [1, 2, 5, 17, 39])
async def test_what_was_lost_is_appended_again_under_the_same_ids(writing: Writing, kept: int) -> None:
    """Whole batches, and the rest of one that was lost in part."""
    for n in range(0, 38, 6):
        await writing.put(*(f"{k} " for k in range(n, n + 6)))
        await writing.finish()
    before = await writing.finish()
    await writing.fail_over(EventId(writing.lease.epoch, kept))
    after = await writing.settled()
    assert after[:-1] == before
    check_log(after, finished=False)
    assert writing.publisher.repairs == 1
    assert await writing.stored("events") == str(len(after))
    assert await writing.stored("end") == str(after[-1].id)


async def test_an_idle_run_is_mended_without_anything_new_to_write(writing: Writing) -> None:
    await writing.put("a", "b")
    before = await writing.finish()
    await writing.fail_over(EventId(writing.lease.epoch, 1))
    async with asyncio.timeout(10):
        while await log.read_all(writing.redis, writing.request_id) != before:
            await asyncio.sleep(0.01)


async def test_a_claim_that_was_lost_is_made_good_by_its_owner(writing: Writing) -> None:
    """PROTOCOL 1.3: an append whose epoch is above the record's takes the record over."""
    await writing.put("a", "b")
    before = await writing.finish()
    await writing.fail_over(EventId(0, 1), status="queued", epoch="0", token="", attempt="0", rewinds="")
    after = await writing.settled()
    assert after[:-1] == before
    check_log(after, finished=False)
    record = [await writing.stored(name) for name in ("status", "epoch", "token", "attempt")]
    assert record == ["running", str(writing.lease.epoch), writing.lease.token, "1"]
    assert (await writing.stored("rewinds")).split() == [f"{writing.lease.epoch}-1:0-1"]


async def test_what_the_agent_yields_meanwhile_follows_what_is_mended(writing: Writing, proxy: Proxy) -> None:
    await writing.put("a", "b", "c")
    before = await writing.finish()
    proxy.pause()
    ids = await writing.put(*(f"{n} " for n in range(600)))
    await roll_back(writing.redis, writing.request_id, EventId(writing.lease.epoch, 2))
    proxy.resume()
    after = await writing.finish()
    check_log(after, finished=False)
    assert after[: len(before)] == before
    assert [entry.id for entry in after[len(before) :]] == ids


async def test_the_last_checkpoint_is_stored_again_with_what_it_covers(writing: Writing) -> None:
    for n in range(3):
        await writing.put(f"{n}")
        await writing.publisher.checkpoint(dumps({"n": n}))
        await writing.finish()
    covered = await writing.stored("checkpoint_id")
    to = EventId(writing.lease.epoch, 2)
    await writing.fail_over(to, checkpoint_id=str(to), checkpoint='{"n":0}')
    await writing.settled()
    assert (await writing.stored("checkpoint_id"), await writing.stored("checkpoint")) == (covered, '{"n":2}')


async def test_a_checkpoint_that_alone_was_lost_is_stored_again(writing: Writing) -> None:
    """It came after its events, in an append of its own: the log's end does not tell that it is gone."""
    [covered] = await writing.put("a")
    await writing.finish()
    await writing.publisher.checkpoint('{"n":1}')
    await writing.finish()
    await writing.redis.hdel(keys.run(writing.request_id), "checkpoint_id", "checkpoint")  # type: ignore[misc]
    writing.publisher.renew()
    await writing.settled()
    assert (await writing.stored("checkpoint_id"), await writing.stored("checkpoint")) == (str(covered), '{"n":1}')


async def test_a_newer_checkpoint_is_never_replaced_by_the_one_that_is_stored_again(
    writing: Writing, proxy: Proxy
) -> None:
    await writing.put("a")
    await writing.publisher.checkpoint("1")
    await writing.finish()
    proxy.pause()
    await writing.put("b")
    await writing.publisher.checkpoint("2")
    for _ in range(3):
        writing.publisher.renew()
    proxy.resume()
    await writing.finish()
    writing.publisher.renew()
    await writing.settled()
    assert await writing.stored("checkpoint") == "2"


async def test_a_loss_of_more_than_is_kept_ends_the_attempt(writing: Writing, monkeypatch: pytest.MonkeyPatch) -> None:
    """LOST: the run is to be handed over."""
    monkeypatch.setattr(publisher_module, "TAIL_BYTES", 1000)
    for n in range(20):
        await writing.put(f"{n} " + "x" * 100)
        await writing.finish()
    await writing.fail_over(EventId(writing.lease.epoch, 3))
    assert (await writing.stopped()).reply.answer is Answer.LOST
    with pytest.raises(Stopped):
        await writing.put("too late")
    entries = await log.read_all(writing.redis, writing.request_id)
    assert len(entries) == 4, "nothing of it is written"


async def test_what_is_kept_is_bounded(writing: Writing) -> None:
    for _ in range(40):
        await writing.put("x" * 60_000)
        await writing.finish()
    assert TAIL_BYTES // 2 < writing.publisher.tail().size <= TAIL_BYTES + 100 * 50
    before = await writing.finish()
    await writing.fail_over(EventId(writing.lease.epoch, 35))
    assert (await writing.settled())[:-1] == before


async def test_what_no_failover_can_take_is_forgotten(writing: Writing, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(primaries, "TAIL_SECONDS", 0.1)
    await writing.put("a", "b")
    await writing.finish()
    assert len(writing.publisher.tail().entries) == 3
    await asyncio.sleep(0.2)
    await writing.primaries.look()
    await writing.put("c")
    await writing.finish()
    tail = writing.publisher.tail()
    assert (tail.first, len(tail.entries)) == (4, 1)


async def test_a_run_that_another_worker_has_taken_since_is_not_mended(redis: Redis, writing: Writing) -> None:
    await writing.put("a", "b")
    await writing.finish()
    await roll_back(redis, writing.request_id, EventId(writing.lease.epoch, 2))
    scripts = Scripts(redis)
    other = await claim(scripts, writing.request_id, await lose_worker(redis, scripts, writing.request_id))
    before = await log.read_all(redis, writing.request_id)
    writing.publisher.renew()
    assert (await writing.stopped()).reply.answer is Answer.FENCED
    assert await log.read_all(redis, writing.request_id) == before
    assert before[-1].id == EventId(other.epoch, 1)


async def test_a_run_that_was_lost_with_its_record_is_not_made_up_again(redis: Redis, writing: Writing) -> None:
    await writing.put("a")
    await writing.finish()
    await redis.delete(keys.run(writing.request_id), keys.log(writing.request_id))
    writing.publisher.renew()
    assert (await writing.stopped()).reply.answer is Answer.GONE
    assert await redis.exists(keys.run(writing.request_id), keys.log(writing.request_id)) == 0


async def test_whatever_is_taken_whenever_the_log_is_in_the_end_what_was_put(writing: Writing, proxy: Proxy) -> None:
    """Twenty failovers while the agent writes, each to any of the places that are kept."""
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    put: list[str] = []
    for _ in range(scaled(200)):
        for _ in range(chance.randint(0, 5)):
            batch = [f"{len(put) + k} " for k in range(chance.choice((1, 3, 40, 300)))]
            put += batch
            await writing.put(*batch)
            if chance.random() < 0.3:
                await writing.publisher.checkpoint(dumps(len(put)))
            await asyncio.sleep(chance.choice((0, 0.001, 0.005)))
        proxy.pause()
        end = EventId.parse(await writing.stored("end"))
        to = EventId(writing.lease.epoch, chance.randint(1, end.seq))
        covered = await writing.stored("checkpoint_id")
        await roll_back(writing.redis, writing.request_id, to)
        if covered and EventId.parse(covered) > to:
            await writing.redis.hdel(keys.run(writing.request_id), "checkpoint_id", "checkpoint")  # type: ignore[misc]
        writing.publisher.renew()
        proxy.resume()
    put += ["the last"]
    await writing.put("the last")  # a publisher that has nothing to write does not yet know what was lost
    entries = await writing.finish()
    check_log(entries, finished=False)
    assert texts(entries) == put
    await writing.publisher.checkpoint(dumps("last"))
    await writing.settled()
    assert await writing.stored("checkpoint") == '"last"'
    print(f"{writing.publisher.repairs} repairs")
    assert writing.publisher.repairs > scaled(200) // 3
