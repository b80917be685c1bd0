"""A conversation: what a checkpoint of `chat` holds, and what a model server is sent."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.events import dumps
from worker import Turn
from worker.agents.conversation import Conversation, opening, sendable
from worker.agents.states import restored
from worker.models.model import Call, Usage


def call(name: str, arguments: str = "{}", *, id: str = "") -> Call:
    return Call(id=id or name, name=name, arguments=arguments)


def test_a_conversation_grows_by_answers_and_results() -> None:
    said = Conversation()
    assert (said.rounds, said.pending, said.has_text) == (0, [], False)
    said = said.answered("", [call("a", '{"x": 1}'), call("b")], Usage(prompt=10, completion=2))
    assert [each.name for each in said.pending] == ["a", "b"] and not said.has_text
    said = said.resulted("b", "B")
    assert said.pending == [call("a", '{"x": 1}')]
    said = said.resulted("a", "A").answered("done", [], Usage(prompt=20, completion=3, cached=10))
    assert said.pending == [] and said.has_text and said.rounds == 2
    assert said.usage == Usage(prompt=30, completion=5, cached=10)
    assert list(said.messages) == [
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {"id": "a", "type": "function", "function": {"name": "a", "arguments": '{"x": 1}'}},
                {"id": "b", "type": "function", "function": {"name": "b", "arguments": "{}"}},
            ],
        },
        {"role": "tool", "tool_call_id": "b", "content": "B"},
        {"role": "tool", "tool_call_id": "a", "content": "A"},
        {"role": "assistant", "content": "done"},
    ]


@given(
    st.lists(
        st.tuples(
            st.text(st.characters(), max_size=10),
            st.lists(st.tuples(st.text(max_size=4), st.text(st.characters(), max_size=9)), max_size=4),
            st.none() | st.builds(Usage, prompt=st.integers(0, 99), completion=st.integers(0, 99)),
            st.integers(0, 5),
        ),
        max_size=5,
    )
)
def test_a_later_attempt_knows_what_was_said_and_what_is_left_to_do(answers: list[Any]) -> None:
    """Whenever the checkpoint was taken."""
    said, used, left = Conversation(), Usage(), list[Call]()
    for text, asked, usage, results in answers:
        calls = [
            Call(id=f"{said.rounds}-{n}", name=name, arguments=arguments) for n, (name, arguments) in enumerate(asked)
        ]
        said = said.answered(text, calls, usage)
        used += usage or Usage()
        for each in calls[:results]:
            said = said.resulted(each.id, each.name)
        left += calls[results:]
        again = restored(Conversation, json.loads(dumps(said.model_dump(mode="json"))))
        assert again == said
        assert again.pending == left
        assert (again.usage or Usage()) == used


@pytest.mark.parametrize("state", [None, 3, {"version": 2}, {"version": 1, "rounds": "x"}, {"unknown": True}])
def test_a_state_of_another_version_is_a_beginning(state: Any) -> None:
    assert restored(Conversation, state) is None


def test_a_conversation_opens_with_its_instructions_and_the_earlier_turns() -> None:
    turns = [
        Turn(request_id="1", agent="chat", query="one?", answer="one.", created_at=1),
        Turn(request_id="2", agent="chat", query="two?", answer="two", created_at=2, cut=True),
    ]
    assert opening("Be brief.", turns, "three?") == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "one?"},
        {"role": "assistant", "content": "one."},
        {"role": "user", "content": "two?"},
        {"role": "assistant", "content": "two […]"},
        {"role": "user", "content": "three?"},
    ]
    assert opening(None, [], "q") == [{"role": "user", "content": "q"}]


def test_a_server_is_sent_nothing_that_it_would_refuse() -> None:
    calls = [
        call("search docs.v2!", '{"a": "\ud800"}', id="1"),
        call("", "{broken", id="2"),
        call("x" * 99, "[1]", id="3"),
        call("ok", "", id="4"),
        call("ok", '{"n": NaN}', id="5"),
        call("ok", '{"n": 1}', id="6"),
    ]
    said = Conversation().answered("so \udfff", calls, None).resulted("1", "a\ud800b")
    sent = sendable([*opening(None, [], "what\ud800?"), *said.messages])
    assert sent[0]["content"] == "what\ufffd?"
    assert sent[1]["content"] == "so \ufffd"
    assert [made["function"] for made in sent[1]["tool_calls"]] == [
        {"name": "search_docs_v2_", "arguments": '{"a": "\ufffd"}'},
        {"name": "_", "arguments": "{}"},
        {"name": "x" * 64, "arguments": "{}"},
        {"name": "ok", "arguments": "{}"},
        {"name": "ok", "arguments": "{}"},
        {"name": "ok", "arguments": '{"n": 1}'},
    ]
    assert sent[2] == {"role": "tool", "tool_call_id": "1", "content": "a\ufffdb"}
    assert said.pending[0].arguments == "{broken", "what the model wrote is kept: its tool is not to be called"
    json.dumps(sent, ensure_ascii=False).encode("utf-8")
