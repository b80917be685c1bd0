"""The cursor of many runs: one spelling, short enough for a header, and that of one run is its long form."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker import sse as wire
from broker.errors import BadCursor
from broker.gateway.dialects.native.many.cursor import FAST_CLOCK_MS, MAX_RUNS, Composite, Places
from broker.ids import Cursor, EventId
from tests.kit import sse

RID = "0123456789abcdef" * 2
OTHER = "fedcba9876543210" * 2
NUMBER = st.integers(0, 10**16 - 1)
REQUEST_IDS = st.text("0123456789abcdef", min_size=32, max_size=32)
PLACES = st.dictionaries(REQUEST_IDS, st.none() | st.builds(EventId, NUMBER, NUMBER), min_size=1, max_size=MAX_RUNS)
COMPOSITES = st.builds(Composite, PLACES, st.none() | NUMBER)


@given(COMPOSITES)
def test_a_cursor_reads_as_it_was_written_and_keeps_its_order(composite: Composite) -> None:
    read = Composite.parse(str(composite))
    assert read == composite
    assert list(read.places) == list(composite.places)
    assert str(read).isascii() and str(read).isprintable() and " " not in str(read)


def test_the_longest_cursor_leaves_room_in_a_header_and_beside_the_runs_in_a_url() -> None:
    largest = EventId(10**16 - 1, 10**16 - 1)
    names = [f"{n:032x}" for n in range(MAX_RUNS)]
    cursor = str(Composite(dict.fromkeys(names, largest), 10**16 - 1))
    assert len(cursor) <= 4096
    listed = "".join(f"run={name}&" for name in names)
    assert len(f"GET /api/v1/stream?{listed}last_event_id={cursor.replace('/', '%2F').replace(',', '%2C')}") < 8192


@given(REQUEST_IDS, st.builds(EventId, NUMBER, NUMBER))
def test_the_cursor_of_one_run_is_its_long_form(request_id: str, at: EventId) -> None:
    text = str(Composite({request_id: at}))
    assert Cursor.parse(text) == Cursor(at, request_id)
    assert Composite.parse(f"{request_id}/{at}") == Composite({request_id: at})


@given(COMPOSITES, st.data())
def test_every_frame_of_a_stream_says_where_the_client_stands_in_every_run(
    before: Composite, data: st.DataObject
) -> None:
    """Its own run's place is the first, and only that one has changed; comments and data are as they were."""
    places, expected = Places(before), dict(before.places)
    for _ in range(3):
        request_id = data.draw(st.sampled_from([*expected]) | REQUEST_IDS.filter(lambda name: len(expected) < MAX_RUNS))
        ids = data.draw(st.lists(st.builds(EventId, NUMBER, NUMBER), min_size=1, max_size=3))
        frames = [wire.frame("token", f'{{"n":{n}}}', f"{request_id}/{at}") for n, at in enumerate(ids)]
        events = sse.parse(places.complete(request_id, b"".join(frames)))
        assert [(event.type, event.data) for event in events] == [("token", f'{{"n":{n}}}') for n in range(len(ids))]
        for at, event in zip(ids, events, strict=True):
            expected[request_id] = at
            cursor = Composite.parse(event.id)
            assert cursor == Composite(expected, before.floor)
            assert next(iter(cursor.places)) == request_id
            assert event.id == str(cursor)


def test_a_floor_alone_is_a_cursor_of_a_session() -> None:
    assert Composite.parse("1763668800000") == Composite({}, 1763668800000)


@given(PLACES, NUMBER, NUMBER)
def test_a_floor_is_at_most_now_and_one_that_no_clock_shows_is_refused(
    places: dict[str, EventId | None], floor: int, now_ms: int
) -> None:
    cursor = Composite(places, floor)
    if floor > now_ms + FAST_CLOCK_MS:
        with pytest.raises(BadCursor, match="milliseconds"):
            cursor.not_ahead_of(now_ms)
    else:
        assert cursor.not_ahead_of(now_ms) == Composite(places, min(floor, now_ms))
    assert Composite(places).not_ahead_of(now_ms) == Composite(places)


@given(NUMBER, st.integers(0, FAST_CLOCK_MS))
def test_a_clock_may_be_fast_by_a_day(now_ms: int, ahead_ms: int) -> None:
    assert Composite({}, now_ms + ahead_ms).not_ahead_of(now_ms).floor == now_ms


@pytest.mark.parametrize(
    "text",
    [
        "",
        ",",
        "1-2",
        "abc",
        f"{RID}",
        f"{RID}/",
        f"{RID}/1",
        f"{RID}/1-2,",
        f",{RID}/1-2",
        f"{RID}/1-2,,{OTHER}/1-2",
        f"{RID}/1-2, {OTHER}/1-2",
        f"{RID}/1-2;{OTHER}/1-2",
        f"{RID}/1-2,3-4",
        f"{RID}/1-2,{RID}/1-3",
        f"{RID}/gone,{RID}/1-3",
        f"{RID}/GONE",
        "gone",
        "/gone",
        f"{RID}/1-2,12,{OTHER}/1-2",
        f"{RID}/1-2,12,13",
        f"{RID}/1-2,012",
        f"{RID}/1-2,-1",
        f"{RID}/1-2,1_0",
        f"{RID}/1-2,\u0661",
        f"{RID}/1-2,12345678901234567",
        f"{RID.upper()}/1-2",
        f"{RID}/01-2",
        ",".join(f"{n:032x}/1-2" for n in range(MAX_RUNS + 1)),
        ",".join(f"{n:032x}/1-2" for n in range(MAX_RUNS + 1)) + ",7",
        "," * 100_000,
    ],
    ids=lambda text: ascii(text)[:80],
)
def test_everything_else_is_refused(text: str) -> None:
    with pytest.raises(BadCursor):
        Composite.parse(text)
