"""What `broker doctor --url` says of a gateway and of the way to it, from what was recorded."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.doctor.finding import Severity
from broker.doctor.gateway import Answer, Health, judge_gateway, judge_refusal
from broker.doctor.probe import Arrival, Recording, Seen
from broker.doctor.stream import judge_flow, judge_head, judge_idle, judge_resume, lateness
from broker.ids import EventId
from tests.kit.doctor import the, worst

OK, NOTE, WARNING, ERROR = Severity

HEADERS = {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-cache, no-transform"}
TYPES = ["start", "attempt", "token", "token", "token", "token", "final"]
LOG = [Arrival(0.0, EventId(min(n, 1), max(n, 1)), kind, {"n": n}) for n, kind in enumerate(TYPES)]
"""0-1, 1-1, 1-2, …: an event every half second."""
WRITTEN = [n * 0.5 for n in range(len(LOG))]


def recording(*, head: dict[str, str] | None = None, **facts: Any) -> Recording:
    made = Recording(began=0.0, status=200, headers={**HEADERS, **(head or {})}, http_version="HTTP/1.1")
    for name, value in facts.items():
        setattr(made, name, value)
    return made


def flow(arrivals: list[float], **facts: Any) -> Recording:
    """LOG, each event at its time; polled at each event's writing."""
    events = [event._replace(at=at) for event, at in zip(LOG, arrivals, strict=True)]
    polls = [Seen(at + 0.1, event.id) for event, at in zip(LOG, WRITTEN, strict=True)]
    return recording(**{"events": events, "reads": arrivals, "polls": polls, "ended": arrivals[-1] + 0.1, **facts})


def test_events_that_come_as_they_are_written_are_fine() -> None:
    assert worst(judge_flow(flow([at + 0.05 for at in WRITTEN]), LOG)) is OK


def test_events_that_all_come_at_the_end_are_held_back() -> None:
    finding = the(judge_flow(flow([3.2] * len(LOG)), LOG), "stream_buffering")
    assert finding.severity is ERROR
    assert "until the run ended" in finding.title and "3.1 s" in finding.title
    assert "proxy_buffering off" in finding.advice


def test_events_that_come_in_bursts_are_held_back() -> None:
    finding = the(judge_flow(flow([1.6, 1.6, 1.6, 1.6, 3.2, 3.2, 3.2]), LOG), "stream_buffering")
    assert finding.severity is ERROR
    assert "bursts" in finding.title


@given(st.floats(0, 0.9))
def test_a_way_that_is_only_slow_is_not_taken_for_one_that_holds_back(delay: float) -> None:
    assert worst(judge_flow(flow([at + delay for at in WRITTEN]), LOG)) is OK


@given(st.lists(st.floats(0, 20), min_size=len(LOG), max_size=len(LOG)))
def test_lateness_is_never_more_than_it_was(delays: list[float]) -> None:
    """An event is late by what passed since it was written; what comes in order can only be later than that."""
    arrivals: list[float] = []
    for at, delay in zip(WRITTEN, delays, strict=True):
        arrivals.append(max([at + delay, *arrivals[-1:]]))
    worst_delay = max(arrival - at for arrival, at in zip(arrivals, WRITTEN, strict=True))
    assert 0 <= lateness(flow(arrivals)) <= worst_delay + 1e-9


def test_a_run_that_no_worker_took_is_an_error() -> None:
    waiting = recording(events=LOG[:1], polls=[Seen(1.0, EventId(0, 1))], left=10.0)
    assert the(judge_flow(waiting, LOG[:1]), "probe_not_taken").severity is ERROR


def test_a_run_that_could_not_even_be_polled_is_not_judged_as_fine() -> None:
    assert worst(judge_flow(recording(events=LOG, ended=1.0), LOG)) is ERROR


@pytest.mark.parametrize(
    "events", [LOG[:3] + LOG[4:], [*LOG[:4], LOG[3], *LOG[4:]], [*LOG[:2], LOG[3], LOG[2], *LOG[4:]]]
)
def test_a_stream_that_lacks_repeats_or_reorders_events_is_an_error(events: list[Arrival]) -> None:
    arrivals = [event._replace(at=at) for event, at in zip(events, [*WRITTEN, 3.0], strict=False)]
    changed = recording(events=arrivals, reads=WRITTEN, ended=3.0, polls=[Seen(3.0, LOG[-1].id)])
    assert the(judge_flow(changed, LOG), "stream_content").severity is ERROR


