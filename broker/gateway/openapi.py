"""OpenAPI 3.1, made from the table of routes and the pydantic models."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from broker import __version__
from broker.gateway.api import Problem
from broker.gateway.dialects.native.many.cursor import MAX_RUNS
from broker.gateway.problems import MEDIA_TYPE
from broker.gateway.routes import EVENT_STREAM, Answer, Route
from broker.status import STATUSES

_PARAMETERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "Last-Event-ID": ("header", "Continue after this event.", {"type": "string"}),
    "last_event_id": ("query", "The same, for clients that can set no header; the header wins.", {"type": "string"}),
    "lastEventId": ("query", "The same again.", {"type": "string"}),
    "Idempotency-Key": (
        "header",
        "The same key within the retention time is the same run.",
        {"type": "string", "minLength": 1, "maxLength": 255},
    ),
    "stream": ("query", "`true`: as a stream of events.", {"type": "boolean"}),
    "starting_after": ("query", "In a stream, leave out events up to this sequence number.", {"type": "integer"}),
    "startIndex": (
        "query",
        "Continue after so many chunks; a negative number counts from the end.",
        {"type": "integer"},
    ),
    "wait": ("query", "Hold the answer until the run ends, at most this many seconds.", {"type": "number"}),
    "Prefer": ("header", "`wait=N` does the same.", {"type": "string"}),
    "If-None-Match": ("header", "Answer 304 while nothing has changed.", {"type": "string"}),
    "limit": ("query", "Rows in a page.", {"type": "integer", "minimum": 1, "maximum": 500, "default": 50}),
    "cursor": ("query", "`next` of the page before.", {"type": "string"}),
    "session_id": ("query", "Only the runs of this session.", {"type": "string"}),
    "ticket": ("query", "Instead of a token: what POST …/ticket has given out.", {"type": "string"}),
    "run": (
        "query",
        f"A run; repeated for each, at most {MAX_RUNS}. Either these, or `session_id`.",
        {"type": "array", "items": {"type": "string"}, "maxItems": MAX_RUNS},
    ),
    "status": (
        "query",
        "Only the runs that have it now. A page may then be short, or empty, and have a `next`.",
        {"type": "string", "enum": list(STATUSES)},
    ),
    "subject": (
        "query",
        "The runs of this user of your tenant, for a token with the scope `broker:tenant`; to others there are none.",
        {"type": "string"},
    ),
    "prompt": ("query", "What the agent shall do.", {"type": "string", "minLength": 1}),
    "agent": ("query", "One of the configured agents.", {"type": "string"}),
    "session_id of a run": ("query", "Groups runs; made up when absent.", {"type": "string", "maxLength": 255}),
    "parameters": ("query", "The agent's own parameters: a JSON object.", {"type": "string"}),
    "access_token": (
        "query",
        "The token, for clients that can set no header; only where BROKER_QUERY_TOKEN allows it.",
        {"type": "string"},
    ),
}
"""By name, and what tells it from another of that name."""
_DESCRIPTIONS = {
    200: "OK",
    202: "Accepted",
    204: "No content",
    304: "Not modified",
    400: "The request cannot be understood",
    401: "No valid token",
    403: "Not allowed here",
    404: "No such run, or not yours",
    405: "Wrong method",
    409: "The run was cancelled",
    413: "The body is too large",
    415: "The body is not JSON",
    422: "A field is not acceptable",
    500: "Something went wrong in the gateway",
    501: "This service is not set up for that",
    503: "Redis is away, or this gateway is draining; try again",
}
_MEDIA = {EVENT_STREAM: EVENT_STREAM, "json": "application/json", "text": "text/plain", "html": "text/html"}


def document(routes: Iterable[Route]) -> dict[str, Any]:
    """Raises ValueError where two models have one name: one of them would be described as the other."""
    routes = list(routes)
    models = _models(routes)
    _, definitions = models_json_schema(
        [(model, "serialization") for model in models], ref_template="#/components/schemas/{model}"
    )
    paths: dict[str, dict[str, Any]] = {}
    for route in routes:
        paths.setdefault(route.path, {})[route.method.lower()] = _operation(route)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Stream broker",
            "version": __version__,
            "description": "Runs of agents that outlive their connections. Native errors are problem documents.",
        },
        "paths": paths,
        "components": {
            "schemas": definitions["$defs"],
            "securitySchemes": {"bearer": {"type": "http", "scheme": "bearer", "bearerFormat": "JWT"}},
        },
        "security": [{"bearer": []}],
    }


def _models(routes: Iterable[Route]) -> list[type[BaseModel]]:
    models: dict[str, type[BaseModel]] = {Problem.__name__: Problem}
    for route in routes:
        answers = [each for answer in route.answers.values() for each in _choices(answer)]
        for model in (*answers, route.body, route.problem_body):
            if isinstance(model, type) and models.setdefault(model.__name__, model) is not model:
                modules = f"{models[model.__name__].__module__} and {model.__module__}"
                raise ValueError(f"{modules} both have a model {model.__name__}: rename one.")
    return list(models.values())


def _operation(route: Route) -> dict[str, Any]:
    operation: dict[str, Any] = {
        "operationId": re.sub(r"\W+", "_", f"{route.method.lower()}{route.path}").strip("_"),
        "summary": route.summary,
        "parameters": [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
            for name in re.findall(r"{(\w+)}", route.path)
        ]
        + [
            {"name": name.partition(" ")[0], "in": where, "required": False, "description": text, "schema": schema}
            for name, (where, text, schema) in ((name, _PARAMETERS[name]) for name in route.parameters)
        ],
        "responses": {str(status): _response(status, answer) for status, answer in _answers(route).items()},
    }
    if route.body is not None:
        operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": _ref(route.body)}}}
    if route.public:
        operation["security"] = []
    return operation


def _answers(route: Route) -> dict[int, Answer | tuple[Answer, ...]]:
    errors = []
    if not route.public:
        errors += [400, 401, 403, 503]
    if "{request_id}" in route.path:
        errors += [404]
    if route.body is not None:
        errors += [413, 415, 422]
    return {**route.answers, 500: Problem, **dict.fromkeys(sorted(errors), route.problem_body)}


def _response(status: int, answer: Answer | tuple[Answer, ...]) -> dict[str, Any]:
    response: dict[str, Any] = {"description": _DESCRIPTIONS[status]}
    content = dict(_content(each) for each in _choices(answer) if each is not None)
    return {**response, "content": content} if content else response


def _choices(answer: Answer | tuple[Answer, ...]) -> tuple[Answer, ...]:
    return answer if isinstance(answer, tuple) else (answer,)


def _content(answer: type[BaseModel] | str) -> tuple[str, dict[str, Any]]:
    """A media type, and what it has."""
    if isinstance(answer, str):
        return _MEDIA[answer], {"schema": {"type": "object"} if answer == "json" else {"type": "string"}}
    return MEDIA_TYPE if answer is Problem else "application/json", {"schema": _ref(answer)}


def _ref(model: type[BaseModel]) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{model.__name__}"}
