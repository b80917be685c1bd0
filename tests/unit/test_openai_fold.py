"""The dialect `openai`: a log as the stream of a response."""

from __future__ import annotations

import json
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.events import Entry, Reasoning, Token
from broker.fold import outcome
from broker.gateway.dialects.openai.fold import Responses
from broker.gateway.dialects.openai.response import Profile
from broker.gateway.dialects.place import JUMP
from tests.kit import openai_stream, sse
from tests.kit.folds import body_of, folded, frames_of
from tests.kit.logs import REQUEST_ID, attempt, entry, logs, start
from tests.kit.openai_stream import output_text

STREAMS = Path(__file__).parents[1] / "data" / "openai"


def dialect(**profile: Any) -> Responses:
    facts = {"request_id": REQUEST_ID, "created_at": 1, "agent": "m", **profile}
    return Responses(Profile(**facts))


def events_of(log: list[Entry]) -> list[dict[str, Any]]:
    return openai_stream.parse(body_of(dialect(), log))


def deltas(events: list[dict[str, Any]]) -> list[tuple[int, str]]:
    return [(event["output_index"], event["delta"]) for event in events if event["type"].endswith("text.delta")]


def token(event_id: str, text: str) -> Entry:
    return entry(event_id, "token", text=text)


def final(event_id: str, answer: str | None = None, **usage: Any) -> Entry:
    return entry(event_id, "final", answer=answer, citations=[], usage=usage)


BEGUN = [start(), attempt("5-1", "0-1", reason="started")]


@given(logs())
def test_every_log_is_a_stream_that_a_strict_client_accepts(log: list[Entry]) -> None:
    events = events_of(log)
    checker = openai_stream.check(events)
    assert checker.ended == log[-1].terminal


@given(logs(ended=True))
def test_the_text_of_the_response_is_the_answer_of_the_poll(log: list[Entry]) -> None:
    response = events_of(log)[-1]["response"]
    expected = outcome(log)
    assert output_text(response) == json.loads(json.dumps(expected.answer or ""))
    assert response["error"] == (json.loads(log[-1].data) if log[-1].type == "error" else None)


@given(logs(), st.data())
def test_a_log_that_is_cut_anywhere_and_resumed_is_the_whole(log: list[Entry], data: st.DataObject) -> None:
    """Also between the frames of one event, and by a fold that goes on from an old state."""
    frames = frames_of(dialect(), log)
    positions = [frame.position for frame in frames]
    assert positions == sorted(set(positions))
    assert positions == [event["sequence_number"] for event in events_of(log)]
    seen = data.draw(st.integers(0, len(frames)))
    after = frames[seen - 1].position if seen else -1
    resumed = [frame for frame in frames_of(dialect(), log) if frame.position > after]
    assert frames[:seen] + resumed == frames
    at = data.draw(st.integers(0, len(log)))
    state, begun = folded(dialect(), log[:at])
    folded(dialect(), log)
    for each in log[at:]:
        state, more = dialect().step(state, each)
        begun += more
    assert begun == frames


@given(logs())
def test_the_last_frame_of_an_event_has_its_id(log: list[Entry]) -> None:
    state = dialect().start
    for each in log:
        state, frames = dialect().step(state, each)
        ids = [sse.parse(frame.data)[0].id for frame in frames]
        assert ids == [""] * (len(ids) - 1) + [str(each.id)] * bool(ids)


@given(logs())
def test_the_object_of_a_poll_is_that_of_the_last_event(log: list[Entry]) -> None:
    state, _ = folded(dialect(), log)
    polled = json.loads(dialect().response(state))
    if log[-1].terminal:
        assert polled == events_of(log)[-1]["response"]
    else:
        assert polled["status"] in ("queued", "in_progress")
        assert output_text(polled) == json.loads(json.dumps(outcome(log).answer or ""))


