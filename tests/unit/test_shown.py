"""What was shown and cannot be taken back: repeated text is held back, other text is noticed, nothing is forgotten."""

from __future__ import annotations

from typing import NamedTuple

import hypothesis
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, rule

from broker.errors import BadCursor
from broker.gateway.dialects.place import LAST, Place, places
from broker.gateway.dialects.shown import Shown
from broker.ids import START, EventId


class Said(NamedTuple):
    """The definition: entries in a list, and all that the client has."""

    entries: tuple[tuple[EventId, str], ...] = ()
    client: str = ""
    last: EventId = START

    @property
    def text(self) -> str:
        return "".join(text for _, text in self.entries)


class Both(NamedTuple):
    shown: Shown
    said: Said


class Machine(RuleBasedStateMachine):
    """Every state that ever was may be gone on from."""

    states = Bundle("states")

    @initialize(target=states)
    def begin(self) -> Both:
        return Both(Shown(), Said())

    @rule(target=states, before=states, text=st.text(alphabet="ab", max_size=4))
    def token(self, before: Both, text: str) -> Both:
        said = before.said
        event_id = EventId(said.last.epoch, said.last.seq + 1)
        whole = said.text + text
        answer = before.shown.token(event_id, text)
        if not (said.client.startswith(whole) or whole.startswith(said.client)):
            assert answer is None
            return before
        assert answer is not None
        shown, piece = answer
        assert (piece or "") == whole[len(said.client) :]
        after = Said((*said.entries, (event_id, text)), said.client + (piece or ""), event_id)
        assert shown.text == after.text
        assert shown.text + shown.unsaid_text == after.client
        return Both(shown, after)

    @rule(target=states, before=states, kept=st.integers(0, 10))
    def rewind(self, before: Both, kept: int) -> Both:
        entries = before.said.entries[:kept]
        to = entries[-1][0] if entries else START
        said = before.said._replace(entries=entries, last=EventId(before.said.last.epoch + 1, 1))
        shown = before.shown.rewind(to)
        assert shown.text == said.text
        assert shown.text + shown.unsaid_text == said.client
        return Both(shown, said)


TestShown = Machine.TestCase
TestShown.settings = hypothesis.settings(max_examples=60, stateful_step_count=20)


def test_what_is_beside_the_text_is_held_back_for_as_long_as_it_repeats() -> None:
    shown = Shown()
    for seq, what in enumerate("abcd", start=2):
        shown, new = shown.other(EventId(1, seq), what)
        assert new
    shown = shown.rewind(EventId(1, 2))
    news = []
    for seq, what in enumerate("bxcd", start=2):
        shown, new = shown.other(EventId(2, seq), what)
        news.append(new)
    assert news == [False, True, True, True], "where it differs once, who knows what the rest means"


def test_text_and_what_is_beside_it_may_come_in_another_order() -> None:
    shown = Shown()
    for seq, text in ((2, "a"), (4, "b")):
        answer = shown.token(EventId(1, seq), text)
        assert answer is not None
        shown = answer[0].other(EventId(1, seq + 1), f"after {text}")[0]
    shown = shown.rewind(EventId(1, 1))
    shown, new = shown.other(EventId(2, 2), "after a")
    assert not new
    answer = shown.token(EventId(2, 3), "ab")
    assert answer is not None and answer[1] is None
    assert not answer[0].other(EventId(2, 4), "after b")[1]


def test_a_log_of_the_greatest_length_can_be_folded_and_forgotten() -> None:
    """What is linked a hundred thousand times must not be gone through by recursion."""
    shown = Shown()
    for seq in range(2, 100_000):
        answer = shown.token(EventId(1, seq), "x")
        assert answer is not None
        shown = answer[0]
    voided = shown.rewind(START)
    assert len(voided.unsaid_text) == len(shown.text) == 99_998
    del shown, voided, answer


@pytest.mark.parametrize(
    ("text", "place"), [("12-40", Place(12, 40)), ("12-40.1", Place(12, 40, 1)), ("0-0.12", Place(0, 0, 12))]
)
def test_a_place_has_a_text_and_is_found_by_it(text: str, place: Place) -> None:
    assert Place.parse(text) == place
    assert str(place) == text


@pytest.mark.parametrize(
    "text", ["", "12", "12-40.", "12-40.0", "12-40.01", "12-40.1.1", "12-40.1234", "1-1.1\n", "é-1"]
)
def test_what_is_no_place_is_refused(text: str) -> None:
    with pytest.raises(BadCursor):
        Place.parse(text)


def test_who_has_the_last_frame_of_an_entry_stands_at_the_entry() -> None:
    assert list(places(EventId(1, 2), "abc")) == [(Place(1, 2, 1), "a"), (Place(1, 2, 2), "b"), (Place(1, 2), "c")]
    assert list(places(EventId(1, 2), "a")) == [(Place(1, 2, LAST), "a")]
    assert Place(1, 1) < Place(1, 2, 1) < Place(1, 2, 2) < Place(1, 2) < Place(1, 3, 1) < Place(2, 1, 1)
