"""How the clients read an event stream: as the HTML standard says, wherever the bytes are cut."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker import sse as wire
from broker.client import frames
from broker.client.frames import Frame, Frames, Oversized
from tests.kit import sse

FIELDS = ("id: 1-1", "id:2-1", "id", "id: a\0b", "event: token", "event:x", "data: {}", "data:a", "data:  b", "data")
OTHERS = (":", ": h", "retry: 10", "retry: -1", "retry: ٣", "retry: 1.5", "other: x", "data: é\u2028\u0085😀")
LINES = st.sampled_from([*FIELDS, *OTHERS, "", "", ""])
STREAMS = st.lists(st.tuples(LINES, st.sampled_from(["\n", "\n", "\r\n", "\r"])), max_size=30).map(
    lambda lines: "".join(line + end for line, end in lines).encode("utf-8")
)


def cut(body: bytes, places: list[int]) -> list[bytes]:
    edges = [0, *sorted(place % (len(body) + 1) for place in places), len(body)]
    return [body[start:end] for start, end in pairwise(edges)]


def read(*parts: bytes) -> tuple[list[Frame], int | None]:
    stream = Frames()
    return [frame for part in parts for frame in stream.feed(part)], stream.retry_ms


@given(STREAMS, st.lists(st.integers(0, 10_000), max_size=12))
def test_any_cuts_give_the_same_frames(body: bytes, places: list[int]) -> None:
    whole = read(body)
    assert read(*cut(body, places)) == whole
    assert read(*(bytes([byte]) for byte in body)) == whole


@given(STREAMS, st.booleans(), st.lists(st.integers(0, 10_000), max_size=4))
def test_frames_are_those_of_the_strict_model(body: bytes, marked: bool, places: list[int]) -> None:
    body = (b"\xef\xbb\xbf" if marked else b"") + body
    model = sse.EventStream()
    expected = model.feed(body + b"\n") if body.endswith(b"\r") else model.feed(body)
    found, retry_ms = read(*cut(body, places))
    assert [(frame.type, frame.data) for frame in found] == [(event.type, event.data) for event in expected]
    assert retry_ms == model.retry_ms
    last = ""
    for frame, event in zip(found, expected, strict=True):
        last = frame.id if frame.id is not None else last
        if frame.id is not None:
            assert event.id == last


@pytest.mark.parametrize("digits", [10, 400, 5000])
def test_a_retry_that_is_no_time_to_wait_is_passed_over(digits: int) -> None:
    assert read(b"retry: 7\nretry: " + b"9" * digits + b"\n") == ([], 7)


def test_a_frame_has_no_id_but_its_own() -> None:
    assert read(b"id: 1-1\ndata: a\n\ndata: b\n\n")[0] == [Frame("1-1", "message", "a"), Frame(None, "message", "b")]


def test_what_the_end_has_cut_was_never_there() -> None:
    assert read(b"id: 1-1\nevent: token\ndata: {}\n")[0] == []


def test_heartbeats_are_counted_and_are_no_frames() -> None:
    stream = Frames()
    assert list(stream.feed(wire.retry(1500) + wire.comment("heartbeat 1-1") + wire.comment("heartbeat 1-1"))) == []
    assert (stream.retry_ms, stream.comments) == (1500, 2)


@pytest.mark.parametrize("body", [b"data: xxxxxxxx", b"data: xxxxxxxx\n", b": xxxxxxxxxx"])
def test_a_frame_without_an_end_is_refused_before_it_takes_all_memory(
    body: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(frames, "MAX_FRAME_BYTES", 1000)
    stream, fed = Frames(), 0
    with pytest.raises(Oversized):
        for _ in range(1000):
            assert list(stream.feed(body)) == []
            fed += len(body)
    assert fed < 3000


def test_many_frames_are_not_one_that_is_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frames, "MAX_FRAME_BYTES", 1000)
    stream, count = Frames(), 0
    for _ in range(1000):
        count += len(list(stream.feed(b": heartbeat\nid: 1\n" * 5 + b"data: abc\n\n" + b": heartbeat\nid: 1\n" * 500)))
    assert count == 1000
