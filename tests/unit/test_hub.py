"""Fan-out on a real Redis: what each client of a gateway gets, whatever happens to the messages on the way."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

import pytest
from redis.asyncio import Redis

from broker.errors import RunNotFound, Unavailable
from broker.gateway.reader import End
from broker.ids import START, EventId
from broker.runs import keys, log
from broker.runs.scripts import Lease, Scripts
from tests.kit import sse
from tests.kit.checker import check_log, check_reader
from tests.kit.hub import Gateway, Stream, append_silently, hub_of
from tests.kit.proxy import Proxy
from tests.kit.redis_server import RedisServer
from tests.kit.runs import FINAL, RETENTION_MS, append, cancel, claim, queued, roll_back, running, words
from tests.kit.scale import scaled
from tests.kit.waiting import until

HEARTBEAT = 0.2


@pytest.fixture
def scripts(redis: Redis) -> Scripts:
    return Scripts(redis)


@pytest.fixture
def proxy(redis_server: RedisServer) -> Iterator[Proxy]:
    with Proxy(redis_server.port) as proxy:
        yield proxy


@pytest.fixture
def heartbeat() -> float:
    return HEARTBEAT


@pytest.fixture
async def gateway(redis: Redis, proxy: Proxy, heartbeat: float) -> AsyncIterator[Gateway]:
    """Reaches Redis through the proxy; the tests, directly."""
    async with hub_of(redis, proxy.url, heartbeat_seconds=heartbeat) as gateway:
        yield gateway


async def write(
    scripts: Scripts,
    lease: Lease,
    count: int,
    *,
    pause: float = 0.0,
    before: Callable[[int], Awaitable[None]] | None = None,
) -> None:
    """`count` tokens one by one, then the end."""
    for n in range(count):
        if before is not None:
            await before(n)
        await append(scripts, lease, n + 2, *words(f"{n} "))
        await asyncio.sleep(pause)
    await append(scripts, lease, count + 2, FINAL)


async def check_whole(redis: Redis, stream: Stream, request_id: str, after: EventId = START) -> None:
    assert await stream.end() is End.FINISHED
    entries = await log.read_all(redis, request_id)
    check_log(entries)
    check_reader(stream.entries(), [entry for entry in entries if entry.id > after])


# -- the ordinary way ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunked", [True, False])
async def test_a_reader_gets_the_log_whole_and_its_stream_ends(
    redis: Redis, scripts: Scripts, gateway: Gateway, chunked: bool
) -> None:
    lease = await running(scripts)
    stream = await gateway.watch(lease.request_id, chunked=chunked)
    await write(scripts, lease, 50)
    await check_whole(redis, stream, lease.request_id)


async def test_nothing_is_written_to_a_client_that_is_gone(scripts: Scripts, gateway: Gateway) -> None:
    """uvloop raises for a closed connection, and the other clients' heartbeats would be lost with it."""
    lease = await running(scripts)
    gone, other = [await gateway.watch(lease.request_id) for _ in range(2)]
    await until(lambda: len(gone.entries()) == len(other.entries()) == 2)
    before = bytes(gone.connection.body)
    gone.connection.leave()
    gone.reader.view.beat("heartbeat of the sweep that is under way")
    assert bytes(gone.connection.body) == before
    assert "heartbeat of the sweep that is under way" in other.connection.comments()


async def test_readers_that_join_mid_stream_at_every_offset_miss_and_double_nothing(
    redis: Redis, scripts: Scripts, gateway: Gateway
) -> None:
    lease = await running(scripts)
    request_id = lease.request_id
    writing = asyncio.create_task(write(scripts, lease, 150, pause=0.002))
    offsets = [START, EventId(0, 1), *(EventId(lease.epoch, seq) for seq in range(1, 120))]
    streams = []
    for offset in offsets:
        async with asyncio.timeout(10):
            while (await gateway.head(request_id)).end < offset:
                await asyncio.sleep(0.001)
        streams.append((offset, await gateway.watch(request_id, offset)))
    await writing
    for offset, stream in streams:
        await check_whole(redis, stream, request_id, offset)


