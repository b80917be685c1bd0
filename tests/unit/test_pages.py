"""Pages of a log: read once for all who want them, kept within bounds, and never of a log that is no longer so."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest
from redis.asyncio import Redis

from broker.events import Entry
from broker.gateway import pages as module
from broker.gateway.channel import Channel, State
from broker.gateway.dialects.dialect import Folded, Frame
from broker.gateway.dialects.native.fold import Native
from broker.gateway.pages import PAGE_SLICES, Damaged, Pages, check_contiguous, encode
from broker.gateway.reader import Slice, chunk
from broker.gateway.view import SLICE_BYTES, View
from broker.ids import START, EventId
from broker.runs import keys, log
from broker.runs.connections import connect, is_away
from broker.runs.scripts import Lease, Scripts
from tests.kit.checker import check_reader, entries_of
from tests.kit.proxy import Proxy
from tests.kit.redis_server import RedisServer
from tests.kit.runs import append, running, words
from tests.kit.sse import parse


@pytest.fixture
def scripts(redis: Redis) -> Scripts:
    return Scripts(redis)


@pytest.fixture
def proxy(redis_server: RedisServer) -> Iterator[Proxy]:
    with Proxy(redis_server.port) as proxy:
        yield proxy


ANYWHERE = Folded(Native.start, None)
"""The native fold can begin at any entry."""


async def written(scripts: Scripts, count: int, size: int = 1) -> Lease:
    lease = await running(scripts)
    for first in range(2, count + 2, 100):
        await append(scripts, lease, first, *words(*["x" * size] * min(100, count + 2 - first)))
    return lease


def view_of(lease: Lease, *, long_ids: bool = False) -> View:
    channel = Channel(lease.request_id)
    channel.users = 2  # what a single reader asks for is not kept
    channel.update(State("running", EventId(lease.epoch, 9999), 1))
    return channel.view(Native(lease.request_id, long_ids=long_ids))


def entries_in(page: list[Slice]) -> list[Entry]:
    for part in page:
        assert part.chunk == chunk(part.data)
        assert entries_of(parse(part.data))[-1].id == part.last
    return entries_of(parse(b"".join(part.data for part in page)))


async def ranges(redis: Redis) -> int:
    stats = await redis.info("commandstats")
    return int(stats.get("cmdstat_xrange", {}).get("calls", 0))


async def test_pages_one_after_the_other_are_the_log(redis: Redis, scripts: Scripts) -> None:
    lease = await written(scripts, 2 * log.PAGE + 50)
    pages, view = Pages(redis), view_of(lease)
    entries, position = list[Entry](), START
    stored = await log.read_all(redis, lease.request_id)
    while position < stored[-1].id:
        page = entries_in(await pages.after(view, position, ANYWHERE))
        assert len(page) <= log.PAGE
        entries += page
        position = page[-1].id
    check_reader(entries, stored)


async def test_a_page_is_cut_into_slices_that_back_pressure_can_bear(redis: Redis, scripts: Scripts) -> None:
    lease = await written(scripts, 200, size=2000)
    page = await Pages(redis).after(view_of(lease), START, ANYWHERE)
    assert len(page) > 1
    assert all(len(part.data) <= SLICE_BYTES + 3000 for part in page)


@pytest.mark.parametrize("size", [1, 1000, 30_000, 60_000])
async def test_a_page_is_bounded_in_bytes_whatever_the_size_of_its_events(
    redis: Redis, scripts: Scripts, size: int
) -> None:
    """P15: each reader that has stopped reading holds one."""
    lease = await running(scripts)
    for seq in range(2, 122):
        await append(scripts, lease, seq, *words("x" * size))
    pages, view, position, entries = Pages(redis), view_of(lease), START, list[Entry]()
    stored = await log.read_all(redis, lease.request_id)
    while position < stored[-1].id:
        page = await pages.after(view, position, ANYWHERE)
        assert sum(len(part.data) for part in page) <= PAGE_SLICES * (SLICE_BYTES + size + 100)
        entries += entries_in(page)
        position = page[-1].last
    check_reader(entries, stored)


async def test_small_events_are_read_many_at_a_time(redis: Redis, scripts: Scripts) -> None:
    lease = await written(scripts, 3 * log.PAGE)
    pages, view, position = Pages(redis), view_of(lease), START
    before = await ranges(redis)
    while position < EventId(lease.epoch, 3 * log.PAGE + 1):
        position = (await pages.after(view, position, ANYWHERE))[-1].last
    assert await ranges(redis) - before <= 5


async def test_who_wants_the_same_page_at_the_same_time_shares_one_read(redis: Redis, scripts: Scripts) -> None:
    lease = await written(scripts, 100)
    pages, view = Pages(redis), view_of(lease)
    before = await ranges(redis)
    got = await asyncio.gather(*(pages.after(view, START, ANYWHERE) for _ in range(50)))
    again = await pages.after(view, START, ANYWHERE)
    assert await ranges(redis) - before == 1
    assert all(page is got[0] for page in (*got, again))


async def test_other_positions_runs_and_id_forms_are_other_pages(redis: Redis, scripts: Scripts) -> None:
    one, two = await written(scripts, 10), await written(scripts, 20)
    pages = Pages(redis)
    wanted = [(view_of(one), START), (view_of(one), EventId(one.epoch, 5)), (view_of(two), START)]
    for _ in range(2):
        for (view, position), lease in zip(wanted, (one, one, two), strict=True):
            stored = [e for e in await log.read_all(redis, lease.request_id) if e.id > position]
            check_reader(entries_in(await pages.after(view, position, ANYWHERE)), stored)
    short, long = [await pages.after(view_of(one, long_ids=long_ids), START, ANYWHERE) for long_ids in (False, True)]
    assert short[0].data != long[0].data
    assert f"id: {one.request_id}/0-1\n".encode() in long[0].data


async def test_one_who_leaves_does_not_take_the_page_from_the_others(
    redis: Redis, scripts: Scripts, proxy: Proxy
) -> None:
    lease = await written(scripts, 10)
    slow = connect(proxy.url, connections=2)
    await slow.ping()
    pages, view = Pages(slow), view_of(lease)
    proxy.delay(0.1)
    leaving, staying = (asyncio.create_task(pages.after(view, START, ANYWHERE)) for _ in range(2))
    await asyncio.sleep(0.05)
    leaving.cancel()
    check_reader(entries_in(await staying), await log.read_all(redis, lease.request_id))
    assert leaving.cancelled()
    await slow.aclose(close_connection_pool=True)


async def test_a_read_that_fails_is_told_to_all_and_not_kept(scripts: Scripts, proxy: Proxy) -> None:
    lease = await written(scripts, 10)
    client = connect(proxy.url, connections=2)
    pages, view = Pages(client), view_of(lease)
    proxy.refuse()
    results = await asyncio.gather(*(pages.after(view, START, ANYWHERE) for _ in range(3)), return_exceptions=True)
    assert all(isinstance(result, Exception) and is_away(result) for result in results), results
    proxy.accept()
    assert entries_in(await pages.after(view, START, ANYWHERE))
    await client.aclose(close_connection_pool=True)


async def test_what_is_kept_is_bounded(monkeypatch: pytest.MonkeyPatch, redis: Redis, scripts: Scripts) -> None:
    monkeypatch.setattr(module, "CACHE_BYTES", 200_000)
    lease = await written(scripts, 60, size=1000)
    pages, view = Pages(redis), view_of(lease)
    positions = [EventId(lease.epoch, seq) for seq in range(30, 60)]
    for position in positions:
        await pages.after(view, position, ANYWHERE)
    before = await ranges(redis)
    await pages.after(view, positions[-1], ANYWHERE)
    assert await ranges(redis) == before, "the last page is kept"
    await pages.after(view, positions[0], ANYWHERE)
    assert await ranges(redis) == before + 1, "the oldest is not"


async def test_the_page_that_is_wanted_again_outlives_the_others(
    monkeypatch: pytest.MonkeyPatch, redis: Redis, scripts: Scripts
) -> None:
    monkeypatch.setattr(module, "CACHE_BYTES", 400_000)
    lease = await written(scripts, 60, size=1000)
    pages, view = Pages(redis), view_of(lease)
    wanted = EventId(lease.epoch, 20)
    for seq in range(30, 60):
        await pages.after(view, wanted, ANYWHERE)
        await pages.after(view, EventId(lease.epoch, seq), ANYWHERE)
    before = await ranges(redis)
    await pages.after(view, wanted, ANYWHERE)
    assert await ranges(redis) == before


async def test_a_forgotten_run_is_read_again(redis: Redis, scripts: Scripts) -> None:
    lease, other = await written(scripts, 10), await written(scripts, 10)
    pages, view, other_view = Pages(redis), view_of(lease), view_of(other)
    for wanted in (view, other_view):
        await pages.after(wanted, START, ANYWHERE)
    pages.forget(lease.request_id)
    before = await ranges(redis)
    await pages.after(view, START, ANYWHERE)
    await pages.after(other_view, START, ANYWHERE)
    assert await ranges(redis) - before == 1


async def test_a_read_that_was_under_way_when_its_run_was_forgotten_is_not_kept(
    redis: Redis, scripts: Scripts, proxy: Proxy
) -> None:
    """It may have read the log as it was before a failover."""
    lease = await written(scripts, 10)
    client = connect(proxy.url, connections=4)
    await client.ping()
    pages, view = Pages(client), view_of(lease)
    proxy.delay(0.2)
    old = asyncio.create_task(pages.after(view, START, ANYWHERE))
    await asyncio.sleep(0.1)
    await redis.delete(keys.log(lease.request_id))
    await redis.xadd(keys.log(lease.request_id), {"t": "start", "d": '{"new":true}'}, id="0-1")
    pages.forget(lease.request_id)
    proxy.delay(0)
    new = entries_in(await pages.after(view, START, ANYWHERE))
    assert [entry.data for entry in new] == ['{"new":true}']
    assert len(entries_in(await old)) == 12
    assert [entry.data for entry in entries_in(await pages.after(view, START, ANYWHERE))] == ['{"new":true}']
    await client.aclose(close_connection_pool=True)


async def test_a_log_from_which_somebody_deleted_is_damaged(redis: Redis, scripts: Scripts) -> None:
    lease = await written(scripts, 10)
    pages, view = Pages(redis), view_of(lease)
    await redis.xdel(keys.log(lease.request_id), f"{lease.epoch}-5")
    for _ in range(2):
        with pytest.raises(Damaged):
            await pages.after(view, START, ANYWHERE)
    assert entries_in(await pages.after(view, EventId(lease.epoch, 5), ANYWHERE))
    await redis.delete(keys.log(lease.request_id))
    with pytest.raises(Damaged):
        await pages.after(view, EventId(lease.epoch, 3), ANYWHERE)


def entry(epoch: int, seq: int) -> Entry:
    return Entry(EventId(epoch, seq), "token", "{}")


@pytest.mark.parametrize(
    ("position", "ids"),
    [
        (START, [(0, 1), (5, 1), (5, 2), (900, 1)]),
        (EventId(5, 2), [(5, 3), (6, 1)]),
        (EventId(5, 2), [(9, 1)]),
        (EventId(0, 1), [(7, 1)]),
    ],
)
def test_contiguous_is_the_next_number_of_an_epoch_or_the_first_of_a_later_one(
    position: EventId, ids: list[tuple[int, int]]
) -> None:
    check_contiguous(position, [entry(*each) for each in ids])


@pytest.mark.parametrize(
    ("position", "ids"),
    [
        (START, []),
        (START, [(0, 2)]),
        (EventId(5, 2), [(5, 4)]),
        (EventId(5, 2), [(6, 2)]),
        (EventId(5, 2), [(5, 3), (5, 5)]),
        (EventId(5, 2), [(5, 3), (6, 2)]),
    ],
)
def test_anything_else_is_damage(position: EventId, ids: list[tuple[int, int]]) -> None:
    with pytest.raises(Damaged):
        check_contiguous(position, [entry(*each) for each in ids])


def test_a_slice_ends_between_events() -> None:
    entries = [Entry(EventId(1, seq), "token", '{"text":"' + "z" * 40_000 + '"}') for seq in range(1, 8)]
    slices = encode(Native("0" * 32, long_ids=False), ANYWHERE, entries)
    assert [part.last for part in slices] == [EventId(1, 2), EventId(1, 4), EventId(1, 6), EventId(1, 7)]
    assert entries_in(slices) == entries
    assert encode(Native("0" * 32, long_ids=False), ANYWHERE, []) == []


def test_what_a_page_does_not_keep_is_not_folded() -> None:
    """A dialect may show several times what the log has."""
    entries = [Entry(EventId(1, seq), "token", '{"text":"' + "z" * 40_000 + '"}') for seq in range(1, 20)]
    steps = 0

    class Counted(Native):
        def step(self, state: None, entry: Entry) -> tuple[None, tuple[Frame]]:
            nonlocal steps
            steps += 1
            return super().step(state, entry)

    slices = encode(Counted("0" * 32, long_ids=False), ANYWHERE, entries)
    assert (len(slices), slices[-1].last, steps) == (PAGE_SLICES, EventId(1, 2 * PAGE_SLICES), 2 * PAGE_SLICES)