def test_a_stream_that_is_cut_before_its_end_is_an_error() -> None:
    cut = recording(events=LOG[:3], reads=[0.0, 1.0], ended=2.0, polls=[Seen(1.0, LOG[2].id)], failure="peer closed")
    finding = the(judge_flow(cut, LOG), "stream_cut")
    assert finding.severity is ERROR
    assert "2.0 s, 1.0 s after its last byte" in finding.title and "peer closed" in finding.title


def test_a_stream_that_the_gateway_itself_cut_is_a_note() -> None:
    facts: dict[str, Any] = {"events": LOG[:3], "reads": [0.0, 1.0], "ended": 2.0, "told_to_return": True}
    cut = recording(**facts, polls=[Seen(1.0, LOG[2].id)], failure="incomplete")
    assert the(judge_flow(cut, LOG), "stream_cut").severity is NOTE
    assert the(judge_idle(cut, heartbeat=15, held_back=False), "stream_cut").severity is NOTE


def test_a_cut_by_the_gateway_that_arrives_as_a_proper_end_is_a_warning() -> None:
    ended = recording(events=LOG[:3], reads=[0.0, 1.0], ended=2.0, told_to_return=True)
    finding = the(judge_idle(ended, heartbeat=15, held_back=False), "stream_cut")
    assert finding.severity is WARNING and "proxy_http_version 1.1" in finding.advice


def test_a_late_first_byte_is_a_warning() -> None:
    slow = flow([max(at, 2.5) for at in WRITTEN], polls=[Seen(3.0, LOG[-1].id)])
    assert the(judge_flow(slow, LOG), "stream_start").severity is WARNING


def test_an_agent_that_fails_is_a_note_in_its_own_words() -> None:
    failed = Arrival(0.0, EventId(1, 6), "error", {"code": "model_unauthorized", "message": "no key"})
    log = [*LOG[:-1], failed]
    events = [event._replace(at=at) for event, at in zip(log, WRITTEN, strict=True)]
    finding = the(
        judge_flow(recording(events=events, reads=WRITTEN, ended=3.0, polls=[Seen(3.0, failed.id)]), log), "probe_agent"
    )
    assert finding.severity is NOTE and "no key" in finding.title


@pytest.mark.parametrize(
    ("head", "code", "expected"),
    [
        ({}, "stream_headers", OK),
        ({"content-type": "text/plain"}, "stream_headers", ERROR),
        ({"cache-control": "max-age=60"}, "stream_headers", WARNING),
        ({"cache-control": ""}, "stream_headers", WARNING),
        ({"content-encoding": "gzip"}, "stream_compression", WARNING),
        ({"content-encoding": "identity"}, "stream_headers", OK),
        ({"content-length": "812"}, "stream_buffering", ERROR),
    ],
)
def test_headers_that_were_changed_on_the_way_are_told(head: dict[str, str], code: str, expected: Severity) -> None:
    finding = the(judge_head(recording(head={**head, "server": "nginx/1.2"})), code)
    assert finding.severity is expected
    assert expected is OK or "nginx/1.2" in finding.title


def test_http_1_0_is_a_warning() -> None:
    assert the(judge_head(recording(http_version="HTTP/1.0")), "stream_http_version").severity is WARNING


def test_no_response_at_all_is_buffering_and_another_status_is_an_error() -> None:
    nothing = Recording(began=0.0, left=20.0)
    assert the(judge_head(nothing), "stream_buffering").severity is ERROR
    refused = Recording(began=0.0, ended=0.1, failure="connection refused")
    assert the(judge_head(refused), "stream_status").severity is ERROR
    finding = the(judge_head(recording(status=504, detail="Gateway Time-out")), "stream_status")
    assert finding.severity is ERROR and "504" in finding.title


def test_a_resumed_stream_must_be_exactly_the_rest() -> None:
    rest = recording(events=LOG[3:], ended=1.0)
    assert the(judge_resume(rest, LOG, 2), "stream_resume").severity is OK
    whole = recording(events=LOG, ended=1.0)
    finding = the(judge_resume(whole, LOG, 2), "stream_resume")
    assert finding.severity is ERROR and "from the beginning" in finding.title
    lacking = recording(events=LOG[4:], ended=1.0)
    assert the(judge_resume(lacking, LOG, 2), "stream_content").severity is ERROR
    cut = recording(events=LOG[3:5], ended=1.0)
    assert the(judge_resume(cut, LOG, 2), "stream_resume").severity is ERROR
    refused = recording(status=500, detail="oops")
    assert "oops" in the(judge_resume(refused, LOG, 2), "stream_resume").title