async def test_what_is_appended_while_the_run_is_being_read_is_not_lost(
    redis: Redis, scripts: Scripts, gateway: Gateway, proxy: Proxy
) -> None:
    """Subscribe first, then read: on a slow link there is time for many appends in between."""
    proxy.delay(0.03)
    for _ in range(5):
        lease = await running(scripts)
        head = await gateway.head(lease.request_id)
        writing = asyncio.create_task(write(scripts, lease, 60, pause=0.001))
        stream = await gateway.watch(lease.request_id, head=head)
        await writing
        await check_whole(redis, stream, lease.request_id)


async def test_a_finished_run_is_replayed_without_a_subscription(
    redis: Redis, scripts: Scripts, gateway: Gateway
) -> None:
    lease = await running(scripts)
    await write(scripts, lease, 20)
    stream = await gateway.watch(lease.request_id, EventId(lease.epoch, 5))
    await check_whole(redis, stream, lease.request_id, EventId(lease.epoch, 5))
    assert await redis.pubsub_channels() == []


async def test_both_id_forms_share_one_subscription(redis: Redis, scripts: Scripts, gateway: Gateway) -> None:
    lease = await running(scripts)
    short, long = [await gateway.watch(lease.request_id, long_ids=long_ids) for long_ids in (False, True)]
    assert await redis.pubsub_numsub(keys.channel(lease.request_id)) == [(keys.channel(lease.request_id).encode(), 1)]
    await write(scripts, lease, 10)
    for stream in (short, long):
        await check_whole(redis, stream, lease.request_id)
    assert f"id: {lease.request_id}/{lease.epoch}-3\n".encode() in long.connection.body
    assert f"id: {lease.epoch}-3\n".encode() in short.connection.body


async def test_one_append_is_one_write_to_a_reader(scripts: Scripts, gateway: Gateway) -> None:
    lease = await running(scripts)
    stream = await gateway.watch(lease.request_id, (await gateway.head(lease.request_id)).end)
    await asyncio.sleep(0.05)
    before = stream.connection.writes
    await append(scripts, lease, 2, *words(*"abcdefghij"))
    await until(lambda: len(stream.entries()) == 10)
    beats = len(stream.connection.comments())
    assert stream.connection.writes - before <= 1 + beats


async def test_a_cancel_ends_the_stream(redis: Redis, scripts: Scripts, gateway: Gateway) -> None:
    request_id = await queued(scripts)
    stream = await gateway.watch(request_id)
    await cancel(scripts, request_id)
    await check_whole(redis, stream, request_id)
    assert [entry.type for entry in stream.entries()] == ["start", "attempt", "cancelled"]


# -- messages that do not come -------------------------------------------------------------------------------


async def test_a_message_that_was_lost_is_found_by_the_next_one(
    redis: Redis, scripts: Scripts, gateway: Gateway
) -> None:
    """PROTOCOL 6.1: `prev` is above the end that is known."""
    lease = await running(scripts)
    streams = [await gateway.watch(lease.request_id, chunked=chunked) for chunked in (True, False)]
    await append(scripts, lease, 2, *words("a"))
    for round_ in range(5):
        first = 3 + 3 * round_
        await append_silently(redis, lease, first, *words("silent", "silent too"))
        await append(scripts, lease, first + 2, *words("loud"))
    await append(scripts, lease, 18, FINAL)
    for stream in streams:
        await check_whole(redis, stream, lease.request_id)


async def test_a_last_message_that_was_lost_is_found_at_the_next_heartbeat(
    redis: Redis, scripts: Scripts, gateway: Gateway
) -> None:
    """PROTOCOL 6.2."""
    lease = await running(scripts)
    stream = await gateway.watch(lease.request_id)
    await append_silently(redis, lease, 2, *words("silent"), FINAL)
    await redis.hset(keys.run(lease.request_id), "status", "completed")  # type: ignore[misc]
    await check_whole(redis, stream, lease.request_id)


