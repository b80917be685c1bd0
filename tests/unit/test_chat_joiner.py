"""The joiner: text leaves whole, soon, and in few enough events for a log."""

from __future__ import annotations

import random
from collections.abc import Iterable
from itertools import chain, cycle, islice
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.events import Event, Reasoning, Token
from worker.agent import MAX_EVENT_BYTES
from worker.agents import joiner as joiner_module
from worker.agents.joiner import FREELY, MAX_CHARS, MOST_EVENTS, PAUSE_SECONDS, Joiner, Kind

YEAR = 365 * 86400.0
KINDS: tuple[Any, ...] = (Token, Reasoning)

arrivals = st.lists(
    st.tuples(
        st.sampled_from(KINDS),
        st.text(st.characters(), max_size=20) | st.integers(1, 3 * MAX_CHARS).map(lambda n: "é" * n),
        st.floats(0, 10),
        st.booleans(),
    ),
    max_size=60,
)


def text_of(events: Iterable[Event], kind: Any) -> str:
    return "".join(event.text for event in events if isinstance(event, kind))


@given(arrivals, st.sampled_from([0, 3, FREELY]))
def test_what_leaves_is_what_came(pieces: list[tuple[Any, str, float, bool]], freely: int) -> None:
    """In its order for each kind, in no larger pieces than an event may hold, and at its time."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(joiner_module, "FREELY", freely)
        patched.setattr(joiner_module, "SLOWER", 5)
        joiner, now, events = Joiner(), 0.0, list[Token | Reasoning]()
        for kind, text, seconds, taken in pieces:
            now += seconds
            joiner.add(kind, text, now)
            if taken:
                due = joiner.wait(now) == 0
                left = joiner.take(now)
                assert bool(left) == due, "it leaves when it is said to, and not before"
                events += left
        wait = joiner.wait(now)
        if wait is not None:
            events += joiner.take(now + wait)
        events += joiner.take(now, everything=True)
        assert joiner.wait(now) is None
    for kind in KINDS:
        assert text_of(events, kind) == "".join(text for of, text, _, _ in pieces if of is kind)
    assert all(0 < len(event.text) <= MAX_CHARS for event in events)


def test_nothing_waits_at_first() -> None:
    joiner = Joiner()
    for n in range(FREELY):
        joiner.add(Token, f"{n} ", n)
        assert joiner.wait(n) == 0
        assert joiner.take(n) == [Token(text=f"{n} ")]
    joiner.add(Token, "later", 0)
    assert joiner.wait(0) == PAUSE_SECONDS and joiner.take(0) == []
    assert joiner.take(PAUSE_SECONDS) == [Token(text="later")]


def test_what_came_meanwhile_is_one_event_of_each_kind() -> None:
    joiner = Joiner()
    pieces: list[tuple[Kind, str]] = [(Reasoning, "hm "), (Token, "a"), (Reasoning, "so"), (Token, "b"), (Token, "")]
    for kind, text in pieces:
        joiner.add(kind, text, 0)
    assert joiner.take(0) == [Reasoning(text="hm so"), Token(text="ab")]
    assert joiner.take(0) == []


@pytest.mark.parametrize("text", ["😀", "\ud800", "\x00", "é", "a"])
def test_every_event_fits_whatever_its_characters_cost(text: str) -> None:
    joiner = Joiner()
    joiner.add(Token, text * (3 * MAX_CHARS + 7), 0)
    events = joiner.take(0)
    assert [len(event.text) for event in events] == [MAX_CHARS] * 3 + [7]
    assert all(len(event.json_data()) <= MAX_EVENT_BYTES for event in events)


def worst(chars: int, seconds: float, sizes: Iterable[int], kinds: Iterable[Any], pauses: Iterable[float]) -> int:
    """The events of a stream of so many characters and seconds, taken after each piece and whenever they may be.

    `pauses` are what lies between two pieces, in pauses of the joiner.
    """
    joiner, now, events = Joiner(), 0.0, 0
    for size, kind, pause in zip(sizes, kinds, pauses, strict=False):
        if chars <= 0 or now > seconds:
            break
        joiner.add(kind, "x" * min(size, chars), now)
        chars -= size
        events += len(joiner.take(now))
        wait = joiner.wait(now)
        if wait is not None and pause:
            now += wait * pause
            events += len(joiner.take(now))
    return events + len(joiner.take(now, everything=True))


CHARS = 64 * 1024 * 1024
STREAMS: dict[str, tuple[Iterable[int], Iterable[Any], Iterable[float]]] = {
    "single characters, each when it may leave": (cycle([1]), cycle([Token]), cycle([1.0])),
    "both kinds in turn, each when it may leave": (cycle([1]), cycle(KINDS), cycle([0.0, 1.0])),
    "single characters first, then all at once": ([*[1] * 60_000, CHARS], cycle([Token]), cycle([1.0])),
    "a year of single characters first, then all at once": (
        chain([1] * 27_800, cycle([MAX_CHARS + 1])), cycle(KINDS), chain([0.0, 1.0] * 13_900, cycle([0.0]))),
    "just enough to leave by its size": (cycle([MAX_CHARS]), cycle([Token]), cycle([0.0])),
    "by size and by time in turn": (cycle([MAX_CHARS, 1]), cycle(KINDS), cycle([0.0, 1.0])),
    "more than an event each time": (cycle([MAX_CHARS + 1]), cycle(KINDS), cycle([0.0])),
}  # fmt: skip


@pytest.mark.parametrize("name", STREAMS)
def test_no_stream_makes_more_events_than_a_log_has_room_for(name: str) -> None:
    assert MOST_EVENTS < 49_000, "tools and rewinds need some too"
    events = worst(CHARS, YEAR, *STREAMS[name])
    assert events <= MOST_EVENTS


def test_no_random_stream_does_either() -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    for _ in range(3):
        sizes = (chance.choice([1, 7, 400, MAX_CHARS - 1, MAX_CHARS + 1, 60_000]) for _ in range(10**9))
        kinds = (chance.choice(KINDS) for _ in range(10**9))
        pauses = (chance.choice([0, 0, 0.3, 1, 1.0001]) for _ in range(10**9))
        assert worst(CHARS, YEAR, sizes, kinds, pauses) <= MOST_EVENTS


def test_an_hour_of_text_leaves_room_for_all_attempts_of_a_run() -> None:
    events = worst(10**9, 3600.0, cycle([1]), cycle([Token]), islice(cycle([1.0]), 10**9))
    assert FREELY < events < 14_500


def test_a_run_that_is_handed_over_again_and_again_has_room_in_its_log() -> None:
    """Each attempt is lost after 10,000 tokens, which its model makes in 10 seconds."""
    events = 0
    for attempt in range(1, 51):
        joiner = Joiner(attempt)
        for n in range(10_000):
            joiner.add(Token, "word ", n / 1000)
            events += len(joiner.take(n / 1000))
    assert FREELY < events < 30_000
