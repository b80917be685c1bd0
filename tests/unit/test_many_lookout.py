"""One look at a session's index answers all who ask, each as if it had been its own."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.errors import Unavailable
from broker.gateway.dialects.native.many.lookout import Look, Lookout, Lookouts
from broker.ids import Owner

TIMES = st.lists(st.integers(1, 30), max_size=20)
FLOOR = st.integers(0, 31)


class Index:
    """A session's, in memory: `limit` rows in one look, and those of the last one's millisecond."""

    def __init__(self, times: Sequence[int], limit: int) -> None:
        self.rows = [(f"run {n}", at) for n, at in enumerate(sorted(times))]
        self.limit = limit
        self.floors: list[int] = []
        self.away = False

    async def look(self, floor: int) -> Look:
        self.floors.append(floor)
        if self.away:
            raise Unavailable
        return self.above(floor)

    def above(self, floor: int) -> Look:
        rows = [row for row in self.rows if row[1] > floor]
        ends = rows[: self.limit][-1:] or [("", 0)]
        page = [row for row in rows if row[1] <= ends[0][1]]
        return Look(page, page == rows, now_ms=99)


@contextlib.asynccontextmanager
async def lookout_of(index: Index, pause: float = 0.01) -> AsyncIterator[Lookout]:
    lookout = Lookout(index.look, pause)
    async with asyncio.timeout(15):
        task = asyncio.create_task(lookout.run())
        try:
            yield lookout
        finally:
            task.cancel()
            await asyncio.wait([task])


@given(TIMES, st.integers(1, 5), FLOOR, FLOOR)
def test_a_look_from_lower_down_has_the_first_rows_above_whole_and_says_whether_they_are_all(
    times: list[int], limit: int, one: int, other: int
) -> None:
    low, high = sorted((one, other))
    index = Index(times, limit)
    look, everything = index.above(low), Index(times, 1000).above(high)
    part = look.above(high)
    if part is None:
        assert not look.complete and look.rows[-1][1] <= high
        return
    assert part.rows == everything.rows[: len(part.rows)]
    assert part.complete == (part.rows == everything.rows)
    assert part.rows or part.complete
    rest = everything.rows[len(part.rows) :]
    assert not {at for _, at in part.rows} & {at for _, at in rest}, "a part of one millisecond"


async def test_all_who_ask_share_one_look_from_the_lowest_floor() -> None:
    index = Index([10, 20, 30], 100)
    async with lookout_of(index) as lookout:
        looks = await asyncio.gather(*(lookout.above(floor) for floor in (20, 5, 30, 10)))
    assert index.floors == [5]
    assert looks == [index.above(floor) for floor in (20, 5, 30, 10)]


async def test_whom_a_look_does_not_reach_has_another_one() -> None:
    index = Index(range(1, 100), 10)
    async with lookout_of(index) as lookout:
        looks = await asyncio.gather(*(lookout.above(floor) for floor in (50, 0, 5, 99)))
    assert index.floors == [0, 50, 99]
    assert [look.rows[:1] for look in looks] == [[("run 50", 51)], [("run 0", 1)], [("run 5", 6)], []]
    assert [look.complete for look in looks] == [False, False, False, True]


async def test_who_is_new_does_not_wait_for_the_tick() -> None:
    index = Index([10], 100)
    async with lookout_of(index, pause=3600) as lookout:
        assert (await lookout.above(0, at_once=True)).rows == [("run 0", 10)]


async def test_that_redis_is_away_is_told_to_all_and_the_next_tick_asks_again() -> None:
    index = Index([10], 100)
    async with lookout_of(index) as lookout:
        index.away = True
        told = await asyncio.gather(lookout.above(0), lookout.above(1), return_exceptions=True)
        assert [type(error) for error in told] == [Unavailable, Unavailable]
        index.away = False
        assert (await lookout.above(0)).complete


async def test_who_has_gone_keeps_nobody_from_an_answer() -> None:
    index = Index([10], 100)
    async with lookout_of(index) as lookout:
        gone, stays = asyncio.create_task(lookout.above(0)), asyncio.create_task(lookout.above(7))
        await asyncio.sleep(0)
        gone.cancel()
        with pytest.raises(asyncio.CancelledError):
            await gone
        assert (await stays).rows == [("run 0", 10)]
    assert index.floors == [7]


async def test_streams_of_a_session_share_its_lookout_which_ends_with_the_last_of_them() -> None:
    async def above(
        owner: Owner, session_id: str, floor: int, *, limit: int
    ) -> tuple[list[tuple[str, int]], bool, int]:
        return [(f"{owner.subject} {session_id}", floor + 1)], True, 99

    alice, bob = Owner("t", "alice"), Owner("t", "bob")
    lookouts, others = Lookouts(above), asyncio.all_tasks()
    with lookouts.of(alice, "s", 3600) as one:
        with lookouts.of(alice, "s", 3600) as same, lookouts.of(alice, "another", 3600) as another:
            assert one is same
            with lookouts.of(bob, "s", 3600) as foreign:
                looks = [await lookout.above(7, at_once=True) for lookout in (one, another, foreign)]
                assert [look.rows for look in looks] == [[("alice s", 8)], [("alice another", 8)], [("bob s", 8)]]
        await asyncio.sleep(0.01)
        assert len(asyncio.all_tasks() - others) == 1
        assert (await one.above(0, at_once=True)).rows == [("alice s", 1)]
    await asyncio.sleep(0.01)
    assert asyncio.all_tasks() == others
    with lookouts.of(alice, "s", 3600) as again:
        assert again is not one
