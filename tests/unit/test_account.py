"""What a run has taken: attempts, their times and events, and what its retries have cost."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

from broker.cli.account import Account, Count, account
from broker.client import LogEvent, Run

CREATED = datetime(2026, 11, 20, 17, 0, 0, tzinfo=UTC)
RID = "ab" * 16


def after(seconds: float) -> datetime:
    return CREATED + timedelta(seconds=seconds)


def run(**fields: Any) -> Run:
    base = {
        "request_id": RID,
        "session_id": "s",
        "status": "completed",
        "agent": "echo",
        "attempt": 1,
        "created_at": CREATED,
        "started_at": after(0.5),
        "finished_at": after(20.5),
        "last_event_id": "1-1",
        "metadata": {},
        "links": {"self": "", "stream": "", "events": "", "cancel": ""},
        "answer": "x",
        "citations": [],
        "usage": {},
        "error": None,
    }
    return Run.model_validate(base | fields)


def event(event_id: str, event_type: str, void: bool = False, **data: Any) -> LogEvent:
    return LogEvent(id=event_id, type=event_type, data=data, void=void)


def attempt(event_id: str, number: int, reason: str) -> LogEvent:
    return event(event_id, "attempt", attempt=number, reason=reason, resume_from="0-1")


START = event("0-1", "start", request_id=RID, session_id="s")


def taken(events: list[LogEvent], now: float = 100, **fields: Any) -> Account:
    return account(run(**fields), events, after(now))


def test_a_run_of_one_attempt_has_cost_nothing_but_that() -> None:
    got = taken(
        [
            START,
            attempt("520-1", 1, "started"),
            event("520-2", "message", text="m"),
            event("520-3", "token", text="a"),
            event("520-4", "final"),
        ]
    )
    assert (got.queued_seconds, got.running_seconds) == (0.5, 20.0)
    assert got.total == Count(events=4, token_events=1)
    assert got.void == Count()
    [only] = got.attempts
    assert (only.attempt, only.reason, only.began_seconds, only.seconds) == (1, "started", 0.5, 20.0)
    assert only.total == Count(events=3, token_events=1)


def test_a_retry_has_cost_what_it_made_void() -> None:
    got = taken(
        [
            START,
            attempt("520-1", 1, "started"),
            event("520-2", "token", text="kept"),
            event("520-3", "token", void=True, text="lost"),
            event("520-4", "message", void=True, text="lost"),
            attempt("15520-1", 2, "worker_lost"),
            event("15520-2", "token", text="again"),
            event("15520-3", "final"),
        ]
    )
    assert got.total == Count(events=6, token_events=3)
    assert got.void == Count(events=2, token_events=1)
    first, second = got.attempts
    assert (first.began_seconds, first.seconds) == (0.5, 15.0)
    assert (first.total, first.void) == (Count(events=3, token_events=2), Count(events=2, token_events=1))
    assert (second.reason, second.began_seconds, second.seconds) == ("worker_lost", 15.5, 5.0)
    assert second.void == Count()


def test_who_closes_a_run_makes_no_attempt_but_ends_the_last_one() -> None:
    got = taken(
        [START, attempt("520-1", 1, "started"), attempt("8520-1", 1, "cancelled"), event("8520-2", "cancelled")],
        status="cancelled",
        finished_at=after(8.5),
    )
    [only] = got.attempts
    assert (only.reason, only.seconds) == ("started", 8.0)
    assert only.total == Count(events=1)


def test_a_run_that_was_cancelled_in_the_queue_has_no_attempt_of_a_worker() -> None:
    got = taken(
        [START, attempt("3000-1", 0, "cancelled"), event("3000-2", "cancelled")],
        status="cancelled",
        attempt=0,
        started_at=None,
        finished_at=after(3),
    )
    assert got.attempts == ()
    assert (got.queued_seconds, got.running_seconds) == (3.0, 0.0)
    assert got.total == Count(events=2)


def test_a_run_that_waits_has_waited_until_now() -> None:
    got = taken([START], now=7, status="queued", started_at=None, finished_at=None)
    assert (got.queued_seconds, got.running_seconds, got.attempts) == (7.0, 0.0, ())


def test_a_run_that_runs_has_run_until_now() -> None:
    got = taken([START, attempt("520-1", 1, "started")], now=7.5, status="running", finished_at=None)
    assert got.running_seconds == 7.0
    assert got.attempts[0].seconds == 7.0


def test_clocks_that_disagree_make_no_time_negative() -> None:
    got = taken([START, attempt("1-1", 1, "started")], now=-5, status="running", finished_at=None)
    assert got.running_seconds == 0.0
    assert got.attempts[0].seconds == 0.0
