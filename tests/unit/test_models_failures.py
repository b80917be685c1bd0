"""Each failure of a model server has its code, and whether asking again may help."""

from __future__ import annotations

import time
from email.utils import formatdate
from typing import Any

import pytest

from worker.models import failures


def error(message: str = "", code: Any = None, kind: str = "") -> dict[str, Any]:
    return {"message": message, "type": kind, "param": None, "code": code}


OF_STATUS = [
    (401, error("Incorrect API key provided: sk-1", "invalid_api_key"), "model_unauthorized", False),
    (403, None, "model_unauthorized", False),
    (404, error("The model `m` does not exist", "model_not_found"), "model_not_found", False),
    (404, error("model 'm' not found, try pulling it first", None, "api_error"), "model_not_found", False),
    (404, {"detail": "Not Found"}, "model_refused_request", False),
    (404, "404 page not found", "model_refused_request", False),
    (429, error("Slow down", "rate_limit_exceeded"), "model_rate_limited", True),
    (429, error("Pay", "insufficient_quota", "insufficient_quota"), "model_rate_limited", False),
    (408, None, "model_unavailable", True),
    (500, error("oh"), "model_unavailable", True),
    (502, "<html>", "model_unavailable", True),
    (503, None, "model_unavailable", True),
    (400, error("too long", "context_length_exceeded"), "model_context_too_long", False),
    (400, error("This model's maximum context length is 4096 tokens."), "model_context_too_long", False),
    (400, error("the request exceeds the available context size", 400), "model_context_too_long", False),
    (400, error("x", 400, "exceed_context_size_error"), "model_context_too_long", False),
    (413, "too large", "model_context_too_long", False),
    (400, error("The response was filtered", "content_filter"), "model_content_filter", False),
    (400, error("temperature must be below 2"), "model_refused_request", False),
    (422, {"detail": [{"msg": "bad"}]}, "model_refused_request", False),
]


@pytest.mark.parametrize(("status", "body", "code", "retry"), OF_STATUS)
def test_a_status_has_its_code(status: int, body: Any, code: str, retry: bool) -> None:
    failed = failures.of_status(status, body, {}, model="m")
    assert (failed.code, failed.retry) == (code, retry)


def test_a_refused_key_is_not_repeated() -> None:
    failed = failures.of_status(401, error("Incorrect API key provided: sk-secret"), {}, model="m")
    assert "sk-secret" not in str(failed)


def test_a_refused_request_quotes_the_server_and_cuts_it() -> None:
    failed = failures.of_status(400, error("temperature   must be low " + "x" * 1000), {}, model="m")
    assert "temperature must be low" in str(failed)
    assert len(str(failed)) < 400


def test_a_404_of_the_path_says_what_to_look_at() -> None:
    assert "OPENAI_BASE_URL" in str(failures.of_status(404, "404 page not found", {}, model="m"))


@pytest.mark.parametrize(
    ("body", "code", "retry"),
    [
        (error("boom", "server_error"), "model_broken", True),
        (error("boom", 503), "model_unavailable", True),
        (error("boom", 429), "model_rate_limited", True),
        (error("slow", "rate_limit_exceeded"), "model_rate_limited", True),
        (error("context length is 5", None), "model_context_too_long", False),
        (error("no", "content_filter"), "model_content_filter", False),
        (error("no", "model_not_found"), "model_not_found", False),
        ("just words", "model_broken", True),
        (None, "model_broken", True),
    ],
)
def test_an_error_inside_a_stream_has_its_code(body: Any, code: str, retry: bool) -> None:
    failed = failures.of_object(body, model="m")
    assert (failed.code, failed.retry) == (code, retry)


@pytest.mark.parametrize(
    ("value", "seconds"),
    [("2", 2.0), ("0.5", 0.5), ("-3", 0.0), ("", None), ("soon", None), ("nan", None), ("inf", None)],
)
def test_retry_after_in_seconds(value: str, seconds: float | None) -> None:
    assert failures.retry_after({"retry-after": value}) == seconds


def test_retry_after_as_a_date() -> None:
    now = float(int(time.time()))
    assert failures.retry_after({"retry-after": formatdate(now + 7, usegmt=True)}, now) == 7
    assert failures.retry_after({"retry-after": formatdate(now - 7, usegmt=True)}, now) == 0


def test_retry_after_in_milliseconds_is_the_more_exact_one() -> None:
    assert failures.retry_after({"retry-after": "1", "retry-after-ms": "250"}) == 0.25


def test_a_rate_limit_knows_how_long() -> None:
    assert failures.of_status(429, None, {"retry-after": "3"}, model="m").after == 3
