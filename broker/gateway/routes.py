"""What a route is: a row of the table from which the application and OpenAPI are made."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Literal

from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from broker.errors import BrokerError
from broker.gateway.api import Problem
from broker.gateway.auth import Authenticator, Principal
from broker.gateway.hub import Hub
from broker.gateway.problems import problem
from broker.gateway.tickets import Tickets
from broker.runs.store import Runs
from broker.settings import Settings

Asgi = Callable[[Scope, Receive, Send], Awaitable[None]]
Endpoint = Callable[[Request, Principal], Awaitable[Asgi]]
EVENT_STREAM = "text/event-stream"


Answer = type[BaseModel] | str | None
"""A model, EVENT_STREAM, "json", "text", "html", or None for no body."""


@dataclass(frozen=True, kw_only=True)
class Route:
    """One row of the table. `answers` are by status; several are what the request chooses from."""

    method: str
    path: str
    endpoint: Endpoint
    summary: str
    answers: Mapping[int, Answer | tuple[Answer, ...]]
    body: type[BaseModel] | None = None
    parameters: tuple[str, ...] = ()
    public: bool = False
    query_token: bool = False
    """Whether `?access_token=` is taken too, where BROKER_QUERY_TOKEN allows it."""
    ticket: bool = False
    """Whether a `?ticket=` for the run in the path is taken instead of a token."""
    problem: Callable[[BrokerError], Response] = problem
    """How its clients are told of an error."""
    problem_body: type[BaseModel] | Literal["text"] = Problem
    """What `problem` answers with."""


@dataclass
class Gateway:
    """Everything that the endpoints use; made once, in app.py."""

    settings: Settings
    runs: Runs
    hub: Hub
    authenticate: Authenticator
    tickets: Tickets
    unready: bool = False
    """Whether it drains: it still accepts, but load balancers shall leave it out."""


def json_response(body: BaseModel, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """ASCII JSON by `json`: pydantic's own fails on lone surrogates. Times are RFC 3339, UTC."""
    text = json.dumps(body.model_dump(), separators=(",", ":"), allow_nan=False, default=_rfc3339)
    return Response(text, status, headers, "application/json")


def _rfc3339(value: datetime) -> str:
    return value.isoformat(timespec="milliseconds").replace("+00:00", "Z")
