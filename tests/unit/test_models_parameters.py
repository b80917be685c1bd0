"""What a run may choose of its model, and what it is told when it chooses something else."""

from __future__ import annotations

from typing import Any

import pytest

from broker.settings import Settings
from worker.models.model import ModelError
from worker.models.parameters import SAMPLING, allowed_parameters


def allowed(given: dict[str, Any], **settings: Any) -> tuple[str, dict[str, Any]]:
    return allowed_parameters(given, Settings(**{"model": "m", **settings}))


GOOD = {
    "temperature": 0.7,
    "top_p": 1,
    "max_tokens": 100,
    "seed": -5,
    "stop": ["a", "b"],
    "presence_penalty": -2,
    "frequency_penalty": 2.0,
    "reasoning_effort": "low",
}


def test_every_sampling_parameter_may_be_set() -> None:
    assert GOOD.keys() == SAMPLING.keys()
    assert allowed(GOOD) == ("m", GOOD)


def test_parameters_of_other_names_are_not_sent_to_the_model() -> None:
    assert allowed({"pace": 3, "tools": False, "n": 100, "temperature": None}) == ("m", {})


def test_one_stop_is_a_list_of_one() -> None:
    assert allowed({"stop": "END"}) == ("m", {"stop": ["END"]})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", 2.1),
        ("temperature", -0.1),
        ("temperature", "hot"),
        ("temperature", True),
        ("temperature", float("nan")),
        ("temperature", 10**400),
        ("top_p", 1.1),
        ("max_tokens", 0),
        ("max_tokens", 1.5),
        ("max_tokens", True),
        ("seed", "x"),
        ("seed", 2**63),
        ("stop", []),
        ("stop", ""),
        ("stop", ["a"] * 5),
        ("stop", [1]),
        ("stop", "x" * 201),
        ("presence_penalty", 3),
        ("frequency_penalty", []),
        ("reasoning_effort", "hard"),
        ("reasoning_effort", {}),
    ],
)
def test_a_bad_value_is_named(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"^{name} must be "):
        allowed({name: value})


@pytest.mark.parametrize(
    ("models", "given", "model"),
    [("", None, "m"), ("", "m", "m"), ("x, y", "y", "y"), ("x", "m", "m"), ("*", "anything", "anything")],
)
def test_a_run_may_choose_among_the_models_of_the_settings(models: str, given: str | None, model: str) -> None:
    assert allowed({"model": given}, models=models)[0] == model


@pytest.mark.parametrize(
    ("models", "given", "said"),
    [
        ("", "x", "model must be one of m$"),
        ("x,y", "z", "one of m, x, y$"),
        ("x", 5, "one of m, x"),
        ("*", "", "a model's name"),
        ("*", "x" * 201, "of at most 200 characters"),
    ],
)
def test_another_model_is_refused_and_the_allowed_ones_are_told(models: str, given: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        allowed({"model": given}, models=models)


def test_without_a_model_in_the_settings_there_is_none() -> None:
    with pytest.raises(ModelError, match="BROKER_MODEL") as caught:
        allowed({}, model=None)
    assert caught.value.code == "model_not_configured"


def test_what_responses_cannot_do_is_refused_where_it_must_be_used() -> None:
    with pytest.raises(ValueError, match=r"^seed is not a parameter of Responses"):
        allowed({"seed": 1}, model_api="responses")
    assert allowed({"seed": 1}, model_api="auto") == ("m", {"seed": 1})
