"""A run's stream over all its connections: exact, folded, and never with a hole."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.client.backoff import Backoff
from broker.client.errors import ApiError, DamagedStream, Unreachable
from broker.client.received import Received, Unknown
from broker.client.tail import TRIES_AT_A_HOLE, Broken, Disconnected, Tail
from broker.errors import BadCursor, Draining, RunNotFound, Unauthorized
from broker.events import Attempt, Entry, Final, Message, Sources, Token, dumps
from broker.fold import fold
from broker.gateway.dialects.native.fold import Native
from broker.ids import EventId
from tests.kit import folds

RID, OTHER = "ab" * 16, "cd" * 16
SSE = {"content-type": "text/event-stream; charset=utf-8"}


def entry(event_id: str, event_type: str, **data: object) -> Entry:
    return Entry(EventId.parse(event_id), event_type, dumps(data))


def attempt(event_id: str, resume_from: str, reason: str = "worker_lost", number: int = 1) -> Entry:
    return entry(event_id, "attempt", attempt=number, reason=reason, resume_from=resume_from)


START = entry("0-1", "start", request_id=RID, session_id="s")
LOG = [
    START,
    attempt("3-1", "0-1", "started"),
    entry("3-2", "token", text="one "),
    entry("3-3", "token", text="two "),
    attempt("7-1", "3-2", number=2),
    entry("7-2", "token", text="three"),
    entry("7-3", "final", answer=None, citations=[], usage={}),
]


def body(entries: Iterable[Entry], *, long_ids: bool = False) -> bytes:
    return b"retry: 1\n" + folds.body_of(Native(RID, long_ids=long_ids), entries)


def tail(*, patience: float = 60, after: str | None = None, **hooks: object) -> Tail:
    backoff = Backoff(patience=patience, longest=15, known=True, chance=lambda: 0.5)
    return Tail(RID, "http://broker", backoff, after=after, **hooks)  # type: ignore[arg-type]


def connect(tail: Tail) -> str | None:
    """The cursor that it asks for."""
    cursor = tail.headers().get("Last-Event-ID")
    tail.opened(200, SSE, b"")
    return cursor


def feed(tail: Tail, *parts: bytes) -> list[Received]:
    """The terminal event included, as the clients give it out."""
    seen = [received for part in parts for received in tail.feed(part)]
    return [*seen, tail.end] if tail.end is not None else seen


def as_entries(seen: Sequence[Received]) -> list[Entry]:
    return [Entry(item.id, item.type, dumps(item.data)) for item in seen]


# -- exact -----------------------------------------------------------------------------------------------------


@st.composite
def logs(draw: st.DrawFn) -> list[Entry]:
    """Of several attempts, each of which goes on from what it likes of what survives."""
    entries, epoch = [START], 0
    for number in range(1, draw(st.integers(1, 5)) + 1):
        epoch += draw(st.integers(1, 9))
        resume_from = draw(st.sampled_from(fold(entries))).id
        entries.append(attempt(f"{epoch}-1", str(resume_from), number=number))
        for seq in range(2, draw(st.integers(2, 7))):
            entries.append(entry(f"{epoch}-{seq}", "token", text=f"{epoch}:{seq} "))
        last = int(entries[-1].id.seq) + 1
    if draw(st.booleans()):
        entries.append(entry(f"{epoch}-{last}", draw(st.sampled_from(["final", "error", "cancelled"])), code="x"))
    return entries


@given(logs(), st.data())
def test_a_log_that_is_cut_at_any_bytes_is_read_exactly_and_folded(log: list[Entry], data: st.DataObject) -> None:
    """Each connection begins where the gateway would, or a few events before: those are dropped."""
    reading, seen = tail(), list[Received]()
    for _ in range(data.draw(st.integers(0, 6))):
        if reading.done:
            break
        connect(reading)
        first = sum(item.id <= reading.position for item in log)
        served = body(log[max(0, first - data.draw(st.integers(0, 3))) :])
        served = served[: data.draw(st.integers(0, len(served)))]
        middle = data.draw(st.integers(0, len(served)))
        seen += [received for part in (served[:middle], served[middle:]) for received in reading.feed(part)]
    if not reading.done:
        connect(reading)
        seen += reading.feed(body([item for item in log if item.id > reading.position]))
    assert reading.done == log[-1].terminal
    if reading.end is not None:
        seen.append(reading.end)
    assert as_entries(seen) == log
    assert as_entries(reading.kept) == fold(log)


def test_a_stream_goes_on_after_the_event_that_was_given_out_last() -> None:
    """Not after the last that has come: who stops in the middle of what one read brought has not had the rest."""
    reading = tail()
    assert connect(reading) is None
    events = reading.feed(body(LOG))
    for _ in range(3):
        next(events)
    assert reading.position == EventId(3, 2)
    assert connect(reading) == "3-2"


def test_an_event_that_comes_twice_is_given_out_once() -> None:
    reading = tail()
    connect(reading)
    assert as_entries(feed(reading, body([*LOG[:3], *LOG[:4], *LOG[2:]]))) == LOG


def test_a_cursor_in_either_form_begins_after_its_event() -> None:
    for after in ("3-3", f"{RID}/3-3", EventId(3, 3)):
        reading = Tail(RID, "", Backoff(patience=1, longest=1, known=True), after=after)
        assert connect(reading) == "3-3"
        assert [item.id for item in feed(reading, body(LOG[4:]))] == [item.id for item in LOG[4:]]


@pytest.mark.parametrize("after", ["3", "x-y", f"{OTHER}/3-3", "-1"])
def test_what_is_no_cursor_of_this_run_is_refused(after: str) -> None:
    with pytest.raises(BadCursor):
        tail(after=after)


# -- holes -----------------------------------------------------------------------------------------------------

HOLES = {
    "the first": (LOG[1:], None),
    "one of an epoch": ([*LOG[:2], *LOG[3:]], EventId(3, 1)),
    "an epoch's attempt": ([*LOG[:2], LOG[2], LOG[3], *LOG[5:]], EventId(3, 3)),
    "what the next attempt stands on": ([*LOG[:2], attempt("7-1", "3-2")], EventId(3, 1)),
    "the beginning of an attempt's own": ([*LOG[:2], attempt("7-2", "3-1")], EventId(3, 1)),
}


@pytest.mark.parametrize("missing", HOLES)
def test_a_hole_is_never_given_out_and_heals_by_connecting_again(missing: str) -> None:
    entries, before = HOLES[missing]
    reading = tail()
    connect(reading)
    seen = []
    with pytest.raises(Broken, match="comes"):
        for received in reading.feed(body(entries)):
            seen.append(received)
    assert reading.position == (before or EventId(0, 0))
    reading.broken("a hole", 0)
    connect(reading)
    seen += feed(reading, body([item for item in LOG if item.id > reading.position]))
    assert as_entries(seen) == LOG


def test_a_hole_that_stays_is_an_error_of_its_own() -> None:
    reading = tail()
    for n in range(TRIES_AT_A_HOLE):
        connect(reading)
        with pytest.raises(Broken) as broken:
            list(reading.feed(body([*LOG[:2], LOG[3]])))
        if n < TRIES_AT_A_HOLE - 1:
            reading.broken(str(broken.value), n)
    with pytest.raises(DamagedStream, match="after 3-1 comes 3-3"):
        reading.broken(str(broken.value), 9)


@pytest.mark.parametrize(
    "frame",
    [
        b"id: 3-2\nevent: token\ndata: {\n\n",
        b"id: 3-2\nevent: token\ndata: []\n\n",
        b"id: x\nevent: token\ndata: {}\n\n",
        b"id: 7-1\nevent: attempt\ndata: {}\n\n",
        b'id: 7-1\nevent: attempt\ndata: {"resume_from":"x"}\n\n',
        b"id: 3-2\nevent: token\ndata: " + b"[" * 100_000 + b"\n\n",
    ],
)
def test_what_cannot_be_an_event_is_a_hole_too(frame: bytes) -> None:
    reading = tail()
    connect(reading)
    feed(reading, body(LOG[:2]))
    with pytest.raises(Broken, match="no event"):
        list(reading.feed(frame))


# -- rewinds ---------------------------------------------------------------------------------------------------


def test_a_rewind_is_given_out_and_what_it_voids_is_dropped() -> None:
    reading = tail()
    connect(reading)
    seen = feed(reading, body(LOG))
    assert [item.type for item in seen] == ["start", "attempt", "token", "token", "attempt", "token", "final"]
    assert seen[4].event == Attempt(attempt=2, reason="worker_lost", resume_from="3-2")
    assert [item.data["text"] for item in reading.kept if item.type == "token"] == ["one ", "three"]


def test_a_lost_cursor_begins_anew() -> None:
    """PROTOCOL 6.5: the frame's id is 0-0, and the whole log follows."""
    reading = tail(after="99-5")
    assert connect(reading) == "99-5"
    lost = attempt("0-0", "0-0", "cursor_lost", 0)
    assert as_entries(feed(reading, body([lost, *LOG]))) == [lost, *LOG]
    again = tail()
    connect(again)
    feed(again, body(LOG[:4]))
    connect(again)
    feed(again, body([lost]))
    assert again.kept == []
    assert connect(again) is None
    assert as_entries(feed(again, body(LOG))) == LOG


