"""The calls of the native API as requests and what their answers mean, and when to send one again. No I/O."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, NamedTuple, TypedDict, TypeVar, Unpack

from pydantic import BaseModel

from broker.client.backoff import Backoff
from broker.client.errors import Unreachable, error_of, not_a_broker
from broker.client.models import Accepted, EventPage, Run, RunPage
from broker.client.tail import AWAY, retry_after
from broker.errors import Invalid, RunNotFound
from broker.events import dumps
from broker.ids import REQUEST_ID

API = "/api/v1"
LONG_POLL_SECONDS = 25.0
"""How long one poll is held: proxies cut a silent answer after 30 or 60 s."""
POLL_PAUSE_SECONDS = 0.5
"""Between polls that were not held as long as they could have been."""
PAGE = 100
MAX_PAGE = 500
REPEAT_SECONDS = 50.0
"""How long a submit is repeated: it joins a run that completed in the last 60 s (PROTOCOL 3.5)."""
_KEY = re.compile(r"[\x21-\x7e]{1,255}")

T = TypeVar("T")
M = TypeVar("M", bound=BaseModel)


class Answer(NamedTuple):
    status: int
    headers: Mapping[str, str]
    """Names in lower case."""
    body: bytes


@dataclass(frozen=True, kw_only=True)
class Call(Generic[T]):
    """A request, and `read`, which takes the answer if it succeeded."""

    method: str
    path: str
    read: Callable[[Answer], T]
    params: Mapping[str, str] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    content: bytes | None = None
    held: float = 0.0
    """How long the service may hold the answer, in seconds."""
    patience: float | None = None
    """For how long it is tried, where that is less than the client's patience."""
    erases: bool = False
    """Whether a repeat that finds nothing has succeeded."""


class Submission(TypedDict, total=False):
    """What a submit may say beside its query; None says nothing."""

    agent: str | None
    """Which one; else the service's default."""
    session_id: str | None
    """Its earlier runs are the history of this one; else a new session."""
    parameters: Mapping[str, Any] | None
    """The agent's own."""
    metadata: Mapping[str, Any] | None
    """Yours: kept with the run, and shown with it."""
    cancel_if_unwatched: float | None
    """The run is cancelled when nobody has watched its stream for so many seconds."""
    idempotency_key: str | None
    """One run for all submits that have it; 1 to 255 visible ASCII characters."""


def submit(query: str, **given: Unpack[Submission]) -> Call[Accepted]:
    """Raises Invalid for what JSON cannot carry, TypeError for a keyword that Submission has not got."""
    if unknown := given.keys() - Submission.__annotations__.keys():
        raise TypeError(f"submit() got an unexpected keyword argument {min(unknown)!r}")
    idempotency_key = given.pop("idempotency_key", None)
    fields = {"query": query, **given}
    try:
        content = dumps({name: value for name, value in fields.items() if value is not None}).encode("ascii")
    except (TypeError, ValueError, RecursionError) as error:
        raise Invalid(f"This cannot be sent as JSON: {error}") from None
    headers = {"Content-Type": "application/json"}
    if idempotency_key is not None:
        if not _KEY.fullmatch(idempotency_key):
            raise Invalid("An idempotency key has 1 to 255 visible ASCII characters.")
        headers["Idempotency-Key"] = idempotency_key
    return Call(
        method="POST",
        path=f"{API}/query",
        read=_accepted,
        content=content,
        headers=headers,
        patience=REPEAT_SECONDS if idempotency_key is None else None,
    )


def _accepted(answer: Answer) -> Accepted:
    return _model(Accepted, answer, joined=answer.status == 200)


def poll(request_id: str, wait: float = 0.0) -> Call[Run]:
    """`wait` is at most LONG_POLL_SECONDS."""
    return Call(
        method="GET",
        path=run_path(request_id),
        read=lambda answer: _model(Run, answer),
        params={"wait": f"{wait:.3f}"} if wait > 0 else {},
        held=wait,
    )


def cancel(request_id: str) -> Call[Run]:
    return Call(method="POST", path=f"{run_path(request_id)}/cancel", read=lambda answer: _model(Run, answer))


def delete(request_id: str) -> Call[None]:
    return Call(method="DELETE", path=run_path(request_id), read=lambda _: None, erases=True)


