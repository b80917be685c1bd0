"""Calls that block: none waits for another that hangs, and nothing at its end does."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from tests.kit.waiting import until
from worker import threads
from worker.threads import Threads

MOST = 4


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> Iterator[Threads]:
    monkeypatch.setattr(threads, "MOST_THREADS", MOST)
    yield Threads("mine")
    assert not busy()


def busy() -> int:
    return sum(thread.name == "mine" and thread.daemon for thread in threading.enumerate())


async def test_each_call_has_a_thread_up_to_a_bound_and_the_others_their_turn(few: Threads) -> None:
    loop, go = asyncio.get_running_loop(), threading.Event()
    loop.set_default_executor(few)
    calls = [asyncio.create_task(asyncio.to_thread(go.wait, 30)) for _ in range(MOST)]
    asked: list[int] = []
    waiting, cancelled = (asyncio.create_task(asyncio.to_thread(asked.append, n)) for n in (1, 2))
    await until(lambda: busy() == MOST)
    cancelled.cancel()
    await asyncio.sleep(0.05)
    assert not waiting.done()
    go.set()
    assert await asyncio.gather(*calls) == [True] * MOST
    await waiting
    await until(lambda: not busy())
    assert asked == [1], "what was cancelled before its turn has none"
    assert await asyncio.to_thread(lambda: "again") == "again"
    await until(lambda: not busy())


@pytest.mark.parametrize("raised", [ValueError, SystemExit])
async def test_what_a_call_raises_is_raised(few: Threads, raised: type[BaseException]) -> None:
    def raises() -> None:
        raise raised("why")

    with pytest.raises(raised, match="why"):
        await asyncio.get_running_loop().run_in_executor(few, raises)
    await until(lambda: not busy())


async def test_a_stop_iteration_does_not_hang(few: Threads) -> None:
    with pytest.raises(RuntimeError, match="StopIteration"):
        await asyncio.get_running_loop().run_in_executor(few, next, iter(()))
    await until(lambda: not busy())


HANGS = """
import asyncio, threading
from worker.threads import Threads
async def main():
    asyncio.get_running_loop().set_default_executor(Threads("mine"))
    calls = [asyncio.create_task(asyncio.to_thread(threading.Event().wait)) for _ in range(3)]
    await asyncio.sleep(0.1)
    print("left")
asyncio.run(main())
"""


def test_a_program_ends_although_its_calls_do_not() -> None:
    ended = subprocess.run([sys.executable, "-c", HANGS], capture_output=True, text=True, check=True, timeout=60)
    assert (ended.stdout, ended.stderr) == ("left\n", "")
