"""Functions that a client brings for a model to call: what the gateway refuses at once, and the worker too."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")
"""Of a function or a tool, as every model server takes it."""


@dataclass(frozen=True, kw_only=True)
class Function:
    """`parameters` is a JSON schema of an object."""

    name: str
    description: str
    parameters: dict[str, Any]


class BadFunction(ValueError):
    """A list of functions cannot be taken; `place` is where in it, such as `[0].name`."""

    def __init__(self, place: str, message: str) -> None:
        super().__init__(message)
        self.place = place


def read_functions(given: Any, *, taken: Iterable[str] = ()) -> tuple[Function, ...]:
    """Of a list of {name, description?, parameters?}. `taken` are names that none can have. Raises BadFunction."""
    if not isinstance(given, list):
        raise BadFunction("", "It must be a list of functions.")
    names, functions = set(taken), []
    for number, one in enumerate(given):
        function = _function(one, f"[{number}]")
        if function.name in names:
            raise BadFunction(f"[{number}].name", f"There is another {function.name}.")
        names.add(function.name)
        functions.append(function)
    return tuple(functions)


def _function(given: Any, place: str) -> Function:
    if not isinstance(given, dict):
        raise BadFunction(place, "It must be an object.")
    if unknown := given.keys() - {"name", "description", "parameters"}:
        raise BadFunction(f"{place}.{min(unknown)}", "It is not known; there are name, description and parameters.")
    name, description, parameters = given.get("name"), given.get("description"), given.get("parameters")
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise BadFunction(f"{place}.name", "It must have 1 to 64 of a-z, A-Z, 0-9, _ and -.")
    if not isinstance(description, str | None):
        raise BadFunction(f"{place}.description", "It must be a text.")
    if not isinstance(parameters, dict | None):
        raise BadFunction(f"{place}.parameters", "It must be a JSON schema of an object.")
    return Function(
        name=name,
        description=description or "",
        parameters=parameters or {"type": "object", "properties": {}},
    )