async def test_an_erasure_whose_message_was_lost_is_found_at_the_next_heartbeat(
    redis: Redis, scripts: Scripts, gateway: Gateway
) -> None:
    lease = await running(scripts)
    stream = await gateway.watch(lease.request_id)
    await redis.delete(keys.run(lease.request_id), keys.log(lease.request_id))
    assert await stream.end() is End.FINISHED
    events = sse.parse(stream.connection.data())
    assert (events[-1].type, events[-1].json["code"]) == ("error", "gone")


async def test_when_the_pubsub_connection_is_killed_under_load_nothing_is_lost(
    redis: Redis, scripts: Scripts, gateway: Gateway
) -> None:
    leases = [await running(scripts) for _ in range(5)]
    streams = [(lease, await gateway.watch(lease.request_id)) for lease in leases for _ in range(4)]

    async def kill(n: int) -> None:
        if n % 40 == 20:
            await redis.client_kill_filter(_type="pubsub")

    await asyncio.gather(
        *(write(scripts, lease, 120, pause=0.003, before=kill if lease is leases[0] else None) for lease in leases)
    )
    for lease, stream in streams:
        await check_whole(redis, stream, lease.request_id)


@pytest.mark.parametrize("heartbeat", [60.0])
async def test_what_was_missed_while_the_connection_was_lost_comes_as_soon_as_it_is_back(
    redis: Redis, scripts: Scripts, gateway: Gateway, proxy: Proxy
) -> None:
    """Neither a later message nor a heartbeat has to tell."""
    lease = await running(scripts)
    streams = [await gateway.watch(lease.request_id) for _ in range(3)]
    for n in range(3):
        await until(lambda n=n: len(streams[0].entries()) == 2 + n)  # type: ignore[misc]
        proxy.refuse()
        await until(lambda: not gateway.hub.connected)
        await append(scripts, lease, 2 + n, *words("missed"))
        proxy.accept()
    await until(lambda: all(len(stream.entries()) == 5 for stream in streams))
    await append(scripts, lease, 5, FINAL)
    for stream in streams:
        await check_whole(redis, stream, lease.request_id)


async def test_when_every_connection_is_reset_under_load_nothing_is_lost(
    redis: Redis, scripts: Scripts, gateway: Gateway, proxy: Proxy
) -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    lease = await running(scripts)
    request_id = lease.request_id

    async def reset(n: int) -> None:
        if chance.random() < 0.05:
            await asyncio.to_thread(proxy.reset)

    streams = [await gateway.watch(request_id) for _ in range(5)]
    await write(scripts, lease, 120, pause=0.003, before=reset)
    for stream in streams:
        await check_whole(redis, stream, request_id)


@pytest.mark.parametrize("heartbeat", [60.0])
async def test_a_page_that_is_read_while_the_run_is_found_rolled_back_ends_no_stream(
    redis: Redis, scripts: Scripts, gateway: Gateway, proxy: Proxy, redis_server: RedisServer
) -> None:
    """The page is empty, and by then the channel knows why. What is repaired afterwards is read."""
    lease = await running(scripts)
    await append(scripts, lease, 2, *words(*"abcdefgh"))
    first = await gateway.watch(lease.request_id)
    await until(lambda: len(first.entries()) == 10)
    position, channel = EventId(lease.epoch, 5), first.reader.view.channel
    lost = [entry for entry in await log.read_all(redis, lease.request_id) if entry.id > position]
    await roll_back(redis, lease.request_id, position)
    proxy.delay(0.3)
    redis_server.drop_clients("pubsub")
    await until(lambda: channel.reading is not None)
    await asyncio.sleep(0.4)  # a read of the run is of two commands, a read of the log of one: that shall end later
    second = await gateway.watch(lease.request_id, position)
    await until(lambda: channel.end == position)
    await asyncio.sleep(1.5)  # the page's read may need a connection, whose greetings are held as well
    proxy.heal()
    assert not second.following.done()
    await append(scripts, lease, 6, *[(entry.type, entry.data) for entry in lost])
    await append(scripts, lease, 6 + len(lost), FINAL)
    await check_whole(redis, first, lease.request_id)
    await check_whole(redis, second, lease.request_id, position)


# -- messages that nobody understands ------------------------------------------------------------------------


