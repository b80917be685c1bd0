"""The clients' calls: what is sent, when it is sent again, and what an answer means."""

from __future__ import annotations

import json
import math
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker import errors
from broker.client import AsyncClient, Client, calls
from broker.client.backoff import FIRST_CONTACT_SECONDS, Backoff
from broker.client.calls import LONG_POLL_SECONDS, Answer, Call, Polls, Tries
from broker.client.errors import ApiError, Unreachable, error_of
from broker.client.models import Accepted, Run
from broker.client.site import DEFAULT_URL, site
from broker.errors import BrokerError, Invalid, Misconfigured, RunNotFound, Unavailable
from broker.ids import EventId

RID = "ab" * 16
RUN: dict[str, Any] = {
    "request_id": RID,
    "session_id": "s",
    "status": "running",
    "agent": "echo",
    "attempt": 1,
    "created_at": "2026-01-02T03:04:05.678Z",
    "started_at": "2026-01-02T03:04:06.000Z",
    "finished_at": None,
    "last_event_id": "3-4",
    "metadata": {"a": 1},
    "links": {"self": "/a", "stream": "/b", "events": "/c", "cancel": "/d", "more": "/e"},
    "answer": "so far",
    "citations": [],
    "usage": {},
    "error": None,
    "cost": 12,
}
ENDED = {**RUN, "status": "failed", "finished_at": "2026-01-02T03:04:07Z", "error": {"code": "x", "message": "y"}}


def answer(body: object, status: int = 200, **headers: str) -> Answer:
    return Answer(status, {name.replace("_", "-"): text for name, text in headers.items()}, json.dumps(body).encode())


def problem(code: str, status: int, detail: str = "Because.") -> Answer:
    return answer({"code": code, "detail": detail, "status": status, "title": "", "type": "about:blank"}, status)


def backoff(patience: float = 60, *, known: bool = True, chance: float = 0.5) -> Backoff:
    return Backoff(patience=patience, longest=15, known=known, chance=lambda: chance)


def submit(**fields: Any) -> Call[Accepted]:
    """What is not given is given as None."""
    names = ("agent", "session_id", "parameters", "metadata", "cancel_if_unwatched", "idempotency_key")
    return calls.submit("why?", **{**dict.fromkeys(names), **fields})


# -- back-off --------------------------------------------------------------------------------------------------


@given(
    st.lists(st.floats(0, 1, exclude_max=True), min_size=1, max_size=40), st.floats(0.001, 100), st.floats(0.001, 100)
)
def test_a_pause_is_at_random_up_to_a_limit_that_doubles(chances: list[float], base: float, longest: float) -> None:
    drawn = iter(chances)
    pauses = Backoff(patience=math.inf, longest=longest, known=True, chance=lambda: next(drawn))
    pauses.base = base
    for n, chance in enumerate(chances):
        assert pauses.pause(0) == pytest.approx(chance * min(base * 2.0 ** min(n, 16), longest))


def test_a_success_begins_the_doubling_and_the_patience_anew() -> None:
    pauses = backoff(10)
    assert [pauses.pause(now) for now in (0, 1, 2)] == [0.5, 1, 2]
    pauses.succeeded()
    assert [pauses.pause(now) for now in (100, 109.9, 110)] == [0.5, pytest.approx(0.1), None]


def test_a_service_that_has_never_answered_is_given_up_soon() -> None:
    first = backoff(known=False)
    assert first.pause(0) is not None
    assert first.pause(FIRST_CONTACT_SECONDS) is None
    first.succeeded()
    assert first.pause(0) is not None
    assert first.pause(FIRST_CONTACT_SECONDS) is not None


def test_a_service_that_says_come_again_is_there() -> None:
    pauses = backoff(known=False)
    tries = Tries(calls.poll(RID), "", pauses)
    assert tries.answered(problem("draining", 503), 0) is not None
    assert tries.answered(problem("draining", 503), FIRST_CONTACT_SECONDS + 1) is not None


def test_what_the_service_asks_for_is_the_least_but_never_more_than_the_longest_pause() -> None:
    assert backoff().pause(0, at_least=7) == 7
    assert backoff().pause(0, at_least=3600) == 15


# -- submits ---------------------------------------------------------------------------------------------------