def runs(
    cursor: str | None, limit: int, *, session_id: str | None, status: str | None, subject: str | None
) -> Call[RunPage]:
    """Raises Invalid for what no URL can carry."""
    params = {"limit": str(limit), "cursor": cursor, "session_id": session_id, "status": status, "subject": subject}
    given = {name: value for name, value in params.items() if value is not None}
    for name, value in given.items():
        if any("\ud800" <= character <= "\udfff" for character in value):
            raise Invalid(f"{name} has a lone surrogate, which no URL can carry.")
    return Call(method="GET", path=f"{API}/runs", read=lambda answer: _model(RunPage, answer), params=given)


def events(request_id: str, cursor: str | None) -> Call[EventPage]:
    return Call(
        method="GET",
        path=f"{run_path(request_id)}/events",
        read=lambda answer: _model(EventPage, answer),
        params={"limit": str(MAX_PAGE)} | ({"cursor": cursor} if cursor is not None else {}),
    )


def run_path(request_id: str) -> str:
    """Raises RunNotFound for what cannot be a run's name, and could lead elsewhere."""
    if not REQUEST_ID.fullmatch(request_id):
        raise RunNotFound(f"There is no run {request_id!r}: a request_id has 32 digits, 0-9 and a-f.")
    return f"{API}/runs/{request_id}"


def _model(model: type[M], answer: Answer, **more: Any) -> M:
    try:
        return model.model_validate(json.loads(answer.body) | more)
    except (ValueError, TypeError, RecursionError):
        raise not_a_broker(answer.status, f"no {model.__name__} of a broker") from None


def page_size(left: int | None) -> int:
    """Rows to ask for where `left` are wanted."""
    return PAGE if left is None else min(left, MAX_PAGE)


class Polls:
    """Polls until a run has ended, or until `wait` seconds are over."""

    def __init__(self, wait: float | None, now: float) -> None:
        self._until = None if wait is None else now + wait
        self._asked = now
        self._held = 0.0

    def hold(self, now: float) -> float:
        """For how long the next poll is to be held."""
        self._asked = now
        left = LONG_POLL_SECONDS if self._until is None else self._until - now
        self._held = min(max(left, 0.0), LONG_POLL_SECONDS)
        return self._held

    def pause(self, run: Run, now: float) -> float | None:
        """Seconds before the next poll; None where there is none: `run` is it."""
        if run.finished or (self._until is not None and now >= self._until):
            return None
        # A gateway that drains answers at once, and the next one perhaps too.
        early = now - self._asked < self._held / 2
        return min(POLL_PAUSE_SECONDS, max(self._held, 0.0)) if early else 0.0


class Tries(Generic[T]):
    """One call, as often as it has to be sent: `failed()` and `answered()` say how long to wait before it is sent
    again.

    All calls may be repeated. A submit that does not know whether it was received says with `x-stainless-retry-count`
    that it is a repeat: then it also joins the run that the first one has started where that has completed meanwhile
    (PROTOCOL 3.5). An Idempotency-Key of the client's own would do the same, but then the same query of another client
    would not join the run.
    """

    def __init__(self, call: Call[T], url: str, backoff: Backoff) -> None:
        self.call = call
        self._url = url
        self._backoff = backoff
        self._repeats = 0
        self._maybe_received = False

    def headers(self) -> dict[str, str]:
        """Of the next request."""
        repeat = {"x-stainless-retry-count": str(self._repeats)} if self._maybe_received else {}
        return {**self.call.headers, "Accept": "application/json", **repeat}

    def failed(self, cause: str, now: float, *, sent: bool) -> float:
        """There was no answer. `sent`: the request may have been received. Raises Unreachable."""
        pause = self._again(now, sent=sent)
        if pause is None:
            raise Unreachable(self._url, cause)
        return pause

    def answered(self, answer: Answer, now: float) -> float | None:
        """None: it is done, and `result()` has what it means."""
        self._backoff.answered()
        if answer.status not in AWAY:
            return None
        return self._again(now, sent=True, at_least=retry_after(answer.headers))

    def result(self, answer: Answer) -> T:
        """Raises the error that the answer means."""
        if answer.status == 404 and self.call.erases and self._maybe_received:
            return self.call.read(answer)
        if not 200 <= answer.status < 300:
            raise error_of(answer.status, answer.headers, answer.body)
        return self.call.read(answer)

    def _again(self, now: float, *, sent: bool, at_least: float = 0.0) -> float | None:
        self._repeats += 1
        self._maybe_received = self._maybe_received or sent
        return self._backoff.pause(now, at_least=at_least)