@given(logs())
def test_every_frame_is_ascii_and_one_event(log: list[Entry]) -> None:
    for frame in frames_of(
        dialect(agent="\n\ud800", metadata={"\r\n": "\n\ndata: x"}, parameters={"model": "\u2028"}), log
    ):
        assert frame.data.isascii()
        assert b"\r" not in frame.data
        assert frame.data.count(b"\n\n") == 1 and frame.data.endswith(b"\n\n")
        assert len(openai_stream.parse(frame.data)) == 1


STREAM_LOGS: dict[str, list[Entry]] = {
    "o_text": [*BEGUN, token("5-2", "Hi"), final("5-3")],
    "o_fc": [*BEGUN, entry("5-2", "tool_call", id="x", tool="f", args={}), final("5-3")],
    "o_reasoning": [*BEGUN, entry("5-2", "reasoning", text="hm"), token("5-3", "Hi"), final("5-4")],
    "o_error": [*BEGUN, token("5-2", "Hi"), entry("5-3", "error", code="server_error", message="boom")],
    "o_cancelled_completed": [
        *BEGUN,
        token("5-2", "Hi"),
        attempt("6-1", "5-2", reason="cancelled"),
        entry("6-2", "cancelled", reason="client"),
    ],
    "o_rewind": [*BEGUN, token("5-2", "No"), attempt("6-1", "0-1", 2), token("6-2", "Hi"), final("6-3")],
}


@pytest.mark.parametrize("name", sorted(STREAM_LOGS))
def test_the_stream_is_the_one_that_real_clients_have_accepted(name: str) -> None:
    """But for ids, the sequence after a rewind, and members that the response has beside those."""
    ours, theirs = events_of(STREAM_LOGS[name]), openai_stream.parse((STREAMS / f"{name}.sse").read_bytes())
    ids: dict[str, str] = {}
    assert [event["type"] for event in ours] == [event["type"] for event in theirs]
    for our, their in zip(ours, theirs, strict=True):
        _check_same(our, their, ids)


def _check_same(ours: Any, theirs: Any, ids: dict[str, str], name: str = "") -> None:
    if isinstance(theirs, dict):
        more = set(ours) - set(theirs) if theirs.get("object") == "response" else set()
        assert set(ours) - more == set(theirs)
        for key, value in theirs.items():
            _check_same(ours[key], value, ids, key)
    elif isinstance(theirs, list):
        assert len(ours) == len(theirs)
        for our, their in zip(ours, theirs, strict=True):
            _check_same(our, their, ids)
    elif name in ("id", "item_id", "call_id"):
        assert ids.setdefault(theirs, ours) == ours
    elif name == "sequence_number":
        assert ours in (theirs, 2 * JUMP + theirs - 5)
    elif not (name == "status" and theirs == "in_progress" and ours == "queued"):
        assert ours == theirs, name


def test_a_rewind_into_a_text_closes_it_and_begins_another_with_what_survives() -> None:
    log = [*BEGUN, token("5-2", "A"), token("5-3", "B"), attempt("6-1", "5-2", 2), token("6-2", "C"), final("6-3")]
    events = events_of(log)
    assert deltas(events) == [(0, "A"), (0, "B"), (1, "A"), (1, "C")]
    closed = [event["item"] for event in events if event["type"] == "response.output_item.done"]
    assert [(item["status"], item["content"][0]["text"]) for item in closed] == [
        ("incomplete", "AB"),
        ("completed", "AC"),
    ]
    assert events[-1]["response"]["output"] == closed[1:]


def test_an_attempt_that_takes_nothing_back_goes_on_in_the_open_text() -> None:
    log = [*BEGUN, token("5-2", "A"), attempt("6-1", "5-2", 2), token("6-2", "B"), final("6-3")]
    events = events_of(log)
    assert deltas(events) == [(0, "A"), (0, "B")]
    assert [event["sequence_number"] for event in events][4:7] == [4, 2 * JUMP, 2 * JUMP + 1]