def test_a_submit_sends_what_was_given_and_nothing_else() -> None:
    assert submit() == calls.submit("why?")
    assert json.loads(submit().content or b"") == {"query": "why?"}
    fields = {
        "agent": "echo",
        "session_id": "s",
        "parameters": {"text": "\ud800é\u2028"},
        "metadata": {},
        "cancel_if_unwatched": 30.0,
    }
    call = submit(**fields, idempotency_key="k")
    assert call.content is not None and call.content.isascii()
    assert json.loads(call.content) == {"query": "why?", **fields}
    assert call.headers == {"Content-Type": "application/json", "Idempotency-Key": "k"}


def test_a_keyword_that_a_submit_has_not_got_is_refused() -> None:
    with pytest.raises(TypeError, match="'sesion_id'"):
        submit(sesion_id="s")


def nested(depth: int) -> dict[str, Any]:
    value: dict[str, Any] = {}
    for _ in range(depth):
        value = {"x": value}
    return value


@pytest.mark.parametrize(
    "fields", [{"parameters": {"x": math.nan}}, {"metadata": {"x": object()}}, {"parameters": nested(100_000)}]
)
def test_what_json_cannot_carry_is_refused_before_it_is_sent(fields: dict[str, Any]) -> None:
    with pytest.raises(Invalid, match="JSON"):
        submit(**fields)


@pytest.mark.parametrize("key", ["", "a b", "é", "a\nX-Other: b", "x" * 256])
def test_a_key_that_no_header_can_carry_is_refused(key: str) -> None:
    with pytest.raises(Invalid, match="idempotency key"):
        submit(idempotency_key=key)


def test_the_status_says_whether_a_run_was_joined() -> None:
    body = {"request_id": RID, "session_id": "s", "status": "queued", "links": {}}
    for status, joined in ((202, False), (200, True)):
        accepted = submit().read(answer(body, status))
        assert accepted == Accepted(request_id=RID, session_id="s", status="queued", joined=joined)


def test_a_submit_says_that_it_is_a_repeat_only_where_the_first_may_have_arrived() -> None:
    """A repeat also joins a run that ended a moment ago (PROTOCOL 3.5): what was never sent asks for a new one."""
    tries = Tries(submit(), "", backoff())
    header = "x-stainless-retry-count"
    assert header not in tries.headers()
    tries.failed("refused", 0, sent=False)
    assert header not in tries.headers()
    tries.failed("reset", 1, sent=True)
    assert tries.headers()[header] == "2"
    tries.failed("refused", 2, sent=False)
    assert tries.headers()[header] == "3"
    assert "Idempotency-Key" not in tries.headers(), "the same query of another client would not join"


def test_an_answer_that_the_service_is_away_is_a_reason_to_come_again() -> None:
    tries = Tries(submit(), "", backoff(10))
    for status in (408, 429, 502, 503, 504):
        assert tries.answered(answer({}, status, retry_after="0"), 0) is not None
    assert tries.headers()["x-stainless-retry-count"] == "5"
    away = problem("unavailable", 503)
    assert tries.answered(away, 11) is None
    with pytest.raises(Unavailable):
        tries.result(away)


def test_a_submit_without_a_key_is_not_repeated_for_longer_than_it_would_be_joined() -> None:
    assert (submit().patience or math.inf) < 60
    assert submit(idempotency_key="k").patience is None


@pytest.mark.parametrize("status", [400, 401, 403, 404, 413, 415, 422, 500, 501])
def test_other_answers_are_not_asked_for_again(status: int) -> None:
    assert Tries(submit(), "", backoff()).answered(answer({}, status), 0) is None


def test_where_nothing_answers_the_url_and_the_cause_are_told() -> None:
    tries = Tries(submit(), "http://nowhere:1", backoff(0))
    with pytest.raises(Unreachable, match="http://nowhere:1 does not answer: refused") as unreachable:
        tries.failed("refused", 0, sent=False)
    assert (unreachable.value.url, unreachable.value.cause) == ("http://nowhere:1", "refused")
    assert unreachable.value.code == "unreachable"


