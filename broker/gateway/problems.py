"""Errors as RFC 9457 problem documents. Nothing in a body tells a foreign run from a missing one."""

from __future__ import annotations

import json
import logging
from collections.abc import Awaitable, Callable, Mapping
from http import HTTPStatus
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from broker import errors

logger = logging.getLogger(__name__)

MEDIA_TYPE = "application/problem+json"
HTTPExceptionHandler = Callable[[Request, Exception], Awaitable[Response]]

STATUS: dict[type[errors.BrokerError], int] = {
    errors.BadRequest: 400,
    errors.Unauthorized: 401,
    errors.Forbidden: 403,
    errors.RunNotFound: 404,
    errors.RunCancelled: 409,
    errors.TooLarge: 413,
    errors.UnsupportedMediaType: 415,
    errors.Invalid: 422,
    errors.NotConfigured: 501,
    errors.Unavailable: 503,
}


def status_of(error: errors.BrokerError) -> int:
    return next((STATUS[kind] for kind in type(error).__mro__ if kind in STATUS), 500)


def problem_bytes(status: int, code: str, title: str, detail: str, fields: list[dict[str, str]] | None = None) -> bytes:
    body: dict[str, Any] = {"type": "about:blank", "title": title, "status": status, "code": code, "detail": detail}
    if fields:
        body["errors"] = fields
    return json.dumps(body, ensure_ascii=True).encode("ascii")


def problem(error: errors.BrokerError) -> Response:
    """The response for one of our errors."""
    status = status_of(error)
    body = problem_bytes(status, error.code, HTTPStatus(status).phrase, error.detail, error.errors)
    return Response(body, status, error_headers(status), MEDIA_TYPE)


def error_headers(status: int) -> dict[str, str]:
    """What an error of this status says beside its body, in whatever shape that is."""
    headers = {}
    if status == HTTPStatus.UNAUTHORIZED:
        headers["WWW-Authenticate"] = 'Bearer realm="stream-broker"'
    if status == HTTPStatus.SERVICE_UNAVAILABLE:
        headers["Retry-After"] = "1"
    return headers


class PathNotFound(errors.BrokerError):
    """There is nothing at this path. GET /openapi.json lists the routes."""

    code = "not_found"


class MethodNotAllowed(errors.BrokerError):
    """This path does not take this method; the Allow header names those that it takes."""

    code = "method_not_allowed"


STATUS |= {PathNotFound: 404, MethodNotAllowed: 405}


def http_exception_handler(shapes: Mapping[str, Callable[[errors.BrokerError], Response]]) -> HTTPExceptionHandler:
    """For Starlette's own: unknown paths and methods. `shapes` is how errors are told below a path's beginning; where
    several have it, the longest counts, and elsewhere they are problem documents."""

    async def on_http_exception(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        path = request.scope["path"]
        above = [prefix for prefix in shapes if f"{path}/".startswith(f"{prefix}/")]
        tell = shapes[max(above, key=len)] if above else problem
        response = tell(MethodNotAllowed() if error.status_code == 405 else PathNotFound())
        response.headers.update(error.headers or {})
        return response

    return on_http_exception


async def on_unexpected(request: Request, error: Exception) -> Response:
    """Starlette raises the error again after this, so that the outermost layer logs it."""
    return internal()


def internal() -> Response:
    """For what nobody foresaw; what it was stands in the log only."""
    detail = "Something went wrong here; the log of the gateway names it under this X-Request-Id."
    return Response(problem_bytes(500, "internal", "Internal Server Error", detail), 500, None, MEDIA_TYPE)
