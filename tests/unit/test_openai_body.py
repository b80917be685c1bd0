"""The bodies of requests for a response: whatever comes is a run or an error that says what is wrong."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from broker.errors import BrokerError, Invalid
from broker.gateway.dialects.aisdk.messages import UIMessagesBody
from broker.gateway.dialects.openai import conversation
from broker.gateway.dialects.openai.body import CreateBody, read
from broker.gateway.dialects.openai.fold import Responses
from broker.gateway.dialects.openai.response import Profile
from broker.settings import Settings
from tests.kit.logs import attempt, entry, start

SETTINGS = Settings(agents=("echo=a:b",), model="m", models=("n",))
JSON = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.sampled_from(("", "x", "\ud800"))
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(
            st.sampled_from(
                ("type", "role", "content", "text", "call_id", "name", "arguments", "output", "format", "effort")
            ),
            st.one_of(
                inner,
                st.sampled_from(
                    ("message", "user", "assistant", "function", "function_call", "function_call_output", "input_text")
                ),
            ),
        ),
    ),
    max_leaves=12,
)
BODIES = st.dictionaries(st.sampled_from([*CreateBody.model_fields, "more"]), JSON)


@given(st.one_of(JSON, BODIES, BODIES.map(lambda body: {**body, "model": "m"})))
def test_any_body_is_a_run_or_an_error_that_says_what_is_wrong(body: Any) -> None:
    try:
        asked = read(body, SETTINGS)
    except BrokerError as error:
        assert error.detail
        return
    assert asked.agent in SETTINGS.agent_names
    assert asked.conversation.query or asked.agent == "chat"


@pytest.mark.parametrize(
    ("body", "agent", "parameters"),
    [
        ({"model": "echo"}, "echo", {}),
        ({"model": "m"}, "chat", {"model": "m"}),
        ({"model": "n"}, "chat", {"model": "n"}),
        ({"model": "chat"}, "chat", {}),
        ({"agent": "echo"}, "echo", {}),
        ({"agent": "echo", "model": "gpt"}, "echo", {}),
        ({"agent": "chat", "model": "n"}, "chat", {"model": "n"}),
        ({"model": "echo", "temperature": 1, "max_output_tokens": 7}, "echo", {"temperature": 1, "max_tokens": 7}),
        (
            {"model": "echo", "temperature": 1, "parameters": {"temperature": 0, "x": 1}},
            "echo",
            {"temperature": 0, "x": 1},
        ),
        ({"model": "m", "reasoning": {"effort": "low"}}, "chat", {"model": "m", "reasoning_effort": "low"}),
    ],
)
def test_a_request_names_an_agent_or_a_model(body: dict[str, Any], agent: str, parameters: dict[str, Any]) -> None:
    asked = read({"input": "q", **body}, SETTINGS)
    assert (asked.agent, asked.parameters) == (agent, parameters)


def test_without_a_model_server_there_are_only_agents() -> None:
    for body in ({"model": "m", "input": "q"}, {"model": "m", "agent": "chat", "input": "q"}):
        with pytest.raises(BrokerError) as refused:
            read(body, Settings())
        assert refused.value.code == "model_not_found"
    assert read({"model": "anything", "input": "q"}, Settings(model="m", models=("*",))).parameters == {
        "model": "anything"
    }


def text(words: str) -> dict[str, str]:
    return {"type": "input_text", "text": words}


def test_items_are_parted_at_the_users_last_message() -> None:
    talk = conversation.read(
        [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "one"},
            {"role": "assistant", "content": [{"type": "output_text", "text": "1"}]},
            {
                "type": "message",
                "role": "user",
                "content": [{"type": "input_text", "text": "t"}, {"type": "input_text", "text": "wo"}],
            },
            {"type": "reasoning", "summary": []},
            {"type": "function_call", "call_id": "a", "name": "f", "arguments": "{}"},
            {"type": "function_call", "call_id": "b", "name": "g", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "a", "output": "A"},
            {"type": "function_call_output", "call_id": "b", "output": [text("B")]},
        ]
    )
    assert (talk.query, talk.instructions) == ("two", ("Be brief.",))
    assert [message["content"] for message in talk.before] == ["one", "1"]
    assert [call["id"] for call in talk.after[0]["tool_calls"]] == ["a", "b"]
    assert [message["content"] for message in talk.after[1:]] == ["A", "B"]
    conversation.check_outputs(talk.after)


def test_what_a_run_said_is_told_by_its_clients_ids() -> None:
    log = [
        start(),
        attempt("5-1", "0-1"),
        entry("5-2", "token", text="I "),
        entry("5-3", "token", text="look."),
        entry("5-4", "tool_call", id="x", tool="look", args={"at": 1}),
        entry("5-5", "tool_call", id="y", tool="open", args="{broken"),
        entry("5-6", "tool_result", id="x", tool="look", result=[1]),
        entry("5-7", "final", answer=None, citations=[], usage={}),
    ]
    said = conversation.of_run(log, lambda event_id: f"call_{event_id}")
    look = {"name": "look", "arguments": '{"at":1}'}
    broken = {"name": "open", "arguments": "{broken"}
    assert said == [
        {
            "role": "assistant",
            "content": "I look.",
            "tool_calls": [
                {"id": "call_5-4", "type": "function", "function": look},
                {"id": "call_5-5", "type": "function", "function": broken},
            ],
        },
        {"role": "tool", "tool_call_id": "call_5-4", "content": "[1]"},
    ]
    with pytest.raises(Invalid, match="No tool output found for function call call_5-5"):
        conversation.check_outputs(said)
    conversation.check_outputs([*said, {"role": "tool", "tool_call_id": "call_5-5", "content": ""}])


@pytest.mark.parametrize("value", [None, "", "text", 0, False, {}, {"a": [None]}])
def test_the_model_is_told_of_calls_what_the_client_was_told(value: Any) -> None:
    log = [
        start(),
        attempt("5-1", "0-1"),
        entry("5-2", "tool_call", id="x", tool="look", args=value),
        entry("5-3", "tool_result", id="x", tool="look", result=value),
        entry("5-4", "final", answer=None, citations=[], usage={}),
    ]
    dialect = Responses(Profile(request_id="a" * 32, created_at=0, agent="chat", parameters={}, metadata={}))
    state = dialect.start
    for each in log:
        state, _ = dialect.step(state, each)
    output = json.loads(dialect.response(state))["output"]
    told = conversation.of_run(log, dialect.call_id)
    sent: list[dict[str, Any]] = []
    conversation.called(sent, output[0]["call_id"], "look", output[0]["arguments"])
    sent.append({"role": "tool", "tool_call_id": output[1]["call_id"], "content": output[1]["output"]})
    assert told == sent


def test_a_conversation_goes_on_behind_a_run_whose_calls_it_answers() -> None:
    user = {"role": "user", "content": "two"}
    call = {"type": "function_call", "call_id": "a", "name": "f", "arguments": "{}"}
    output = {"type": "function_call_output", "call_id": "a", "output": "A"}
    said: list[dict[str, Any]] = []
    conversation.called(said, "a", "f", "{}")
    for items in ([output], [output, user]):
        talk = conversation.read(items)
        assert talk.goes_on
        whole = talk.after_run("one", said)
        conversation.check_outputs(whole.before)
        conversation.check_outputs(whole.after)
        told = [*whole.before, {"role": "user", "content": whole.query}, *whole.after]
        assert told[:2] == [{"role": "user", "content": "one"}, *said]
        assert [message["content"] for message in told[2:]] == ["A", "two"][: len(items)]
    for items in ([user], [call, output, user], [user, call, output]):
        assert not conversation.read(items).goes_on


def test_outputs_follow_their_calls_at_once() -> None:
    messages: list[dict[str, Any]] = []
    conversation.called(messages, "a", "f", "{}")
    output = {"role": "tool", "tool_call_id": "a", "content": "A"}
    conversation.check_outputs([*messages, output])
    for wrong in (
        [output],
        [*messages, output, output],
        [*messages, {"role": "user", "content": "x"}, output],
        messages,
    ):
        with pytest.raises(Invalid):
            conversation.check_outputs(wrong)


@pytest.mark.parametrize(("model", "field"), [(CreateBody, "tools"), (UIMessagesBody, "messages")])
def test_a_list_of_what_is_not_acceptable_is_refused_at_its_first_item(model: type[BaseModel], field: str) -> None:
    """P22: half a million errors would take a second of the loop to tell."""
    with pytest.raises(ValidationError) as refused:
        model.model_validate({"model": "chat", "input": "x", field: [1] * 1000})
    assert refused.value.error_count() == 1