def test_an_idle_stream_with_heartbeats_is_fine() -> None:
    idle = recording(events=LOG[:3], reads=[0.1, 11.3], heartbeats=[11.3], left=20.0)
    finding = the(judge_idle(idle, heartbeat=15, held_back=False), "stream_heartbeats")
    assert finding.severity is OK and "11.2 s of silence" in finding.title


def test_an_idle_stream_without_heartbeats_is_a_warning_unless_none_was_due() -> None:
    idle = recording(events=LOG[:3], reads=[0.1], left=20.0)
    assert the(judge_idle(idle, heartbeat=15, held_back=False), "stream_heartbeats").severity is WARNING
    assert the(judge_idle(idle, heartbeat=15, held_back=True), "stream_heartbeats").severity is NOTE
    assert the(judge_idle(idle, heartbeat=30, held_back=False), "stream_heartbeats").severity is NOTE


def test_an_idle_stream_that_is_cut_is_an_error_with_the_timeouts_to_change() -> None:
    cut = recording(events=LOG[:3], reads=[0.1], ended=10.1)
    finding = the(judge_idle(cut, heartbeat=15, held_back=False), "stream_cut")
    assert finding.severity is ERROR
    assert "10.0 s after its last byte" in finding.title and "proxy_read_timeout" in finding.advice


def test_an_idle_run_that_ended_by_itself_says_nothing() -> None:
    ended = recording(events=LOG, reads=[0.1], ended=0.2)
    assert the(judge_idle(ended, heartbeat=15, held_back=False), "probe_agent").severity is NOTE


def test_a_gateway_that_is_away_unready_or_another_service() -> None:
    fine = Answer(status=200, body="ok")
    assert worst(judge_gateway("u", Health(health=fine, ready=Answer(status=200, body="ready")))) is OK
    for health, code in (
        (Answer(status=None, failure="refused"), "gateway_unreachable"),
        (Answer(status=502, body="Bad Gateway", server="nginx"), "gateway_unreachable"),
        (Answer(status=200, body="<html>"), "gateway_unreachable"),
    ):
        assert the(judge_gateway("u", Health(health=health, ready=health)), code).severity is ERROR
    unready = Health(health=fine, ready=Answer(status=503, body="Redis cannot be reached"))
    finding = the(judge_gateway("u", unready), "gateway_ready")
    assert finding.severity is ERROR and "Redis cannot be reached" in finding.title


def test_a_submit_that_is_refused_names_the_token_or_the_reason() -> None:
    assert "BROKER_TOKEN" in judge_refusal(401, "A valid bearer token is required.", has_token=False).advice
    assert "expired" in judge_refusal(401, "expired", has_token=True).title
    assert judge_refusal(503, "no Redis", has_token=True).code == "gateway_submit"


WIRE = b"retry: 1500\n" + b"".join(
    b'id: %s\nevent: %s\ndata: {"n":%d}\n\n: heartbeat %s\n' % (str(e.id).encode(), e.type.encode(), e.data["n"], b"x")
    for e in LOG
)


@given(st.lists(st.integers(0, len(WIRE)), max_size=12))
def test_a_stream_is_read_alike_however_it_is_cut_into_pieces(cuts: list[int]) -> None:
    made = Recording(began=0.0)
    ends = [0, *sorted(cuts), len(WIRE)]
    for number, (first, last) in enumerate(itertools.pairwise(ends)):
        made.feed(WIRE[first:last], float(number))
    assert [event[1:] for event in made.events] == [event[1:] for event in LOG]
    assert len(made.heartbeats) == len(LOG)
    assert not made.told_to_return


def test_a_last_line_that_says_retry_is_the_gateway_s_own_end() -> None:
    made = Recording(began=0.0)
    made.feed(b"retry: 1500\n", 0.0)
    assert not made.told_to_return
    made.feed(b"id: 0-1\nevent: start\ndata: {}\n\n", 0.1)
    made.feed(b"retry: 1500\n", 0.2)
    assert made.told_to_return
    made.feed(b": heartbeat\n", 0.3)
    assert not made.told_to_return
