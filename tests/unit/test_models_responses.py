"""Responses: what is asked, and what is made of its events."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.kit.pieces import calls, end, feed, text, thoughts
from worker.models import responses
from worker.models.failures import Failed
from worker.models.model import Message, Options, Piece, ToolSpec, Usage

WEATHER = ToolSpec(name="weather", description="Tells it.", parameters={"type": "object", "properties": {}})


def read(*events: dict[str, Any], taken: frozenset[str] = frozenset()) -> list[Piece]:
    return feed(responses.Reader("m", taken), events)


def event(kind: str, **fields: Any) -> dict[str, Any]:
    return {"type": f"response.{kind}", **fields}


def delta(piece: str) -> dict[str, Any]:
    return event("output_text.delta", item_id="msg", output_index=0, content_index=0, delta=piece)


def ended(status: str = "completed", **fields: Any) -> dict[str, Any]:
    return event(status, response={"id": "resp", "status": status, "output": [], **fields})


def item(index: int, **fields: Any) -> dict[str, Any]:
    return {"output_index": index, "item": {"type": "function_call", "id": f"fc_{index}", **fields}}


def request(*messages: Message, tools: Sequence[ToolSpec] = (), **parameters: Any) -> Any:
    return responses.request(messages, tools, Options(model="m", deadline=0, parameters=parameters))


def test_a_request_is_not_stored_by_the_server() -> None:
    body = request({"role": "user", "content": "hi"}, temperature=0.5, max_tokens=7)
    assert body == {
        "model": "m",
        "input": [{"role": "user", "content": "hi"}],
        "stream": True,
        "store": False,
        "temperature": 0.5,
        "max_output_tokens": 7,
    }


def test_an_effort_asks_for_the_summary_of_the_reasoning() -> None:
    assert request(reasoning_effort="low")["reasoning"] == {"effort": "low", "summary": "auto"}


def test_rounds_of_calls_become_items() -> None:
    function = {"name": "weather", "arguments": "{}"}
    body = request(
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "hi"},
        {
            "role": "assistant",
            "content": "I look.",
            "tool_calls": [{"id": "a", "type": "function", "function": function}],
        },
        {"role": "tool", "tool_call_id": "a", "content": "12 degrees"},
    )
    assert body["input"] == [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "I look."},
        {"type": "function_call", "call_id": "a", **function},
        {"type": "function_call_output", "call_id": "a", "output": "12 degrees"},
    ]


def test_tools_are_told_flat_and_not_strict() -> None:
    [tool] = request(tools=[WEATHER])["tools"]
    assert tool == {
        "type": "function",
        "name": "weather",
        "description": "Tells it.",
        "parameters": WEATHER.parameters,
        "strict": False,
    }


def test_text_reasoning_and_usage() -> None:
    usage = {
        "input_tokens": 10,
        "input_tokens_details": {"cached_tokens": 4},
        "output_tokens": 5,
        "output_tokens_details": {"reasoning_tokens": 2},
        "total_tokens": 15,
    }
    pieces = read(
        event("created", response={}),
        event("reasoning_summary_part.added", summary_index=0),
        event("reasoning_summary_text.delta", delta="h"),
        event("reasoning_summary_part.added", summary_index=1),
        event("reasoning_text.delta", delta="m"),
        delta("Hel"),
        delta("lo"),
        event("never_heard_of", x=1),
        ended(usage=usage),
    )
    assert (thoughts(pieces), text(pieces)) == ("h\n\nm", "Hello")
    assert end(pieces).usage == Usage(prompt=10, completion=5, cached=4, reasoning=2)
    assert end(pieces).reason == "stop"


def test_a_server_that_tells_no_usage() -> None:
    assert end(read(delta("a"), ended(usage=None))).usage is None


@pytest.mark.parametrize("told", ["lots", [1], {"input_tokens": "many"}, {"output_tokens": float("inf")}])
def test_usage_that_is_nonsense_costs_no_answer(told: Any) -> None:
    assert end(read(delta("a"), ended(usage=told))).usage == Usage()


def test_calls_come_in_pieces_or_whole() -> None:
    whole = item(1, call_id="b", name="time", arguments="{}")
    pieces = read(
        event("output_item.added", **item(0, call_id="a", name="weather", arguments="")),
        event("function_call_arguments.delta", output_index=0, delta='{"city":'),
        event("output_item.done", **whole),
        event("function_call_arguments.delta", output_index=0, delta='"Bern"}'),
        ended(),
    )
    assert calls(pieces) == [("a", "weather", '{"city":"Bern"}'), ("b", "time", "{}")]
    assert end(pieces).reason == "tool_calls"


def test_arguments_without_an_end_are_given_up() -> None:
    part = event("function_call_arguments.delta", output_index=0, delta="x" * 100_000)
    with pytest.raises(Failed, match="do not end"):
        read(*[part] * 11)


def test_what_did_not_come_as_events_is_taken_from_the_response() -> None:
    message = {"type": "message", "content": [{"type": "output_text", "text": "Hello"}, {"type": "other"}]}
    call = item(1, call_id="a", name="f", arguments="{}")["item"]
    pieces = read(ended(output=[message, call]))
    assert text(pieces) == "Hello"
    assert calls(pieces) == [("a", "f", "{}")]


def test_calls_of_ollama_that_come_one_after_the_other_have_the_same_index() -> None:
    """As its 0.13 writes them: the index does not rise between two chunks of its own."""
    whole = [
        {"type": "function_call", "id": f"fc_{n}", "status": "completed", "call_id": n, "name": "f", "arguments": n}
        for n in ("1", "2")
    ]
    events = [event("created", response={"id": "resp", "status": "in_progress", "output": []})]
    for call in whole:
        at = {"output_index": 0, "item_id": call["id"]}
        events += [
            event("output_item.added", output_index=0, item={**call, "status": "in_progress", "arguments": ""}),
            event("function_call_arguments.delta", **at, delta=call["arguments"]),
            event("function_call_arguments.done", **at, arguments=call["arguments"]),
            event("output_item.done", output_index=0, item=call),
        ]
    assert calls(read(*events, ended(output=whole))) == [("1", "f", "1"), ("2", "f", "2")]


def test_what_came_as_events_is_not_told_twice() -> None:
    message = {"type": "message", "content": [{"type": "output_text", "text": "Hello"}]}
    call = item(1, call_id="a", name="f", arguments="{}")
    pieces = read(delta("Hello"), event("output_item.done", **call), ended(output=[message, call["item"]]))
    assert text(pieces) == "Hello"
    assert len(calls(pieces)) == 1


def test_an_answer_that_was_cut_says_so() -> None:
    pieces = read(delta("a"), ended("incomplete", incomplete_details={"reason": "max_output_tokens"}))
    assert end(pieces).reason == "length"


FAILED = {"error": {"code": "server_error", "message": "boom"}}
LIMITED = {"error": {"code": "rate_limit_exceeded", "message": "slow down"}}


@pytest.mark.parametrize(
    ("events", "code"),
    [
        ([delta("a")], "model_broken"),
        ([], "model_broken"),
        ([delta("a"), ended("failed", **FAILED)], "model_broken"),
        ([ended("failed", **LIMITED)], "model_rate_limited"),
        ([{"type": "error", "code": "context_length_exceeded", "message": "long"}], "model_context_too_long"),
        ([ended()], "model_empty"),
        ([ended("incomplete", incomplete_details={"reason": "content_filter"})], "model_content_filter"),
        ([event("refusal.delta", delta="I cannot"), ended()], "model_content_filter"),
    ],
)
def test_ends_that_are_failures(events: list[dict[str, Any]], code: str) -> None:
    with pytest.raises(Failed) as caught:
        read(*events)
    assert caught.value.code == code


@given(answer=st.text(min_size=1), arguments=st.text(min_size=1), data=st.data())
def test_any_cutting_of_an_answer_gives_the_same(answer: str, arguments: str, data: st.DataObject) -> None:
    def cut(whole: str) -> list[str]:
        places = sorted(data.draw(st.lists(st.integers(0, len(whole)), max_size=4)))
        return [whole[a:b] for a, b in zip([0, *places], [*places, len(whole)], strict=True)]

    events = [delta(part) for part in cut(answer)]
    events.append(event("output_item.added", **item(1, call_id="a", name="f", arguments="")))
    events += [event("function_call_arguments.delta", output_index=1, delta=part) for part in cut(arguments)]
    pieces = read(*(json.loads(json.dumps(one)) for one in [*events, ended()]))
    assert text(pieces) == answer
    assert calls(pieces) == [("a", "f", arguments)]
