"""What a run of `chat` brings of its conversation: instructions, what was said before and after its query, and
functions that its client calls itself.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from worker.models.model import Message, ToolSpec
from worker.models.parameters import BadParameter

NAMES = ("instructions", "before", "after", "functions")
_FUNCTION_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")
T = TypeVar("T")


class _Called(BaseModel):
    model_config = ConfigDict(extra="forbid")
    name: str
    arguments: str


class _Call(BaseModel):
    model_config = ConfigDict(extra="forbid")
    id: str
    type: Literal["function"]
    function: _Called


class _User(BaseModel):
    model_config = ConfigDict(extra="forbid")
    role: Literal["user"]
    content: str


class _Assistant(BaseModel):
    model_config = ConfigDict(extra="forbid")
    role: Literal["assistant"]
    content: str | None = None
    tool_calls: list[_Call] | None = None


class _Tool(BaseModel):
    model_config = ConfigDict(extra="forbid")
    role: Literal["tool"]
    tool_call_id: str
    content: str


class _Function(BaseModel):
    model_config = ConfigDict(extra="forbid")
    name: str
    description: str = ""
    parameters: dict[str, Any] = {}


_MESSAGES = TypeAdapter[list[_User | _Assistant | _Tool]](list[_User | _Assistant | _Tool])
_FUNCTIONS = TypeAdapter[list[_Function]](list[_Function])


@dataclass(frozen=True, kw_only=True)
class Given:
    instructions: str | None
    before: tuple[Message, ...]
    after: tuple[Message, ...]
    functions: tuple[ToolSpec, ...]

    @staticmethod
    def of(parameters: Mapping[str, Any], tools: Iterable[str]) -> Given:
        """`tools` are the names that functions cannot have. Raises BadParameter."""
        instructions = parameters.get("instructions")
        if not isinstance(instructions, str | None):
            raise BadParameter("instructions must be a text")
        return Given(
            instructions=instructions,
            before=_messages(parameters, "before"),
            after=_messages(parameters, "after"),
            functions=_functions(parameters, set(tools)),
        )


def _messages(parameters: Mapping[str, Any], name: str) -> tuple[Message, ...]:
    expected = "messages of a user, an assistant or a tool, in the shape of Chat Completions"
    messages = _checked(_MESSAGES, parameters, name, expected)
    return tuple({"content": None, **message.model_dump(exclude_none=True)} for message in messages)


def _functions(parameters: Mapping[str, Any], taken: set[str]) -> tuple[ToolSpec, ...]:
    functions = _checked(_FUNCTIONS, parameters, "functions", "objects with a name, a description and parameters")
    for function in functions:
        if not _FUNCTION_NAME.fullmatch(function.name):
            raise BadParameter("functions: a name has 1 to 64 letters, digits, _ and -")
        if function.name in taken:
            raise BadParameter(f"functions: there is another {function.name}, or a tool of this name")
        taken.add(function.name)
    return tuple(
        ToolSpec(
            name=function.name,
            description=function.description,
            parameters=function.parameters or {"type": "object", "properties": {}},
        )
        for function in functions
    )


def _checked(adapter: TypeAdapter[list[T]], parameters: Mapping[str, Any], name: str, expected: str) -> list[T]:
    try:
        return adapter.validate_python(parameters.get(name) or [])
    except ValidationError:
        raise BadParameter(f"{name} must be a list of {expected}") from None