def test_what_a_rewind_leaves_whole_stays_in_the_response() -> None:
    log = [
        *BEGUN,
        token("5-2", "I look. "),
        entry("5-3", "tool_call", id="x", tool="look", args={"at": 1}),
        entry("5-4", "tool_result", id="x", tool="look", result=[1]),
        token("5-5", "No"),
        attempt("6-1", "5-4", 2),
        token("6-2", "Yes"),
        final("6-3"),
    ]
    output = events_of(log)[-1]["response"]["output"]
    assert [item["type"] for item in output] == ["message", "function_call", "function_call_output", "message"]
    assert output[1]["call_id"] == output[2]["call_id"]
    assert (output[1]["name"], output[1]["arguments"], output[2]["output"]) == ("look", '{"at":1}', "[1]")
    assert output_text(events_of(log)[-1]["response"]) == "I look. Yes"


def test_a_call_that_is_made_again_has_another_call_id() -> None:
    call = {"id": "x", "tool": "f", "args": None}
    log = [
        *BEGUN,
        entry("5-2", "tool_call", **call),
        attempt("6-1", "0-1", 2),
        entry("6-2", "tool_call", **call),
        entry("6-3", "tool_result", id="x", tool="f", result="r"),
        final("6-4"),
    ]
    events = events_of(log)
    calls = [event["item"] for event in events if event["type"] == "response.output_item.added"]
    assert len({item["id"] for item in calls}) == 3
    assert calls[0]["call_id"] != calls[1]["call_id"] == calls[2]["call_id"]
    assert [item["type"] for item in events[-1]["response"]["output"]] == ["function_call", "function_call_output"]


def test_a_result_finds_its_call_however_far_back_that_is() -> None:
    between = [entry(f"5-{n}", "reasoning" if n % 2 else "token", text="t") for n in range(3, 1500)]
    call = entry("5-2", "tool_call", id="x", tool="f", args={})
    events = events_of([*BEGUN, call, *between, entry("5-1500", "tool_result", id="x", tool="f", result="late")])
    first, last = [event["item"] for event in events if "function_call" in event.get("item", {"type": ""})["type"]][
        1::2
    ]
    assert (first["call_id"], last["output"]) == (last["call_id"], "late")


def test_a_result_whose_call_was_taken_back_is_not_shown() -> None:
    """Nor is it taken for that of an earlier call: of a name the last call that survives counts."""
    calls = [entry(f"5-{n}", "tool_call", id=name, tool="f", args={}) for n, name in ((2, "x"), (3, "x"), (4, "y"))]
    results = [entry(f"6-{n}", "tool_result", id=name, tool="f", result=name) for n, name in ((2, "x"), (3, "y"))]
    log = [*BEGUN, *calls, attempt("6-1", "5-2", 2), *results, final("6-4")]
    output = events_of(log)[-1]["response"]["output"]
    assert [item["type"] for item in output] == ["function_call", "function_call_output"]
    assert output[0]["call_id"] == output[1]["call_id"]


def test_a_result_without_a_call_is_not_shown() -> None:
    log = [*BEGUN, entry("5-2", "tool_result", id="x", tool="f", result=1), final("5-3")]
    assert events_of(log)[-1]["response"]["output"] == []


@pytest.mark.parametrize(
    ("answer", "told", "texts"),
    [
        (None, ["On the way. ", "There"], ["On the way. ", "There"]),
        ("On the way. There", ["On the way. ", "There"], ["On the way. ", "There"]),
        ("On the way. There!", ["On the way. ", "There", "!"], ["On the way. ", "There!"]),
        ("There", ["On the way. ", "There"], ["There"]),
        ("Elsewhere", ["On the way. ", "There", "Elsewhere"], ["Elsewhere"]),
        ("", ["On the way. ", "There"], []),
    ],
)
def test_the_messages_together_are_the_answer(answer: str | None, told: list[str], texts: list[str]) -> None:
    call = entry("5-3", "tool_call", id="x", tool="f", args={})
    log = [*BEGUN, token("5-2", "On the way. "), call, token("5-4", "There"), final("5-5", answer)]
    events = events_of(log)
    openai_stream.check(events)
    assert [delta for _, delta in deltas(events)] == told
    output = events[-1]["response"]["output"]
    assert [item["content"][0]["text"] for item in output if item["type"] == "message"] == texts
    assert [item["status"] for item in output] == ["completed"] * len(output)