# -- the end ---------------------------------------------------------------------------------------------------


def test_nothing_is_read_after_the_terminal() -> None:
    reading = tail()
    connect(reading)
    assert as_entries(feed(reading, body([*LOG, entry("7-4", "token", text="more")]))) == LOG
    assert reading.done
    assert isinstance(reading.end and reading.end.event, Final)


def test_who_has_it_all_is_done_at_once() -> None:
    reading = tail(after="7-3")
    reading.headers()
    reading.opened(204, {}, b"")
    assert reading.done


def test_a_run_that_is_gone_is_not_found() -> None:
    """The gateway says so in a frame without an id: what came before it is given out."""
    reading = tail()
    connect(reading)
    seen = []
    with pytest.raises(RunNotFound):
        for received in reading.feed(body(LOG[:3]) + Native(RID, long_ids=False).gone(None)):
            seen.append(received)
    assert as_entries(seen) == LOG[:3]


# -- newer brokers ---------------------------------------------------------------------------------------------


def test_types_values_and_fields_of_a_newer_broker_are_no_error() -> None:
    reading = tail()
    connect(reading)
    newer = [
        START,
        attempt("3-1", "0-1", "by_a_new_reason"),
        entry("3-2", "plan", steps=[1, 2]),
        entry("3-3", "message", text="hello", tone="warm"),
        entry("3-4", "sources", stage="ranked", count=1, items=[]),
        entry("3-5", "token"),
    ]
    seen = feed(reading, body(newer))
    assert as_entries(seen) == newer, "`data` is all that came"
    assert [item.event for item in seen[1:]] == [
        Unknown(name="attempt", data=newer_data(newer[1])),
        Unknown(name="plan", data={"steps": [1, 2]}),
        Message(text="hello"),
        Unknown(name="sources", data={"stage": "ranked", "count": 1, "items": []}),
        Unknown(name="token", data={}),
    ]
    feed(reading, body([attempt("9-1", "3-1", "by_a_new_reason")]))
    assert [item.id for item in reading.kept] == [EventId(0, 1)], "it voids, whatever its reason"


