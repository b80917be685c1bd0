"""The stand-in provider speaks the wire formats as the openai package knows them, and does what its directives say."""

from __future__ import annotations

from typing import Any

import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from broker.model_stub import Answer, Asked, BadDirective, Completions, Responses, answer_to
from tests.kit.pieces import calls, feed, text, thoughts
from worker.models import completions, responses

EVENTS: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
QUERIES = [
    "hi",
    "[[say=one two]] [[reasoning=hm hm]]",
    "[[say=one two]] [[thinking=hm hm]]",
    '[[tool=weather {"city": "Bern"}]] [[tool=weather {}]] [[say=I look.]]',
    "[[say=one two three]] [[fail=filter after=1]]",
    "[[fail=refusal]]",
    "[[fail=empty]]",
]


def asked(query: str, *more: dict[str, Any], system: str = "", tools: tuple[str, ...] = ("weather",)) -> Asked:
    messages = [{"role": "system", "content": system}, {"role": "user", "content": query}, *more]
    return Asked(model="m", messages=messages, tools=list(tools), stream=True)


def answered(query: str, *more: dict[str, Any], **options: Any) -> Answer:
    return answer_to(asked(query, *more, **options))


def said(query: str, *more: dict[str, Any], **options: Any) -> str:
    return "".join(answered(query, *more, **options).text)


@pytest.mark.parametrize("query", QUERIES)
def test_chunks_are_what_the_sdk_declares(query: str) -> None:
    for frame in Completions.frames(answered(query)):
        ChatCompletionChunk.model_validate(frame.data, strict=True)
    ChatCompletion.model_validate(Completions.whole(answered(query)), strict=True)


@pytest.mark.parametrize("query", QUERIES)
def test_events_are_what_the_sdk_declares(query: str) -> None:
    frames = list(Responses.frames(answered(query)))
    for number, frame in enumerate(frames):
        event = EVENTS.validate_python(frame.data)
        assert event.type == frame.data["type"]
        assert event.sequence_number == number
    assert frames[0].data["type"] == "response.created"
    Response.model_validate(frames[-1].data["response"])


@pytest.mark.parametrize("query", QUERIES[:4])
def test_both_formats_say_the_same(query: str) -> None:
    answer = answered(query)
    chunks = feed(completions.Reader(), [frame.data for frame in Completions.frames(answer)])
    events = feed(responses.Reader("m"), [frame.data for frame in Responses.frames(answer)])
    for read in (text, thoughts, calls):
        assert read(chunks) == read(events)


def test_it_says_that_it_is_a_stub_and_what_it_was_told() -> None:
    told = said("How are you?", {"role": "assistant", "content": "Well."}, {"role": "user", "content": "And now?"})
    assert "I am a stub" in told
    assert "You said: And now?" in told
    assert "Before that you said: How are you?" in told


def test_it_tells_what_a_tool_has_answered() -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"id": "a"}]}
    assert "12 degrees" in said(
        "[[tool=weather]]", call, {"role": "tool", "tool_call_id": "a", "content": "12 degrees"}
    )


def test_calls_come_by_rounds() -> None:
    query = "[[tool=a]] [[tool2=b]] [[tool*=c]]"
    call = {"role": "assistant", "content": None, "tool_calls": [{"id": "x"}]}
    result = {"role": "tool", "tool_call_id": "x", "content": "12 degrees"}
    assert [one.name for one in answered(query).calls] == ["a", "c"]
    assert [one.name for one in answered(query, call, result).calls] == ["b", "c"]
    assert [one.name for one in answered(query, call, result, call, result).calls] == ["c"]


def test_without_tools_there_are_no_calls() -> None:
    assert answered("[[tool=weather]]", tools=()).calls == []


def test_only_the_last_message_directs() -> None:
    assert "stub" in said("[[say=yes]]", {"role": "assistant", "content": "yes"}, {"role": "user", "content": "more"})


def test_a_directive_for_another_system_message_does_not_count() -> None:
    query = "[[say@plan=the plan]] [[say@screen=the screening]]"
    assert said(query, system="Write a plan.") == "the plan"
    assert said(query, system="You screen.") == "the screening"
    assert "stub" in said(query, system="")


def test_an_answer_has_as_many_tokens_as_it_should() -> None:
    answer = answered("[[tokens=100000]]")
    assert len(answer.text) == answer.completion == 100_000
    assert "".join(answer.text).startswith("w1 w2 w3")


@pytest.mark.parametrize(
    "directive",
    [
        "fail=sometimes",
        "fail=200",
        "fail=503 after=1",
        "fail=break sometimes=1",
        "pace=fast",
        "tokens=-1",
        "fail=429 retry_after=soon",
    ],
)
def test_a_directive_that_cannot_be_followed_is_refused(directive: str) -> None:
    with pytest.raises(BadDirective, match=directive.partition("=")[0] + "=|" + directive.split()[-1]):
        answered(f"[[{directive}]]")


def test_other_brackets_are_text() -> None:
    assert "[[Bern]]" in said("What is [[Bern]]?")
