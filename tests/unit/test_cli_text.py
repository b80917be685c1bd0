"""Text from outside, made fit for a terminal; parameters; times and counts for people."""

from __future__ import annotations

import io
import unicodedata
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from broker.cli.text import compact, duration, harmless, make_legible, one_line, parameter


@settings(max_examples=50)
@given(st.text())
def test_harmless_text_has_no_control_characters_but_line_feeds_and_tabs(text: str) -> None:
    assert not [char for char in harmless(text) if unicodedata.category(char) == "Cc" and char not in "\n\t"]


@settings(max_examples=50)
@given(st.text())
def test_text_without_control_characters_stays_as_it_is(text: str) -> None:
    text = "".join(char for char in text if unicodedata.category(char) != "Cc" or char in "\n\t")
    assert harmless(text) == text


@settings(max_examples=50)
@given(st.text())
def test_harmless_text_stays_as_it_is(text: str) -> None:
    assert harmless(harmless(text)) == harmless(text)


def test_control_characters_become_visible() -> None:
    assert harmless("\x1b[2J\x07\x7f\x9b\x00") == r"\x1b[2J\x07\x7f\x9b\x00"


def test_line_ends_of_windows_become_line_feeds() -> None:
    assert harmless("a\r\nb\rc") == "a\nbc"


@settings(max_examples=50)
@given(st.text())
def test_one_line_is_one_line(text: str) -> None:
    assert len(one_line(text).splitlines()) <= 1
    assert "\t" not in one_line(text)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("a  text\nof lines", "a text of lines"),
        ({"a": [1, None]}, '{"a": [1, null]}'),
        ("日本", "日本"),
        (["日本"], '["日本"]'),
        (None, "null"),
        (True, "true"),
        (["\x1b[2J"], r'["\u001b[2J"]'),
    ],
)
def test_values_are_compact(value: Any, text: str) -> None:
    assert compact(value) == text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("pace=20", ("pace", 20)),
        ("pace=0.5", ("pace", 0.5)),
        ("deep=true", ("deep", True)),
        ("nothing=null", ("nothing", None)),
        ('tags=["a", "b"]', ("tags", ["a", "b"])),
        ('model="gpt"', ("model", "gpt")),
        ("model=gpt-5", ("model", "gpt-5")),
        ("expression=a=b", ("expression", "a=b")),
        ("empty=", ("empty", "")),
        ("version=1.2.3", ("version", "1.2.3")),
        ("cost=NaN", ("cost", "NaN")),
        ("cost=-Infinity", ("cost", "-Infinity")),
        ("big=1e999", ("big", "1e999")),
        ("deep=" + "[" * 100_000, ("deep", "[" * 100_000)),
    ],
)
def test_a_parameter_is_json_where_it_is_json_else_text(text: str, expected: tuple[str, Any]) -> None:
    name, value = parameter(text)
    assert (name, value) == expected
    assert type(value) is type(expected[1])


@pytest.mark.parametrize("text", ["", "pace", "=20", "="])
def test_a_parameter_needs_a_name_and_an_equals_sign(text: str) -> None:
    with pytest.raises(ValueError, match="is not name=value"):
        parameter(text)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (-0.5, "0.0 s"),
        (0, "0.0 s"),
        (0.44, "0.4 s"),
        (9.94, "9.9 s"),
        (9.96, "10 s"),
        (59.4, "59 s"),
        (59.6, "1 min 0 s"),
        (125, "2 min 5 s"),
        (3599.7, "1 h 0 min"),
        (7260, "2 h 1 min"),
    ],
)
def test_durations_are_short(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("encoding", "written"), [("utf-8", "a…→日?".encode()), ("ascii", b"a~>??"), ("latin-1", b"a~>??")]
)
def test_what_an_encoding_has_not_got_is_replaced(encoding: str, written: bytes) -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding=encoding)
    make_legible(stream)
    stream.write("a…→日\ud800")
    stream.flush()
    assert raw.getvalue() == written


def test_what_is_no_stream_of_bytes_is_left_alone() -> None:
    stream = io.StringIO()
    make_legible(stream)
    stream.write("日\ud800")
    assert stream.getvalue() == "日\ud800"
