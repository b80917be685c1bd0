"""Tasks of agents: what would end the event loop ends the task."""

from __future__ import annotations

import asyncio
import gc
import inspect
from collections.abc import AsyncIterator

import pytest

from worker.tasks import guard


@pytest.fixture(autouse=True)
async def guarded() -> AsyncIterator[None]:
    loop = asyncio.get_running_loop()
    guard(loop)
    yield
    loop.set_task_factory(None)


@pytest.mark.parametrize("raised", [SystemExit, KeyboardInterrupt])
async def test_what_would_end_the_loop_fails_the_task(raised: type[BaseException]) -> None:
    async def raises(seconds: float) -> None:
        await asyncio.sleep(seconds)
        raise raised("why")

    for task in (asyncio.create_task(raises(0)), asyncio.create_task(raises(0.01), name="named")):
        with pytest.raises(RuntimeError, match=f"a task raised {raised.__name__}") as failed:
            await task
        assert type(failed.value.__cause__) is raised
    assert task.get_name() == "named"


async def test_what_a_task_raises_when_it_is_cancelled_does_not_end_the_loop() -> None:
    async def raises() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            raise SystemExit

    task = asyncio.create_task(raises())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(RuntimeError):
        await task


async def test_other_tasks_are_as_ever() -> None:
    async def answers() -> int:
        await asyncio.sleep(0)
        return 1

    async def waits() -> None:
        await asyncio.Event().wait()

    assert sum(await asyncio.gather(answers(), asyncio.wait_for(answers(), 5))) == 2
    waiting = asyncio.create_task(waits())
    assert inspect.getcoroutinestate(waiting.get_coro()) == inspect.CORO_CREATED  # type: ignore[arg-type]
    waiting.cancel()  # before it has begun, of which Python is to have nothing to warn
    with pytest.raises(asyncio.CancelledError):
        await waiting
    del waiting
    gc.collect()
    failing = asyncio.create_task(asyncio.wait_for(waits(), 0.01))
    with pytest.raises(TimeoutError):
        await failing
