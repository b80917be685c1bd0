"""A pool of agent processes by itself, without a worker or a Redis."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections.abc import AsyncGenerator, AsyncIterator
from pathlib import Path
from typing import Any, cast

import pytest

from broker.errors import Misconfigured
from broker.events import Final
from broker.settings import Settings
from tests.kit.processes import AGENTS
from tests.kit.waiting import until
from worker import Run
from worker.agent import Agent
from worker.attempt import Encoded, WorkerLost
from worker.processes import execution as execution_module
from worker.processes.messages import WINDOW
from worker.processes.pool import Pool
from worker.processes.process import PING_SECONDS


def settings(**more: Any) -> Settings:
    return Settings(
        **{"agents": tuple(f"{name}=tests.kit.agents:{name}" for name in AGENTS), "agent_processes": 1, **more}
    )


def run(query: str = "", **parameters: Any) -> Run:
    return Run(request_id="ab" * 16, query=query, parameters=parameters)


def begin(agent: Agent, asked: Run) -> AsyncGenerator[Any, None]:
    return cast("AsyncGenerator[Any, None]", agent(asked))


@pytest.fixture
async def agents() -> AsyncIterator[dict[str, Agent]]:
    pool = Pool(settings())
    yield await pool.start()
    await pool.close()


async def test_an_agent_that_outruns_its_reader_waits(agents: dict[str, Agent], tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    events = begin(agents["counts"], run(count=500, mark=str(mark)))
    taken = [await anext(events)]
    await until(lambda: int(mark.read_text() or 0) >= WINDOW)
    await asyncio.sleep(0.3)
    assert int(mark.read_text()) == WINDOW
    taken += [event async for event in events if not isinstance(event, Final)]
    assert taken == [Encoded("token", f'{{"text":"{n} "}}') for n in range(500)]


async def test_an_agent_that_is_closed_while_it_waits_runs_its_finally(
    agents: dict[str, Agent], tmp_path: Path
) -> None:
    mark = tmp_path / "mark"
    events = begin(agents["steps"], run(count=500, mark=str(mark)))
    await anext(events)
    await asyncio.sleep(0.2)
    await events.aclose()
    assert Path(f"{mark}.1").read_text() == "closed"


async def test_runs_that_are_not_read_do_not_stop_the_others(agents: dict[str, Agent], tmp_path: Path) -> None:
    unread = [begin(agents["burst"], run(count=500, size=60_000)) for _ in range(20)]
    for events in unread:
        await anext(events)
    async with asyncio.timeout(20):
        assert [event async for event in begin(agents["echo"], run("one two"))][-1] == Final(answer="one two")
    for events in unread:
        await events.aclose()


async def test_a_new_run_goes_to_a_process_that_is_not_blocked_though_it_has_more(tmp_path: Path) -> None:
    pool = Pool(settings(agent_processes=2))
    agents = await pool.start()
    until_, release = tmp_path / "until", tmp_path / "release"
    until_.touch()
    blocks = begin(agents["blocks"], run(until=str(until_), release=str(release)))
    await anext(blocks)
    going_on = asyncio.create_task(anext(blocks))
    await asyncio.sleep(3 * PING_SECONDS)
    beside = [begin(agents["hangs"], run()) for _ in range(4)]
    async with asyncio.timeout(20):
        for events in beside:
            await anext(events)
    assert not going_on.done()
    release.touch()
    await going_on
    for events in (blocks, *beside):
        await events.aclose()
    await pool.close()


async def test_runs_that_begin_as_a_process_is_blocked_are_not_held_up_and_begin_only_once(tmp_path: Path) -> None:
    """No process is known to be blocked yet, and both are given runs."""
    pool = Pool(settings(agent_processes=2))
    agents = await pool.start()
    until_, release = tmp_path / "until", tmp_path / "release"
    until_.touch()
    blocks = begin(agents["blocks"], run(until=str(until_), release=str(release)))
    await anext(blocks)
    going_on = asyncio.create_task(anext(blocks))
    marks = [tmp_path / f"{n}" for n in range(6)]
    beside = [begin(agents["marks"], run(mark=str(mark))) for mark in marks]
    async with asyncio.timeout(20):
        await asyncio.gather(*(anext(events) for events in beside))
    assert not going_on.done()
    release.touch()
    await going_on
    for events in (blocks, *beside):
        await events.aclose()
    assert [mark.read_text() for mark in marks] == ["begun"] * 6
    await pool.close()


async def test_a_process_that_a_run_blocks_which_is_over_is_killed_and_another_one_takes_its_place(
    agents: dict[str, Agent], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(execution_module, "CLOSE_SECONDS", 0.3)
    blocks, beside = begin(agents["computes"], run(seconds=300)), begin(agents["hangs"], run())
    await anext(beside)
    await anext(blocks)
    async with asyncio.timeout(20):
        await blocks.aclose()
        with pytest.raises(WorkerLost):
            await anext(beside)
        assert [event async for event in begin(agents["echo"], run("again"))][-1] == Final(answer="again")
    assert "an agent process is blocked by a run that is over: it is killed" in caplog.messages


async def test_an_agent_that_does_not_end_is_waited_for_and_keeps_no_other_from_going_on(
    agents: dict[str, Agent], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(execution_module, "CLOSE_SECONDS", 0.3)
    stubborn = begin(agents["stubborn"], run())
    assert await anext(stubborn) == Encoded("token", '{"text":"I "}')
    closing = asyncio.create_task(stubborn.aclose())
    await asyncio.sleep(1)
    assert not closing.done()
    assert [event async for event in begin(agents["echo"], run("beside"))][-1] == Final(answer="beside")
    assert not caplog.messages
    closing.cancel()
    await asyncio.wait([closing])


async def test_no_run_is_given_to_a_process_that_has_ended_while_its_socket_is_still_open(
    agents: dict[str, Agent], tmp_path: Path
) -> None:
    release = tmp_path / "release"
    dies = begin(agents["dies"], run(how="fork", release=str(release)))
    assert [await anext(dies), await anext(dies)]
    dying = asyncio.create_task(anext(dies))
    await asyncio.sleep(0.7)
    assert not dying.done()
    assert [event async for event in begin(agents["echo"], run("again"))][-1] == Final(answer="again")
    release.touch()
    await asyncio.wait([dying])
    assert isinstance(dying.exception(), WorkerLost)


async def test_closing_the_pool_closes_the_agents(tmp_path: Path) -> None:
    pool = Pool(settings())
    agents = await pool.start()
    mark = tmp_path / "mark"
    events = begin(agents["slow"], run(mark=str(mark)))
    await anext(events)
    await pool.close()
    assert mark.read_text() == "closed"
    with pytest.raises(WorkerLost):
        await anext(events)


async def test_a_process_that_cannot_be_started_again_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    module = tmp_path / "changing.py"
    good = "import os\nfrom worker import Final\nasync def agent(run):\n    yield Final(answer=str(os.getpid()))\n"
    module.write_text(good)
    monkeypatch.chdir(tmp_path)
    pool = Pool(settings(agents=("changing=changing:agent",), default_agent="changing"))
    agents = await pool.start()
    [final] = [event async for event in begin(agents["changing"], run())]
    module.write_text("no Python")
    os.kill(int(final.answer), signal.SIGKILL)
    await until(lambda: "an agent process cannot be started" in caplog.messages)
    module.write_text(good)
    async with asyncio.timeout(20):
        [another] = [event async for event in begin(agents["changing"], run())]
    assert another.answer != final.answer
    await pool.close()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "changing has no function agent"),
        ("import os; os._exit(5)", "an agent process ended with code 5 while it loaded the agents"),
    ],
)
async def test_agents_that_cannot_be_loaded_are_refused_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, reason: str
) -> None:
    (tmp_path / "changing.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Misconfigured, match=reason):
        await Pool(settings(agents=("changing=changing:agent",), default_agent="changing")).start()


async def test_a_module_of_the_working_directory_does_not_hide_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("worker.py", "broker.py", "json.py"):
        (tmp_path / name).write_text("raise RuntimeError")
    monkeypatch.chdir(tmp_path)
    pool = Pool(settings(agents=(), default_agent="research"))
    assert set(await pool.start()) >= {"research"}
    await pool.close()


async def test_what_a_process_sends_and_nobody_understands_ends_it(
    agents: dict[str, Agent], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.ERROR)
    with pytest.raises(WorkerLost):
        [event async for event in begin(agents["babbles"], run())]
    assert "an agent process is not understood: it is killed" in caplog.messages
