"""Agents of the OpenAI Agents SDK, registered as they are: their clients see runs like others."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from agents import set_default_openai_client
from openai import AsyncOpenAI

from broker.settings import Settings
from tests.kit.fleet import reasons
from tests.kit.foreign import ROUNDS, Stage, staged
from tests.kit.processes import wait_for
from tests.kit.scale import LONG
from tests.kit.waiting import until
from worker import Run
from worker.agent import Agent
from worker.agents import load

MODULE = "tests.kit.foreign_agents"
AGENTS = {name: f"{MODULE}:{name}" for name in ("helper", "typed", "stops")}
WEATHER = 'weather {"city": "Bern"}'
VARIANTS: list[dict[str, Any]] = [{}, {"agent_processes": 2}] if LONG else [{}]


@pytest.fixture(scope="module", params=VARIANTS, ids=str)
def stage(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    with staged(tmp_path_factory.mktemp("agents"), AGENTS, **request.param) as made:
        yield made


def test_an_answer_comes_as_the_model_makes_it(stage: Stage) -> None:
    ended = stage.run("helper", "hello [[tokens=20]] [[pace=20]]")
    assert ended.run["answer"] == ended.text == " ".join(f"w{n}" for n in range(1, 21))
    assert len(ended.data("token")) > 5, "in pieces"
    assert ended.types == ["token", "final"]
    usage = ended.run["usage"]
    assert (usage["rounds"], usage["completion_tokens"]) == (1, 20)
    assert usage["prompt_tokens"] > 0


def test_reasoning_tools_and_their_results_are_events(stage: Stage) -> None:
    ended = stage.run(
        "helper", 'w [[reasoning=let me think]] [[say=done]] [[tool=weather {"city": "Bern"}]] [[tool=session {}]]',
        session_id="mine",
    )  # fmt: skip
    assert "".join(data["text"] for data in ended.data("reasoning")) == "let me thinklet me think"
    assert ended.tools == [
        ("weather", {"city": "Bern"}, {"city": "Bern", "sky": "clear"}),
        ("session", {}, "mine"),
    ]
    assert ended.types == [
        "reasoning",
        "token",
        *["tool_call"] * 2,
        *["tool_result"] * 2,
        "reasoning",
        "token",
        "final",
    ]
    assert (ended.text, ended.run["answer"]) == ("done\n\ndone", "done"), "what its runner says is the answer"
    assert ended.run["usage"]["rounds"] == 2


def test_a_tool_that_fails_is_told_to_the_model_and_ends_nothing(stage: Stage) -> None:
    [(_, _, result)] = stage.run("helper", 'f [[tool=fails {"text": "x"}]]').tools
    assert "error" in result


def test_a_handoff_is_told_and_the_other_agent_answers(stage: Stage) -> None:
    ended = stage.run("helper", 'h [[tool=transfer_to_billing]] [[tool2=weather {"city": "Bern"}]] [[say@billing=b]]')
    assert ended.data("data") == [{"name": "handoff", "value": {"from": "Helper", "to": "Billing"}}]
    assert [tool for tool, _, _ in ended.tools] == ["weather"]
    assert ended.types == ["data", "token", "tool_call", "tool_result", "token", "final"]
    assert ended.run["answer"] == "b"


def test_a_typed_answer_is_json(stage: Stage) -> None:
    assert stage.run("typed", '[[say={"city":"Bern","degrees":3}]]').run["answer"] == '{"city": "Bern", "degrees": 3.0}'


def test_a_result_that_ends_the_run_is_the_answer(stage: Stage) -> None:
    ended = stage.run("stops", 's [[tool=weather {"city": "Bern"}]]')
    assert ended.run["answer"] == "{'city': 'Bern', 'sky': 'clear'}", "the SDK's text of it"
    assert ended.types == ["tool_call", "tool_result", "final"]


def test_earlier_turns_of_the_session_are_told_to_the_model(stage: Stage) -> None:
    stage.run("helper", "first [[say=one]]", session_id="told")
    stage.run("helper", "second [[say=two]]", session_id="told")
    [asked] = stage.stub.journal("second [[")
    assert [(message["role"], message["content"]) for message in asked["messages"]] == [
        ("system", "You are the helper."),
        ("user", "first [[say=one]]"),
        ("assistant", "one"),
        ("user", "second [[say=two]]"),
    ]


@pytest.mark.parametrize(
    ("query", "parameters", "code"),
    [
        ("[[tool*=session {}]]", {"max_turns": 2}, "too_many_rounds"),
        ("my secret", {}, "guardrail"),
        ("[[tool=no_such_tool {}]]", {}, "model_broken"),
        ("[[fail=refusal]]", {}, "model_content_filter"),
        ("[[fail=401]]", {}, "model_unauthorized"),
        ("[[fail=context]]", {}, "model_context_too_long"),
        ("[[fail=empty]]", {}, "model_empty"),
        ('[[tool=delete {"path": "/"}]]', {}, "agent_interrupted"),
        ("q", {"max_turns": 0}, "invalid_parameter"),
        ("q", {"max_turns": ROUNDS + 1}, "invalid_parameter"),
        ("q", {"model": "other"}, "invalid_parameter"),
    ],
)
def test_what_goes_wrong_has_a_stable_code(stage: Stage, query: str, parameters: dict[str, Any], code: str) -> None:
    error = stage.run("helper", query, status="failed", parameters=parameters).run["error"]
    assert error["code"] == code
    assert "a-key-of-the-tests" not in error["message"]


def test_what_the_library_does_not_explain_is_in_the_log_of_the_worker_only(stage: Stage) -> None:
    ended = stage.run("typed", "[[tokens=3]] [[fail=malformed after=1]]", status="failed")
    assert (ended.run["error"]["code"], ended.text) == ("agent_failed", "w1")
    wait_for(lambda: bool(stage.worker.logged("an agent failed", request_id=ended.run["request_id"])))


def test_a_cancel_ends_the_model_and_the_tool_at_once(stage: Stage, tmp_path: Path) -> None:
    """P25."""
    stage.cancelled_at_once("helper", tmp_path / "mark")


def test_a_run_goes_on_behind_the_tools_that_had_ended(stage: Stage, tmp_path: Path) -> None:
    """Its worker dies while the third turn is under way, in the agent to which it was handed."""
    mark, query = tmp_path / "mark", "w [[tool=session {}]] [[tool2=transfer_to_billing]]"
    request_id = stage.submit("helper", f'{query} [[say=done]] [[tool3=waits {{"mark": "{mark}"}}]]', session_id="s")
    wait_for(mark.exists)
    stage.another_worker()
    Path(f"{mark}.go").touch()
    ended = stage.ended(request_id)
    assert reasons(ended.log) == ["started", "worker_lost"]
    assert mark.read_text().count("called") == 2, "what was under way is called again"
    assert [(tool, result) for tool, _, result in ended.tools] == [("session", "s"), ("waits", "waited")]
    assert sum(entry.type == "tool_call" and '"session"' in entry.data for entry in ended.log) == 1
    assert ended.run["answer"] == "done"
    asked = stage.stub.journal("w [[tool=session {}]]")
    assert len(asked) == 5, "the first two turns are not asked for again"
    assert asked[-1]["messages"][0]["content"] == "You are billing."
    assert ended.run["usage"]["rounds"] == 4


# -- in this process --------------------------------------------------------------------------------------------------


@pytest.fixture
async def helper(stage: Stage) -> AsyncIterator[Agent]:
    """With a client of its own: the SDK's has its connections in the event loop of the test before."""
    client = AsyncOpenAI(base_url=stage.stub.url, api_key="none")
    set_default_openai_client(client)
    yield load(Settings(agents=(f"helper={MODULE}:helper",)))["helper"]
    await client.close()


