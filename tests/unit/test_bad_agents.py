"""Agents at their worst: how they end is their own affair, and no reason for a run to hang or a worker to end."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import ClassVar

import pytest
from redis.asyncio import Redis

from broker.runs import log
from tests.kit.runs import running
from tests.unit.test_attempt import Attempts, attempts  # noqa: F401  (a fixture)
from worker import Checkpoint, Event, Final, Run, Token
from worker import attempt as attempt_module

Events = AsyncIterator[Event | Checkpoint]


class Strange(BaseException):
    pass


@pytest.mark.parametrize(
    "raised", [GeneratorExit, KeyboardInterrupt, SystemExit, asyncio.CancelledError, Strange, StopAsyncIteration]
)
async def test_whatever_an_agent_raises_ends_its_run_and_nothing_else(
    attempts: Attempts,  # noqa: F811
    raised: type[BaseException],
) -> None:
    async def agent(run: Run) -> Events:
        yield Token(text="so far")
        raise raised("a secret")

    ended = await attempts.run(agent)
    assert ended.error["code"] == "agent_failed"
    assert "secret" not in json.dumps(ended.error)


async def test_an_answer_stands_although_the_cleanup_fails(attempts: Attempts) -> None:  # noqa: F811
    async def agent(run: Run) -> Events:
        try:
            yield Final(answer="right")
        finally:
            raise RuntimeError("while cleaning up")

    assert (await attempts.run(agent)).final["answer"] == "right"


async def test_an_answer_does_not_wait_for_the_cleanup(
    redis: Redis,
    attempts: Attempts,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(attempt_module, "CLOSE_SECONDS", 3.0)
    cleaning, may_end = asyncio.Event(), asyncio.Event()

    async def agent(run: Run) -> Events:
        try:
            yield Final(answer="right")
        finally:
            cleaning.set()
            await may_end.wait()

    lease = await running(attempts.scripts)
    executing, _ = attempts.begin(lease, agent)
    async with asyncio.timeout(10):
        await cleaning.wait()
    assert (await log.read_all(redis, lease.request_id))[-1].type == "final"
    assert not executing.done()
    may_end.set()
    await attempts.ended(lease, executing)


async def test_an_agent_that_yields_nothing_but_checkpoints_stops_neither_the_loop_nor_fills_the_memory(
    attempts: Attempts,  # noqa: F811
) -> None:
    turns = 0

    async def count() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    async def agent(run: Run) -> Events:
        for n in range(5_000):
            yield Checkpoint(state=n)
        yield Final(answer="done")

    counting = asyncio.create_task(count())
    ended = await attempts.run(agent)
    counting.cancel()
    assert ended.final["answer"] == "done"
    assert ended.record["checkpoint"] == "4999"
    assert turns >= 5_000


async def test_an_event_cannot_have_a_type_of_its_own(attempts: Attempts) -> None:  # noqa: F811
    class Forged(Token):
        type: ClassVar[str] = "x\nid: 9-9"

    async def agent(run: Run) -> Events:
        yield Forged(text="forged")

    ended = await attempts.run(agent)
    assert ended.error["code"] == "invalid_event"
    assert [entry.type for entry in ended.entries] == ["start", "attempt", "error"]
