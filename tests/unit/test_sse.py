"""Frames as we write them, and the strict model of how they are read."""

from __future__ import annotations

import json
from itertools import pairwise

import httpx_sse
import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker import sse as wire
from broker.events import Entry, dumps
from broker.gateway.dialects.native.fold import Native
from broker.ids import EventId
from tests.kit import folds, sse
from tests.kit.sse import Event, EventStream

RID = "ab" * 16
TEXT = st.text(st.characters(exclude_categories=()), max_size=30).map(lambda text: json.loads(json.dumps(text)))

# -- what we write ---------------------------------------------------------------------------------------------


def test_a_frame_is_id_event_data_and_a_blank_line() -> None:
    assert wire.frame("token", '{"text":"a"}', "12-3") == b'id: 12-3\nevent: token\ndata: {"text":"a"}\n\n'


def test_a_frame_without_an_id_has_no_line_for_it() -> None:
    """An empty `id:` would clear the client's cursor."""
    assert wire.frame("error", "{}") == b"event: error\ndata: {}\n\n"


def test_comments_and_retry_are_one_line() -> None:
    """A blank line after them is an empty event to several clients."""
    assert wire.comment("heartbeat 12-812 lease=1.3s") == b": heartbeat 12-812 lease=1.3s\n"
    assert wire.retry(1500) == b"retry: 1500\n"


@pytest.mark.parametrize("text", ["é", "\u2028", "\ud800"])
def test_what_is_not_ascii_never_gets_into_a_frame(text: str) -> None:
    with pytest.raises(UnicodeEncodeError):
        wire.frame("token", f'"{text}"')
    with pytest.raises(UnicodeEncodeError):
        wire.frame(text, "{}")
    with pytest.raises(UnicodeEncodeError):
        wire.comment(text)


@given(st.lists(TEXT, max_size=6), st.booleans())
def test_a_text_in_a_frame_is_read_as_it_was_written(texts: list[str], long_ids: bool) -> None:
    """And the reader of the next frame is not led astray by it."""
    native = Native(RID, long_ids=long_ids)
    entries = [Entry(EventId(3, n), "token", dumps({"text": text, text: text})) for n, text in enumerate(texts, 1)]
    body = wire.retry(1000) + b"".join(
        wire.comment("heartbeat 3-1") + folds.body_of(native, [entry]) for entry in entries
    )
    assert body.isascii()
    seen = sse.parse(body)
    assert [(event.id, event.type, event.data) for event in seen] == [
        (f"{RID}/{entry.id}" if long_ids else str(entry.id), "token", entry.data) for entry in entries
    ]
    assert [event.json["text"] for event in seen] == texts


def test_a_run_that_is_gone_is_told_without_an_id() -> None:
    [event] = sse.parse(Native(RID, long_ids=False).gone(None))
    assert (event.id, event.type, event.json["code"]) == ("", "error", "gone")


# -- the model: examples of the standard -----------------------------------------------------------------------


def read(text: str) -> list[tuple[str, str, str]]:
    return [(event.id, event.type, event.data) for event in sse.parse(text.encode())]


def test_the_standards_first_example() -> None:
    assert read("data: YHOO\ndata: +2\ndata: 10\n\n") == [("", "message", "YHOO\n+2\n10")]


def test_the_standards_second_example() -> None:
    """A comment, an event with an id, one that clears it, and one whose data begins with a blank."""
    text = ": test stream\n\ndata: first event\nid: 1\n\ndata:second event\nid\n\ndata:  third event\n\n"
    assert read(text) == [
        ("1", "message", "first event"),
        ("", "message", "second event"),
        ("", "message", " third event"),
    ]


def test_the_standards_third_example() -> None:
    """Two empty events, then one line end; the last block never ends."""
    assert read("data\n\ndata\ndata\n\ndata:") == [("", "message", ""), ("", "message", "\n")]


def test_the_standards_fourth_example() -> None:
    assert read("data:test\n\ndata: test\n\n") == [("", "message", "test"), ("", "message", "test")]


