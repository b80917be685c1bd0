"""A citation stays where its passage says what is claimed, and goes where it does not, while the answer streams."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.agents.citing import LONGEST_BRACKET, LONGEST_CLAIM, Citer, Passages

PASSAGES = [
    ("Tea › Green tea", "Green tea wants water of **75 to 80 degrees**. Boiling water makes it bitter."),
    ("Coffee", "Filter coffee is brewed at 92 degrees. It takes about 1,000 grams of water for sixty grams of coffee."),
    ("Tides", "The tides follow the moon’s pull. “Spring tides” come at new and full moon."),
    ("お茶", "緑茶は七十度のお湯で淹れる。"),
]
TEXTS = st.lists(
    st.sampled_from(
        [
            "Green tea",
            " wants",
            " water of 80 degrees",
            " ",
            "[1]",
            "[",
            "2",
            "]",
            "[1, 2]",
            "[9]",
            ". ",
            ".",
            "\n",
            "x",
            "[",
        ]
    ),
    max_size=20,
).map("".join)


def cited(*pieces: str) -> tuple[str, Citer]:
    citer = Citer(Passages(PASSAGES))
    return "".join(citer.feed(piece) for piece in pieces) + citer.end(), citer


def holds(claim: str, number: int) -> bool:
    return Passages(PASSAGES).hold(claim, number)


@pytest.mark.parametrize(
    ("claim", "number"),
    [
        ("Green tea wants water of 75 to 80 degrees", 1),
        ("Water for green teas should have 80 degrees", 1),
        ("Coffee is brewed with 1000 grams of water", 2),
        ("Boiling water makes green tea bitter", 1),
        ("“Boiling water makes it bitter.”", 1),
        ('The text says that "green tea wants water of 75 to 80 degrees"', 1),
        ("1. Filter coffee is brewed", 2),
        ("The tides follow the moon's pull", 3),
        ("Tides", 3),
        ("緑茶は七十度のお湯", 4),
    ],
)
def test_what_a_passage_says_holds(claim: str, number: int) -> None:
    assert holds(claim, number)


@pytest.mark.parametrize(
    ("claim", "number", "why"),
    [
        ("Green tea wants water of 75 to 80 degrees", 2, "another passage"),
        ("Green tea wants water of 95 degrees", 1, "another number"),
        ("Green tea was discovered by a Chinese emperor under a tree", 1, "made up"),
        ('It says "green tea wants milk and honey with water"', 1, "a quotation that is not there"),
        ("Green tea wants water of 80 degrees", 5, "no such passage"),
        ("Green tea wants water of 80 degrees", 0, "no such passage"),
        ("It is the", 1, "no words that say anything"),
        ("", 1, "nothing at all"),
        ("Grüner Tee braucht heißes Wasser", 1, "another language cannot be checked"),
        ("月の引力", 4, "no pair of letters"),
    ],
)
def test_what_a_passage_does_not_say_does_not_hold(claim: str, number: int, why: str) -> None:
    assert not holds(claim, number), why


GOOD = "Green tea wants water of 80 degrees"


@pytest.mark.parametrize(
    ("answer", "shown", "dropped"),
    [
        (f"{GOOD} [1].", f"{GOOD} [1].", 0),
        (f"{GOOD} [2].", f"{GOOD}.", 1),
        (f"{GOOD}. [1]", f"{GOOD}. [1]", 0),
        (f"{GOOD}.[2] Yes.", f"{GOOD}. Yes.", 1),
        (f"{GOOD} [1, 2].", f"{GOOD} [1].", 1),
        (f"{GOOD} [2][1].", f"{GOOD}[1].", 1),
        (f"{GOOD} [ 1 ; 3 ].", f"{GOOD} [1].", 1),
        (f"{GOOD} [1], coffee 92 degrees [2].", f"{GOOD} [1], coffee 92 degrees [2].", 0),
        (f"{GOOD} [1], coffee 92 degrees [1].", f"{GOOD} [1], coffee 92 degrees.", 1),
        (f"I do not know. {GOOD}! [1]", f"I do not know. {GOOD}! [1]", 0),
        (f"{GOOD}. Nobody knows why that is so [1].", f"{GOOD}. Nobody knows why that is so.", 1),
        (
            f"- {GOOD} [1]\n- Spring tides come at full moon [3]",
            f"- {GOOD} [1]\n- Spring tides come at full moon [3]",
            0,
        ),
        ("[1]", "", 1),
        ("An array a[0] or [x] or [ or [1", "An array a[0] or [x] or [ or [1", 0),
        (f"{GOOD} [12345678]", f"{GOOD} [12345678]", 0),
        ("[" + "1," * LONGEST_BRACKET, "[" + "1," * LONGEST_BRACKET, 0),
    ],
)
def test_citations_in_answers(answer: str, shown: str, dropped: int) -> None:
    assert cited(answer)[0] == shown
    assert cited(answer)[1].dropped == dropped


def test_what_is_cited_is_known_with_its_claim() -> None:
    _, citer = cited(f"{GOOD} [1]. Spring tides come at full moon [3][1].")
    assert {number: claim.strip(" .") for number, claim in citer.cited.items()} == {
        1: GOOD,
        3: "Spring tides come at full moon",
    }


def test_only_a_bracket_is_held_back() -> None:
    citer = Citer(Passages(PASSAGES))
    assert citer.feed(GOOD) == GOOD
    assert citer.feed(" ") == ""
    assert citer.feed("[") == ""
    assert citer.feed("1") == ""
    assert citer.feed("]") == " [1]"
    assert citer.feed(" or [not") == " or [not"
    assert citer.feed("[" + "1," * LONGEST_BRACKET) != "", "nor is a bracket that never ends"


@given(text=TEXTS, data=st.data())
def test_any_cutting_of_an_answer_shows_the_same(text: str, data: st.DataObject) -> None:
    places = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    pieces = [text[a:b] for a, b in zip([0, *places], [*places, len(text)], strict=True)]
    whole, one = cited(text)
    cut, other = cited(*pieces)
    assert (whole, one.cited, one.dropped) == (cut, other.cited, other.dropped)


@given(text=st.text())
def test_a_text_without_brackets_is_shown_as_it_is(text: str) -> None:
    text = text.replace("[", "")
    assert cited(text)[0] == text


def test_a_text_without_an_end_does_not_slow_down() -> None:
    text, _ = cited(*["word " * 100] * 1000)
    assert len(text) == 500_000


def test_only_the_last_words_of_an_endless_sentence_are_claimed() -> None:
    unrelated = "".join(f"{chr(97 + n)}dragon " for n in range(26)) * 10
    related = f"{GOOD} and " * (2 * LONGEST_CLAIM // len(GOOD))
    assert cited(unrelated, related, "[1]")[1].dropped == 0
    assert cited(unrelated, GOOD, "[1]")[1].dropped == 1


def test_the_nearest_sentence_is_found() -> None:
    passages = Passages(PASSAGES)
    assert (
        passages.nearest("It becomes bitter with boiling water", ["Green tea is green.", "Boiling water is bitter."])[0]
        == 1
    )