def test_a_repeated_erasure_that_finds_nothing_has_succeeded() -> None:
    missing = problem("run_not_found", 404)
    with pytest.raises(RunNotFound):
        Tries(calls.delete(RID), "", backoff()).result(missing)
    tries = Tries(calls.delete(RID), "", backoff())
    tries.failed("refused", 0, sent=False)
    with pytest.raises(RunNotFound):
        tries.result(missing)
    tries.failed("reset", 0, sent=True)
    assert tries.result(missing) is None


# -- answers ---------------------------------------------------------------------------------------------------


def test_a_run_is_typed_and_has_no_more_than_this_version_knows() -> None:
    run = calls.poll(RID).read(answer(RUN))
    assert run.created_at == datetime(2026, 1, 2, 3, 4, 5, 678000, UTC)
    assert (run.finished_at, run.finished, run.metadata, run.error) == (None, False, {"a": 1}, None)
    ended = calls.poll(RID).read(answer(ENDED))
    assert ended.finished
    assert ended.error is not None and (ended.error.code, ended.error.message) == ("x", "y")


@pytest.mark.parametrize("body", [b"<html>", b"[]", b"null", b'{"request_id": 1}', b"", b"\xff", b"[" * 200_000])
def test_a_success_that_is_no_run_is_not_a_broker(body: bytes) -> None:
    with pytest.raises(ApiError, match="URL of a broker") as refused:
        calls.poll(RID).read(Answer(200, {}, body))
    assert refused.value.code == "not_a_broker"


def test_ids_are_event_ids_and_in_json_their_text() -> None:
    got = calls.poll(RID).read(answer(RUN))
    row = {"id": "10-2", "type": "token", "data": {"text": "x"}, "void": False}
    [event] = calls.events(RID, None).read(answer({"events": [row], "next": None})).events
    assert (got.last_event_id, event.id) == (EventId(3, 4), EventId(10, 2))
    assert event.id > got.last_event_id
    assert (got.model_dump(mode="json")["last_event_id"], event.model_dump(mode="json")) == ("3-4", row)
    assert json.loads(got.model_dump_json())["last_event_id"] == "3-4"


@pytest.mark.parametrize("event_id", ["", "3", "3-x", 3, None, ["3-4"]])
def test_an_answer_whose_ids_are_none_is_not_a_broker_s(event_id: object) -> None:
    with pytest.raises(ApiError, match="no Run of a broker"):
        calls.poll(RID).read(answer({**RUN, "last_event_id": event_id}))


KNOWN = [
    cls
    for cls in vars(errors).values()
    if isinstance(cls, type) and issubclass(cls, BrokerError) and cls not in (BrokerError, Misconfigured)
]


@pytest.mark.parametrize("cls", KNOWN)
def test_each_code_of_the_service_is_its_class(cls: type[BrokerError]) -> None:
    error = error_of(400, {}, problem(cls.code, 400, "What is wrong.").body)
    assert type(error) is cls
    assert str(error) == error.detail == "What is wrong."


def test_the_fields_that_are_wrong_are_named() -> None:
    fields = [{"field": "agent", "message": "Unknown"}]
    error = error_of(422, {}, json.dumps({"code": "invalid", "detail": "x", "errors": fields}).encode())
    assert error.errors == fields


def test_a_code_that_has_no_class_is_an_api_error_with_all_that_was_told() -> None:
    error = error_of(429, {"x-request-id": "r"}, problem("too_many_runs", 429).body)
    assert isinstance(error, ApiError)
    assert (error.code, error.status, error.detail, error.log_id) == ("too_many_runs", 429, "Because.", "r")
    assert isinstance(error_of(500, {}, problem("internal", 500).body), ApiError)


@pytest.mark.parametrize(
    ("status", "code"),
    [
        (401, "unauthorized"),
        (403, "forbidden"),
        (502, "unavailable"),
        (404, "http_404"),
        (302, "http_302"),
        (999, "http_999"),
    ],
)
@pytest.mark.parametrize(
    "body", [b"<html>Bad</html>", b"", b"[]", b'{"code": 5}', b'{"detail": "only"}', b"\xff", b"[" * 99_999]
)
def test_an_answer_of_somebody_else_is_an_error_by_its_status(status: int, code: str, body: bytes) -> None:
    error = error_of(status, {}, body)
    assert error.code == code
    assert str(status) in error.detail