@pytest.mark.parametrize("end", ["\n", "\r", "\r\n"])
def test_a_line_ends_in_one_of_three_ways(end: str) -> None:
    assert read(f"id: 1{end}event: x{end}data: a{end}{end}data: b{end}{end}") == [
        ("1", "x", "a"),
        ("1", "message", "b"),
    ]


@pytest.mark.parametrize("character", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\x1e", "\0"])
def test_nothing_else_ends_a_line(character: str) -> None:
    assert read(f"data: a{character}b\n\n") == [("", "message", f"a{character}b")]


def test_a_block_without_data_is_no_event_but_its_id_counts() -> None:
    assert read("id: 7\n\nevent: x\n\ndata: a\n\n") == [("7", "message", "a")]


def test_an_id_with_a_nul_is_ignored() -> None:
    assert read("id: 1\ndata: a\n\nid: 2\0\ndata: b\n\n") == [("1", "message", "a"), ("1", "message", "b")]


def test_an_unknown_field_is_ignored() -> None:
    assert read("ids: 3\n data: x\nfoo\ndata: a\n\n") == [("", "message", "a")]


def test_one_byte_order_mark_is_skipped() -> None:
    assert read("\ufeffdata: a\n\n") == [("", "message", "a")]
    assert read("\ufeff\ufeffdata: a\n\n") == []
    assert read("data: a\n\n\ufeffdata: b\n\n") == [("", "message", "a")]


def test_an_event_that_is_not_finished_is_none() -> None:
    stream = EventStream()
    assert stream.feed(b"id: 1\ndata: a\n\nid: 2\ndata: b\n") == [Event("1", "message", "a")]
    assert stream.last_event_id == "1"


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("retry: 20", 20),
        ("retry:20", 20),
        ("retry: 2s", None),
        ("retry: -1", None),
        ("retry: ٢", None),
        ("retry:", None),
    ],
)
def test_a_retry_is_digits_only(line: str, expected: int | None) -> None:
    stream = EventStream()
    stream.feed(f"{line}\n".encode())
    assert stream.retry_ms == expected


def test_a_retry_counts_only_with_its_line_end() -> None:
    stream = EventStream()
    stream.feed(b"retry: 20")
    assert stream.retry_ms is None


def test_comments_are_kept_aside() -> None:
    stream = EventStream()
    assert stream.feed(b": heartbeat 1-2\n:\n:x\ndata: a\n\n") == [Event("", "message", "a")]
    assert stream.comments == ["heartbeat 1-2", "", "x"]


FIELDS = ("", "data: a", "data", "data:", "id: 1", "id", "event: x", "event", ": c", "retry: 5", "foo: bar")
UTF8 = st.characters(codec="utf-8", exclude_characters="\r\n")
LINES = st.lists(st.one_of(st.sampled_from(FIELDS), st.text(UTF8, max_size=6)), max_size=20)
ENDS = st.sampled_from(["\n", "\r", "\r\n"])


@given(LINES, ENDS, st.data())
def test_how_the_bytes_are_cut_into_pieces_makes_no_difference(lines: list[str], end: str, data: st.DataObject) -> None:
    body = "".join(line + end for line in lines).encode()
    cuts = sorted(data.draw(st.lists(st.integers(0, len(body)), max_size=8)))
    stream, pieces = EventStream(), [body[a:b] for a, b in pairwise([0, *cuts, len(body)])]
    assert [event for piece in pieces for event in stream.feed(piece)] == sse.parse(body)


@given(LINES, ENDS)
def test_the_model_agrees_with_a_decoder_of_others_but_for_empty_events(lines: list[str], end: str) -> None:
    """httpx-sse yields an event for a block without data, which the standard drops; they cannot be told apart from
    events of empty data, so both are left out.
    """
    decoder = httpx_sse._decoders.SSEDecoder()
    theirs = []
    for line in lines:
        event = decoder.decode(line)
        if event is not None and event.data:
            theirs.append((event.id, event.event, event.data))
    body = "".join(line + end for line in lines)
    if body.startswith("\ufeff"):
        return
    assert [(event_id, kind or "message", data) for event_id, kind, data in theirs] == [
        event for event in read(body) if event[2]
    ]