def run(query: str) -> Run:
    return Run(request_id="5" * 32, query=query)


async def test_a_checkpoint_comes_behind_the_last_result_of_a_round(helper: Agent) -> None:
    """It holds all of them: what came behind an earlier one would be void, and told by nobody."""
    query = 'c [[tool=weather {"city": "Bern"}]] [[tool=session {}]] [[tool2=transfer_to_billing]] [[say=x]]'
    kinds = [type(event).__name__ async for event in helper(run(query))]
    rounds = ["Token", "ToolCall", "ToolCall", "ToolResult", "ToolResult", "Checkpoint", "Token", "Data", "Checkpoint"]
    assert kinds == [*rounds, "Token", "Final"]


@pytest.mark.parametrize(
    ("name", "tool"),
    [
        ("stops", 'weather {"city": "Bern"}'),
        ("forced", 'weather {"city": "Bern"}'),
        ("indirect", "transfer_to_billing"),
    ],
)
@pytest.mark.usefixtures("helper")
async def test_there_is_no_checkpoint_where_a_later_attempt_would_go_on_otherwise(name: str, tool: str) -> None:
    """A result that ends the run, a call that is forced once, an agent that its name does not lead to."""
    agent = load(Settings(agents=(f"{name}={MODULE}:{name}",)))[name]
    kinds = [type(event).__name__ async for event in agent(run(f"n [[tool={tool}]]"))]
    assert "Checkpoint" not in kinds
    assert {"ToolResult", "Data"} & set(kinds) and kinds[-1] == "Final"


@pytest.mark.parametrize("query", ["[[tokens=10000]] [[pace=50]]", '[[say=x]] [[tool=waits {"mark": "/dev/null"}]]'])
async def test_an_agent_that_is_closed_leaves_no_task_behind(helper: Agent, query: str) -> None:
    events = helper(run(query))
    seen = [(await anext(events)).__class__.__name__ for _ in range(2)]
    await events.aclose()  # type: ignore[attr-defined]
    assert seen[0] == "Token"
    await until(lambda: asyncio.all_tasks() == {asyncio.current_task()})


async def test_an_agent_that_is_closed_while_nobody_takes_its_text_ends_its_model(stage: Stage, helper: Agent) -> None:
    events = helper(run(f"unread [[say={' '.join(['x' * 2000] * 300)}]] [[pace=40]]"))
    await anext(events)
    await asyncio.sleep(2)  # by then more has come than is read ahead
    await events.aclose()  # type: ignore[attr-defined]
    await asyncio.to_thread(stage.stub.until_ended, "disconnected", "unread [[")