@pytest.mark.parametrize("name", ["", "x", "../../x?y#z", RID.upper(), RID + "\n", RID[:-1]])
def test_what_cannot_be_a_runs_name_is_not_sent(name: str) -> None:
    for call in (calls.poll, calls.cancel, calls.delete):
        with pytest.raises(RunNotFound, match="32 digits"):
            call(name)
    assert calls.run_path(RID) == f"/api/v1/runs/{RID}"


def test_a_name_that_no_url_can_carry_is_refused() -> None:
    with pytest.raises(Invalid, match="session_id"):
        calls.runs(None, 1, session_id="\ud800", status=None, subject=None)


# -- polls -----------------------------------------------------------------------------------------------------


def run(body: dict[str, Any] = RUN) -> Run:
    return calls.poll(RID).read(answer(body))


def test_a_poll_without_a_limit_is_held_again_and_again_until_the_run_ends() -> None:
    polls = Polls(None, 0)
    for now in (0.0, 25.0, 50.0):
        assert polls.hold(now) == LONG_POLL_SECONDS
        assert polls.pause(run(), now + LONG_POLL_SECONDS) == 0
    assert polls.pause(run(ENDED), 60) is None


def test_a_poll_with_a_limit_returns_the_run_as_it_is_then() -> None:
    polls = Polls(30, 100)
    assert polls.hold(100) == LONG_POLL_SECONDS
    assert polls.pause(run(), 125) == 0
    assert polls.hold(125) == 5
    assert polls.pause(run(), 130) is None


def test_a_poll_for_now_asks_once_and_is_not_held() -> None:
    polls = Polls(0, 5)
    assert polls.hold(5) == 0
    assert calls.poll(RID, 0).params == {}
    assert polls.pause(run(), 5) is None


def test_answers_that_come_at_once_do_not_become_a_storm() -> None:
    polls = Polls(None, 0)
    polls.hold(0)
    assert (polls.pause(run(), 0.01) or 0) > 0.1


# -- where and who ---------------------------------------------------------------------------------------------


def make(url: str | None = None, token: Any = None) -> Any:
    return site(url, token, timeout=1, patience=1, longest_pause=1)


def test_url_and_token_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("BROKER_URL", "BROKER_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    assert make().url == DEFAULT_URL
    assert "Authorization" not in make().headers()
    monkeypatch.setenv("BROKER_URL", "https://broker.example/base/")
    monkeypatch.setenv("BROKER_TOKEN", "a.b.c\n")
    assert make().url == "https://broker.example/base"
    assert make().headers()["Authorization"] == "Bearer a.b.c"
    assert make("http://other:1", "x").headers()["Authorization"] == "Bearer x"
    assert make("http://other:1").url == "http://other:1"


@pytest.mark.parametrize(
    "url",
    [
        "",
        "broker",
        "localhost:8000",
        "ftp://a",
        "http://",
        "http://a:x",
        "http://a:99999",
        "http://u:p@a",
        "ftp://u:p@a",
        "u:p@a",
        "http://u:p/a@b",
        "http://a?b",
        "http://a#b",
        "http://[::",
    ],
)
def test_what_is_no_url_of_a_service_is_refused(url: str) -> None:
    with pytest.raises(Misconfigured, match="BROKER_URL") as refused:
        make(url)
    assert "u:p" not in str(refused.value)


@pytest.mark.parametrize("url", ["http://a..b", "http://ä..b", "http://[v1.x]", "http://a\x7f", "http://" + "a" * 64])
def test_a_host_that_cannot_be_one_is_refused(url: str) -> None:
    for client in (Client, AsyncClient):
        with pytest.raises(Misconfigured, match="BROKER_URL"):
            client(url)


@pytest.mark.parametrize("token", ["a\nb", "a b", "é", "a\x00"])
def test_a_token_that_no_header_can_carry_is_refused_and_not_told(token: str) -> None:
    with pytest.raises(Misconfigured, match="BROKER_TOKEN") as refused:
        make(None, token).headers()
    assert token not in str(refused.value)


def test_a_token_that_is_a_function_is_asked_for_each_request() -> None:
    tokens = iter(["one", "two"])
    asked = make(None, lambda: next(tokens))
    assert [asked.headers()["Authorization"] for _ in range(2)] == ["Bearer one", "Bearer two"]
