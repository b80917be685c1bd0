"""Agents of other libraries: how they are known, and what is the same for all of them."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import AsyncGenerator
from datetime import date
from typing import Any, cast

import httpx
import pytest
from openai import APIConnectionError, APIError, APITimeoutError, NotFoundError
from pydantic import BaseModel

from broker.errors import Misconfigured
from broker.events import Data, Event, Final, Reasoning, Token, ToolCall, ToolResult
from broker.settings import Settings
from tests.kit.foreign_graphs import kept
from worker.agent import MAX_EVENT_BYTES, Checkpoint, Run
from worker.agents import load
from worker.agents.foreign.telling import answer_of, ending, joined, shown
from worker.agents.joiner import FREELY
from worker.models.raised import model_error

AGENT, GRAPH = "tests.kit.foreign_agents:helper", "tests.kit.foreign_graphs:graph"


def python(code: str, **environment: str) -> str:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("BROKER_", "OPENAI_"))}
    done = subprocess.run(
        [sys.executable, "-c", code], env={**inherited, **environment}, capture_output=True, text=True, check=True
    )
    return done.stdout


LOADED = """
import sys
from broker.settings import Settings
from worker.agents import load
load(Settings())
"""


def test_a_worker_without_such_an_agent_does_without_their_libraries() -> None:
    told = python(f"{LOADED}print(*sys.modules)", BROKER_AGENTS="echo=tests.kit.agents:echo")
    assert not {"agents", "langgraph", "langchain_core"} & set(told.split())


@pytest.mark.parametrize(("said", "traced"), [(None, False), ("1", False), ("0", True)])
def test_nothing_is_traced_unless_the_environment_says_so(said: str | None, traced: bool) -> None:
    """The SDK would send what each run said to OpenAI, wherever the model is."""
    code = f"{LOADED}from agents.tracing import trace\nprint(type(trace('x')).__name__)"
    environment = {} if said is None else {"OPENAI_AGENTS_DISABLE_TRACING": said}
    told = python(code, BROKER_AGENTS=f"helper={AGENT}", OPENAI_API_KEY="none", **environment)
    assert told.split() == ["TraceImpl" if traced else "NoOpTrace"]


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("tests.kit.foreign_graphs:react", "a graph that is not compiled yet: register what its compile() returns"),
        ("tests.kit.foreign_graphs:nowhere", "takes other, and neither messages nor query"),
        ("tests.kit.foreign_agents:no_such", "tests.kit.foreign_agents has no function no_such"),
        ("tests.kit.foreign_agents:weather", "is a FunctionTool, which is no agent"),
    ],
)
def test_what_cannot_be_an_agent_is_refused_and_says_why(target: str, words: str) -> None:
    with pytest.raises(Misconfigured, match=r"^BROKER_AGENTS: mine: ") as refused:
        load(Settings(agents=(f"mine={target}",)))
    assert words in str(refused.value)


def test_an_agent_whose_library_is_not_there_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or is too old: its module is there, and lacks what is needed."""
    monkeypatch.delitem(sys.modules, "worker.agents.foreign.langgraph", raising=False)
    monkeypatch.setitem(sys.modules, "langgraph.errors", None)
    with pytest.raises(Misconfigured, match="foreign_graphs:graph is of a library that cannot be used"):
        load(Settings(agents=(f"mine={GRAPH}",)))


# -- what they tell ---------------------------------------------------------------------------------------------------


async def all_of(*items: object, attempt: int = 1) -> list[Any]:
    """What `joined` makes of them, one after the other; an exception is raised in its turn."""
    told: list[Any] = []

    async def events() -> AsyncGenerator[Event | Checkpoint, None]:
        for item in items:
            if isinstance(item, Exception):
                raise item
            yield item  # type: ignore[misc]
            await asyncio.sleep(0)

    try:
        async for event in joined(events(), attempt):
            told.append(event)
    except ValueError as error:
        told.append(str(error))
    return told


async def test_text_keeps_its_place_between_other_events() -> None:
    events = [Token(text="a"), Data(name="x"), Checkpoint(state=1), Reasoning(text="b"), Token(text="c"), Final()]
    assert await all_of(*events) == events


async def test_what_was_said_before_a_failure_is_told_before_it() -> None:
    assert await all_of(Token(text="a"), ValueError("why")) == [Token(text="a"), "why"]


async def test_a_log_has_room_for_any_number_of_tokens() -> None:
    """Text that waits for more is told before what comes behind it, and at the end."""
    many = [Token(text="x")] * (FREELY + 2000)
    told = await all_of(*many, Data(name="here"), Reasoning(text="y"), Token(text="z"))
    assert len(told) < FREELY + 100
    [at] = [number for number, event in enumerate(told) if isinstance(event, Data)]
    assert sum(len(event.text) for event in told[:at]) == len(many)
    assert sorted(event.text for event in told[at + 1 :]) == ["y", "z"]


async def test_leaving_closes_what_is_told() -> None:
    closed = asyncio.Event()

    async def events() -> AsyncGenerator[Event | Checkpoint, None]:
        try:
            yield Token(text="a")
            await asyncio.Event().wait()
        finally:
            closed.set()

    told = joined(events(), 1)
    await anext(told)
    await told.aclose()
    assert closed.is_set()


