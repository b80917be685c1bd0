"""The AI SDK dialect: what a client's message becomes of any log, and what the stream is made of."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.events import (
    Cancelled,
    Data,
    Entry,
    Error,
    Event,
    Final,
    Message,
    Progress,
    Reasoning,
    Sources,
    Token,
    ToolCall,
    ToolResult,
)
from broker.fold import outcome
from broker.gateway.dialects.aisdk.fold import AiSdk
from broker.gateway.dialects.aisdk.scribe import OPEN_CALL, VOID_CALL
from broker.gateway.dialects.aisdk.state import State
from broker.gateway.dialects.dialect import Frame
from broker.gateway.dialects.known import Known
from tests.kit import folds, ui_stream
from tests.kit.logs import REQUEST_ID, TEXTS, log_of, logs, words
from tests.kit.ui_stream import Chunk, chunks_of, message_of

RESETS = st.booleans()
LOGS = st.one_of(logs(), logs(repeating=True))
ENDED = st.one_of(logs(ended=True), logs(ended=True, repeating=True))


def dialect(reset_step: bool = False) -> AiSdk:
    return AiSdk(REQUEST_ID, reset_step=reset_step)


def chunks(log: Sequence[Entry], *, reset_step: bool = False) -> list[Chunk]:
    return chunks_of(folds.body_of(dialect(reset_step), log))


def told(*events: Event) -> list[Chunk]:
    """The chunks of a run of one attempt, without its frame."""
    made = chunks(log_of(list(events)))
    assert made[:2] == [{"type": "start", "messageId": REQUEST_ID}, {"type": "start-step"}]
    if made[-1] == {"type": "finish"}:
        assert made[-2] in ({"type": "finish-step"}, {"type": "abort"})
        return made[2:-2] if made[-2] == {"type": "finish-step"} else made[2:-1]
    return made[2:]


def message(log: Sequence[Entry], *, reset_step: bool = False) -> ui_stream.Message:
    return message_of(chunks(log, reset_step=reset_step))


# -- for every log ---------------------------------------------------------------------------------------------


@given(LOGS, RESETS)
def test_every_log_is_a_stream_that_the_strictest_client_accepts(log: list[Entry], reset_step: bool) -> None:
    seen = message(log, reset_step=reset_step)
    assert seen.id == REQUEST_ID
    assert seen.finished == log[-1].terminal


@given(LOGS, RESETS)
def test_a_position_is_the_number_of_chunks_up_to_it(log: list[Entry], reset_step: bool) -> None:
    """[DONE] is not counted: it comes in one piece with `finish`."""
    frames = folds.frames_of(dialect(reset_step), log)
    assert [frame.position for frame in frames] == list(range(1, len(frames) + 1))
    assert all(len(chunks_of(frame.data)) == 1 for frame in frames)


@given(LOGS, RESETS, st.data())
def test_a_stream_cut_at_any_chunk_and_resumed_by_its_number_is_the_whole(
    log: list[Entry], reset_step: bool, data: st.DataObject
) -> None:
    frames = folds.frames_of(dialect(reset_step), log)
    start_index = data.draw(st.integers(0, len(frames)))
    again = folds.frames_of(dialect(reset_step), log)
    resumed = [frame for frame in again if frame.position > start_index]
    assert [*frames[:start_index], *resumed] == frames


@given(LOGS, RESETS, st.data())
def test_a_fold_goes_on_from_every_old_state(log: list[Entry], reset_step: bool, data: st.DataObject) -> None:
    """A gateway keeps the states of its ring, and folds on from any of them more than once."""
    at = data.draw(st.integers(0, len(log)))
    made = dialect(reset_step)
    state, before = folds.folded(made, log[:at])
    folds.frames_of(made, log)
    for _ in range(2):
        now, after = state, list[Frame]()
        for entry in log[at:]:
            now, frames = made.step(now, entry)
            after += frames
        assert [*before, *after] == folds.frames_of(dialect(reset_step), log)


@given(ENDED, RESETS)
def test_in_the_end_the_message_has_the_answer_that_a_poll_has(log: list[Entry], reset_step: bool) -> None:
    """As its text, or as the last part of it where the agent says that only this is the answer."""
    if log[-1].type != "final":
        return
    seen, answer = message(log, reset_step=reset_step), outcome(log).answer or ""
    texts = seen.all_of("text")
    assert answer.strip() in (seen.text.strip(), (texts or [""])[-1].strip())


@given(ENDED)
def test_with_reset_step_the_message_has_nothing_that_was_taken_back(log: list[Entry]) -> None:
    if log[-1].type == "final" and json.loads(log[-1].data)["answer"] is None:
        assert "".join(message(log, reset_step=True).all_of("text")).strip() == (outcome(log).answer or "").strip()


@given(LOGS, RESETS)
def test_an_id_is_that_of_the_event_that_a_chunk_shows(log: list[Entry], reset_step: bool) -> None:
    made, state = dialect(reset_step), dialect(reset_step).start
    for entry in log:
        state, frames = made.step(state, entry)
        assert all(frame.data.startswith(f"id: {entry.id}\ndata: ".encode()) for frame in frames)


@given(ENDED)
def test_nothing_follows_the_end(log: list[Entry]) -> None:
    made = dialect()
    state, _ = folds.folded(made, log)
    assert made.ended(state)
    assert made.step(state, log[1]) == (state, ())


# -- each event ------------------------------------------------------------------------------------------------


def test_a_text_is_a_part_with_a_start_and_an_end() -> None:
    assert chunks(log_of([*words("H", "i"), Final()])) == [
        {"type": "start", "messageId": REQUEST_ID},
        {"type": "start-step"},
        {"type": "text-start", "id": "text-2"},
        {"type": "text-delta", "id": "text-2", "delta": "H"},
        {"type": "text-delta", "id": "text-2", "delta": "i"},
        {"type": "text-end", "id": "text-2"},
        {"type": "finish-step"},
        {"type": "finish"},
    ]


def test_reasoning_ends_where_the_text_begins() -> None:
    made = told(Reasoning(text="hm"), Token(text="Hi"), Final())
    assert [chunk["type"] for chunk in made] == [
        "reasoning-start",
        "reasoning-delta",
        "reasoning-end",
        "text-start",
        "text-delta",
        "text-end",
    ]


def test_an_empty_piece_of_text_is_no_chunk() -> None:
    assert told(Token(text=""), Reasoning(text=""), Final()) == []


def test_a_tool_call_is_a_part_that_the_client_does_not_execute() -> None:
    """Without `providerExecuted` a chat that sends tool results by itself would send this one, again and again."""
    assert told(ToolCall(id="c", tool="f", args={"a": 1}), ToolResult(id="c", tool="f", result=[2])) == [
        {
            "type": "tool-input-available",
            "toolCallId": "c",
            "toolName": "f",
            "input": {"a": 1},
            "providerExecuted": True,
        },
        {"type": "tool-output-available", "toolCallId": "c", "output": [2]},
    ]


def test_a_text_after_a_tool_call_is_a_part_of_its_own() -> None:
    """So that a page shows them in the order in which they came."""
    seen = message(log_of([*words("Let me see."), ToolCall(id="c", tool="f"), *words("It is so."), Final()]))
    assert [part.kind for part in seen.parts] == ["text", "tool-f", "text"]
    assert seen.text == "Let me see.It is so."


def test_a_tool_that_failed_says_so() -> None:
    made = told(ToolCall(id="c", tool="f"), ToolResult(id="c", tool="f", result={"error": "no such file"}))
    assert made[-1] == {"type": "tool-output-error", "toolCallId": "c", "errorText": "no such file"}


@pytest.mark.parametrize("result", [{"error": 1}, {"error": "x", "more": 1}, "error", None])
def test_what_only_looks_like_a_failure_is_a_result(result: Any) -> None:
    made = told(ToolCall(id="c", tool="f"), ToolResult(id="c", tool="f", result=result))
    assert made[-1] == {"type": "tool-output-available", "toolCallId": "c", "output": result}


def test_a_result_without_its_call_brings_one() -> None:
    """It is an error in the client otherwise."""
    [call] = message(log_of([ToolResult(id="c", tool="f", result=1)])).all_of("tool-f")
    assert call == {"id": "c", "input": {}, "output": 1}


@pytest.mark.parametrize("end", [Final(), Error(code="x", message="y"), Cancelled(reason="client")])
def test_a_call_without_a_result_is_at_work_no_longer_when_the_run_has_ended(end: Event) -> None:
    seen = message(log_of([ToolCall(id="a", tool="f"), ToolCall(id="b", tool="f"), ToolResult(id="a", tool="f"), end]))
    assert seen.all_of("tool-f")[1] == {"id": "b", "input": None, "error": OPEN_CALL}


def test_the_other_events_are_told_and_not_kept() -> None:
    made = told(Message(text="a"), Progress(percent=5, message="b"), Data(name="weather", value=[1]))
    assert made == [
        {"type": "data-message", "data": {"text": "a"}, "transient": True},
        {"type": "data-progress", "data": {"percent": 5.0, "message": "b"}, "transient": True},
        {"type": "data-weather", "data": [1], "transient": True},
    ]


def test_what_was_read_and_what_is_cited_are_sources_once_each() -> None:
    first, second = {"url": "https://a.example", "title": "A"}, {"url": "http://b.example", "title": 7}
    made = told(
        Sources(stage="discovered", count=3, items=[{"url": "https://c.example"}]),
        Sources(stage="analyzed", count=1, items=[first]),
        Final(answer="", citations=[first, second, {"path": "x.md"}]),
    )
    assert [chunk for chunk in made if chunk["type"] == "source-url"] == [
        {"type": "source-url", "sourceId": "source-4", "url": "https://a.example", "title": "A"},
        {"type": "source-url", "sourceId": "source-5", "url": "http://b.example"},
    ]


@pytest.mark.parametrize("url", ["javascript:alert(1)", "data:text/html,x", "//a.example", " https://a", "", None, 3])
def test_what_a_page_must_not_link_to_is_no_source(url: Any) -> None:
    assert not message(log_of([Final(citations=[{"url": url}])])).all_of("source-url")


def test_citations_and_usage_are_told_at_the_end() -> None:
    [final] = told(Final(citations=[{"path": "x.md"}], usage={"tokens": 3}))
    assert final == {
        "type": "data-final",
        "data": {"citations": [{"path": "x.md"}], "usage": {"tokens": 3}},
        "transient": True,
    }


def test_an_answer_without_tokens_is_shown() -> None:
    assert message(log_of([Final(answer="42")])).parts == [("text", "42")]


def test_the_rest_of_an_answer_is_shown() -> None:
    assert message(log_of([*words("for"), Final(answer="forty-two")])).parts == [("text", "forty-two")]


def test_an_answer_that_is_the_last_part_of_the_text_is_not_shown_twice() -> None:
    log = log_of(
        [*words("Let me see."), ToolCall(id="c", tool="f"), *words("It is", " so. "), Final(answer="It is so.")]
    )
    assert [part.kind for part in message(log).parts] == ["text", "tool-f", "text"]


def test_an_answer_that_the_tokens_did_not_say_takes_their_place() -> None:
    seen = message(log_of([*words("41"), Final(answer="42")]))
    assert seen.parts == [("text", "41"), ("data-rewind", {"attempt": None, "reason": "final"}), ("text", "42")]
    assert seen.text == "42"


def test_a_failed_run_closes_its_parts_and_then_tells_why() -> None:
    made = chunks(log_of([*words("Hi"), Error(code="agent_failed", message="boom")]))
    assert made[-4:] == [
        {"type": "text-end", "id": "text-2"},
        {"type": "error", "errorText": "boom"},
        {"type": "finish-step"},
        {"type": "finish"},
    ]


def test_an_error_without_a_message_shows_its_code() -> None:
    assert message(log_of([Error(code="agent_failed", message="")])).error == "agent_failed"


def test_a_cancelled_run_is_aborted_without_a_reason() -> None:
    """ai 5.0.0 and 6.0.0 refuse one."""
    made = chunks(log_of([*words("Hi"), Cancelled(reason="client")]))
    assert made[-3:] == [{"type": "text-end", "id": "text-2"}, {"type": "abort"}, {"type": "finish"}]


def test_a_run_that_is_gone_and_a_place_that_is_lost_are_an_error_and_an_end() -> None:
    for body in (dialect().gone(State()), dialect().lost(State())):
        assert [chunk["type"] for chunk in chunks_of(body)] == ["error", "finish"]


@given(LOGS.filter(lambda log: not log[-1].terminal), RESETS)
def test_what_is_open_gets_its_end_where_the_run_goes_or_the_place_is_lost(log: list[Entry], reset_step: bool) -> None:
    """A part without an end is `streaming` for ever, and a call without a result at work."""
    state, frames = folds.folded(dialect(reset_step), log)
    for broken in (dialect(reset_step).gone(state), dialect(reset_step).lost(state)):
        seen = message_of(chunks_of(b"".join(frame.data for frame in frames) + broken))
        assert seen.finished and seen.error
        assert all(part.value.keys() & {"output", "error"} for part in seen.parts if part.kind.startswith("tool-"))


# -- rewinds ---------------------------------------------------------------------------------------------------


def test_an_attempt_that_says_the_same_again_is_not_noticed() -> None:
    one = log_of(words("Hello", " wor"), [*words("Hel", "lo world", "!"), Final()])
    assert message(one).parts == [("text", "Hello world!")]


def test_an_attempt_that_goes_on_from_a_checkpoint_is_not_noticed() -> None:
    log = log_of(words("one ", "two "), ("1-2", [*words("two ", "three"), Final()]))
    assert message(log).parts == [("text", "one two three")]


def test_an_attempt_that_says_something_else_takes_the_text_back() -> None:
    log = log_of(words("one ", "two "), ("1-2", [*words("three ", "four"), Final()]))
    seen = message(log)
    assert seen.parts == [
        ("text", "one two "),
        ("data-rewind", {"attempt": 2, "reason": "worker_lost"}),
        ("text", "one three four"),
    ]
    assert seen.text == outcome(log).answer


def test_what_is_the_last_part_is_known_after_a_rewind_too() -> None:
    second = [*words("Or not."), ToolCall(id="c", tool="f"), *words("It is so."), Final(answer="It is so.")]
    seen = message(log_of(words("Let me see."), second))
    assert [part.kind for part in seen.parts] == ["text", "data-rewind", "text", "tool-f", "text"]


def test_an_attempt_that_ends_before_it_has_said_all_again_takes_the_text_back() -> None:
    log = log_of(words("one ", "two "), [*words("one "), Final()])
    assert message(log).text == "one "
    assert message(log, reset_step=True).parts == [("text", "one ")]


def test_with_reset_step_what_survives_is_shown_anew() -> None:
    item = {"url": "https://a.example"}
    log = log_of(
        [
            Reasoning(text="hm"),
            ToolCall(id="c", tool="f", args=1),
            ToolResult(id="c", tool="f", result=2),
            Sources(stage="analyzed", count=1, items=[item]),
            *words("one ", "two "),
            ToolCall(id="void", tool="f"),
            *words("three"),
        ],
        ("1-6", [*words("one", " or two"), Final()]),
    )
    assert message(log, reset_step=True).parts == [
        ("reasoning", "hm"),
        ("tool-f", {"id": "c", "input": 1, "output": 2}),
        ("source-url", "https://a.example"),
        ("text", "one one or two"),
    ]
    assert chunks(log, reset_step=True).count({"type": "reset-step"}) == 1


def test_with_reset_step_an_attempt_that_says_the_same_again_resets_nothing() -> None:
    log = log_of(words("Hello", " wor"), [*words("Hel", "lo world", "!"), Final()])
    assert {"type": "reset-step"} not in chunks(log, reset_step=True)


def test_a_call_that_was_taken_back_is_at_work_no_longer() -> None:
    log = log_of([ToolCall(id="a", tool="f")], [ToolCall(id="b", tool="f"), ToolResult(id="b", tool="f", result=1)])
    assert message(log).all_of("tool-f") == [
        {"id": "a", "input": None, "error": VOID_CALL},
        {"id": "b", "input": None, "output": 1},
    ]


def test_a_call_that_is_made_again_under_its_id_is_the_same_part() -> None:
    again = [ToolCall(id="a", tool="f"), ToolResult(id="a", tool="f", result=1)]
    assert message(log_of(again, again)).all_of("tool-f") == [{"id": "a", "input": None, "output": 1}]


def test_reasoning_that_is_said_again_is_shown_once() -> None:
    log = log_of([Reasoning(text="hm, "), *words("a")], [Reasoning(text="hm, so"), *words("ab"), Final()])
    seen = message(log)
    assert "".join(seen.all_of("reasoning")) == "hm, so"
    assert seen.text == "ab"


def test_a_cancelled_run_keeps_what_was_shown() -> None:
    """Though the new attempt had not said it again yet."""
    seen = message(log_of(words("one ", "two "), [*words("one "), Cancelled(reason="client")]))
    assert seen.parts == [("text", "one two ")]
    assert seen.aborted


# -- hostile text ----------------------------------------------------------------------------------------------


@given(TEXTS, TEXTS)
def test_no_text_makes_another_chunk_and_none_is_changed(text: str, name: str) -> None:
    item = {"url": "https://" + text, "title": text}
    made = told(
        Message(text=text),
        Data(name=name, value={text: text}),
        Reasoning(text="." + text),
        ToolCall(id=text, tool=name, args={text: text}),
        ToolResult(id=text, tool=name, result=[text]),
        Token(text="." + text),
        Final(answer="." + text, citations=[item]),
    )
    expected: list[Chunk] = [
        {"type": "data-message", "data": {"text": text}, "transient": True},
        {"type": f"data-{name}", "data": {text: text}, "transient": True},
        {"type": "reasoning-start", "id": "reasoning-4"},
        {"type": "reasoning-delta", "id": "reasoning-4", "delta": "." + text},
        {"type": "reasoning-end", "id": "reasoning-4"},
        {
            "type": "tool-input-available",
            "toolCallId": text,
            "toolName": name,
            "input": {text: text},
            "providerExecuted": True,
        },
        {"type": "tool-output-available", "toolCallId": text, "output": [text]},
        {"type": "text-start", "id": "text-9"},
        {"type": "text-delta", "id": "text-9", "delta": "." + text},
        {"type": "text-end", "id": "text-9"},
        {"type": "source-url", "sourceId": "source-12", "url": "https://" + text, "title": text},
        {"type": "data-final", "data": {"citations": [item], "usage": {}}, "transient": True},
    ]
    assert made == json.loads(json.dumps(expected))


@given(TEXTS)
def test_a_hostile_error_is_its_text(text: str) -> None:
    assert message(log_of([Error(code="x", message=text)])).error == (text or "x")


POISON: list[Any] = [
    {"__proto__": {"admin": True}},
    [{"a": {"__proto__": None}}],
    {"constructor": {"prototype": 1}},
]


@pytest.mark.parametrize("value", POISON)
def test_what_the_clients_json_parser_refuses_comes_as_a_text(value: Any) -> None:
    """It would end the whole stream with an error: a tool that has fetched a page is enough for that."""
    log = log_of(
        [
            Data(name="x", value=value),
            ToolCall(id="c", tool="f", args=value),
            ToolResult(id="c", tool="f", result=value),
            Sources(stage="screened", count=1, items=[{"x": value}]),
            Final(citations=[{"x": value}]),
        ]
    )
    seen = message(log)
    [call] = seen.all_of("tool-f")
    assert json.loads(call["input"]) == json.loads(call["output"]) == value
    assert json.loads(seen.transient[0]["data"]) == value


@pytest.mark.parametrize("value", ["__proto__", {"a": "__proto__", "constructor": "prototype"}, {"prototype": 1}])
def test_what_only_mentions_it_comes_as_it_is(value: Any) -> None:
    [call, _] = told(ToolCall(id="c", tool="f", args=value), ToolResult(id="c", tool="f", result=value))
    assert call["input"] == value


# -- the parts -------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.text(max_size=2), st.integers()), max_size=40))
def test_a_map_that_grows_has_what_was_added_and_leaves_the_old_ones_as_they_were(items: list[tuple[str, int]]) -> None:
    known, steps = Known(), [(Known(), dict[str, int]())]
    for key, value in items:
        known = known.plus(key, value)
        steps.append((known, steps[-1][1] | {key: value}))
    for each, expected in steps:
        for key in [*(key for key, _ in items), "not there"]:
            assert (each.holds(key), each.get(key)) == (key in expected, expected.get(key))
    assert len(known.parts) <= len(items).bit_length()
