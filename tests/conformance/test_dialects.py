"""What holds for every dialect, whatever the log: its frames are a pure fold, each is one SSE event, and a client that
is cut anywhere goes on exactly there.
"""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from broker.events import Entry
from broker.gateway.dialects.dialect import Dialect, Folded, Frame
from broker.gateway.dialects.table import DIALECTS
from broker.gateway.pages import encode
from broker.gateway.reader import Marks, Slice
from tests.kit import sse
from tests.kit.folds import FOLDS, folded, frames_of
from tests.kit.logs import logs
from tests.kit.scale import scaled

EACH = [pytest.param(dialect, id=f"{name}-{n}") for name, found in FOLDS.items() for n, dialect in enumerate(found)]
each_dialect = pytest.mark.parametrize("dialect", EACH)
many = settings(max_examples=scaled(300), suppress_health_check=[HealthCheck.too_slow], deadline=None)
END_OF_AISDK = b"data: [DONE]\n\n"
"""Beside the last chunk, and not counted as one."""
LOGS = st.one_of(logs(), logs(repeating=True))


def test_no_dialect_is_left_out() -> None:
    assert set(FOLDS) == set(DIALECTS)


@each_dialect
@many
@given(LOGS)
def test_a_frame_is_one_event_of_ascii_lines(dialect: Dialect, log: list[Entry]) -> None:
    """P18: nothing that a text holds makes another line, another field or another event."""
    for frame in frames_of(dialect, log):
        one = frame.data.removesuffix(END_OF_AISDK)
        assert one.isascii() and b"\r" not in one and b"\0" not in one
        assert one.endswith(b"\n\n") and one.count(b"\n\n") == 1
        names = [line.partition(b": ")[0] for line in one[:-2].split(b"\n")]
        assert names.count(b"data") == 1 and set(names) <= {b"id", b"event", b"data"} and len(set(names)) == len(names)
        [event] = sse.parse(one)
        assert isinstance(json.loads(event.data), dict)


@each_dialect
@many
@given(LOGS)
def test_positions_rise(dialect: Dialect, log: list[Entry]) -> None:
    positions = [frame.position for frame in frames_of(dialect, log)]
    assert all(one < two for one, two in pairwise(positions))


@each_dialect
@many
@given(LOGS, st.data())
def test_a_state_is_a_value_from_which_the_fold_can_go_on_again(
    dialect: Dialect, log: list[Entry], data: st.DataObject
) -> None:
    whole = frames_of(dialect, log)
    cut = data.draw(st.integers(0, len(log)))
    state, frames = folded(dialect, log[:cut])
    for _ in range(2):  # gateways go on from kept states, more than once
        later: list[Frame] = []
        at: Any = state
        for entry in log[cut:]:
            if dialect.ended(at):
                break
            at, more = dialect.step(at, entry)
            later += more
        assert frames + later == whole


@each_dialect
@many
@given(LOGS, st.data())
def test_whoever_is_cut_anywhere_goes_on_exactly_there(dialect: Dialect, log: list[Entry], data: st.DataObject) -> None:
    """P8, in pages of any size: what the client has and what it gets then is the whole."""
    whole = frames_of(dialect, log)
    cut = data.draw(st.integers(0, len(whole)))
    after = whole[cut - 1].position if cut else None
    rest = b""
    for part in pages(dialect, log, data):
        assert part.marks is not None or dialect.seekable
        marks = part.marks or Marks.of([frames_of(dialect, [entry]) for entry in log if entry.id == part.last])
        starts = [0, *marks.ends]
        rest += b"".join(
            part.data[starts[n] : end]
            for n, (position, end) in enumerate(zip(*marks, strict=True))
            if after is None or position > after
        )
    assert b"".join(frame.data for frame in whole[:cut]) + rest == b"".join(frame.data for frame in whole)


def pages(dialect: Dialect, log: list[Entry], data: st.DataObject) -> list[Slice]:
    """As a gateway reads a log: the fold goes from page to page."""
    found: list[Slice] = []
    at, fold = 0, Folded(dialect.start, None)
    while at < len(log) and not dialect.ended(fold.state):
        size = 1 if dialect.seekable else data.draw(st.integers(1, 5))
        [part] = encode(dialect, fold, log[at : at + size])
        found.append(part)
        at, fold = at + size, part.folded
    return found


@each_dialect
@many
@given(logs(ended=True))
def test_the_terminal_event_ends_the_fold(dialect: Dialect, log: list[Entry]) -> None:
    state, frames = folded(dialect, log)
    assert dialect.ended(state) or dialect.seekable
    assert frames and frames[-1].data


@each_dialect
def test_what_is_sent_beside_frames_is_seen_by_no_client(dialect: Dialect) -> None:
    """P13: whole lines, which a reader by the standard dispatches no event for, before and after an id was seen."""
    beside = [dialect.opening(1500), dialect.heartbeat("heartbeat 12-812 lease=1.3s"), dialect.closing(1500)]
    frame = b'id: 12-7\ndata: {"x": 1}\n\n'
    for extra in beside:
        assert extra.endswith(b"\n") and b"\r" not in extra
        events = sse.parse(beside[0] + extra + frame + extra + frame + extra)
        assert [(event.id, event.data) for event in events] == [("12-7", '{"x": 1}')] * 2


@each_dialect
def test_a_run_that_is_gone_and_a_cursor_that_is_lost_are_told(dialect: Dialect) -> None:
    for told in (dialect.gone(dialect.start), dialect.lost(dialect.start)):
        assert sse.parse(told) and told.endswith(b"\n\n")