class Typed(BaseModel):
    day: date


def test_an_answer_is_a_text_or_json() -> None:
    assert answer_of("as it is") == "as it is"
    assert answer_of(None) == ""
    assert answer_of(Typed(day=date(2026, 1, 2))) == '{"day": "2026-01-02"}'
    assert answer_of({"é": [float("nan"), object]}) == '{"é": [null, "<class \'object\'>"]}'


def test_an_answer_that_no_event_can_hold_is_told_as_tokens_or_left_to_them() -> None:
    long = "é" * MAX_EVENT_BYTES
    *tokens, end = ending(long, {"n": 1}, told=False)
    assert "".join(token.text for token in tokens if isinstance(token, Token)) == long
    assert end == Final(usage={"n": 1})
    assert list(ending(long, {}, told=True)) == [Final()]
    assert list(ending("short", {}, told=True)) == [Final(answer="short")]


def test_what_json_cannot_carry_is_shown_as_text() -> None:
    assert shown({1, 2}) == [1, 2]
    assert shown(float("nan")) == "nan"
    assert len(shown("x" * 10**6)) < MAX_EVENT_BYTES


# -- what they raise --------------------------------------------------------------------------------------------------

REQUEST: Any = httpx.Request("POST", "http://127.0.0.1/v1/responses")


def answered(status: int, code: str) -> dict[str, Any]:
    return {"response": httpx.Response(status, request=REQUEST), "body": {"code": code, "message": "no such model"}}


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (NotFoundError("no", **answered(404, "model_not_found")), "model_not_found"),
        (APITimeoutError(request=REQUEST), "model_stalled"),
        (APIConnectionError(request=REQUEST), "model_unavailable"),
        (APIError("no", request=REQUEST, body={"code": "context_length_exceeded"}), "model_context_too_long"),
        (httpx.ReadError("cut"), "model_broken"),
        (RuntimeError("mine"), None),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_a_model_servers_failures_have_the_codes_of_our_own_agents(error: Exception, code: str | None) -> None:
    failed = model_error(error, "m")
    assert (failed and failed.code) == code


def test_a_key_that_a_server_repeats_is_not_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-a-real-secret")
    body = {"message": "bad sk-a-real-secret"}
    error = APIError("no", request=REQUEST, body=body)
    assert "sk-a-real-secret" not in str(model_error(error, "m"))


async def test_what_an_agents_own_code_cancels_is_its_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    agents = load(Settings(agents=("mine=tests.kit.foreign_agents:cancels",)))
    with pytest.raises(RuntimeError, match="the agent's code raised CancelledError"):
        async for event in agents["mine"](Run(request_id="r", query="q")):
            assert event == Token(text="")


async def told_by(target: str, query: str) -> list[Any]:
    """The events of one run, on this event loop."""
    agent = load(Settings(agents=(f"mine={target}",)))["mine"]
    return [event async for event in agent(Run(request_id="r", query=query))]


@pytest.mark.parametrize("graph", ["calls", "calls_inside"])
@pytest.mark.parametrize("ids", ["a,b", "a,a,a", ","])
async def test_each_call_of_a_tool_is_told_once_whatever_its_id(graph: str, ids: str) -> None:
    told = await told_by(f"tests.kit.foreign_graphs:{graph}", ids)
    expected: list[Event] = []
    for n, id in enumerate(ids.split(",")):
        expected.append(ToolCall(id=id, tool="echo", args={"n": n}))
        expected.append(ToolResult(id=id, tool="echo", result=str(n)))
    assert [event for event in told if isinstance(event, (ToolCall, ToolResult))] == expected
    assert told[-1].answer == "done"


async def test_a_checkpointer_keeps_nothing_of_a_run_that_has_ended_or_was_left() -> None:
    agent = load(Settings(agents=("mine=tests.kit.foreign_graphs:calls_kept",)))["mine"]
    async for event in (told := cast("AsyncGenerator[Any, None]", agent(Run(request_id="left", query="a,b,c")))):
        assert isinstance(event, ToolCall)
        assert kept.storage, "a thread of its own, while it runs"
        break
    await told.aclose()
    await told_by("tests.kit.foreign_graphs:calls_kept", "a,b,c")
    assert not kept.storage and not kept.writes


async def test_a_checkpointer_that_cannot_forget_a_run_ends_none_and_is_named(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def refuses(thread: str) -> None:
        raise NotImplementedError

    monkeypatch.setattr(kept, "adelete_thread", refuses)
    assert (await told_by("tests.kit.foreign_graphs:calls_kept", "a"))[-1].answer == "done"
    [record] = [record for record in caplog.records if "has not deleted the thread" in record.message]
    assert record.__dict__["thread_id"] == "r-1"


@pytest.mark.parametrize(("graph", "left"), [("both", "left answer"), ("one_breaks_off", "l")])
async def test_what_two_branches_say_at_once_is_told_one_after_the_other(graph: str, left: str) -> None:
    told = await told_by(f"tests.kit.foreign_graphs:{graph}", "q")
    text = "".join(event.text for event in told if isinstance(event, Token))
    assert sorted(text.split("\n\n")) == [left, "right one"]
