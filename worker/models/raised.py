"""What others' code raises that asks a model through the openai SDK, as the failures of our own agents."""

from __future__ import annotations

import os

from openai import APIConnectionError, APIError, APIStatusError, APITimeoutError

from worker.models import failures
from worker.models.model import ModelError


def model_error(error: BaseException, model: str) -> ModelError | None:
    """The same, if it is a model server's failure; None for any other exception. `model` is for the message."""
    if isinstance(error, APIStatusError):
        failed = failures.of_status(error.status_code, error.body, error.response.headers, model=model)
    elif isinstance(error, APITimeoutError):
        failed = failures.Failed("model_stalled", "The model server did not answer in time.")
    elif isinstance(error, APIConnectionError):
        failed = failures.unreachable()
    elif isinstance(error, APIError):
        failed = failures.of_object(error.body, model=model)
    elif _is_of_the_transport(error):
        failed = failures.broken()
    else:
        return None
    return ModelError(failed.code, failures.redacted(str(failed), os.environ.get("OPENAI_API_KEY")))


def _is_of_the_transport(error: BaseException) -> bool:
    """The SDK does not wrap what breaks in the middle of a stream. Its transport is not the same in each version."""
    return any(
        kind.__module__.partition(".")[0] in ("httpx", "httpx2") and kind.__name__ == "HTTPError"
        for kind in type(error).__mro__
    )