STRANGE = [
    b"2 5-1\n5-2 token {}",
    b"",
    b"1",
    b"1 5-1",
    b"1 nonsense\n5-2 token {}",
    b"1 5-1\n5-2",
    b"1 5-1\nx-y token {}",
    b"\xff\xfe",
    b"1 5-1\n\xff",
]


@pytest.mark.parametrize("payload", STRANGE)
async def test_a_strange_message_is_logged_and_harms_no_stream(
    redis: Redis, scripts: Scripts, gateway: Gateway, caplog: pytest.LogCaptureFixture, payload: bytes
) -> None:
    """In a rolling upgrade the first writer of a new version must not cut the old gateways off."""
    lease = await running(scripts)
    stream = await gateway.watch(lease.request_id)
    other = await running(scripts)
    unaffected = await gateway.watch(other.request_id)
    await append(scripts, lease, 2, *words("a"))
    await until(lambda: len(stream.entries()) == 3)
    [before] = [client["id"] for client in await redis.client_list(_type="pubsub")]
    with caplog.at_level(logging.WARNING):
        async with redis.pipeline(transaction=True) as pipe:  # the messages around it come in the same read
            pipe.publish(keys.channel(lease.request_id), payload)
            pipe.publish(keys.channel(lease.request_id), payload)
            await pipe.execute()
        await until(lambda: bool(caplog.records))
    assert lease.request_id in [getattr(record, "request_id", "") for record in caplog.records]
    await write(scripts, other, 10)
    await check_whole(redis, unaffected, other.request_id)
    await append_silently(redis, lease, 3, *words("of the new version"))
    await redis.publish(keys.channel(lease.request_id), payload)
    await until(lambda: len(stream.entries()) == 4)
    [after] = [client["id"] for client in await redis.client_list(_type="pubsub")]
    assert after == before, "the connection was lost"
    await append(scripts, lease, 4, FINAL)
    await check_whole(redis, stream, lease.request_id)


@pytest.mark.parametrize("heartbeat", [60.0])
async def test_a_strange_message_that_comes_while_the_run_is_read_has_it_read_once_more(
    redis: Redis, scripts: Scripts, gateway: Gateway, proxy: Proxy
) -> None:
    """The read that is under way may be older than what the message told."""
    lease = await running(scripts)
    stream = await gateway.watch(lease.request_id)
    await until(lambda: len(stream.entries()) == 2)
    proxy.delay(0.1)
    await redis.publish(keys.channel(lease.request_id), b"2 what?")
    await asyncio.sleep(0.05)
    await append_silently(redis, lease, 2, *words("a"))
    await redis.publish(keys.channel(lease.request_id), b"2 what?")
    await until(lambda: len(stream.entries()) == 3)


async def reads(redis: Redis, command: str) -> int:
    stats = await redis.info("commandstats")
    return int(stats.get(f"cmdstat_{command}", {}).get("calls", 0))


@pytest.mark.parametrize("prev", ["999999999-1", "0-1"])
async def test_a_message_of_a_log_that_a_failover_took_is_not_read_after_for_ever(
    redis: Redis, scripts: Scripts, gateway: Gateway, prev: str
) -> None:
    lease = await running(scripts)
    stream = await gateway.watch(lease.request_id)
    await until(lambda: len(stream.entries()) == 2)
    before = await reads(redis, "hmget")
    message = f"1 {prev}\n999999999-2 token {{}}".encode()
    async with redis.pipeline(transaction=True) as pipe:  # in one read: the second comes while the first is looked into
        pipe.publish(keys.channel(lease.request_id), message)
        pipe.publish(keys.channel(lease.request_id), message)
        await pipe.execute()
    await asyncio.sleep(HEARTBEAT)
    assert await reads(redis, "hmget") - before < 20
    await write(scripts, lease, 5)
    await check_whole(redis, stream, lease.request_id)


# -- readers that do not keep up -----------------------------------------------------------------------------


