"""Errors, grouped by what the caller should do next. `code` is stable and part of the API."""

from __future__ import annotations


class BrokerError(Exception):
    """The root of every error that this package raises on purpose."""

    code = "internal"

    def __init__(self, detail: str = "", *, errors: list[dict[str, str]] | None = None) -> None:
        """`detail` is shown to the client; `errors` name single fields: [{"field", "message"}]."""
        super().__init__(detail or (self.__doc__ or "").strip())
        self.detail = str(self)
        self.errors = errors or []


# Mend the request, then send it again.
class BadRequest(BrokerError):
    """The request cannot be understood."""

    code = "bad_request"


class BadCursor(BadRequest):
    """The cursor is malformed, or belongs to another run."""

    code = "bad_cursor"


class Invalid(BrokerError):
    """The request is well formed, but a field's value is not acceptable."""

    code = "invalid"


class KeyReused(Invalid):
    """This Idempotency-Key was used with another request body."""

    code = "idempotency_key_reused"


class TooLarge(BrokerError):
    """The request body is too large."""

    code = "too_large"


class UnsupportedMediaType(BrokerError):
    """The request body must be application/json."""

    code = "unsupported_media_type"


# Present other credentials.
class Unauthorized(BrokerError):
    """A valid bearer token is required."""

    code = "unauthorized"


class Forbidden(BrokerError):
    """This request is not allowed here."""

    code = "forbidden"


# Give up: there is nothing here for this caller.
class RunNotFound(BrokerError):
    """There is no such run."""

    code = "run_not_found"


# The run came to nothing; the same request starts another one.
class RunFailed(BrokerError):
    """The run failed."""

    code = "run_failed"


class RunCancelled(BrokerError):
    """The run was cancelled."""

    code = "cancelled"


# Try again later; nothing was lost.
class Unavailable(BrokerError):
    """Redis cannot be reached. Try again."""

    code = "unavailable"


class Draining(Unavailable):
    """This gateway is shutting down. Try again: another one will answer."""

    code = "draining"


# Ask the operator: another request will fare no better.
class NotConfigured(BrokerError):
    """This service is not set up for that."""

    code = "not_configured"


# Mend the settings, then start again.
class Misconfigured(BrokerError):
    """The settings do not allow a start."""

    code = "misconfigured"
