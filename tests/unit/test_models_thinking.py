"""Reasoning between tags in the text is parted from it, however it is cut."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.kit.pieces import text, thoughts
from worker.models.model import Piece
from worker.models.thinking import Thinking

TEXTS = st.lists(st.sampled_from(["<think>", "</think>", "<", "think", ">", "/", " ", "\n", "a", "</thi"]), max_size=12)


def read(*parts: str) -> list[Piece]:
    thinking = Thinking()
    pieces: list[Piece] = [piece for part in parts for piece in thinking.feed(part)]
    return [*pieces, *thinking.end()]


@pytest.mark.parametrize(
    ("whole", "thought", "said"),
    [
        ("Hello", "", "Hello"),
        ("<think>hm</think>\n\nHello", "hm", "Hello"),
        ("\n<think>\nhm\n</think>Hello", "\nhm\n", "Hello"),
        ("<think></think>Hello", "", "Hello"),
        ("<think>a < b </thin </think>x", "a < b </thin ", "x"),
        ("<think>never closed", "never closed", ""),
        ("<think>hm</think>a</think><think>b</think>", "hm", "a</think><think>b</think>"),
        ("The tag <think> is one", "", "The tag <think> is one"),
        ("<thi", "", "<thi"),
        ("  ", "", "  "),
        ("", "", ""),
    ],
)
def test_texts_with_tags(whole: str, thought: str, said: str) -> None:
    for parts in ([whole], list(whole)):
        assert (thoughts(read(*parts)), text(read(*parts))) == (thought, said)


def test_nothing_is_held_back_that_cannot_be_a_tag() -> None:
    thinking = Thinking()
    assert thoughts(list(thinking.feed("<think>hm"))) == "hm"
    assert thoughts(list(thinking.feed(" <"))) == " "
    assert thoughts(list(thinking.feed("b"))) == "<b"
    assert text(list(thinking.feed("</think> x"))) == "x"
    assert text(list(thinking.feed(" <think>"))) == " <think>"


@given(parts=TEXTS)
def test_any_cutting_gives_the_same(parts: list[str]) -> None:
    whole = "".join(parts)
    assert (thoughts(read(*parts)), text(read(*parts))) == (thoughts(read(whole)), text(read(whole)))