@pytest.mark.parametrize("chunked", [True, False])
async def test_a_reader_that_falls_behind_the_ring_reads_pages_and_catches_up(
    redis: Redis, scripts: Scripts, gateway: Gateway, chunked: bool
) -> None:
    lease = await running(scripts)
    slow = await gateway.watch(lease.request_id, chunked=chunked)
    await until(lambda: len(slow.entries()) == 2)
    slow.connection.stop_reading()
    await asyncio.sleep(0)
    before = await reads(redis, "xrange")
    for batch in range(12):
        await append(scripts, lease, 2 + 100 * batch, *words(*["x" * 100] * 100))
    taken = len(slow.connection.body)
    assert await reads(redis, "xrange") == before
    slow.connection.read_on()
    await until(lambda: len(slow.entries()) == 1202)
    assert taken < len(slow.connection.body)
    assert await reads(redis, "xrange") > before, "the ring cannot have kept all of it"
    await append(scripts, lease, 1202, FINAL)
    await check_whole(redis, slow, lease.request_id)


async def test_a_reader_that_stops_and_goes_on_at_any_byte_gets_everything(
    redis: Redis, scripts: Scripts, gateway: Gateway
) -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    lease = await running(scripts)
    streams = [await gateway.watch(lease.request_id, chunked=n % 2 == 0, room=chance.randrange(500)) for n in range(20)]

    async def tread(stream: Stream) -> None:
        while not stream.following.done():
            await asyncio.sleep(chance.random() * 0.05)
            if stream.connection.paused:
                stream.connection.read_on()
                stream.connection.room = len(stream.connection.body) + chance.randrange(5_000)

    treading = [asyncio.create_task(tread(stream)) for stream in streams]
    for batch in range(scaled(300)):
        await append(scripts, lease, 2 + 20 * batch, *words(*["y" * chance.randrange(200) for _ in range(20)]))
        await asyncio.sleep(0.002)
    await append(scripts, lease, 2 + 20 * scaled(300), FINAL)
    await asyncio.gather(*treading)
    for stream in streams:
        await check_whole(redis, stream, lease.request_id)


async def test_what_one_reader_does_not_read_does_not_hold_up_another(
    redis: Redis, scripts: Scripts, gateway: Gateway
) -> None:
    lease = await running(scripts)
    stuck = await gateway.watch(lease.request_id, room=1)
    fine = await gateway.watch(lease.request_id)
    await write(scripts, lease, 300)
    await check_whole(redis, fine, lease.request_id)
    assert not stuck.following.done()
    assert len(stuck.connection.body) < 10_000


# -- Redis away, rolled back ---------------------------------------------------------------------------------


async def test_while_redis_is_away_streams_beat_and_afterwards_they_go_on(
    redis: Redis, scripts: Scripts, gateway: Gateway, proxy: Proxy
) -> None:
    lease = await running(scripts)
    stream = await gateway.watch(lease.request_id)
    await append(scripts, lease, 2, *words("a"))
    await until(lambda: len(stream.entries()) == 3)
    proxy.refuse()
    await append(scripts, lease, 3, *words("b"))
    beats = len(stream.connection.comments())
    await until(lambda: len(stream.connection.comments()) >= beats + 3)
    assert "lease=unknown" in stream.connection.comments()[-1]
    proxy.accept()
    await until(lambda: len(stream.entries()) == 4)
    await append(scripts, lease, 4, FINAL)
    await check_whole(redis, stream, lease.request_id)


async def test_a_silent_redis_does_not_silence_the_heartbeats(scripts: Scripts, gateway: Gateway, proxy: Proxy) -> None:
    lease = await running(scripts)
    stream = await gateway.watch(lease.request_id)
    await until(lambda: len(stream.entries()) == 2)
    proxy.pause()
    beats = len(stream.connection.comments())
    await until(lambda: len(stream.connection.comments()) >= beats + 3)
    proxy.resume()


async def test_heartbeats_tell_where_the_log_ends_and_what_holds_the_run(
    redis: Redis, scripts: Scripts, gateway: Gateway
) -> None:
    request_id = await queued(scripts)
    stream = await gateway.watch(request_id)
    await until(lambda: stream.connection.comments()[-1:] == ["heartbeat 0-1 queued"])
    lease = await claim(scripts, request_id)
    begins = f"heartbeat {lease.epoch}-1 lease=1"
    await until(lambda: any(text.startswith(begins) and text.endswith("s") for text in stream.connection.comments()))
    await redis.hset(keys.run(request_id), "deadline", "1")  # type: ignore[misc]
    await until(lambda: stream.connection.comments()[-1] == f"heartbeat {lease.epoch}-1 lease=expired")


