"""What a call can raise beside the classes of broker.errors, and how an answer becomes an error.

All are BrokerErrors with a stable `code`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from broker import errors
from broker.errors import BrokerError

_BY_CODE: dict[str, type[BrokerError]] = {
    cls.code: cls
    for cls in (
        errors.BadRequest,
        errors.BadCursor,
        errors.Invalid,
        errors.KeyReused,
        errors.TooLarge,
        errors.UnsupportedMediaType,
        errors.Unauthorized,
        errors.Forbidden,
        errors.NotConfigured,
        errors.RunCancelled,
        errors.RunFailed,
        errors.RunNotFound,
        errors.Unavailable,
        errors.Draining,
    )
}
_BY_STATUS: dict[int, type[BrokerError]] = {
    401: errors.Unauthorized,
    403: errors.Forbidden,
    502: errors.Unavailable,
    503: errors.Unavailable,
    504: errors.Unavailable,
}
"""For answers that are not the broker's own: a proxy's."""


class ApiError(BrokerError):
    """The service has refused, for a reason that has no class of its own."""

    def __init__(
        self,
        detail: str,
        *,
        code: str,
        status: int,
        errors: list[dict[str, str]] | None = None,
        log_id: str | None = None,
    ) -> None:
        """`log_id`: the header X-Request-Id, under which the gateway's log has the request; it is no run's name."""
        super().__init__(detail, errors=errors)
        self.code = code
        self.status = status
        self.log_id = log_id


class Unreachable(BrokerError):
    """Nothing answers. What runs, runs on: come again."""

    code = "unreachable"

    def __init__(self, url: str, cause: str) -> None:
        super().__init__(f"{url} does not answer: {cause}")
        self.url = url
        self.cause = cause


class DamagedStream(BrokerError):
    """What the service sends is not the run's log: something is missing, also after reconnecting."""

    code = "damaged_stream"


class RunFailed(BrokerError):
    """The run ended with an error."""

    def __init__(self, code: str, message: str) -> None:
        """Both are the run's own."""
        super().__init__(message)
        self.code = code


class RunCancelled(BrokerError):
    """The run was cancelled."""

    code = "cancelled"


def error_of(status: int, headers: Mapping[str, str], body: bytes) -> BrokerError:
    """The error that an answer means: by the code of its problem document, else by its status."""
    problem = _problem(body)
    code, detail = problem.get("code"), problem.get("detail")
    if isinstance(code, str) and isinstance(detail, str):
        fields = problem.get("errors") or []
        cls = _BY_CODE.get(code)
        if cls is not None:
            return cls(detail, errors=fields)
        log_id = headers.get("x-request-id")
        return ApiError(detail, code=code, status=status, errors=fields, log_id=log_id)
    phrase = HTTPStatus(status).phrase if status in HTTPStatus._value2member_map_ else "an unknown status"
    detail = f"The answer was {status} {phrase}, and not from a broker. Is this its URL?"
    if 300 <= status < 400 and "location" in headers:
        detail = f"This URL leads to {headers['location']}. No token is sent after a redirect: give that URL itself."
    cls = _BY_STATUS.get(status)
    return cls(detail) if cls is not None else ApiError(detail, code=f"http_{status}", status=status)


def not_a_broker(status: int, what: str) -> ApiError:
    """For an answer that succeeded, but cannot be a broker's."""
    return ApiError(f"The answer is {what}. Is this the URL of a broker?", code="not_a_broker", status=status)


def _problem(body: bytes) -> dict[str, Any]:
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
