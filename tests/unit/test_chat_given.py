"""What a run of `chat` brings of its conversation, and the calls that it leaves to its client."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from broker.events import Error, Final, ToolCall, ToolResult, dumps
from tests.unit.test_chat import RUN, SETTINGS, Bench, Scripted, bench, count, end, said
from worker import Checkpoint, Turn
from worker.agents.conversation import opening
from worker.agents.given import Given
from worker.models.model import Call, Text
from worker.models.parameters import BadParameter

__all__ = ["bench"]

FUNCTION = {"name": "open_door", "description": "Opens it.", "parameters": {"type": "object", "properties": {"n": {}}}}
OPEN = Call(id="c1", name="open_door", arguments='{"n": 1}')
CALLED = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "open_door", "arguments": '{"n": 1}'}}],
}
OPENED = {"role": "tool", "tool_call_id": "c1", "content": "open"}


def given(**parameters: Any) -> Given:
    return Given.of(parameters, ["count"])


def test_a_conversation_has_its_instructions_and_what_was_said_around_the_query() -> None:
    said = {"role": "user", "content": "Hello."}
    turn = Turn(request_id="1", agent="chat", query="zero?", answer="0", created_at=1)
    brought = given(instructions="In French.", before=[said], after=[CALLED, OPENED])
    assert opening("Be brief.", [turn], "q", brought) == [
        {"role": "system", "content": "Be brief.\n\nIn French."},
        {"role": "user", "content": "zero?"},
        {"role": "assistant", "content": "0"},
        said,
        {"role": "user", "content": "q"},
        CALLED,
        OPENED,
    ]


def test_the_turn_that_is_gone_on_with_is_not_told_twice() -> None:
    turns = [Turn(request_id=n, agent="chat", query="q", answer=n, created_at=1) for n in ("1", "2")]
    assert [message["content"] for message in opening(None, turns, "q", given(after=[CALLED, OPENED]))] == [
        "q", "1", "q", None, "open"
    ]  # fmt: skip
    assert len(opening(None, turns, "q", given())) == 5
    before = [{"role": "user", "content": "q"}, CALLED, OPENED]
    assert [message["content"] for message in opening(None, turns, "more", given(before=before))] == [
        "q", "1", "q", None, "open", "more"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({"instructions": 1}, "instructions must be a text"),
        ({"before": "x"}, "before must be a list of messages"),
        ({"before": [{"role": "system", "content": "x"}]}, "before must be"),
        ({"after": [{"role": "tool", "content": "x"}]}, "after must be"),
        ({"after": [{**CALLED, "tool_calls": [{"id": "c1"}]}]}, "after must be"),
        ({"functions": "x"}, "functions: It must be a list"),
        ({"functions": [{"name": "a b"}]}, r"functions\[0\].name: It must have 1 to 64"),
        ({"functions": [{"name": "count"}]}, r"functions\[0\].name: There is another count"),
    ],
)
def test_what_is_wrong_is_named(parameters: dict[str, Any], words: str) -> None:
    with pytest.raises(BadParameter, match=words):
        given(**parameters)


async def test_a_call_of_the_clients_function_ends_the_run_and_is_left_to_it(bench: Bench) -> None:
    model = Scripted([Text(text="I open it."), OPEN, end("tool_calls", prompt=3)])
    items = await bench.items(model, replace(RUN, parameters={"functions": [FUNCTION]}))
    assert [spec.name for spec in model.asked[0][1]] == ["count", "open_door"]
    assert said(items) == "I open it."
    assert [(item.id, item.tool, item.args) for item in items if isinstance(item, ToolCall)] == [
        ("c1", "open_door", {"n": 1})
    ]
    assert not [item for item in items if isinstance(item, ToolResult)]
    assert isinstance(items[-1], Final)
    assert items[-1].usage["finish_reason"] == "tool_calls"


async def test_a_call_of_the_clients_function_is_whole_or_the_run_fails(bench: Bench) -> None:
    run = replace(RUN, parameters={"functions": [FUNCTION]})
    small = Call(id="c0", name="open_door", arguments="{}")
    for letters, fits in ((60_000, True), (70_000, False)):
        for arguments in (dumps({"n": "x" * letters}), "{" + "x" * letters):
            call = Call(id="c1", name="open_door", arguments=arguments)
            items = await bench.items(Scripted([small, call, end("tool_calls")]), run)
            calls = [item.args for item in items if isinstance(item, ToolCall)]
            if fits:
                assert isinstance(items[-1], Final)
                assert (calls[1] if isinstance(calls[1], str) else dumps(calls[1])) == arguments
            else:
                assert calls == [], "a client that executes some of the calls cannot go on"
                assert isinstance(items[-1], Error) and items[-1].code == "model_call_too_large"


async def test_the_services_own_tools_are_called_before_the_client_is_left_with_its_calls(bench: Bench) -> None:
    model = Scripted([count("a"), OPEN, count("b"), end("tool_calls")])
    items = await bench.items(model, replace(RUN, parameters={"functions": [FUNCTION]}))
    assert bench.counted == {"a": 1, "b": 1}
    assert sorted(item.id for item in items if isinstance(item, ToolResult)) == ["a", "b"]
    assert isinstance(items[-1], Final) and len(model.asked) == 1


async def test_a_later_attempt_leaves_the_client_with_its_calls_too(bench: Bench) -> None:
    run = replace(RUN, parameters={"functions": [FUNCTION]})
    first = await bench.items(Scripted([OPEN, end("tool_calls")]), run)
    [state] = [item.state for item in first if isinstance(item, Checkpoint)]
    again = await bench.items(Scripted(), replace(run, attempt=2, restored=state))
    assert [type(item) for item in again] == [Final]


async def test_a_run_goes_on_with_what_its_client_has_found(bench: Bench) -> None:
    model = Scripted([], [Text(text="It is open."), end()])
    parameters = {"functions": [FUNCTION], "after": [CALLED, OPENED]}
    items = await bench.items(model, replace(RUN, parameters=parameters))
    assert said(items) == "It is open."
    assert model.asked[0][0] == [{"role": "user", "content": "q"}, CALLED, OPENED]


async def test_a_run_that_brings_nonsense_says_so(bench: Bench) -> None:
    [error] = await bench.items(Scripted(), replace(RUN, parameters={"functions": "x"}), SETTINGS)
    assert isinstance(error, Error) and error.code == "invalid_parameter"