async def test_a_reader_whose_events_were_rolled_back_waits_for_their_repair(
    redis: Redis, scripts: Scripts, gateway: Gateway
) -> None:
    """PROTOCOL 6.5: the writer appends the same entries again, under the same ids."""
    lease = await running(scripts)
    stream = await gateway.watch(lease.request_id)
    tail = words("a", "b", "c", "d")
    await append(scripts, lease, 2, *tail)
    await until(lambda: len(stream.entries()) == 6)
    await redis.xtrim(keys.log(lease.request_id), maxlen=6)
    for seq in (4, 5):
        await redis.xdel(keys.log(lease.request_id), f"{lease.epoch}-{seq}")
    kept = await log.read_all(redis, lease.request_id)
    await redis.delete(keys.log(lease.request_id))
    for entry in kept:
        await redis.xadd(keys.log(lease.request_id), {"t": entry.type, "d": entry.data}, id=str(entry.id))
    await redis.hset(keys.run(lease.request_id), "end", f"{lease.epoch}-3")  # type: ignore[misc]
    await until(lambda: "waiting for repair" in stream.connection.comments())
    await append(scripts, lease, 2, *tail)
    await append(scripts, lease, 6, *words("e"), FINAL)
    await check_whole(redis, stream, lease.request_id)


# -- ends ----------------------------------------------------------------------------------------------------


async def test_an_erased_run_ends_its_streams_and_opens_no_more(
    redis: Redis, scripts: Scripts, gateway: Gateway
) -> None:
    lease = await running(scripts)
    head = await gateway.head(lease.request_id)
    stuck = await gateway.watch(lease.request_id, room=1)
    stream = await gateway.watch(lease.request_id)
    await until(lambda: len(stream.entries()) == 2)
    await scripts.erase(lease.request_id, tombstone_ms=RETENTION_MS)
    assert await stream.end() is End.FINISHED
    events = sse.parse(stream.connection.data())
    assert [event.type for event in events] == ["start", "attempt", "error"]
    assert (events[-1].json["code"], events[-1].id) == ("gone", str(EventId(lease.epoch, 1)))
    for _ in range(2):
        with pytest.raises(RunNotFound):
            await gateway.watch(lease.request_id, head=head)
    await stuck.leave()
    with pytest.raises(RunNotFound):
        await gateway.watch(lease.request_id, head=head)


async def test_a_stream_is_cut_when_its_time_is_over(scripts: Scripts, gateway: Gateway) -> None:
    lease = await running(scripts)
    stream = await gateway.watch(lease.request_id, seconds=0.2)
    assert await stream.end() is End.CUT


async def test_a_drain_cuts_every_stream_and_frees_who_waits(redis: Redis, scripts: Scripts, gateway: Gateway) -> None:
    lease = await running(scripts)
    streams = [await gateway.watch(lease.request_id), await gateway.watch(lease.request_id, room=1)]
    head = await gateway.head(lease.request_id)
    waiting = asyncio.create_task(gateway.hub.wait_end(lease.request_id, head, 60))
    await asyncio.sleep(0.05)
    gateway.hub.drain()
    for stream in streams:
        assert await stream.end() is End.CUT
    async with asyncio.timeout(5):
        await waiting
    assert await (await gateway.watch(lease.request_id)).end() is End.CUT
    for stream in streams:
        check_reader(stream.entries(), (await log.read_all(redis, lease.request_id))[: len(stream.entries())])