@given(st.lists(st.one_of(st.none(), st.text("ab", min_size=1, max_size=2)), min_size=1, max_size=6), st.data())
def test_an_answer_that_the_last_messages_are_is_not_told_again(parts: list[str | None], data: st.DataObject) -> None:
    """None is what parts two messages."""
    body = [
        entry(f"5-{n}", "reasoning", text="r") if part is None else token(f"5-{n}", part)
        for n, part in enumerate(parts, 2)
    ]
    messages = [
        "".join(part or "" for part in group)
        for silent, group in groupby(parts, lambda part: part is None)
        if not silent
    ]
    answer = "".join(messages[data.draw(st.integers(0, len(messages))) :])
    events = events_of([*BEGUN, *body, final("5-99", answer)])
    assert "".join(text for _, text in deltas(events)).replace("r", "") == "".join(messages)
    assert output_text(events[-1]["response"]) == answer


def test_an_answer_without_tokens_is_a_message() -> None:
    events = events_of([*BEGUN, final("5-2", "Hi")])
    assert deltas(events) == [(0, "Hi")]
    assert output_text(events[-1]["response"]) == "Hi"


def test_an_answer_that_was_cut_for_its_length_is_incomplete() -> None:
    last = events_of([*BEGUN, token("5-2", "Hi"), final("5-3", finish_reason="length")])[-1]
    assert last["type"] == "response.incomplete"
    assert last["response"]["incomplete_details"] == {"reason": "max_output_tokens"}
    assert last["response"]["output"][0]["status"] == "incomplete"


@pytest.mark.parametrize(
    "usage",
    [
        {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7, "cached_tokens": 1, "reasoning_tokens": 2},
        {"input_tokens": 3, "output_tokens": 4, "cached_tokens": 1, "reasoning_tokens": 2},
    ],
)
def test_usage_has_openais_names(usage: dict[str, int]) -> None:
    response = events_of([*BEGUN, final("5-2", "Hi", **usage)])[-1]["response"]
    assert response["usage"] == {
        "input_tokens": 3,
        "input_tokens_details": {"cached_tokens": 1, "cache_write_tokens": 0},
        "output_tokens": 4,
        "output_tokens_details": {"reasoning_tokens": 2},
        "total_tokens": 7,
    }
    assert events_of([*BEGUN, final("5-2", "Hi", rounds=1)])[-1]["response"]["usage"] is None


def test_the_response_says_what_was_asked_for() -> None:
    told = dialect(
        agent="chat",
        parameters={"model": "gpt", "temperature": 0.5, "instructions": "Be brief.", "top_p": "much", "max_tokens": 5},
        metadata={"a": "b", "n": 1, "openai": {"previous_response_id": "resp_1", "background": True}},
    )
    response = json.loads(told.response(told.start))
    assert response["model"] == "gpt"
    assert (response["temperature"], response["top_p"], response["instructions"]) == (0.5, None, "Be brief.")
    assert response["max_output_tokens"] == 5
    assert response["metadata"] == {"a": "b", "n": "1"}
    assert (response["previous_response_id"], response["background"]) == ("resp_1", True)
    assert (response["id"], response["object"], response["status"]) == (f"resp_{REQUEST_ID}", "response", "queued")


def test_the_text_that_is_taken_as_it_stands_in_the_log_is_all_that_its_events_have() -> None:
    assert set(Token.model_fields) == set(Reasoning.model_fields) == {"text"}
