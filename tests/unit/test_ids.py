"""Ids and cursors: exactly one spelling each, and two integers when they are compared."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.errors import BadCursor
from broker.ids import REQUEST_ID, START, Cursor, EventId, Owner, new_request_id

RID = "0123456789abcdef" * 2
NUMBER = st.integers(0, 10**16 - 1)
IDS = st.builds(EventId, NUMBER, NUMBER)

NOT_AN_EVENT_ID = [
    "",
    "-",
    "1",
    "1-",
    "-1",
    "1--1",
    "-1-1",
    "+1-1",
    "1-+1",
    "01-1",
    "1-01",
    "00-0",
    "1-1-1",
    "1.0-1",
    "1e3-1",
    "0x1-1",
    "1_0-1",
    " 1-1",
    "1-1 ",
    "1 -1",
    "1-1\n",
    "\n1-1",
    "1-1\r\n",
    "1-1\0",
    "١-١",
    "１-１",
    "1\u22121",
    "1–1",
    "$",
    "*",
    ">",
    "latest",
    "1" * 17 + "-1",
    "1-" + "1" * 17,
]


@given(IDS)
def test_an_event_id_reads_as_it_was_written(event_id: EventId) -> None:
    assert EventId.parse(str(event_id)) == event_id
    assert str(event_id).isascii()


@given(IDS, IDS)
def test_event_ids_compare_as_two_integers(one: EventId, other: EventId) -> None:
    """As strings 1-10 would be below 1-9."""
    assert (one < other) == ((one.epoch, one.seq) < (other.epoch, other.seq))


@pytest.mark.parametrize(("lower", "higher"), [("1-9", "1-10"), ("9-1", "10-1"), ("2-99", "10-1"), ("0-0", "0-1")])
def test_an_id_of_more_digits_is_higher(lower: str, higher: str) -> None:
    assert EventId.parse(lower) < EventId.parse(higher)
    assert lower > higher or lower == "0-0"


@pytest.mark.parametrize("text", NOT_AN_EVENT_ID, ids=repr)
def test_anything_else_is_no_event_id(text: str) -> None:
    with pytest.raises(BadCursor):
        EventId.parse(text)


@given(st.text(max_size=40))
def test_no_text_does_more_than_parse_or_be_refused(text: str) -> None:
    try:
        assert str(EventId.parse(text)) == text
    except BadCursor as error:
        assert error.code == "bad_cursor"
    try:
        cursor = Cursor.parse(text)
        assert text == (f"{cursor.request_id}/{cursor.event_id}" if cursor.request_id else str(cursor.event_id))
    except BadCursor as error:
        assert error.code == "bad_cursor"


@given(IDS)
def test_a_cursor_has_a_short_and_a_long_form(event_id: EventId) -> None:
    assert Cursor.parse(str(event_id)) == Cursor(event_id, None)
    assert Cursor.parse(f"{RID}/{event_id}") == Cursor(event_id, RID)


@pytest.mark.parametrize(
    "text",
    [
        *NOT_AN_EVENT_ID,
        "/1-1",
        f"{RID}/",
        RID,
        f"{RID}1-1",
        f"{RID[:-1]}/1-1",
        f"{RID}0/1-1",
        f"{RID.upper()}/1-1",
        f"{RID[:-1]}g/1-1",
        f"{RID}//1-1",
        f"/{RID}/1-1",
        f"{RID}/{RID}/1-1",
        f" {RID}/1-1",
        f"{RID} /1-1",
        f"{RID}\n/1-1",
        f"{RID}/1-1\n",
        f"{RID}\\1-1",
        f"{RID[:-1]}٣/1-1",
        "../1-1",
    ],
    ids=repr,
)
def test_anything_else_is_no_cursor(text: str) -> None:
    with pytest.raises(BadCursor):
        Cursor.parse(text)


def test_the_beginning_is_below_every_event() -> None:
    assert EventId.parse("0-0") == START
    assert EventId(0, 1) > START


def test_request_ids_are_32_hex_digits_and_never_the_same() -> None:
    made = {new_request_id() for _ in range(1000)}
    assert len(made) == 1000
    assert all(REQUEST_ID.fullmatch(request_id) for request_id in made)
    assert all(re.fullmatch("[0-9a-f]{32}", request_id, re.ASCII) for request_id in made)


def test_a_request_id_has_no_other_spelling() -> None:
    for text in (RID.upper(), RID[:-1], RID + "0", RID + "\n", RID[:-1] + "g", RID[:-1] + "٣", f"{RID[:8]}-{RID[9:]}"):
        assert not REQUEST_ID.fullmatch(text), text


def test_owners_are_equal_in_tenant_and_subject_only() -> None:
    assert Owner("t", "s") == Owner("t", "s")
    assert len({Owner("t", "s"), Owner("s", "t"), Owner("ts", "")}) == 3
