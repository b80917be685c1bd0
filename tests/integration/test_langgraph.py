"""Graphs of LangGraph, registered as they are: their clients see runs like others."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.kit.fleet import reasons
from tests.kit.foreign import Stage, staged
from tests.kit.processes import wait_for
from tests.kit.scale import LONG

MODULE = "tests.kit.foreign_graphs"
GRAPHS = {name: f"{MODULE}:{name}" for name in ("graph", "remembers", "nested", "pipeline", "long")}
VARIANTS: list[dict[str, Any]] = [{"agent_processes": 1}, {}] if LONG else [{"agent_processes": 1}]


@pytest.fixture(scope="module", params=VARIANTS, ids=str)
def stage(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    with staged(tmp_path_factory.mktemp("graphs"), GRAPHS, **request.param) as made:
        yield made


def test_an_answer_comes_as_the_model_makes_it(stage: Stage) -> None:
    ended = stage.run("graph", "hello [[tokens=20]] [[pace=20]]")
    assert ended.run["answer"] == ended.text == " ".join(f"w{n}" for n in range(1, 21))
    assert len(ended.data("token")) > 5, "in pieces"
    assert ended.types == ["token", "final"]
    assert ended.run["usage"]["completion_tokens"] == 20


@pytest.mark.parametrize("graph", ["graph", "nested", "remembers"])
def test_reasoning_tools_and_what_a_node_writes_are_events(stage: Stage, graph: str) -> None:
    query = 'w [[reasoning=let me think]] [[say=done]] [[tool=weather {"city": "Bern"}]] [[tool=session {}]]'
    ended = stage.run(graph, query, session_id=f"of {graph}")
    assert "".join(data["text"] for data in ended.data("reasoning")) == "let me thinklet me think"
    assert ended.tools == [("weather", {"city": "Bern"}, "clear in Bern"), ("session", {}, f"of {graph}")]
    assert ended.data("data") == [{"name": "custom", "value": {"asked": "Bern"}}]
    assert ended.data("progress") == [{"percent": 50.0, "message": "Bern"}], "an event of ours is one"
    assert ended.types == [
        "reasoning", "token", *["tool_call"] * 2, "data", "progress", *["tool_result"] * 2, "reasoning", "token",
        "final"]  # fmt: skip
    assert (ended.text, ended.run["answer"]) == ("done\n\ndone", "done")


def test_a_graph_without_messages_is_given_the_query_and_its_own_inputs_as_parameters(stage: Stage) -> None:
    ended = stage.run("pipeline", "quiet", parameters={"loud": True})
    assert ended.data("data") == [{"name": "update", "value": {"node": "answer", "values": {"answer": "QUIET"}}}]
    assert ended.run["answer"] == '{"query": "quiet", "loud": true, "answer": "QUIET"}'


def test_an_answer_that_no_event_can_hold_is_told_as_tokens(stage: Stage) -> None:
    assert stage.run("long", "q").run["answer"] == "x" * 100_000


def test_earlier_turns_of_the_session_are_told_to_the_model(stage: Stage) -> None:
    for graph in ("graph", "remembers"):
        stage.run(graph, f"first of {graph} [[say=one]]", session_id=f"told {graph}")
        stage.run(graph, f"second of {graph} [[say=two]]", session_id=f"told {graph}")
        [asked] = stage.stub.journal(f"second of {graph} [[")
        first, answer, second = asked["messages"]
        assert (first["role"], first["content"]) == ("user", f"first of {graph} [[say=one]]")
        assert (answer["role"], answer["content"][0]["text"]) == ("assistant", "one")
        assert (second["role"], second["content"]) == ("user", f"second of {graph} [[say=two]]")


@pytest.mark.parametrize(
    ("query", "parameters", "code"),
    [
        ("[[tool*=session {}]]", {"recursion_limit": 3}, "too_many_rounds"),
        ("[[fail=401]]", {}, "model_unauthorized"),
        ("[[fail=404]]", {}, "model_not_found"),
        ("[[fail=context]]", {}, "model_context_too_long"),
        ("[[fail=empty]]", {}, "model_empty"),
        ('[[tool=delete {"path": "/"}]]', {}, "agent_interrupted"),
        ("q", {"recursion_limit": 26}, "invalid_parameter"),
        ("q", {"model": "other"}, "invalid_parameter"),
        ("q", {"messages": []}, "invalid_parameter"),
    ],
)
def test_what_goes_wrong_has_a_stable_code(stage: Stage, query: str, parameters: dict[str, Any], code: str) -> None:
    error = stage.run("graph", query, status="failed", parameters=parameters).run["error"]
    assert error["code"] == code
    assert "a-key-of-the-tests" not in error["message"]


def test_a_cancel_ends_the_model_and_the_tool_at_once(stage: Stage, tmp_path: Path) -> None:
    """P25."""
    stage.cancelled_at_once("graph", tmp_path / "mark")


def test_a_run_goes_on_behind_its_tools_where_messages_are_all_of_its_state(stage: Stage, tmp_path: Path) -> None:
    """A graph with a checkpointer of its own begins anew."""
    marks = {graph: tmp_path / graph for graph in ("graph", "remembers")}
    queries = {graph: f"w {graph} [[tool=session {{}}]]" for graph in marks}
    runs = {
        graph: stage.submit(
            graph, f'{queries[graph]} [[say=done]] [[tool2=waits {{"mark": "{mark}"}}]]', session_id="s"
        )
        for graph, mark in marks.items()
    }
    wait_for(lambda: all(mark.exists() for mark in marks.values()))
    stage.another_worker()
    for mark in marks.values():
        Path(f"{mark}.go").touch()
    for graph, asked, sessions in (("graph", 4, 1), ("remembers", 5, 2)):
        ended = stage.ended(runs[graph])
        assert reasons(ended.log) == ["started", "worker_lost"]
        assert marks[graph].read_text().count("called") == 2, "what was under way is called again"
        assert [(tool, result) for tool, _, result in ended.tools] == [("session", "s"), ("waits", "waited")]
        assert sum(entry.type == "tool_call" and '"session"' in entry.data for entry in ended.log) == sessions
        assert ended.run["answer"] == "done"
        assert len(stage.stub.journal(queries[graph])) == asked


# -- what no client sees, in a process of its own: langchain-openai keeps connections for ever -------------------------

SCRIPT = """
import asyncio, json, sys
from broker.settings import Settings
from worker import Run
from worker.agents import load

