"""What a terminal shows of a run: decided by `Transcript`, printed by `Screen`, read from a Display."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from broker.cli.render import Bar, Block, Inline, Piece, Transcript
from broker.cli.screen import Screen
from broker.cli.tables import RunsTable
from broker.cli.text import make_legible
from broker.client import RunSummary
from broker.client.received import Unknown
from broker.events import (
    Attempt,
    Cancelled,
    Data,
    Error,
    Event,
    Final,
    Message,
    Progress,
    Reasoning,
    Sources,
    Start,
    Token,
    ToolCall,
    ToolResult,
)
from broker.ids import EventId
from tests.kit.display import Display

START = Start(request_id="ab" * 16, session_id="s")
SOURCES = [
    {"title": "Streams", "heading": "Resuming", "path": "docs/streams.md", "line": 12, "score": 0.91},
    {"title": "日本語の文書", "path": "docs/ja.md", "line": 3, "score": 0.5},
]


def numbered(events: Iterable[Event]) -> list[tuple[EventId, Event]]:
    """With ids as a log gives them: each attempt begins an epoch."""
    epoch, seq, found = 0, 0, []
    for event in events:
        if isinstance(event, Attempt):
            epoch, seq = epoch + 1, 0
        seq += 1
        found.append((EventId(epoch, seq), event))
    return found


def pieces(events: Iterable[Event], *, seconds: float = 0.0, transcript: Transcript | None = None) -> list[Piece]:
    """`seconds` pass between two events."""
    transcript = transcript or Transcript("broker show ID")
    return [
        piece
        for number, (event_id, event) in enumerate(numbered(events))
        for piece in transcript.feed(event_id, event, number * seconds)
    ]


def shown(parts: Iterable[Piece], *, columns: int = 80, **environ: str) -> Display:
    """What stands on a terminal with standard output and standard error."""
    file = io.StringIO()
    console = Console(
        file=file,
        force_terminal=True,
        width=columns,
        highlight=False,
        markup=False,
        emoji=False,
        _environ={"TERM": "xterm-256color", **environ},
    )
    screen = Screen(console, console)
    for part in parts:
        screen.show([part])
    screen.close()
    display = Display(columns)
    display.feed(file.getvalue().replace("\n", "\r\n").encode())
    return display


def lines(events: Iterable[Event], **options: Any) -> list[str]:
    return shown(pieces(events), **options).lines


def tokens(*texts: str) -> list[Event]:
    return [Token(text=text) for text in texts]


def attempt(number: int, resume_from: str, reason: Any = "worker_lost") -> Attempt:
    return Attempt(attempt=number, reason=reason, resume_from=resume_from)


FIRST = attempt(1, "0-1", "started")


# -- text ------------------------------------------------------------------------------------------------------------


def test_tokens_come_one_after_the_other_as_they_are() -> None:
    assert [piece for piece in pieces(tokens("one ", "two", "\n three")) if isinstance(piece, Inline)] == [
        Inline(text="one "),
        Inline(text="two"),
        Inline(text="\n three"),
    ]
    assert lines(tokens("one ", "two", "\n three")) == ["one two", " three"]


@settings(max_examples=50)
@given(st.lists(st.text(st.sampled_from("ab 日é\n*_#`[]|<>:"), max_size=12), max_size=30), st.integers(20, 100))
def test_the_answer_stands_on_the_terminal_character_by_character(texts: list[str], columns: int) -> None:
    """No wrapping of ours, no markup, no emoji codes: a terminal wraps by itself."""
    answer = "".join(texts).lstrip("\n")
    want = [line.rstrip() for line in answer.split("\n")]
    while want and not want[-1]:
        want.pop()
    got = shown(pieces(tokens(*texts)), columns=columns).lines
    while got and not got[-1]:
        got.pop()
    assert got == want


def test_reasoning_is_dim_and_stands_apart_from_the_answer() -> None:
    display = shown(pieces([Reasoning(text="let me "), Reasoning(text="think"), *tokens("yes")]))
    assert display.lines == ["let me think", "", "yes"]
    assert display.styles("think") == {"2"}
    assert display.styles("yes") == {""}


def test_each_part_of_an_answer_stands_one_line_apart_however_it_begins() -> None:
    parts = [*tokens("one"), ToolCall(id="1", tool="t"), *tokens("\n", "\n", "\ntwo\n\n", "three")]
    assert lines(parts) == ["one", "", "→ t()", "", "two", "", "three"]


@settings(max_examples=50)
@given(st.text(st.characters(codec="utf-8"), max_size=40))
def test_no_event_can_control_the_terminal(text: str) -> None:
    """The Display raises for every control character and every sequence that is not ours."""
    text += "\x1b[31mred\x1b]0;title\x07\x9b2J\x08\x7f\r"
    item = {"title": text, "path": text, "score": text}
    events: list[Event] = [
        Message(text=text),
        Progress(percent=5, message=text),
        Sources(stage="discovered", count=1, items=[item]),
        Reasoning(text=text),
        ToolCall(id=text, tool=text, args={text: [text]}),
        ToolResult(id=text, tool=text, result={text: text}),
        Data(name=text, value=text),
        Token(text=text),
        Final(answer="another " + text, citations=[item], usage={text: 1}),
        Error(code=text, message=text),
        Cancelled(reason=text),
        Unknown(name=text, data={text: text}),
    ]
    raw = shown(pieces(events)).text
    assert r"\x1b[31mred\x1b]0;title\x07\x9b2J" in raw


def test_a_carriage_return_cannot_write_over_what_was_there() -> None:
    assert lines(tokens("rm -rf /\rls", "\r\nnext")) == ["rm -rf /ls", "next"]


# -- progress ----------------------------------------------------------------------------------------------------------


def test_progress_is_a_bar_that_vanishes() -> None:
    parts = pieces([Progress(percent=25, message="Searching"), Progress(percent=50), *tokens("found")])
    display = shown(parts)
    assert display.lines == ["found"]
    first, second = display.erased
    assert re.fullmatch(r"━{6}─{18}  25 % Searching", first.rstrip())
    assert re.fullmatch(r"━{12}─{12}  50 %", second.rstrip())


def test_until_there_is_something_to_show_it_says_what_it_waits_for() -> None:
    display = shown(pieces([START, FIRST, Message(text="above"), *tokens("done")]))
    assert [line.rstrip() for line in display.erased] == ["waiting for a worker…", "running…", "running…"]
    assert display.lines == ["above", "", "done"]


def test_the_bar_stays_below_what_is_printed_above_it() -> None:
    display = shown(pieces([Progress(percent=25, message="Searching"), Message(text="found something")]))
    assert display.lines == ["found something"]
    assert len(display.erased) == 2


def test_there_is_no_bar_while_the_answer_is_written_so_nothing_flickers() -> None:
    parts = pieces([Progress(percent=25), *tokens("a\n", "b\n"), Progress(percent=50), *tokens("c\n")])
    assert len(shown(parts).erased) == 1


@pytest.mark.parametrize("columns", [2, 5, 10, 20, 40, 200])
@settings(max_examples=50)
@given(percent=st.floats(0, 100), message=st.text(st.sampled_from("ab日 "), max_size=60))
def test_the_bar_never_wraps(columns: int, percent: float, message: str) -> None:
    display = shown([Bar(percent=percent, message=message)], columns=columns)
    assert len(display.rows) == 1
    assert len(display.erased) == 1


def test_a_dumb_terminal_has_no_bar_and_no_escape_sequence() -> None:
    events = [Progress(percent=25), Message(text="m"), Reasoning(text="r"), *tokens("t"), Final(usage={"a": 1})]
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=80, highlight=False, _environ={"TERM": "dumb"})
    screen = Screen(console, console)
    for piece in pieces(events):
        screen.show([piece])
    screen.close()
    assert "\x1b" not in file.getvalue()
    assert "\r" not in file.getvalue()
    assert "%" not in file.getvalue()


def test_no_color_leaves_no_colour() -> None:
    events = [
        Message(text="m"),
        Reasoning(text="why"),
        Sources(stage="analyzed", count=2, items=SOURCES),
        ToolCall(id="1", tool="search", args={"q": "x"}),
        *tokens("t"),
        attempt(2, "0-1"),
        Final(answer="other", citations=SOURCES),
        Error(code="c", message="m"),
    ]
    colours = re.compile(r"\b(3[0-7]|9[0-7]|[34]8;)")

    def coloured(no_color: str) -> bool:
        rows = shown(pieces(events), NO_COLOR=no_color).rows
        return any(colours.search(style) for row in rows for _, style in row.cells)

    assert coloured("")
    assert not coloured("1")


# -- sources, tools, messages ------------------------------------------------------------------------------------------


def test_each_stage_is_a_line_and_the_last_one_a_table() -> None:
    got = lines(
        [
            Sources(stage="discovered", count=20, items=SOURCES),
            Sources(stage="screened", count=1, items=SOURCES[:1]),
            Sources(stage="analyzed", count=2, items=SOURCES),
            *tokens("done"),
        ]
    )
    assert got[:3] == ["discovered: 20 sources", "screened: 1 source", "analyzed: 2 sources"]
    assert got[3].split() == ["source", "where", "score"]
    assert got[4].split("  ")[0] == "Streams – Resuming"
    assert "docs/streams.md:12" in got[4]
    assert got[4].endswith("0.91")
    assert got[5].startswith("日本語の文書")
    assert got[6:] == ["", "done"]


def test_a_stage_that_turns_out_to_be_the_last_is_a_table_when_the_answer_begins() -> None:
    got = lines([Sources(stage="discovered", count=2, items=SOURCES), *tokens("done")])
    assert got[0] == "discovered: 2 sources"
    assert got[2].startswith("Streams")
    assert got[-1] == "done"


def test_stages_without_items_have_no_table() -> None:
    assert lines([Sources(stage="analyzed", count=0), *tokens("x")]) == ["analyzed: 0 sources", "", "x"]


def test_a_tool_call_has_its_arguments_and_its_result_the_time_it_took() -> None:
    events = [
        ToolCall(id="1", tool="search", args={"query": "streams", "limit": 5, "deep": True}),
        ToolResult(id="1", tool="search", result={"hits": 3}),
        ToolCall(id="2", tool="now"),
        ToolResult(id="2", tool="now", result="noon"),
    ]
    display = shown(pieces(events, seconds=1.5))
    assert display.lines == [
        "→ search(query=streams, limit=5, deep=true)",
        '← search 1.5 s {"hits": 3}',
        "→ now()",
        "← now 1.5 s noon",
    ]


def test_tools_that_run_side_by_side_have_each_its_own_time() -> None:
    events = [
        ToolCall(id="1", tool="slow"),
        ToolCall(id="2", tool="fast"),
        ToolResult(id="2", tool="fast"),
        ToolResult(id="1", tool="slow"),
    ]
    assert shown(pieces(events, seconds=2)).lines[2:] == ["← fast 2.0 s null", "← slow 6.0 s null"]


def test_a_replay_says_no_time_of_a_tool() -> None:
    events = [ToolCall(id="1", tool="search"), ToolResult(id="1", tool="search", result=1)]
    assert lines(events)[1] == "← search 1"


@pytest.mark.parametrize("columns", [20, 33, 80])
def test_calls_and_their_results_are_cut_to_the_width(columns: int) -> None:
    long = "日本" * 100
    display = shown(
        pieces([ToolCall(id="1", tool="t", args={"q": long}), ToolResult(id="1", tool="t", result=long)]),
        columns=columns,
    )
    assert len(display.rows) <= 3
    assert all(line.endswith("…") for line in display.lines)


def test_messages_are_lines_beside_the_answer() -> None:
    got = lines([Message(text="Searching."), Message(text="Found."), *tokens("yes"), Message(text="One more thing.")])
    assert got == ["Searching.", "Found.", "", "yes", "", "One more thing."]


def test_the_agents_own_data_and_unknown_events_are_not_shown() -> None:
    assert pieces([Data(name="x", value=1), Unknown(name="new", data={"a": 1})]) == []


# -- attempts ----------------------------------------------------------------------------------------------------------


def test_the_first_attempt_is_not_worth_a_word() -> None:
    assert lines([START, FIRST, *tokens("x")]) == ["x"]


def test_a_later_attempt_says_what_is_void_and_the_answer_starts_anew() -> None:
    got = lines([START, FIRST, *tokens("one ", "two "), attempt(2, "0-1"), *tokens("one ", "two ", "three")])
    assert got == [
        "one two",
        "attempt 2: its worker was lost; what came after 0-1 is void. The answer starts anew:",
        "",
        "one two three",
    ]


def test_what_survives_is_printed_again_so_that_the_last_answer_is_whole() -> None:
    got = lines([START, FIRST, *tokens("one ", "two ", "lost"), attempt(2, "1-3", "handed_over"), *tokens("three")])
    assert got[-1] == "one two three"
    assert "another worker takes over; what came after 1-3 is void" in got[1]


def test_an_attempt_that_voids_nothing_does_not_break_the_answer_off() -> None:
    got = lines([START, FIRST, *tokens("one "), attempt(2, "1-2"), *tokens("two")])
    assert got == ["one", "attempt 2: its worker was lost; nothing is void", "two"]


def test_an_attempt_that_voids_no_text_says_only_that() -> None:
    call = ToolCall(id="1", tool="t")
    got = lines([START, FIRST, *tokens("one "), call, attempt(2, "1-2"), *tokens("two")])
    assert "what came after 1-2 is void" in got[-3]
    assert "starts anew" not in "".join(got)
    assert got[-1] == "two"


@pytest.mark.parametrize("reason", ["cancelled", "timeout", "not_started", "worker_lost"])
def test_who_closes_a_run_makes_no_attempt(reason: str) -> None:
    """Its end says what happened (PROTOCOL 5.1)."""
    got = lines([START, FIRST, *tokens("one "), attempt(1, "1-2", reason), Cancelled(reason="client")])
    assert got == ["one", "", "cancelled: client"]


def test_a_lost_cursor_shows_the_run_from_its_beginning() -> None:
    transcript = Transcript("more", after=EventId(7, 3))
    parts = transcript.feed(EventId(0, 0), attempt(1, "0-0", "cursor_lost"), 0)
    parts += transcript.feed(EventId(0, 1), START, 0)
    parts += transcript.feed(EventId(1, 1), Token(text="all of it"), 0)
    parts += transcript.feed(EventId(1, 2), Final(answer="not all of it"), 0)
    got = shown(parts).lines
    assert got == [
        "the broker has lost what came before: the run is shown from its beginning",
        "",
        "all of it",
        "",
        "the final answer differs:",
        "",
        "not all of it",
        "",
        "completed · more",
    ]


def test_after_a_cursor_it_is_said_that_what_others_printed_is_void_too() -> None:
    transcript = Transcript("more", after=EventId(1, 5))
    parts = transcript.feed(EventId(1, 6), Token(text="lost"), 0)
    parts += transcript.feed(EventId(2, 1), attempt(2, "1-3"), 0)
    parts += transcript.feed(EventId(2, 2), Token(text="three"), 0)
    got = shown(parts).lines
    assert got[1] == "attempt 2: its worker was lost; what came after 1-3 is void. From there on:"
    assert got[-1] == "three"


@settings(max_examples=50)
@given(st.data())
def test_the_last_answer_on_the_terminal_is_what_survives(data: st.DataObject) -> None:
    """Whatever attempts there are: below the last notice that it starts anew stands the whole answer."""
    events: list[Event] = [START, FIRST]
    kept: list[tuple[EventId, str]] = []
    for number in range(data.draw(st.integers(0, 4))):
        if number:
            at = data.draw(st.sampled_from([EventId(0, 1), *(event_id for event_id, _ in kept)]))
            kept = [(event_id, text) for event_id, text in kept if event_id <= at]
            events.append(attempt(number + 1, str(at)))
        for index in range(data.draw(st.integers(0, 5))):
            text = f"{number}.{index} "
            events.append(Token(text=text))
            kept.append((numbered(events)[-1][0], text))
    last = " ".join(" ".join(lines(events)).split()).rpartition("The answer starts anew:")[2]
    last = re.sub(r"attempt \d+: its worker was lost; nothing is void", "", last)
    assert last.split() == "".join(text for _, text in kept).split()


# -- ends --------------------------------------------------------------------------------------------------------------


def test_the_end_has_citations_usage_and_how_to_see_more() -> None:
    citations = [
        {"number": 1, "title": "Streams", "path": "docs/streams.md", "line": 12},
        {"title": "A page", "url": "https://example.com/a"},
    ]
    got = lines(
        [
            *tokens("so [1]"),
            Final(
                answer="so [1]",
                citations=citations,
                usage={"total_tokens": 1234, "cached_tokens": 0, "model": "m", "cheap": True},
            ),
        ]
    )
    assert got == [
        "so [1]",
        "",
        "[1] Streams  docs/streams.md:12",
        "[2] A page  https://example.com/a",
        "",
        "completed · total tokens 1,234 · broker show ID",
    ]


def test_an_answer_without_tokens_is_shown_when_it_comes() -> None:
    assert lines([START, FIRST, Final(answer="at once")])[0] == "at once"


def test_an_answer_that_is_the_tokens_is_not_shown_twice() -> None:
    assert lines([*tokens("one ", "two "), Final(answer="one two")])[:2] == ["one two", ""]


def test_an_answer_that_is_not_the_tokens_is_shown_as_it_is() -> None:
    got = lines([*tokens("a draft"), Final(answer="the answer")])
    assert got[:5] == ["a draft", "", "the final answer differs:", "", "the answer"]


def test_after_a_cursor_the_rest_of_the_answer_is_enough() -> None:
    transcript = Transcript("more", after=EventId(1, 5))
    parts = transcript.feed(EventId(1, 6), Token(text="two"), 0)
    parts += transcript.feed(EventId(1, 7), Final(answer="one two"), 0)
    assert shown(parts).lines == ["two", "", "completed · more"]


def test_an_error_is_red_has_its_code_and_goes_to_standard_error() -> None:
    parts = pieces([*tokens("so far"), Error(code="no_quota", message="Come back tomorrow.")])
    last = parts[-1]
    assert isinstance(last, Block)
    assert last.aside
    display = shown(parts)
    assert display.lines == ["so far", "", "error no_quota: Come back tomorrow."]
    assert display.styles("no_quota") == {"1;31"}


def test_the_connection_is_said_to_be_lost_and_the_text_goes_on_where_it_was() -> None:
    transcript = Transcript("more")
    parts = transcript.feed(EventId(1, 1), Token(text="one t"), 0)
    parts += transcript.lost() + transcript.found(2.14)
    parts += transcript.feed(EventId(1, 2), Token(text="wo"), 0)
    assert shown(parts).lines == ["one t", "connection lost, reconnecting…", "connected again after 2.1 s", "wo"]


# -- terminals ---------------------------------------------------------------------------------------------------------

EVERYTHING: Sequence[Event] = (
    START,
    FIRST,
    Message(text="Searching the documents."),
    Progress(percent=5, message="Searching"),
    Sources(stage="discovered", count=20, items=SOURCES),
    Sources(stage="analyzed", count=2, items=SOURCES),
    Reasoning(text="hm"),
    ToolCall(id="1", tool="search", args={"q": "日本語 " * 20}),
    ToolResult(id="1", tool="search", result="x" * 100),
    *tokens("The answer is long enough to be wrapped, and 日本語 is wide. "),
    attempt(2, "0-1"),
    *tokens("Again."),
    Final(answer="Again.", citations=SOURCES, usage={"tokens": 3}),
)


@pytest.mark.parametrize("columns", [20, 21, 40, 60, 80, 200])
def test_every_width_shows_the_whole_text_and_tables_that_fit(columns: int) -> None:
    display = shown(pieces(EVERYTHING), columns=columns)
    assert "The answer is long enough to be wrapped, and 日本語 is wide." in display.lines
    assert "Again." in display.lines
    assert "Streams" in display.text
    whole = ("The answer is long", "attempt 2", "Searching the documents.", "completed")
    for line in display.lines:
        assert len(line) <= columns or line.startswith(whole), line


def test_a_terminal_without_utf_8_gets_what_it_can_show() -> None:
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding="ascii")
    make_legible(file)
    console = Console(file=file, force_terminal=True, width=40, highlight=False, _environ={"TERM": "xterm"})
    screen = Screen(console, console)
    screen.show(pieces([*EVERYTHING, *tokens("\ud800")]))
    screen.show([Block(body="a"), Bar(percent=50, message="half")])
    screen.close()
    text = raw.getvalue().decode("ascii")
    assert "> search" in re.sub(r"\x1b\[[0-9;]*m", "", text)
    assert "??? is wide" in text
    assert "####" in text


# -- tables of runs ----------------------------------------------------------------------------------------------------


def summary(**fields: Any) -> RunSummary:
    base = {
        "request_id": "ab" * 16,
        "session_id": "s-" + "cd" * 16,
        "status": "completed",
        "agent": "research",
        "attempt": 1,
        "created_at": datetime(2026, 11, 20, 17, 0, tzinfo=UTC),
        "started_at": None,
        "finished_at": datetime(2026, 11, 20, 17, 59, 59, tzinfo=UTC),
        "last_event_id": "1-1",
        "metadata": {},
        "links": {"self": "", "stream": "", "events": "", "cancel": ""},
    }
    return RunSummary.model_validate(base | fields)


@pytest.mark.parametrize("columns", [32, 60, 89, 90, 100, 200])
def test_the_id_the_status_and_the_time_of_a_run_are_never_cut(columns: int) -> None:
    runs = [summary(), summary(request_id="12" * 16, status="cancelled", agent="a" * 60, finished_at=None)]
    display = shown([Block(body=RunsTable(runs))], columns=columns)
    for run in runs:
        assert run.request_id in display.text
        assert run.status in display.text
    assert len(re.findall(r"2026-11-2\d \d\d:\d\d:00", display.text)) == 2
    assert max(map(len, display.lines)) <= columns


def test_on_the_narrowest_terminal_the_id_goes_on_in_the_next_line() -> None:
    display = shown([Block(body=RunsTable([summary()]))], columns=20)
    assert "".join(display.lines[:2]) == "ab" * 16
