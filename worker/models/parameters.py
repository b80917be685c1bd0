"""What a run may choose of its model: the model itself, and the sampling parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from broker.settings import Settings
from worker.models import responses
from worker.models.model import ModelError

EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh")
MOST_MODEL_CHARS = 200
"""It is told again in the usage and in errors, for which an event has little room."""
SHOWN_MESSAGE = 2000
"""So many bytes of a BadParameter are told: what it names may be long."""
MOST_STOPS = 4
MOST_STOP_CHARS = 200


class BadParameter(ValueError):
    """A parameter of the run is wrong; the message says which and what it must be."""


def allowed_parameters(given: Mapping[str, Any], settings: Settings) -> tuple[str, dict[str, Any]]:
    """The model and the sampling parameters of a run, checked. Other names are not this function's business, and None
    is as if it were not given.

    Raises BadParameter, and ModelError (`model_not_configured`) where no model is set.
    """
    if settings.model is None:
        raise ModelError("model_not_configured", "No model is configured: set BROKER_MODEL, and OPENAI_BASE_URL.")
    checked = {}
    for name, check in SAMPLING.items():
        if given.get(name) is not None:
            if settings.model_api == "responses" and name not in responses.PARAMETERS:
                raise BadParameter(f"{name} is not a parameter of Responses, which is the API in use here")
            checked[name] = check(name, given[name])
    return _model(given.get("model"), settings.model, settings.models), checked


def refuse_unknown(agent: str, given: Mapping[str, Any], known: Sequence[str]) -> None:
    """Raises BadParameter, which names those that the agent does not have, and those that it has."""
    if unknown := [name for name in given if name not in known]:
        raise BadParameter(f"{agent} has no parameter {', '.join(unknown)}; it has {', '.join(known)}")


def _model(given: Any, default: str, others: tuple[str, ...]) -> str:
    if given is None or given == default:
        return default
    if isinstance(given, str) and given and (given in others or ("*" in others and len(given) <= MOST_MODEL_CHARS)):
        return given
    if "*" in others:
        raise BadParameter(f"model must be a model's name of at most {MOST_MODEL_CHARS} characters")
    raise BadParameter(f"model must be one of {', '.join(dict.fromkeys([default, *others]))}")


def _number(low: float, high: float) -> Callable[[str, Any], float]:
    def check(name: str, value: Any) -> float:
        valid = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not valid or not low <= value <= high:
            raise BadParameter(f"{name} must be a number from {low:g} to {high:g}")
        return float(value)

    return check


def whole(low: int, high: int) -> Callable[[str, Any], int]:
    """A check of a whole number, which raises BadParameter."""

    def check(name: str, value: Any) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise BadParameter(f"{name} must be a whole number from {low} to {high}")
        return value

    return check


def _stop(name: str, value: Any) -> list[str]:
    texts = [value] if isinstance(value, str) else value
    if (
        not isinstance(texts, list)
        or not 1 <= len(texts) <= MOST_STOPS
        or not all(isinstance(text, str) and 1 <= len(text) <= MOST_STOP_CHARS for text in texts)
    ):
        raise BadParameter(
            f"{name} must be a text, or 1 to {MOST_STOPS} of them, of at most {MOST_STOP_CHARS} characters"
        )
    return texts


def _effort(name: str, value: Any) -> str:
    if not isinstance(value, str) or value not in EFFORTS:
        raise BadParameter(f"{name} must be one of {', '.join(EFFORTS)}")
    return value


SAMPLING: dict[str, Callable[[str, Any], Any]] = {
    "temperature": _number(0, 2),
    "top_p": _number(0, 1),
    "max_tokens": whole(1, 10_000_000),
    "seed": whole(-(2**63), 2**63 - 1),
    "stop": _stop,
    "presence_penalty": _number(-2, 2),
    "frequency_penalty": _number(-2, 2),
    "reasoning_effort": _effort,
}
"""The sampling parameters that a run may set, and how each is checked."""
