"""A blocked event loop is told of by a thread beside it."""

from __future__ import annotations

import asyncio
import ctypes
import logging
import threading
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest

from tests.kit.waiting import until
from worker import watchdog
from worker.watchdog import Keeper, Watchdog, Work, current

WORK = Work("ab" * 16, "thinker", 2)


@pytest.fixture(autouse=True)
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchdog, "BLOCKED_SECONDS", 0.2)
    monkeypatch.setattr(watchdog, "EVERY_SECONDS", 0.05)


class Told:
    def __init__(self, caplog: pytest.LogCaptureFixture) -> None:
        self._caplog = caplog

    def __call__(self, message: str) -> list[dict[str, Any]]:
        return [vars(record) for record in self._caplog.records if record.getMessage() == message]


@pytest.fixture
def told(caplog: pytest.LogCaptureFixture) -> Told:
    caplog.set_level(logging.WARNING)
    return Told(caplog)


@pytest.fixture
async def watched() -> AsyncIterator[Watchdog]:
    made = Watchdog()
    made.start()
    yield made
    await made.close()


async def block(seconds: float) -> None:
    time.sleep(seconds)


async def working(seconds: float, work: Work = WORK) -> None:
    current.set(work)
    await asyncio.gather(asyncio.create_task(block(seconds)))


async def test_the_run_and_the_place_are_told_and_then_for_how_long(watched: Watchdog, told: Told) -> None:
    await asyncio.create_task(working(0.6))
    await until(lambda: bool(told("the event loop turns again")))
    [blocked] = told("the event loop is blocked")
    assert (blocked["request_id"], blocked["agent"], blocked["attempt"]) == tuple(WORK)
    assert blocked["place"][0].endswith(" block")
    [over] = told("the event loop turns again")
    assert over["request_id"] == WORK.request_id
    assert 0.5 < over["seconds"] < 10


async def test_what_is_no_runs_doing_is_told_with_its_place(watched: Watchdog, told: Told) -> None:
    asyncio.get_running_loop().call_soon(time.sleep, 0.6)
    await until(lambda: bool(told("the event loop turns again")))
    [blocked] = told("the event loop is blocked")
    assert "request_id" not in blocked
    assert blocked["place"]


async def test_when_the_whole_process_stood_still_that_is_told_and_nobody_is_said_to_block_the_loop(
    watched: Watchdog, told: Told
) -> None:
    """As after SIGSTOP: the loop turns late, but is not to blame for it."""

    async def stand_still() -> None:
        current.set(WORK)
        ctypes.PyDLL(None).usleep(900_000)  # with Python's lock held
        time.sleep(0.1)  # the thread runs again, and the loop does not yet

    await asyncio.sleep(0.2)
    await asyncio.create_task(stand_still())
    await asyncio.sleep(0.2)
    [line] = told("the process stood still: it was stopped, or a library held Python's lock")
    assert line["request_id"] == WORK.request_id
    assert 0.8 < line["seconds"] < 10
    assert not told("the event loop is blocked")


async def test_a_loop_that_turns_is_left_in_peace(watched: Watchdog, told: Told) -> None:
    for _ in range(10):
        await block(0.05)
        await asyncio.sleep(0.02)
    assert not told("the event loop is blocked")


async def test_a_run_is_not_told_of_again_and_again_but_another_one_is(watched: Watchdog, told: Told) -> None:
    for work in (WORK, WORK, WORK._replace(request_id="cd" * 16), WORK):
        await asyncio.create_task(working(0.4, work))
        await asyncio.sleep(0.15)
    assert [line["request_id"] for line in told("the event loop is blocked")] == [WORK.request_id, "cd" * 16]
    assert len(told("the event loop turns again")) == 2


async def test_a_run_that_blocks_for_long_is_told_of_although_it_was_just_before(
    watched: Watchdog, told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watchdog, "LONG_SECONDS", 0.8)
    for seconds in (0.4, 1.1):
        await asyncio.create_task(working(seconds))
        await asyncio.sleep(0.15)
    assert len(told("the event loop is blocked")) == 2


async def test_what_keeps_the_loops_work_begins_when_it_is_silent_and_ends_when_it_turns(told: Told) -> None:
    done = list[str]()

    async def keep() -> None:
        done.append("begun")
        try:
            await asyncio.Event().wait()
        finally:
            done.append("ended")

    watched = Watchdog(Keeper(0.3, keep))
    watched.start()
    await asyncio.sleep(0.4)
    assert done == []
    await block(0.6)
    assert done == ["begun"]
    await until(lambda: done == ["begun", "ended"])
    await block(0.6)
    await watched.close()
    assert done == ["begun", "ended"] * 2


async def test_a_keeper_that_fails_is_told_of_and_the_watch_goes_on(told: Told) -> None:
    async def keep() -> None:
        raise RuntimeError("no")

    watched = Watchdog(Keeper(0.1, keep))
    watched.start()
    await block(0.6)
    await until(lambda: bool(told("the event loop turns again")))
    assert len(told("the leases of a blocked worker cannot be kept")) == 1
    await watched.close()


async def test_it_ends_with_its_loop(watched: Watchdog) -> None:
    await watched.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "watchdog"]
