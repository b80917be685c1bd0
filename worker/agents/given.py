"""What a run of `chat` brings of its conversation: instructions, what was said before and after its query, and
functions that its client calls itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from broker.functions import BadFunction, read_functions
from worker.models.model import Message, ToolSpec
from worker.models.parameters import BadParameter

NAMES = ("instructions", "before", "after", "functions")


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


_MESSAGES = TypeAdapter[list[_User | _Assistant | _Tool]](list[_User | _Assistant | _Tool])


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
            functions=_functions(parameters, tools),
        )


def _messages(parameters: Mapping[str, Any], name: str) -> tuple[Message, ...]:
    try:
        messages = _MESSAGES.validate_python(parameters.get(name) or [])
    except ValidationError:
        expected = "messages of a user, an assistant or a tool, in the shape of Chat Completions"
        raise BadParameter(f"{name} must be a list of {expected}") from None
    return tuple({"content": None, **message.model_dump(exclude_none=True)} for message in messages)


def _functions(parameters: Mapping[str, Any], taken: Iterable[str]) -> tuple[ToolSpec, ...]:
    try:
        functions = read_functions(parameters.get("functions") or [], taken=taken)
    except BadFunction as error:
        raise BadParameter(f"functions{error.place}: {error}") from None
    return tuple(
        ToolSpec(name=function.name, description=function.description, parameters=function.parameters)
        for function in functions
    )
