"""The dialects `chat`, `session_chat`, `agent` and `prompt`: what clients get that cannot take text back."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import hypothesis
import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.events import Cancelled, Data, Entry, Error, Event, Final, Progress, Reasoning, Token, ToolCall, ToolResult
from broker.fold import Rewind, fold, outcome
from broker.gateway.dialects.agent.fold import Agent
from broker.gateway.dialects.chat.fold import Chat
from broker.gateway.dialects.dialect import Frame
from broker.gateway.dialects.place import Place
from broker.gateway.dialects.prompt.fold import Prompt
from broker.gateway.dialects.session_chat.fold import SessionChat
from broker.ids import EventId
from tests.kit import folds, sse
from tests.kit.logs import REQUEST_ID, log_of, logs, surviving_text, words
from tests.kit.scale import scaled

SESSION_ID = "s"
CREATED_AT_MS = 1_700_000_000_000

DIALECTS: dict[str, Callable[[], Any]] = {
    "chat": lambda: Chat(REQUEST_ID, SESSION_ID),
    "session_chat": lambda: SessionChat(CREATED_AT_MS),
    "agent": lambda: Agent(SESSION_ID),
    "prompt": lambda: Prompt(REQUEST_ID),
}
NAMES = sorted(DIALECTS)
names = st.sampled_from(NAMES)
MORE = hypothesis.settings(max_examples=scaled(1000))
every_dialect = pytest.mark.parametrize("name", NAMES)


def frames_of(name: str, log: Sequence[Entry]) -> list[Frame]:
    return folds.frames_of(DIALECTS[name](), log)


def events_of(name: str, log: Sequence[Entry]) -> list[tuple[str, Any]]:
    """(type, JSON) as an EventSource has them."""
    return [(event.type, event.json) for event in sse.parse(b"".join(frame.data for frame in frames_of(name, log)))]


def piece_of(name: str, kind: str, value: Any) -> str | None:
    """The text of a piece of the answer."""
    field, kinds = {
        "chat": ("content", "token"),
        "session_chat": ("content", "text_delta"),
        "agent": ("content", "token"),
        "prompt": ("token", "message"),
    }[name]
    text: str | None = value.get(field) if value.get("type", kind) == kinds else None
    return text


def shown_text(name: str, log: Sequence[Entry]) -> str:
    return "".join(piece_of(name, *event) or "" for event in events_of(name, log))


def code_of(name: str, log: Sequence[Entry]) -> str | None:
    """Of the error that a client is told, if it is."""
    failures = [value for _, value in events_of(name, log) if "code" in value]
    assert len(failures) <= 1
    return failures[0]["code"] if failures else None


# -- for every log ---------------------------------------------------------------------------------------------


@MORE
@given(name=names, log=logs(repeating=True), cut=st.integers(0, 200))
def test_what_is_cut_between_two_frames_and_resumed_there_is_the_whole(name: str, log: list[Entry], cut: int) -> None:
    """P8. A gateway that resumes folds from the beginning, and leaves out what stands at the cursor or below."""
    frames, again = frames_of(name, log), frames_of(name, log)
    assert frames == again, "another gateway would give other bytes"
    positions = [frame.position for frame in frames]
    assert all(one < two for one, two in pairwise(positions))
    seen = frames[: cut % (len(frames) + 1)]
    rest = [frame for frame in again if not seen or frame.position > seen[-1].position]
    assert seen + rest == frames


@MORE
@given(name=names, log=logs(repeating=True), cut=st.integers(0, 100))
def test_a_log_that_grows_gives_what_it_gave_before_and_more(name: str, log: list[Entry], cut: int) -> None:
    """And an old state stays what it was: a gateway goes on from it once for each reader."""
    dialect = DIALECTS[name]()
    states = [dialect.start]
    for entry in log:
        states.append(dialect.step(states[-1], entry)[0])
    at = cut % (len(log) + 1)
    for _ in range(2):
        state, rest = states[at], []
        for entry in log[at:]:
            state, made = dialect.step(state, entry)
            rest += made
        assert frames_of(name, log[:at]) + rest == frames_of(name, log)


@MORE
@given(name=names, log=logs(repeating=True))
def test_text_makes_no_frames_of_its_own(name: str, log: list[Entry]) -> None:
    """P18, P13: each frame is one event to a strict reader, one line `data:`, and has no line but its own."""
    allowed = {"chat": (), "session_chat": (), "agent": ("id", "event"), "prompt": ("id",)}[name]
    for frame in frames_of(name, log):
        text = frame.data.decode("ascii")
        assert text.endswith("\n\n")
        lines = text[:-2].split("\n")
        assert [line.split(": ")[0] for line in lines] == [*allowed, "data"]
        assert all(" " <= letter <= "~" for line in lines for letter in line)
        [event] = sse.parse(frame.data)
        json.loads(event.data)


@MORE
@given(name=names, log=logs(repeating=True))
def test_the_shown_text_follows_the_answer_for_as_long_as_none_of_it_has_to_be_taken_back(
    name: str, log: list[Entry]
) -> None:
    """Against the definition: of each beginning of the log, the surviving text either goes on where the shown one ends,
    or is a beginning of it; else it is over."""
    shown = ""
    for length, entry in enumerate(log, start=1):
        if entry.terminal:
            break
        text = surviving_text(log[:length])
        if not text.startswith(shown) and not shown.startswith(text):
            assert code_of(name, log[:length]) == "restarted"
            assert frames_of(name, log[:length]) == frames_of(name, log), "nothing follows"
            return
        shown = text if len(text) > len(shown) else shown
        assert shown_text(name, log[:length]) == shown
        assert code_of(name, log[:length]) is None


@MORE
@given(name=names, log=logs(ended=True, repeating=True))
def test_the_end_says_what_the_poll_says(name: str, log: list[Entry]) -> None:
    """P23. And it is told for certain that nothing follows."""
    dialect = DIALECTS[name]()
    assert dialect.ended(folds.folded(dialect, log)[0])
    came_to, shown, code = outcome(log), shown_text(name, log), code_of(name, log)
    kind, last = events_of(name, log)[-1]
    if code == "restarted":
        return
    if log[-1].type == "final":
        assert code is None
        answer = came_to.answer or ""
        text = surviving_text(log)
        assert shown == (text or answer) or (shown == answer and answer.startswith(text))
        match name:
            case "chat":
                names = {"request_id": REQUEST_ID, "session_id": SESSION_ID}
                extra = {"citations": came_to.citations, "usage": came_to.usage}
                assert last == {"type": "done", "content": answer, **extra, **names}
            case "session_chat":
                assert last == {"type": "done", "finalMessage": answer}
            case "agent":
                tokens = sum(kind == "token" for kind, _ in events_of(name, log))
                common = {"session_id": SESSION_ID, "total_tokens": tokens, "status": "complete"}
                assert (kind, last) == ("done", {"content": answer, **common})
            case _:
                assert last == {"lifecycle": "done"}
    elif log[-1].type == "error":
        assert came_to.error is not None and code == came_to.error["code"]
    elif name == "agent":
        assert (kind, last["status"], last["content"]) == ("done", "cancelled", came_to.answer or "")
    else:
        assert code == "cancelled"


@given(log=logs(repeating=True))
def test_every_id_of_prompt_leads_back_to_its_frame(log: list[Entry]) -> None:
    for frame in frames_of("prompt", log):
        [event] = sse.parse(frame.data)
        request_id, _, place = event.id.partition("/")
        assert (request_id, Place.parse(place)) == (REQUEST_ID, frame.position)


@given(log=logs(repeating=True))
def test_the_ids_of_agent_are_its_positions_and_have_no_gap_within_an_attempt(log: list[Entry]) -> None:
    frames = frames_of("agent", log)
    assert [sse.parse(frame.data)[0].id for frame in frames] == [str(frame.position) for frame in frames]
    before = 0
    for frame in frames:
        later = frame.position // 1_000_000 > before // 1_000_000
        assert frame.position == (1 + frame.position // 1_000_000 * 1_000_000 if later else before + 1)
        before = frame.position


@MORE
@given(name=st.sampled_from(["chat", "session_chat", "prompt"]), log=logs(repeating=True))
def test_what_is_beside_the_answer_is_shown_once_and_in_order(name: str, log: list[Entry]) -> None:
    """Whatever survives of it has been shown; and where nothing was taken back, nothing else."""

    def beside(entries: Sequence[Entry]) -> list[str]:
        shown = events_of(name, entries)
        kept = [value for kind, value in shown if piece_of(name, kind, value) is None]
        return [json.dumps(value) for value in kept if not {"code", "lifecycle"} & value.keys()]

    if code_of(name, log) == "restarted":
        return
    if name != "prompt":
        log = [entry for entry in log if not entry.terminal]
    shown, wanted = beside(log), beside(fold(log))
    left = iter(shown)
    assert all(value in left for value in wanted), f"{wanted} is not in {shown}"
    if len([entry for entry in log if entry.type == "attempt"]) == 1:
        assert shown == wanted


REJOINED: dict[str, Callable[[tuple[Rewind, ...]], Any]] = {
    "chat": lambda rewinds: Chat(REQUEST_ID, SESSION_ID, rewinds),
    "session_chat": lambda rewinds: SessionChat(CREATED_AT_MS, rewinds),
}


def rewinds_of(log: Sequence[Entry]) -> tuple[Rewind, ...]:
    """As the record has them."""
    return tuple(
        Rewind(each.id, EventId.parse(json.loads(each.data)["resume_from"])) for each in log if each.type == "attempt"
    )


def rejoined(name: str, before: Sequence[Entry], log: Sequence[Entry]) -> list[Any]:
    """What a client gets that comes when the log is `before`, and stays."""
    frames = folds.frames_of(REJOINED[name](rewinds_of(before)), log)
    return [(event.type, event.json) for frame in frames for event in sse.parse(frame.data)]


@MORE
@given(name=st.sampled_from(sorted(REJOINED)), log=logs(ended=False, repeating=True), cut=st.integers(0, 200))
def test_a_client_without_cursors_that_comes_later_is_shown_what_survives(
    name: str, log: list[Entry], cut: int
) -> None:
    """And from then on what everybody is shown who has that."""
    at = 1 + cut % len(log)
    shown = surviving_text(log[:at])
    for length in range(at, len(log) + 1):
        text = surviving_text(log[:length])
        events = rejoined(name, log[:at], log[:length])
        told = "".join(piece_of(name, *event) or "" for event in events)
        if not text.startswith(shown) and not shown.startswith(text):
            assert events[-1][1]["code"] == "restarted"
            return
        shown = text if len(text) > len(shown) else shown
        assert told == shown
        assert not [value for _, value in events if "code" in value]


@pytest.mark.parametrize("name", sorted(REJOINED))
def test_a_client_that_comes_later_is_told_when_a_failover_takes_what_it_was_shown_by(name: str) -> None:
    """The attempt that it knew of is lost: another one comes, or the one before goes on and ends."""
    known = log_of(words("a", "b"), words("x", "y"))
    other = log_of(words("a", "b"), ("1-2", words("c")))
    other[-2] = Entry(EventId(3, 1), "attempt", other[-2].data)
    other[-1] = Entry(EventId(3, 2), *other[-1][1:])
    for log in (other, log_of([*words("a", "b"), Final()])):
        [(_, value)] = rejoined(name, known, log)
        assert value["code"] == "cursor_lost"
    assert "".join(piece_of(name, *event) or "" for event in rejoined(name, known, known)) == "xy"


# -- one by one ------------------------------------------------------------------------------------------------

ALL: list[Event] = [
    Reasoning(text="hm"),
    ToolCall(id="c1", tool="weather", args={"city": "Bern"}),
    ToolResult(id="c1", tool="weather", result=["sun"]),
    Progress(percent=50, message="half"),
    Token(text="It "),
    Token(text="shines."),
    Data(name="n", value=1),
    Final(citations=[{"title": "t"}], usage={"tokens": 2}),
]


def test_chat_shows_every_type_under_its_own_name() -> None:
    values = [value for _, value in events_of("chat", log_of(ALL))]
    assert values == [
        {"type": "reasoning", "content": "hm"},
        {"type": "tool_call", "id": "c1", "tool": "weather", "args": {"city": "Bern"}},
        {"type": "tool_result", "id": "c1", "tool": "weather", "result": ["sun"]},
        {"type": "progress", "percent": 50.0, "message": "half"},
        {"type": "token", "content": "It "},
        {"type": "token", "content": "shines."},
        {"type": "data", "name": "n", "value": 1},
        {
            "type": "done",
            "content": "It shines.",
            "citations": [{"title": "t"}],
            "usage": {"tokens": 2},
            "request_id": REQUEST_ID,
            "session_id": SESSION_ID,
        },
    ]


def test_session_chat_shows_text_tools_and_progress() -> None:
    values = [value for _, value in events_of("session_chat", log_of(ALL))]
    assert values == [
        {"type": "tool_start", "tool": "weather", "args": {"city": "Bern"}},
        {"type": "tool_result", "tool": "weather", "result": ["sun"]},
        {"type": "progress", "percent": 50.0, "message": "half"},
        {"type": "text_delta", "content": "It ", "timestamp": CREATED_AT_MS + 1},
        {"type": "text_delta", "content": "shines.", "timestamp": CREATED_AT_MS + 1},
        {"type": "done", "finalMessage": "It shines."},
    ]


def test_agent_shows_tokens_and_counts_them() -> None:
    assert b"".join(frame.data for frame in frames_of("agent", log_of(ALL))).decode() == (
        'id: 1\nevent: token\ndata: {"content":"It "}\n\n'
        'id: 2\nevent: token\ndata: {"content":"shines."}\n\n'
        'id: 3\nevent: done\ndata: {"content":"It shines.","session_id":"s","total_tokens":2,'
        '"status":"complete"}\n\n'
    )


def test_prompt_shows_tokens_and_tools_and_gives_an_id_before_the_first_word() -> None:
    assert b"".join(frame.data for frame in frames_of("prompt", log_of(ALL))).decode() == (
        f'id: {REQUEST_ID}/0-1\ndata: {{"token":""}}\n\n'
        f'id: {REQUEST_ID}/1-3\ndata: {{"tool_call":{{"id":"c1","tool":"weather","args":{{"city":"Bern"}}}}}}\n\n'
        f'id: {REQUEST_ID}/1-4\ndata: {{"tools_called":[{{"id":"c1","tool":"weather","result":["sun"]}}]}}\n\n'
        f'id: {REQUEST_ID}/1-6\ndata: {{"token":"It "}}\n\n'
        f'id: {REQUEST_ID}/1-7\ndata: {{"token":"shines."}}\n\n'
        f'id: {REQUEST_ID}/1-9\ndata: {{"lifecycle":"done"}}\n\n'
    )


def test_frames_of_one_entry_have_ids_of_their_own_in_prompt() -> None:
    [answer, end] = frames_of("prompt", log_of([Final(answer="42")]))[1:]
    assert sse.parse(answer.data)[0] == sse.Event(f"{REQUEST_ID}/1-2.1", "message", '{"token":"42"}')
    assert sse.parse(end.data)[0] == sse.Event(f"{REQUEST_ID}/1-2", "message", '{"lifecycle":"done"}')
    [error, end] = frames_of("prompt", log_of([Error(code="no_quota", message="Later.")]))[1:]
    assert sse.parse(error.data)[0].json == {"error": "Later.", "code": "no_quota"}
    assert answer.position < end.position and error.position < end.position


@every_dialect
def test_an_answer_that_came_without_tokens_is_shown_as_one(name: str) -> None:
    assert shown_text(name, log_of([Final(answer="42")])) == "42"
    assert shown_text(name, log_of([Final(answer="")])) == ""
    assert shown_text(name, log_of([Final()])) == ""


@every_dialect
def test_an_empty_token_is_a_token(name: str) -> None:
    pieces = [piece_of(name, *event) for event in events_of(name, log_of(words("a", "", "b")))]
    assert [piece for piece in pieces if piece is not None][-3:] == ["a", "", "b"]


@every_dialect
def test_an_attempt_that_says_the_same_again_is_not_seen(name: str) -> None:
    once = log_of([*words("Hel", "lo"), ToolCall(id="1", tool="t"), *words(" wor", "ld"), Final()])
    again = log_of(
        [*words("Hel", "lo"), ToolCall(id="1", tool="t"), *words(" w")],
        [*words("Hello"), ToolCall(id="1", tool="t"), *words(" w", "orld"), Final()],
    )
    assert shown_text(name, again) == shown_text(name, once) == "Hello world"
    assert code_of(name, again) is None
    if name != "agent":
        kinds = [kind for kind, value in events_of(name, again) if piece_of(name, kind, value) is None]
        assert len(kinds) == len([None for kind, v in events_of(name, once) if piece_of(name, kind, v) is None])


@every_dialect
def test_an_attempt_that_goes_on_from_a_checkpoint_goes_on_where_the_text_ends(name: str) -> None:
    log = log_of(words("a", "b", "c"), ("1-3", words("c", "d")))
    assert shown_text(name, log) == "abcd"


@every_dialect
def test_a_second_rewind_in_the_middle_of_a_repetition_forgets_nothing_of_what_was_shown(name: str) -> None:
    log = log_of(words("one ", "two ", "three "), words("one ", "two "), ("2-2", words("two three ", "four")))
    assert shown_text(name, log) == "one two three four"
    assert code_of(name, log_of(words("one ", "two "), words("one "), words("one ", "2"))) == "restarted"


@every_dialect
@pytest.mark.parametrize("second", [["Hi"], ["Hel", "p"], ["Hello", "!"], ["", "h"]])
def test_an_attempt_that_says_something_else_ends_it(name: str, second: list[str]) -> None:
    log = log_of(words("Hel", "lo "), [*words(*second), *words("more"), Final(answer="right")])
    assert shown_text(name, log) == "Hello "
    assert code_of(name, log) == "restarted"


@every_dialect
def test_an_attempt_that_ends_before_it_has_said_as_much_ends_it_too(name: str) -> None:
    assert code_of(name, log_of(words("Hello"), [*words("Hel"), Final()])) == "restarted"
    assert code_of(name, log_of(words("Hello"), [*words("Hel"), Final(answer="Hello")])) is None
    assert code_of(name, log_of(words("Hello"), [Final(answer="Hello")])) is None
    assert code_of(name, log_of(words("Hello"), [Final(answer="Help")])) == "restarted"
    assert shown_text(name, log_of(words("Hello"), [Final(answer="Hello world")])) == "Hello world"


def test_the_end_carries_the_right_answer_where_it_is_not_what_the_tokens_said() -> None:
    log = log_of([*words("about 40"), Final(answer="42")])
    assert events_of("chat", log)[-1][1]["content"] == "42"
    assert events_of("session_chat", log)[-1][1] == {"type": "done", "finalMessage": "42"}
    assert events_of("agent", log)[-1][1]["content"] == "42"


def test_a_later_attempt_of_agent_counts_from_its_own_number() -> None:
    log = log_of(words("a", "b"), words("a", "bc", "d"), [*words("ab", "cd", "e"), Final()])
    assert [frame.position for frame in frames_of("agent", log)] == [1, 2, 2_000_001, 2_000_002, 3_000_001, 3_000_002]
    assert events_of("agent", log)[-1][1]["total_tokens"] == 5


@pytest.mark.parametrize("attempts", [1, 2])
def test_a_cancel_does_not_set_the_count_of_agent_back(attempts: int) -> None:
    log = log_of(*[words("a")] * (attempts - 1), words("a", "b"), ("1-2", []))
    number = json.dumps({"attempt": attempts, "reason": "cancelled", "resume_from": str(log[-2].id)})
    log[-1] = Entry(log[-1].id, "attempt", number)
    log.append(Entry(EventId(log[-1].id.epoch, 2), "cancelled", Cancelled(reason="client").json_data()))
    positions = [frame.position for frame in frames_of("agent", log)]
    assert positions == ([1, 2, 3] if attempts == 1 else [1, 2_000_001, 2_000_002])


@every_dialect
def test_a_tool_that_is_called_otherwise_by_a_later_attempt_is_shown_again(name: str) -> None:
    if name == "agent":
        return
    log = log_of(
        [ToolCall(id="1", tool="t", args=1), ToolResult(id="1", tool="t", result=1)],
        [ToolCall(id="2", tool="t", args=2), ToolResult(id="2", tool="t", result=2)],
    )
    assert len(events_of(name, log)) == 4 + (name == "prompt")


@every_dialect
def test_a_dialect_has_words_for_what_is_not_in_the_log(name: str) -> None:
    """Whole lines; never nothing, which would be the end of a chunked body."""
    dialect = DIALECTS[name]()
    for said in (dialect.opening(1500), dialect.closing(1500), dialect.heartbeat("heartbeat 1-2 lease=1.0s")):
        assert said.endswith(b"\n")
        assert sse.parse(said) == []
        numbered = name in ("agent", "prompt")
        assert said.endswith(b"\n\n") != numbered, "a blank line ends a block: an empty event where there are ids"
        assert said.startswith(b"retry: 1500\n" if numbered and b"retry" in said else b": ")
    for said, code in ((dialect.gone(dialect.start), "gone"), (dialect.lost(dialect.start), "cursor_lost")):
        events = sse.parse(said)
        assert events[0].json["code"] == code
        assert len(events) == 1 + (name == "prompt")


def test_who_was_told_that_the_cursor_is_lost_has_another_one_afterwards() -> None:
    """An EventSource would come again with the old one for ever."""
    assert sse.parse(DIALECTS["agent"]().lost(None))[-1].id == "999999999999999"
    assert sse.parse(DIALECTS["prompt"]().lost(None))[-1].id == f"{REQUEST_ID}/0-0.1"
    assert Place.parse("0-0.1") < Place(0, 1)