def newer_data(item: Entry) -> dict[str, object]:
    found: dict[str, object] = json.loads(item.data)
    return found


def test_events_that_are_known_are_typed() -> None:
    reading = tail()
    connect(reading)
    sources = entry("3-2", "sources", stage="screened", count=1, items=[{"a": 1}])
    seen = feed(reading, body([*LOG[:2], sources, entry("3-3", "token", text="\ud800\u2028")]))
    assert seen[2].event == Sources(stage="screened", count=1, items=[{"a": 1}])
    assert seen[3].event == Token(text="\ud800\u2028")


def test_a_frame_without_an_id_that_is_no_error_is_not_an_event_of_the_log() -> None:
    reading = tail()
    connect(reading)
    assert as_entries(feed(reading, b"event: notice\ndata: {}\n\n" + body(LOG))) == LOG


# -- connections -----------------------------------------------------------------------------------------------


def test_each_answer_that_refuses_is_the_error_that_it_means() -> None:
    problem = dumps({"code": "run_not_found", "detail": "There is no such run."}).encode()
    with pytest.raises(RunNotFound):
        tail().opened(404, {}, problem)
    with pytest.raises(Unauthorized):
        tail().opened(401, {}, b"<html>")
    with pytest.raises(ApiError, match="not an event stream") as refused:
        tail().opened(200, {"content-type": "text/html"}, b"")
    assert refused.value.code == "not_a_broker"


def test_a_service_that_is_away_is_tried_again_until_patience_ends() -> None:
    problem = dumps({"code": "draining", "detail": "Elsewhere."}).encode()
    reading = tail(patience=10)
    for now in (0.0, 5.0, 9.9):
        reading.headers()
        with pytest.raises(Broken, match="Elsewhere"):
            reading.opened(503, {"retry-after": "3"}, problem)
        assert reading.broken("Elsewhere.", now) == pytest.approx(min(3.0, 10 - now))
    with pytest.raises(Draining):
        reading.broken("Elsewhere.", 10.1)
    silent = tail(patience=10)
    silent.headers()
    silent.broken("refused", 0)
    with pytest.raises(Unreachable, match="http://broker does not answer: refused"):
        silent.broken("refused", 10)


def test_events_and_heartbeats_renew_patience_but_an_empty_answer_does_not() -> None:
    for sign, renewed in ((body(LOG[:1]), True), (b": heartbeat 0-1\n", True), (b"retry: 1000\n", False)):
        reading = tail(patience=10)
        connect(reading)
        reading.broken("cut", 0)
        connect(reading)
        feed(reading, sign)
        if renewed:
            reading.broken("cut", 11)
        else:
            with pytest.raises(Unreachable):
                reading.broken("cut", 11)


def test_the_pause_is_what_retry_asks_for_at_most_and_doubles() -> None:
    reading = tail()
    connect(reading)
    feed(reading, b"retry: 3000\n" + body(LOG[:1])[9:])
    assert [reading.broken("cut", 0) for _ in range(4)] == [1.5, 3, 6, 7.5]


def test_a_service_that_asks_for_no_pause_is_not_asked_without_one() -> None:
    reading = tail()
    for _ in range(3):
        connect(reading)
        feed(reading, b"retry: 0\n: heartbeat 0-1\n")
        assert reading.broken("cut", 0) == 0.05


def test_the_hooks_tell_of_each_break_and_of_each_return() -> None:
    said: list[object] = []
    reading = tail(on_disconnect=said.append, on_reconnect=lambda: said.append("back"))
    connect(reading)
    reading.broken("cut", 0)
    reading.broken("refused", 1)
    connect(reading)
    reading.broken("cut", 2)
    connect(reading)
    assert said == [
        Disconnected("cut", 0.5),
        Disconnected("refused", 1.0),
        "back",
        Disconnected("cut", 2.0),
        "back",
    ]
    assert reading.reconnects == 2