graph = load(Settings(agents=(f"graph={sys.argv[1]}",)))["graph"]

async def kinds(query, most):
    events, found = graph(Run(request_id="5" * 32, query=query)), []
    async for event in events:
        found.append(type(event).__name__)
        if len(found) == most:
            break
    await events.aclose()
    return found, len(asyncio.all_tasks())

async def main():
    print(json.dumps([await kinds(*asked) for asked in json.loads(sys.argv[2])]))

asyncio.run(main())
"""


def seen(stage: Stage, *asked: tuple[str, int]) -> list[tuple[list[str], int]]:
    """Of each (query, how many events are taken at most): their kinds, and the tasks that are left at the end."""
    command = [sys.executable, "-c", SCRIPT, f"{MODULE}:graph", json.dumps(asked)]
    environment = {**os.environ, **stage.stub.environment}
    told = subprocess.run(command, env=environment, capture_output=True, check=True, timeout=60)
    return [(kinds, left) for kinds, left in json.loads(told.stdout)]


def test_there_is_no_checkpoint_of_what_json_cannot_carry(stage: Stage) -> None:
    (session, _), (sketch, _) = seen(stage, ("n [[tool=session]]", 99), ("n [[tool=sketch]]", 99))
    assert session[:3] == ["ToolCall", "ToolResult", "Checkpoint"] and session[-1] == "Final"
    assert sketch[:2] == ["ToolCall", "ToolResult"] and "Checkpoint" not in sketch and sketch[-1] == "Final"


def test_a_graph_that_is_closed_leaves_no_task_behind(stage: Stage) -> None:
    """In the middle of the model's answer, or of a tool."""
    queries = ["[[tokens=10000]] [[pace=50]]", '[[say=x]] [[tool=waits {"mark": "/dev/null"}]]']
    for kinds, left in seen(stage, *((query, 2) for query in queries)):
        assert (kinds[0], left) == ("Token", 1)
