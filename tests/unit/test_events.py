"""Events and their JSON: ASCII on one line, the same after a round trip, and nothing that JSON cannot carry."""

from __future__ import annotations

import inspect
import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from broker import events
from broker.events import AGENT, NATIVE, TERMINAL, Data, Entry, Error, Event, Final, Progress, Sources, Token, dumps
from broker.ids import EventId

TEXT = st.text(st.characters(exclude_categories=()), max_size=20).map(lambda text: json.loads(json.dumps(text)))
JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), TEXT),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(TEXT, inner, max_size=4)),
    max_leaves=10,
)
SAMPLES: dict[str, dict[str, Any]] = {
    "start": {"request_id": "ab" * 16, "session_id": "s"},
    "attempt": {"attempt": 2, "reason": "worker_lost", "resume_from": "12-40"},
    "message": {"text": "hello"},
    "progress": {"percent": 12.5, "message": "on it"},
    "sources": {"stage": "screened", "count": 2, "items": [{"title": "a"}, {"title": "b"}]},
    "reasoning": {"text": "because"},
    "token": {"text": "the"},
    "tool_call": {"id": "c1", "tool": "search", "args": {"q": ["x", None]}},
    "tool_result": {"id": "c1", "tool": "search", "result": [1, 2.5, "three"]},
    "data": {"name": "mine", "value": {"any": "thing"}},
    "final": {"answer": "42", "citations": [{"path": "a.md"}], "usage": {"tokens": 7}},
    "error": {"code": "agent_failed", "message": "no"},
    "cancelled": {"reason": "client"},
}
by_type = pytest.mark.parametrize("kind", NATIVE, ids=[kind.type for kind in NATIVE])


@given(JSON)
def test_json_is_ascii_on_one_line_and_comes_back_as_it_was(value: Any) -> None:
    text = dumps(value)
    assert text.isascii()
    assert text.isprintable(), "a control character, or a line end, that is not escaped"
    assert json.loads(text) == value


def test_json_is_compact() -> None:
    assert dumps({"a": [1, {"b": None}]}) == '{"a":[1,{"b":null}]}'


@pytest.mark.parametrize("text", ["\u2028", "\u2029", "\x85", "\n", "\r", "\0", "\ud800", "\udfff", "\x7f", "é", "😀"])
def test_what_breaks_lines_or_utf8_is_escaped(text: str) -> None:
    assert len(dumps(text).splitlines()) == 1
    assert dumps(text).isascii()
    assert json.loads(dumps(text)) == text


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, {"a": [math.nan]}])
def test_a_number_that_json_does_not_know_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match="JSON"):
        dumps(value)


@pytest.mark.parametrize("value", [b"bytes", {1, 2}, object(), 1j])
def test_a_type_that_json_does_not_know_is_refused(value: Any) -> None:
    with pytest.raises(TypeError):
        dumps(value)
    with pytest.raises(TypeError):
        Data(name="x", value=value).json_data()


@by_type
def test_an_event_has_the_data_that_its_type_says(kind: type[Event]) -> None:
    """Every field, in the documented order, and nothing else."""
    sample = SAMPLES[kind.type]
    assert kind(**sample).json_data() == dumps(sample)


@by_type
def test_an_event_refuses_a_field_that_it_does_not_have(kind: type[Event]) -> None:
    with pytest.raises(ValidationError):
        kind(**(SAMPLES[kind.type] | {"surprise": 1}))


@by_type
def test_an_event_cannot_be_changed(kind: type[Event]) -> None:
    event = kind(**SAMPLES[kind.type])
    for name in SAMPLES[kind.type]:
        with pytest.raises(ValidationError):
            setattr(event, name, None)


@by_type
def test_an_event_needs_what_it_needs(kind: type[Event]) -> None:
    needed = {name for name, field in kind.model_fields.items() if field.is_required()}
    for name in needed:
        with pytest.raises(ValidationError):
            kind(**{key: value for key, value in SAMPLES[kind.type].items() if key != name})
    kind(**{key: value for key, value in SAMPLES[kind.type].items() if key in needed})


@given(TEXT)
def test_every_text_field_takes_every_text(text: str) -> None:
    made: list[Event] = [
        events.Start(request_id=text, session_id=text),
        events.Message(text=text),
        Progress(percent=1, message=text),
        Sources(stage="analyzed", count=0, items=[{text: text}]),
        events.Reasoning(text=text),
        Token(text=text),
        events.ToolCall(id=text, tool=text, args={text: text}),
        events.ToolResult(id=text, tool=text, result=text),
        Data(name=text, value={text: text}),
        Final(answer=text, citations=[{text: text}], usage={text: text}),
        Error(code=text, message=text),
        events.Cancelled(reason=text),
    ]
    for event in made:
        data = event.json_data()
        assert data.isascii()
        assert data.isprintable()
        assert type(event)(**json.loads(data)) == event


@pytest.mark.parametrize("percent", [-0.1, 100.1, math.nan, math.inf])
def test_progress_is_between_0_and_100(percent: float) -> None:
    with pytest.raises(ValidationError):
        Progress(percent=percent)


def test_progress_may_be_either_end() -> None:
    assert [Progress(percent=percent).percent for percent in (0, 100)] == [0, 100]


def test_a_stage_or_a_reason_that_nobody_knows_is_refused() -> None:
    with pytest.raises(ValidationError):
        Sources.model_validate({"stage": "guessed", "count": 1})
    with pytest.raises(ValidationError):
        events.Attempt.model_validate({"attempt": 1, "reason": "boredom", "resume_from": "0-1"})


def test_a_final_without_an_answer_says_so() -> None:
    """The surviving tokens are the answer then."""
    assert json.loads(Final().json_data()) == {"answer": None, "citations": [], "usage": {}}


def test_the_tables_name_every_event_once() -> None:
    classes = {cls for _, cls in inspect.getmembers(events, inspect.isclass) if issubclass(cls, Event)} - {Event}
    assert set(NATIVE) == classes
    assert len({kind.type for kind in NATIVE}) == len(NATIVE)
    assert set(NATIVE) - set(AGENT) == {events.Start, events.Attempt, events.Cancelled}
    assert {kind.type for kind in NATIVE} >= TERMINAL == {"final", "error", "cancelled"}
    assert set(SAMPLES) == {kind.type for kind in NATIVE}


def test_types_are_names_that_need_no_escaping_anywhere() -> None:
    assert all(kind.type.isascii() and kind.type.replace("_", "a").isalpha() for kind in NATIVE)


@pytest.mark.parametrize("kind", [kind.type for kind in NATIVE])
def test_an_entry_is_terminal_by_its_type(kind: str) -> None:
    assert Entry(EventId(1, 1), kind, "{}").terminal == (kind in ("final", "error", "cancelled"))
