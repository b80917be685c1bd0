"""What is asked of a model at each stage of a research, and what is made of replies that keep to the format or not."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.agents import prompts

REPLIES = [
    ('["green tea", "water temperature"]', ["green tea", "water temperature"]),
    ('Here they are:\n```json\n["green  tea",\n "green tea", ""]\n```', ["green tea"]),
    ('["a", "b", "c", "d", "e"]', ["a", "b", "c", "d"]),
    ('[1, {"query": "tea"}]', ["the question"]),
    ('{"queries": ["tea"]}', ["tea"]),
    ("I would search for tea.", ["the question"]),
    ("[not json", ["the question"]),
    ("[] [1]", ["the question"]),
    ("", ["the question"]),
]


@pytest.mark.parametrize(("reply", "queries"), REPLIES)
def test_queries_are_read_from_a_plan(reply: str, queries: list[str]) -> None:
    assert prompts.queries_in(reply, "the question") == queries


@pytest.mark.parametrize(
    ("reply", "numbers"),
    [
        ("[2, 1]", [2, 1]),
        ("The best are [3, 3, 1].", [3, 1]),
        ("[]", []),
        ("[0, 4, 2]", [2]),
        ("none of them", None),
        ('["2"]', None),
        ("[true]", None),
    ],
)
def test_numbers_are_read_from_a_screening(reply: str, numbers: list[int] | None) -> None:
    assert prompts.numbers_in(reply, 3) == numbers


@given(st.text())
def test_any_reply_can_be_read(reply: str) -> None:
    assert 1 <= len(prompts.queries_in(reply, "q")) <= prompts.MOST_QUERIES
    prompts.numbers_in(reply, 3)


def test_passages_are_told_with_their_numbers_and_the_question_last() -> None:
    for messages in (prompts.screening("Why?", ["one", "two"]), prompts.answering("Why?", ["one", "two"])):
        assert messages[-1]["content"] == "[1] one\n\n[2] two\n\nQuestion: Why?"
