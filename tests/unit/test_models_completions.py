"""Chat Completions: what is asked, and what is made of the chunks of many kinds of servers."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.kit.pieces import calls, end, feed, text, thoughts
from worker.models import completions
from worker.models.failures import Failed
from worker.models.model import Message, Options, Piece, ToolSpec, Usage

WEATHER = ToolSpec(name="weather", description="Tells it.", parameters={"type": "object", "properties": {}})


def read(*chunks: dict[str, Any], taken: frozenset[str] = frozenset()) -> list[Piece]:
    return feed(completions.Reader(taken), chunks)


def chunk(reason: str | None = None, **delta: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": delta, "finish_reason": reason}]}


def call(**function: Any) -> dict[str, Any]:
    """Part of a call; `index` and `id` are beside its function."""
    beside: dict[str, Any] = {name: function.pop(name) for name in ("index", "id") if name in function}
    return {**beside, "function": function}


def request(*messages: Message, tools: Sequence[ToolSpec] = (), newest: bool = False, **parameters: Any) -> Any:
    options = Options(model="m", deadline=0, parameters=parameters)
    return completions.request(messages, tools, options, newest=newest)


def test_a_request_asks_for_a_stream_with_usage() -> None:
    body = request({"role": "user", "content": "hi"}, temperature=0.5, max_tokens=7)
    assert body == {
        "model": "m",
        "messages": [{"role": "user", "content": "hi"}],
        "stream": True,
        "stream_options": {"include_usage": True},
        "temperature": 0.5,
        "max_tokens": 7,
    }


def test_openai_itself_is_told_the_limit_by_its_new_name() -> None:
    body = request(newest=True, max_tokens=7)
    assert body["max_completion_tokens"] == 7
    assert "max_tokens" not in body


def test_tools_are_told_as_functions() -> None:
    [tool] = request(tools=[WEATHER])["tools"]
    assert tool == {
        "type": "function",
        "function": {"name": "weather", "description": "Tells it.", "parameters": WEATHER.parameters},
    }


def test_text_comes_as_it_comes_and_the_end_last() -> None:
    pieces = read(chunk(role="assistant", content=""), chunk(content="Hel"), chunk(content="lo"), chunk("stop"))
    assert [type(piece).__name__ for piece in pieces] == ["Text", "Text", "End"]
    assert text(pieces) == "Hello"
    assert end(pieces).reason == "stop"
    assert end(pieces).usage is None


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning"])
def test_reasoning_has_two_names(name: str) -> None:
    pieces = read(chunk(**{name: "hm"}), chunk(content="yes"), chunk("stop"))
    assert (thoughts(pieces), text(pieces)) == ("hm", "yes")


def test_reasoning_may_stand_in_the_text() -> None:
    pieces = read(chunk(content="<thi"), chunk(content="nk>hm</think>"), chunk(content="yes"), chunk("stop"))
    assert (thoughts(pieces), text(pieces)) == ("hm", "yes")


def test_an_answer_of_nothing_but_reasoning_is_empty() -> None:
    with pytest.raises(Failed) as caught:
        read(chunk(content="<think>hm</think>"), chunk("stop"))
    assert caught.value.code == "model_empty"


def test_usage_comes_in_a_last_chunk_without_choices() -> None:
    told = {
        "prompt_tokens": 10,
        "completion_tokens": 5,
        "total_tokens": 15,
        "prompt_tokens_details": {"cached_tokens": 4},
        "completion_tokens_details": {"reasoning_tokens": 2},
    }
    pieces = read(chunk(content="a"), chunk("stop"), {"choices": [], "usage": told})
    assert end(pieces).usage == Usage(prompt=10, completion=5, cached=4, reasoning=2)


def test_usage_may_have_holes() -> None:
    told = {"prompt_tokens": 10, "completion_tokens": None, "prompt_tokens_details": None}
    pieces = read(chunk(content="a"), chunk("stop") | {"usage": told})
    assert end(pieces).usage == Usage(prompt=10)


@pytest.mark.parametrize("told", ["lots", [1], {"prompt_tokens": "many", "completion_tokens_details": [2]}])
@pytest.mark.parametrize("count", [-5, float("nan"), float("inf"), 1e300])
def test_usage_that_is_nonsense_costs_no_answer(told: Any, count: float) -> None:
    usage = told | {"completion_tokens": count} if isinstance(told, dict) else told
    assert end(read(chunk(content="a"), chunk("stop") | {"usage": usage})).usage == Usage()


def test_unknown_fields_and_empty_choices_are_passed_over() -> None:
    pieces = read(
        {"choices": [], "prompt_filter_results": []},
        {"choices": [{"delta": {"content": "a", "audio": None, "x": 1}}], "system_fingerprint": None},
        {"choices": [{"index": 1, "delta": {"content": "another choice"}}]},
        {"choices": None},
        chunk("stop"),
    )
    assert text(pieces) == "a"


def test_the_arguments_of_several_calls_come_in_pieces() -> None:
    pieces = read(
        chunk(tool_calls=[call(index=0, id="a", name="weather", arguments="")]),
        chunk(tool_calls=[call(index=0, arguments='{"city":')]),
        chunk(tool_calls=[call(index=1, id="b", name="time", arguments="{}")]),
        chunk(tool_calls=[call(index=0, arguments='"Bern"}')]),
        chunk("tool_calls"),
    )
    assert calls(pieces) == [("a", "weather", '{"city":"Bern"}'), ("b", "time", "{}")]
    assert end(pieces).reason == "tool_calls"


def test_calls_come_before_the_end_and_after_the_text() -> None:
    pieces = read(
        chunk(tool_calls=[call(index=0, id="a", name="f", arguments="{}")]), chunk(content="t"), chunk("stop")
    )
    assert [type(piece).__name__ for piece in pieces] == ["Text", "Call", "End"]
    assert end(pieces).reason == "tool_calls", "some servers say stop"


@pytest.mark.parametrize(
    "parts",
    [
        pytest.param([call(id="a", name="f", arguments="{}"), call(id="b", name="g", arguments="{}")], id="no index"),
        pytest.param(
            [call(index=0, id="a", name="f", arguments="{}"), call(index=0, id="b", name="g", arguments="{}")],
            id="one index for all",
        ),
        pytest.param(
            [call(id="a", name="f", arguments="{"), call(arguments="}"), call(id="b", name="g")], id="no id in the rest"
        ),
        pytest.param(
            [call(id="a", name="f", arguments="{"), call(id="a", name="f", arguments="}"), call(id="b", name="g")],
            id="id and name each time",
        ),
        pytest.param(
            [call(index=0, id="a", name="f", arguments={}), call(index=1, id="b", name="g", arguments=None)],
            id="arguments as an object, and none",
        ),
    ],
)
@pytest.mark.parametrize("together", [True, False], ids=["one chunk", "a chunk each"])
def test_calls_of_servers_that_differ(parts: list[dict[str, Any]], together: bool) -> None:
    chunks = [chunk(tool_calls=parts)] if together else [chunk(tool_calls=[part]) for part in parts]
    assert calls(read(*chunks, chunk("tool_calls"))) == [("a", "f", "{}"), ("b", "g", "{}")]


def test_an_answer_as_ollama_writes_it() -> None:
    """Each call whole, in a chunk of its own; a role and a content in every chunk; the usage behind the end."""
    base = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "system_fingerprint": "fp_ollama"}

    def said(reason: str | None = None, **delta: Any) -> dict[str, Any]:
        delta = {"role": "assistant", "content": "", **delta}
        return {**base, "choices": [{"index": 0, "delta": delta, "finish_reason": reason}]}

    pieces = read(
        said(reasoning="let me"),
        said(reasoning=" see"),
        said(tool_calls=[call(index=0, id="call_1", name="f", arguments='{"a":1}')]),
        said(tool_calls=[call(index=1, id="call_2", name="f", arguments='{"a":2}')]),
        said("tool_calls"),
        {**base, "choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 7, "total_tokens": 12}},
    )
    assert thoughts(pieces) == "let me see"
    assert calls(pieces) == [("call_1", "f", '{"a":1}'), ("call_2", "f", '{"a":2}')]
    assert end(pieces).usage == Usage(prompt=5, completion=7)


def test_reasoning_under_both_names_is_told_once() -> None:
    """As vLLM has sent it while it renamed the field."""
    assert thoughts(read(chunk(reasoning="a", reasoning_content="a"), chunk(content="b"), chunk("stop"))) == "a"


def test_a_call_without_an_id_gets_one_of_its_own() -> None:
    pieces = read(chunk(tool_calls=[call(name="f"), call(name="g")]), chunk("stop"))
    (one, _, _), (other, _, _) = calls(pieces)
    assert one
    assert other
    assert one != other


def test_an_id_that_an_earlier_answer_had_is_replaced() -> None:
    pieces = read(chunk(tool_calls=[call(id="call_0", name="f")]), chunk("stop"), taken=frozenset({"call_0"}))
    [(id, _, _)] = calls(pieces)
    assert id not in ("", "call_0")


def test_arguments_without_an_end_are_given_up() -> None:
    parts = [chunk(tool_calls=[call(index=0, id="a", name="f", arguments="x" * 100_000)]) for _ in range(11)]
    with pytest.raises(Failed, match="do not end"):
        read(*parts)


@pytest.mark.parametrize("id", [7, "\ud800", "a\nb", "x" * 70_000, ["a"]])
def test_an_id_that_could_not_be_sent_back_is_replaced(id: Any) -> None:
    pieces = read(chunk(tool_calls=[call(id=id, name="f")]), chunk("stop"))
    [(sent, _, _)] = calls(pieces)
    assert re.fullmatch(r"[\w\[\]']{1,64}", sent, re.ASCII)


@pytest.mark.parametrize("reason", ["length", "max_tokens"])
def test_an_answer_that_was_cut_says_so(reason: str) -> None:
    assert end(read(chunk(content="a"), chunk(reason))).reason == "length"


@pytest.mark.parametrize(
    ("chunks", "code"),
    [
        ([chunk(content="a")], "model_broken"),
        ([], "model_broken"),
        ([chunk(content="a"), chunk("error")], "model_broken"),
        ([chunk(role="assistant", content=""), chunk("stop")], "model_empty"),
        ([chunk(reasoning="hm"), chunk("length")], "model_empty"),
        ([chunk(content="a"), chunk("content_filter")], "model_content_filter"),
        ([chunk(refusal="I can"), chunk(refusal="not"), chunk("stop")], "model_content_filter"),
    ],
)
def test_ends_that_are_failures(chunks: list[dict[str, Any]], code: str) -> None:
    with pytest.raises(Failed) as caught:
        read(*chunks)
    assert caught.value.code == code


def test_a_refusal_is_quoted() -> None:
    with pytest.raises(Failed, match="I cannot"):
        read(chunk(refusal="I can"), chunk(refusal="not"), chunk("stop"))


CALLS = st.lists(st.tuples(st.text(min_size=1, max_size=5), st.text(min_size=1, max_size=20)), max_size=3)


def cut(data: st.DataObject, whole: str) -> list[str]:
    places = sorted(data.draw(st.lists(st.integers(0, len(whole)), max_size=4)))
    return [whole[a:b] for a, b in zip([0, *places], [*places, len(whole)], strict=True)]


@given(answer=st.text(min_size=1), thought=st.text(), wanted=CALLS, data=st.data())
def test_any_cutting_of_an_answer_gives_the_same(
    answer: str, thought: str, wanted: list[tuple[str, str]], data: st.DataObject
) -> None:
    chunks = [chunk(reasoning_content=part) for part in cut(data, thought)]
    chunks += [chunk(content=part) for part in cut(data, answer)]
    growing = []
    for index, (name, arguments) in enumerate(wanted):
        first, *rest = cut(data, arguments)
        chunks.append(chunk(tool_calls=[call(index=index, id=str(index), name=name, arguments=first)]))
        growing.append([chunk(tool_calls=[call(index=index, arguments=part)]) for part in rest])
    while any(growing):  # the calls grow by turns
        chunks.append(data.draw(st.sampled_from([parts for parts in growing if parts])).pop(0))
    pieces = read(*(json.loads(json.dumps(one)) for one in [*chunks, chunk("stop")]))
    assert (thoughts(pieces), text(pieces)) == (thought, answer)
    assert calls(pieces) == [(str(index), *one) for index, one in enumerate(wanted)]
