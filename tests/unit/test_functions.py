"""Functions that a client brings: read by the gateway and the worker by the same rules."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.errors import Invalid
from broker.functions import BadFunction, Function, read_functions
from broker.gateway.dialects.openai.body import read
from broker.settings import Settings
from worker.agents.given import Given

SETTINGS = Settings(model="m")
ANYTHING: st.SearchStrategy[Any] = st.sampled_from(
    ("f", "g", "a b!", "x" * 65, "", "\n", None, 1, {}, {"type": "object"}, [])
)
LISTS = st.lists(
    st.dictionaries(st.sampled_from(("name", "description", "parameters")), ANYTHING, max_size=3), max_size=3
)


def test_what_a_function_leaves_out_is_empty() -> None:
    assert read_functions([{"name": "f"}, {"name": "g", "description": None, "parameters": None}]) == tuple(
        Function(name=name, description="", parameters={"type": "object", "properties": {}}) for name in "fg"
    )


@pytest.mark.parametrize(
    ("functions", "place"),
    [
        (None, ""),
        ({"name": "f"}, ""),
        (["f"], "[0]"),
        ([{"name": "f"}, {}], "[1].name"),
        ([{"name": 1}], "[0].name"),
        ([{"name": ""}], "[0].name"),
        ([{"name": "a b!"}], "[0].name"),
        ([{"name": "f\n"}], "[0].name"),
        ([{"name": "x" * 65}], "[0].name"),
        ([{"name": "f"}, {"name": "f"}], "[1].name"),
        ([{"name": "taken"}], "[0].name"),
        ([{"name": "f", "description": 1}], "[0].description"),
        ([{"name": "f", "parameters": []}], "[0].parameters"),
        ([{"name": "f", "strict": True}], "[0].strict"),
    ],
)
def test_what_cannot_be_taken_is_named(functions: Any, place: str) -> None:
    with pytest.raises(BadFunction) as refused:
        read_functions(functions, taken=["taken"])
    assert refused.value.place == place


@given(LISTS)
def test_what_the_gateway_takes_the_worker_takes_too(functions: list[dict[str, Any]]) -> None:
    """So that a request for a response is refused by a 400 that names the place, and its run does not fail."""
    body = {"model": "m", "input": "q", "tools": [{"type": "function", **function} for function in functions]}
    try:
        expected = read_functions(functions)
    except BadFunction as wrong:
        with pytest.raises(Invalid) as refused:
            read(body, SETTINGS)
        assert refused.value.errors is not None
        assert [error["field"] for error in refused.value.errors] == [f"tools{wrong.place}"]
        return
    parameters = read(body, SETTINGS).parameters
    assert [asdict(function) for function in Given.of(parameters, ()).functions] == [asdict(each) for each in expected]
