"""Errors in OpenAI's shape, from which its SDKs make their exceptions."""

from __future__ import annotations

from pydantic import BaseModel
from starlette.responses import Response

from broker.errors import BrokerError, Invalid, Unauthorized
from broker.events import dumps
from broker.gateway.problems import error_headers, status_of


class ErrorObject(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """`param` names the field that is wrong; `code` is stable."""

    error: ErrorObject


class ModelNotFound(BrokerError):
    """There is no such model here, nor an agent of this name."""

    code = "model_not_found"


class PreviousNotFound(Invalid):
    """There is no such previous response."""

    code = "previous_response_not_found"


def problem(error: BrokerError) -> Response:
    status = _status(error)
    body = {
        "message": error.detail,
        "type": "server_error" if status >= 500 else "invalid_request_error",
        "param": error.errors[0]["field"] if error.errors else None,
        "code": "invalid_api_key" if isinstance(error, Unauthorized) else error.code,
    }
    return Response(dumps({"error": body}), status, error_headers(status), "application/json")


def _status(error: BrokerError) -> int:
    if isinstance(error, ModelNotFound):
        return 404
    return 400 if isinstance(error, Invalid) else status_of(error)