async def test_waiting_for_the_end_returns_when_it_comes(scripts: Scripts, gateway: Gateway) -> None:
    leases = [await running(scripts) for _ in range(3)]
    heads = [await gateway.head(lease.request_id) for lease in leases]
    waiting = [
        asyncio.create_task(gateway.hub.wait_end(lease.request_id, head, 60))
        for lease, head in zip(leases, heads, strict=True)
    ]
    await until(lambda: sum(len(channel.watchers) for channel in gateway.hub._channels.values()) == 3)
    assert not any(task.done() for task in waiting)
    await append(scripts, leases[0], 2, FINAL)
    await cancel(scripts, leases[1].request_id)
    await scripts.erase(leases[2].request_id, tombstone_ms=RETENTION_MS)
    async with asyncio.timeout(5):
        await asyncio.gather(*waiting)
    later = await running(scripts)
    async with asyncio.timeout(5):
        await gateway.hub.wait_end(later.request_id, await gateway.head(later.request_id), 0.1)


# -- what is left behind -------------------------------------------------------------------------------------


async def test_after_the_last_reader_nothing_is_subscribed(redis: Redis, scripts: Scripts, gateway: Gateway) -> None:
    lease = await running(scripts)
    streams = [await gateway.watch(lease.request_id) for _ in range(3)]
    assert len(await redis.pubsub_channels()) == 1
    for stream in streams[:2]:
        await stream.leave()
    await append(scripts, lease, 2, *words("a"))
    await until(lambda: len(streams[2].entries()) == 3)
    await streams[2].leave()
    async with asyncio.timeout(5):
        while await redis.pubsub_channels():
            await asyncio.sleep(0.01)
    assert gateway.hub.readers == 0


async def test_a_reader_that_left_while_redis_was_away_leaves_no_subscription(
    redis: Redis, scripts: Scripts, gateway: Gateway, proxy: Proxy
) -> None:
    watched, left = await running(scripts), await running(scripts)
    stream = await gateway.watch(watched.request_id)
    head = await gateway.head(left.request_id)
    proxy.refuse()
    await until(lambda: not gateway.hub.connected)
    opening = asyncio.create_task(gateway.watch(left.request_id, head=head))
    await asyncio.sleep(0.1)
    opening.cancel()
    await asyncio.gather(opening, return_exceptions=True)
    proxy.accept()
    await append(scripts, watched, 2, *words("a"))
    await until(lambda: len(stream.entries()) == 3)
    assert await redis.pubsub_channels() == [keys.channel(watched.request_id).encode()]


async def test_a_run_that_cannot_be_watched_is_unavailable_and_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, redis: Redis, scripts: Scripts, gateway: Gateway, proxy: Proxy
) -> None:
    monkeypatch.setattr("broker.gateway.hub._OPEN_TIMEOUT", 0.2)
    lease = await running(scripts)
    head = await gateway.head(lease.request_id)
    proxy.pause()
    with pytest.raises(Unavailable):
        await gateway.watch(lease.request_id, head=head)
    proxy.resume()
    assert gateway.hub.readers == 0
    async with asyncio.timeout(10):
        while await redis.pubsub_channels():
            await asyncio.sleep(0.01)
    stream = await gateway.watch(lease.request_id, head=head)
    await write(scripts, lease, 3)
    await check_whole(redis, stream, lease.request_id)


async def test_thousands_that_come_and_go_leave_no_task_and_no_subscription(
    redis: Redis, scripts: Scripts, gateway: Gateway
) -> None:
    """P14, the hub's part."""
    leases = [await running(scripts) for _ in range(10)]
    heads = [await gateway.head(lease.request_id) for lease in leases]
    await asyncio.sleep(0.1)
    tasks = len(asyncio.all_tasks())
    chance = random.Random(1)

    async def visit(n: int) -> None:
        at = n % len(leases)
        stream = await gateway.watch(leases[at].request_id, head=heads[at], long_ids=n % 3 == 0)
        await asyncio.sleep(chance.random() * 0.01 if n % 4 else 0)
        if n % 5 == 0:
            stream.following.cancel()
            await asyncio.gather(stream.following, return_exceptions=True)
        else:
            await stream.leave()
        gateway.opened.remove(stream)

    for first in range(0, scaled(5_000), 50):
        await asyncio.gather(*(visit(first + n) for n in range(50)))
    assert gateway.hub.readers == 0
    async with asyncio.timeout(5):
        while await redis.pubsub_channels() or len(asyncio.all_tasks()) > tasks:
            await asyncio.sleep(0.01)
