"""Fan-out of a dialect whose frames depend on all that was before them, on a real Redis."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import NamedTuple

import pytest
from redis.asyncio import Redis

from broker import sse
from broker.events import Entry
from broker.gateway.dialects.dialect import Frame
from broker.gateway.reader import End
from broker.ids import START, EventId
from broker.runs import keys, log
from broker.runs.scripts import Lease, Scripts
from tests.kit import folds
from tests.kit.folds import FOLDS
from tests.kit.hub import Gateway, Stream, append_silently, hub_of
from tests.kit.proxy import Proxy
from tests.kit.redis_server import RedisServer
from tests.kit.runs import FINAL, append, claim, lose_worker, roll_back, running, words
from tests.kit.sse import parse
from tests.kit.waiting import until

JUMP = 1000


class Count(NamedTuple):
    frames: int = 0
    text: int = 0
    ended: bool = False


class Counting:
    """Two frames for each token, which tell how much text there was; one for the end. "stop" ends it early."""

    key = "counting"
    seekable = False
    start = Count()

    def __init__(self, *, exact: bool = False, may_be_ahead: bool = False) -> None:
        self.exact = exact
        self.may_be_ahead = may_be_ahead

    def step(self, state: Count, entry: Entry) -> tuple[Count, Sequence[Frame]]:
        data = json.loads(entry.data)
        if entry.type == "attempt" and data["attempt"] > 1:
            return state._replace(frames=data["attempt"] * JUMP), ()
        if entry.terminal:
            return self._frames(state._replace(ended=True), 1)
        if entry.type != "token":
            return state, ()
        ended = data["text"] == "stop"
        return self._frames(state._replace(text=state.text + len(data["text"]), ended=ended), 2)

    def _frames(self, state: Count, count: int) -> tuple[Count, list[Frame]]:
        positions = range(state.frames + 1, state.frames + count + 1)
        frames = [Frame(n, sse.frame("count", json.dumps(state.text), str(n))) for n in positions]
        return state._replace(frames=positions[-1]), frames

    def ended(self, state: Count) -> bool:
        return state.ended

    def opening(self, retry_ms: int) -> bytes:
        return b""

    def heartbeat(self, text: str) -> bytes:
        return sse.comment(text)

    def gone(self, state: Count) -> bytes:
        return b"data: gone at %d\n\n" % state.text

    def lost(self, state: Count) -> bytes:
        return b"data: lost at %d\n\n" % state.text

    def closing(self, retry_ms: int) -> bytes:
        return b""


@pytest.fixture
def scripts(redis: Redis) -> Scripts:
    return Scripts(redis)


@pytest.fixture
def proxy(redis_server: RedisServer) -> Iterator[Proxy]:
    with Proxy(redis_server.port) as proxy:
        yield proxy


@pytest.fixture
async def gateway(redis: Redis, proxy: Proxy) -> AsyncIterator[Gateway]:
    async with hub_of(redis, proxy.url, heartbeat_seconds=0.2, lease_seconds=1) as gateway:
        yield gateway


def frames(stream: Stream) -> bytes:
    """What came, without comments."""
    return b"".join(line + b"\n" for line in stream.connection.data().split(b"\n")[:-1] if line[:1] != b":")


async def expected(redis: Redis, request_id: str, after: int = 0) -> bytes:
    shown = folds.frames_of(Counting(), await log.read_all(redis, request_id))
    return b"".join(frame.data for frame in shown if frame.position > after)


async def written(scripts: Scripts, count: int) -> Lease:
    lease = await running(scripts)
    for first in range(2, count + 2, 100):
        await append(scripts, lease, first, *words(*["x" * (n % 7) for n in range(first, min(first + 100, count + 2))]))
    return lease


@pytest.mark.parametrize("chunked", [True, False])
async def test_a_client_goes_on_at_any_frame(redis: Redis, scripts: Scripts, gateway: Gateway, chunked: bool) -> None:
    """Also between the frames of one entry; in pages, in the ring and live."""
    lease = await written(scripts, 700)
    early = [await gateway.open(lease.request_id, Counting(), after=n, chunked=chunked) for n in (0, 1, 2, 999, 1399)]
    for seq in range(702, 722):
        await append(scripts, lease, seq, *words("live"))
    late = [await gateway.open(lease.request_id, Counting(), after=n, chunked=chunked) for n in (1, 1400, 1403, 1440)]
    await append(scripts, lease, 722, *words("last"), FINAL)
    for stream in (*early, *late):
        assert await stream.end() is End.FINISHED
    for stream, after in zip((*early, *late), (0, 1, 2, 999, 1399, 1, 1400, 1403, 1440), strict=True):
        assert frames(stream) == await expected(redis, lease.request_id, after), after


async def test_each_frame_is_encoded_once_for_all_who_read_live(
    redis: Redis, scripts: Scripts, gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = 0
    real = Counting.step

    def counted(self: Counting, state: Count, entry: Entry) -> tuple[Count, Sequence[Frame]]:
        nonlocal steps
        steps += 1
        return real(self, state, entry)

    lease = await running(scripts)
    streams = [await gateway.open(lease.request_id, Counting()) for _ in range(20)]
    whole = await expected(redis, lease.request_id)
    await until(lambda: all(stream.reader in stream.reader.view._live_chunked for stream in streams))
    monkeypatch.setattr(Counting, "step", counted)
    await append(scripts, lease, 2, *words(*"abcdefghij"), FINAL)
    for stream in streams:
        await stream.end()
    assert steps == 11
    whole = await expected(redis, lease.request_id)
    assert all(frames(stream) == whole for stream in streams)


async def test_a_fold_that_has_ended_ends_its_streams_though_the_run_goes_on(
    redis: Redis, scripts: Scripts, gateway: Gateway
) -> None:
    lease = await running(scripts)
    early = await gateway.open(lease.request_id, Counting())
    await until(lambda: early.reader in early.reader.view._live_chunked)
    await append(scripts, lease, 2, *words("a", "stop"))
    late = await gateway.open(lease.request_id, Counting())
    for stream in (early, late):
        assert await stream.end() is End.FINISHED
        assert frames(stream) == await expected(redis, lease.request_id)


@pytest.mark.parametrize("read_live", [True, False])
async def test_a_cursor_that_the_positions_jump_over_is_lost(
    redis: Redis, scripts: Scripts, gateway: Gateway, read_live: bool
) -> None:
    lease = await running(scripts)
    await append(scripts, lease, 2, *words("a", "b"))
    exact, other = Counting(exact=True), Counting()
    other.key = "another"
    streams = (
        [await gateway.open(lease.request_id, dialect, after=7) for dialect in (exact, other)] if read_live else []
    )
    if read_live:
        await until(lambda: all(stream.reader.position > START for stream in streams))
    await lose_worker(redis, scripts, lease.request_id)
    again = await claim(scripts, lease.request_id, 2)
    await append(scripts, again, 2, *words("c"), FINAL)
    if not read_live:
        streams = [await gateway.open(lease.request_id, dialect, after=7) for dialect in (exact, other)]
    for stream in streams:
        assert await stream.end() is End.FINISHED
    assert frames(streams[0]).startswith(b"data: lost at ")
    assert frames(streams[1]) == await expected(redis, lease.request_id, 7)


async def test_a_cursor_beyond_the_end_of_a_run_is_lost_only_where_it_must_be_exact(
    scripts: Scripts, gateway: Gateway
) -> None:
    lease = await running(scripts)
    await append(scripts, lease, 2, *words("a"), FINAL)
    other = Counting()
    other.key = "another"
    exact = await gateway.open(lease.request_id, Counting(exact=True), after=99)
    inexact = await gateway.open(lease.request_id, other, after=99)
    assert await exact.end() is await inexact.end() is End.FINISHED
    assert (frames(exact), frames(inexact)) == (b"data: lost at 0\n\n", b"")


async def test_who_names_a_position_before_there_is_one_gets_what_comes_above_it(
    redis: Redis, scripts: Scripts, gateway: Gateway
) -> None:
    """However long that takes; an end below it is an end."""
    gateway.hub._follower._repair_seconds = 0.1
    lease = await running(scripts)
    await append(scripts, lease, 2, *words("a", "b"))
    streams = {
        after: await gateway.open(lease.request_id, Counting(exact=True, may_be_ahead=True), after=after)
        for after in (6, 99)
    }
    await until(lambda: all(stream.reader.position > START for stream in streams.values()))
    await asyncio.sleep(0.5)
    await append(scripts, lease, 4, *words("c", "d", "e"), FINAL)
    for after, stream in streams.items():
        assert await stream.end() is End.FINISHED
        assert frames(stream) == await expected(redis, lease.request_id, after)
        assert "waiting for repair" not in stream.connection.comments()
    assert frames(streams[6]).count(b"\n\n") == 5
    assert frames(streams[99]) == b""


async def test_what_a_failover_took_is_waited_for_and_goes_on_after_its_repair(
    redis: Redis, scripts: Scripts, gateway: Gateway
) -> None:
    lease = await running(scripts)
    stream = await gateway.open(lease.request_id, Counting(exact=True))
    tail = words("aa", "b", "cc", "d")
    await append(scripts, lease, 2, *tail)
    await until(lambda: frames(stream).count(b"\n\n") == 8)
    await roll_back(redis, lease.request_id, EventId(lease.epoch, 3))
    await until(lambda: "waiting for repair" in stream.connection.comments())
    await append(scripts, lease, 2, *tail)
    await append(scripts, lease, 6, *words("e"), FINAL)
    assert await stream.end() is End.FINISHED
    assert frames(stream) == await expected(redis, lease.request_id)


async def test_what_a_failover_took_for_ever_ends_the_stream_of_who_has_it(
    redis: Redis, scripts: Scripts, gateway: Gateway
) -> None:
    lease = await running(scripts)
    has_it = await gateway.open(lease.request_id, Counting(exact=True))
    await append(scripts, lease, 2, *words("aa", "b", "cc", "d"))
    await until(lambda: frames(has_it).count(b"\n\n") == 8)
    before = frames(has_it)
    await roll_back(redis, lease.request_id, EventId(lease.epoch, 3))
    await lose_worker(redis, scripts, lease.request_id)
    again = await claim(scripts, lease.request_id, 2)
    await append(scripts, again, 2, *words("other"), FINAL)
    assert await has_it.end() is End.FINISHED
    assert frames(has_it) == before + b"data: lost at 6\n\n", "where the client stands, and not where the fold is now"


@pytest.mark.parametrize("name", [name for name in FOLDS if name != "native"])
async def test_a_client_that_cannot_take_back_what_a_failover_took_is_told(
    redis: Redis, scripts: Scripts, gateway: Gateway, name: str
) -> None:
    """Also one without ids: its stream is where it was when the log went back."""
    lease = await running(scripts)
    dialect = FOLDS[name][0]
    stream = await gateway.open(lease.request_id, dialect)
    await append(scripts, lease, 2, *words("aa", "b", "cc", "d"))
    await until(lambda: b'"d"' in stream.connection.data())
    await roll_back(redis, lease.request_id, EventId(lease.epoch, 3))
    await lose_worker(redis, scripts, lease.request_id)
    again = await claim(scripts, lease.request_id, 2)
    await append(scripts, again, 2, *words("aa", "b", "other"), FINAL)
    assert await stream.end() is End.FINISHED
    assert stream.connection.data().endswith(dialect.lost(dialect.start))
    assert b"other" not in stream.connection.data()


@pytest.mark.parametrize("name", [name for name in FOLDS if name != "native"])
async def test_a_log_that_goes_back_before_the_gateway_has_noticed_is_waited_for(
    redis: Redis, scripts: Scripts, gateway: Gateway, name: str
) -> None:
    lease = await running(scripts)
    stream = await gateway.open(lease.request_id, FOLDS[name][0])
    await append(scripts, lease, 2, *words("aa", "b"))
    await until(lambda: b'"b"' in stream.connection.data())
    stream.connection.stop_reading()
    channel = stream.reader.view.channel
    await append_silently(redis, lease, 4, *words("cc"))
    await append(scripts, lease, 5, *words("d"))
    await until(lambda: stream.reader.shown is not None and channel.end.seq == 5)
    await roll_back(redis, lease.request_id, EventId(lease.epoch, 2))
    stream.connection.read_on()
    await until(lambda: stream.reader.waiting)
    await append(scripts, lease, 3, *words("b", "cc", "d"), FINAL)
    assert await stream.end() is End.FINISHED
    whole = folds.body_of(FOLDS[name][0], await log.read_all(redis, lease.request_id))
    assert parse(stream.connection.data()) == parse(whole)


async def test_messages_that_were_missed_change_no_frame(redis: Redis, scripts: Scripts, gateway: Gateway) -> None:
    lease = await running(scripts)
    streams = [await gateway.open(lease.request_id, Counting()) for _ in range(3)]
    await append(scripts, lease, 2, *words("a", "bb"))
    await until(lambda: all(frames(stream).count(b"\n\n") == 4 for stream in streams))
    await append_silently(redis, lease, 4, *words("ccc", "d"))
    await append(scripts, lease, 6, *words("e"))
    await append_silently(redis, lease, 7, *words("f"))
    await until(lambda: all(frames(stream).count(b"\n\n") == 12 for stream in streams))
    await append(scripts, lease, 8, FINAL)
    for stream in streams:
        assert await stream.end() is End.FINISHED
        assert frames(stream) == await expected(redis, lease.request_id)


async def test_a_client_that_reads_slowly_falls_behind_the_ring_and_gets_everything(
    redis: Redis, scripts: Scripts, gateway: Gateway
) -> None:
    lease = await running(scripts)
    slow = await gateway.open(lease.request_id, Counting(), room=100)
    quick = await gateway.open(lease.request_id, Counting())
    for first in range(2, 1002, 100):
        await append(scripts, lease, first, *words(*["x" * 40] * 100))
    await append(scripts, lease, 1002, FINAL)
    assert await quick.end() is End.FINISHED
    slow.connection.read_on()
    assert await slow.end() is End.FINISHED
    whole = await expected(redis, lease.request_id)
    assert frames(slow) == frames(quick) == whole


async def test_an_erased_run_ends_its_streams(redis: Redis, scripts: Scripts, gateway: Gateway) -> None:
    lease = await running(scripts)
    stream = await gateway.open(lease.request_id, Counting())
    await append(scripts, lease, 2, *words("aa", "b"))
    await until(lambda: frames(stream).count(b"\n\n") == 4)
    await redis.delete(keys.run(lease.request_id), keys.log(lease.request_id))
    assert await stream.end() is End.FINISHED
    assert frames(stream).endswith(b"data: gone at 3\n\n")


class Failing(Counting):
    """It cannot show "bad"."""

    key = "failing"

    def step(self, state: Count, entry: Entry) -> tuple[Count, Sequence[Frame]]:
        if entry.type == "token" and json.loads(entry.data)["text"] == "bad":
            raise KeyError("bad")
        return super().step(state, entry)


async def test_a_fold_that_fails_cuts_its_own_streams_and_no_others(
    redis: Redis, scripts: Scripts, gateway: Gateway, caplog: pytest.LogCaptureFixture
) -> None:
    """Live, and for who comes before and after the others have gone."""
    lease = await running(scripts)
    failing = [await gateway.open(lease.request_id, Failing(), chunked=chunked) for chunked in (True, False)]
    before, after = Counting(), Counting()
    after.key = "another"
    exact = [await gateway.open(lease.request_id, dialect) for dialect in (before, after)]
    await append(scripts, lease, 2, *words("a"))
    await until(lambda: all(frames(stream).count(b"\n\n") == 2 for stream in (*failing, *exact)))
    await append(scripts, lease, 3, *words("b", "bad", "c"))
    late = await gateway.open(lease.request_id, Failing())
    for stream in (*failing, late):
        assert await stream.end() is End.CUT
    whole = await expected(redis, lease.request_id)
    await until(lambda: all(frames(stream) == whole for stream in exact))
    later = await gateway.open(lease.request_id, Failing())
    assert await later.end() is End.CUT
    await append(scripts, lease, 6, *words("d"), FINAL)
    for stream in exact:
        assert await stream.end() is End.FINISHED
        assert frames(stream) == await expected(redis, lease.request_id)
    failures = [record for record in caplog.records if record.message == "a fold failed"]
    assert {record.__dict__["request_id"] for record in failures} == {lease.request_id}
    assert {record.__dict__["dialect"] for record in failures} == {"'failing'"}


async def test_a_fold_that_fails_leaves_the_other_messages_of_a_read(
    redis: Redis, scripts: Scripts, gateway: Gateway
) -> None:
    """What one read brings of other runs goes to them at once: nothing is read again."""
    lease, other = await running(scripts), await running(scripts)
    failing = await gateway.open(lease.request_id, Failing())
    stream = await gateway.open(other.request_id, Counting())
    await until(lambda: all(each.reader in each.reader.view._live_chunked for each in (failing, stream)))
    gateway.hub._subscriber.on_message(keys.channel(lease.request_id), _message(lease, 2, "bad"))
    gateway.hub._subscriber.on_message(keys.channel(other.request_id), _message(other, 2, "x"))
    gateway.hub._subscriber.on_batch()
    assert frames(stream).count(b"\n\n") == 2
    assert await failing.end() is End.CUT


def _message(lease: Lease, seq: int, text: str) -> bytes:
    """Of one token, as a script publishes it."""
    return f'1 {lease.epoch}-{seq - 1}\n{lease.epoch}-{seq} token {{"text":"{text}"}}'.encode("ascii")


@pytest.mark.parametrize("ended", [True, False])
async def test_a_log_that_a_fold_cannot_show_cuts_who_asks_for_it(
    redis: Redis, scripts: Scripts, gateway: Gateway, ended: bool
) -> None:
    lease = await running(scripts)
    await append(scripts, lease, 2, *words("a", "bad", "c"), *([FINAL] if ended else []))
    streams = [await gateway.open(lease.request_id, dialect) for dialect in (Failing(), Failing(), Counting())]
    for stream in streams[:2]:
        assert await stream.end() is End.CUT
    if not ended:
        await append(scripts, lease, 5, FINAL)
    assert await streams[2].end() is End.FINISHED
    assert frames(streams[2]) == await expected(redis, lease.request_id)
