"""What goes wrong with a model server, as the codes that clients see: docs/agents.md has their table."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from typing import Any

from worker.models.model import ModelError

RETRIED = frozenset({"model_rate_limited", "model_unavailable", "model_broken", "model_stalled", "model_empty"})
"""Asking again may help; the others fail in the same way each time."""
QUOTED_CHARS = 300
SECRET_CHARS = 8
"""A shorter key is none that was drawn at random; hidden, it would garble every message that has the word."""

_TOO_LONG = re.compile(
    r"context[ _](length|size|window)|maximum context|(prompt|input)( is)? too long|too many (input )?tokens", re.I
)
_TOO_LONG_CODES = frozenset({"context_length_exceeded", "exceed_context_size_error", "string_above_max_length"})
_FILTERED_CODES = frozenset({"content_filter", "content_policy_violation", "bio_policy", "invalid_prompt"})


class Failed(ModelError):
    """A ModelError of which is known whether asking again may help, and after how many seconds the server wants it."""

    def __init__(self, code: str, message: str, *, retry: bool | None = None, after: float | None = None) -> None:
        super().__init__(code, message)
        self.retry = code in RETRIED if retry is None else retry
        self.after = after


class NoSuchApi(Exception):
    """The server has no Responses. What it said instead, for the log."""

    def __init__(self, status: int, content_type: str) -> None:
        super().__init__(f"{status} {content_type}")
        self.status = status
        self.content_type = content_type


def broken(words: str = "") -> Failed:
    return Failed("model_broken", _quoting("The model server broke off in the middle of its answer", words))


def filtered(words: str = "") -> Failed:
    return Failed("model_content_filter", _quoting("The model server's content filter withheld the answer", words))


def refused(words: str) -> Failed:
    return Failed("model_content_filter", _quoting("The model refused to answer", words))


def empty(reason: str) -> Failed:
    if reason == "length":
        hint = "The model used up its tokens before the answer began: raise max_tokens."
        return Failed("model_empty", hint, retry=False)
    return Failed("model_empty", "The model gave an empty answer.")


def unreachable() -> Failed:
    return Failed("model_unavailable", "The model server cannot be reached.")


def stalled(seconds: float) -> Failed:
    return Failed("model_stalled", f"The model server sent nothing for {seconds:g} seconds.")


def of_status(status: int, body: Any, headers: Mapping[str, str], *, model: str) -> Failed:
    """An HTTP error. `body` is what the server said: the `error` object, other JSON, text or nothing."""
    code, words = _code(body), words_of(body)
    if status in (401, 403):
        return Failed("model_unauthorized", f"The model server refused our key ({status}): see OPENAI_API_KEY.")
    if status == 429:
        quota = "insufficient_quota" in (code, _type(body))
        said = _quoting("The model server has had too many requests", words)
        return Failed("model_rate_limited", said, retry=not quota, after=retry_after(headers))
    if status >= 500 or status == 408:
        return Failed("model_unavailable", f"The model server failed with status {status}.", after=retry_after(headers))
    if status == 413 or _is_too_long(code, _type(body), words):
        return _too_long(words)
    if code in _FILTERED_CODES:
        return filtered(words)
    if status == 404 and is_about_the_model(body):
        return Failed("model_not_found", f"The model server has no model {model!r}.")
    hint = " Does OPENAI_BASE_URL end with /v1?" if status == 404 else ""
    return Failed(
        "model_refused_request", _quoting(f"The model server refused the request with status {status}", words) + hint
    )


def of_object(error: Any, *, model: str) -> Failed:
    """An error inside a stream, which has no status, or only one in its `code`."""
    code, words = _code(error), words_of(error)
    if re.fullmatch("[45][0-9][0-9]", code):
        return of_status(int(code), error, {}, model=model)
    if _is_too_long(code, _type(error), words):
        return _too_long(words)
    if code in _FILTERED_CODES:
        return filtered(words)
    if code == "model_not_found":
        return Failed("model_not_found", f"The model server has no model {model!r}.")
    if code.startswith("rate_limit"):
        return Failed("model_rate_limited", _quoting("The model server has had too many requests", words))
    return broken(words)


def redacted(text: str, key: str | None) -> str:
    """Servers may repeat the key in what they say. One that is a mere word, as for a server of one's own, stays."""
    return text.replace(key, "…") if key and len(key) >= SECRET_CHARS else text


def is_about_the_model(body: Any) -> bool:
    """Whether a 404 is for the model, and not for the path."""
    return _code(body) == "model_not_found" or re.search(r"\bmodel\b", words_of(body), re.I) is not None


def words_of(body: Any) -> str:
    """What the server says in its error, whichever form it has."""
    if isinstance(body, dict):
        body = body.get("message") or body.get("detail") or body.get("error") or ""
    return words_of(body) if isinstance(body, dict) else str(body or "")


def retry_after(headers: Mapping[str, str], now: float | None = None) -> float | None:
    """In seconds, from either form of the header, or OpenAI's own; None where there is none, or it cannot be read."""
    value, exact = headers.get("retry-after", "").strip(), headers.get("retry-after-ms", "").strip()
    if not value and not exact:
        return None
    try:
        seconds = float(exact) / 1000 if exact else float(value)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(value).timestamp() - (time.time() if now is None else now)
        except (ValueError, OverflowError):
            return None
    return max(seconds, 0.0) if math.isfinite(seconds) else None


def _too_long(words: str) -> Failed:
    return Failed("model_context_too_long", _quoting("The conversation is too long for the model", words))


def _is_too_long(code: str, kind: str, words: str) -> bool:
    return code in _TOO_LONG_CODES or kind in _TOO_LONG_CODES or _TOO_LONG.search(words) is not None


def _code(body: Any) -> str:
    return str(body.get("code") or "") if isinstance(body, dict) else ""


def _type(body: Any) -> str:
    return str(body.get("type") or "") if isinstance(body, dict) else ""


def _quoting(sentence: str, words: str) -> str:
    words = " ".join(words.split())
    if len(words) > QUOTED_CHARS:
        words = words[: QUOTED_CHARS - 1] + "…"
    return f"{sentence}: {words}" if words else f"{sentence}."
