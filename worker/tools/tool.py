"""A tool: a function that a model may call, and what the model is told of it."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from dataclasses import dataclass
from types import FunctionType
from typing import Any, TypeVar, get_type_hints, overload

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model
from pydantic.errors import PydanticUserError

from broker.events import dumps
from broker.functions import NAME
from worker.agent import Run
from worker.tools.result import MAX_RESULT_BYTES, cut

_MARK = "__broker_tool__"
_SHOWN_ERRORS = 5

F = TypeVar("F", bound=Callable[..., Any])


class BadTool(ValueError):
    """A function cannot be a tool; the message says why."""


class BadArguments(ValueError):
    """The model's arguments do not fit; the message is for the model."""


@dataclass(frozen=True, kw_only=True)
class _Mark:
    name: str | None
    timeout: float | None


@overload
def tool(function: F, /) -> F: ...


@overload
def tool(*, name: str | None = None, timeout: float | None = None) -> Callable[[F], F]: ...


def tool(function: F | None = None, /, *, name: str | None = None, timeout: float | None = None) -> Any:
    """Marks a function, async or not, as a tool. It stays as it is, to be called by others too.

    The model is told its name, its docstring and its arguments; these need types, which pydantic checks. A parameter
    of type Run is given the run. What it returns goes to the model: a str, or what JSON can carry. What it raises goes
    to the model as an error. `timeout` is in seconds; BROKER_TOOL_SECONDS by default.
    """

    def mark(marked: F) -> F:
        setattr(marked, _MARK, _Mark(name=name, timeout=timeout))
        return marked

    return mark if function is None else mark(function)


def is_marked(value: object) -> bool:
    """Whether it is a function that was decorated by `tool`."""
    return type(value) is FunctionType and _MARK in vars(value)


@dataclass(frozen=True, kw_only=True)
class Tool:
    """A function with what is needed to call it for a model."""

    name: str
    description: str
    function: Callable[..., Any]
    timeout: float
    schema: dict[str, Any]
    """The JSON schema of its arguments: an object."""
    arguments: type[BaseModel]
    names: tuple[str, ...]
    """The parameters that the model fills, in the order of the model's fields."""
    run_parameters: tuple[str, ...]
    """Those that are given the run."""

    @property
    def asynchronous(self) -> bool:
        return inspect.iscoroutinefunction(self.function)

    def bind(self, text: str, run: Run) -> dict[str, Any]:
        """The keyword arguments of a call, from the JSON that the model wrote. Raises BadArguments."""
        try:
            given = parse_arguments(text)
        except ValueError as error:
            raise BadArguments(f"The arguments are not JSON: {error}") from None
        if not isinstance(given, dict):
            raise BadArguments("The arguments must be a JSON object.")
        try:
            found = self.arguments.model_validate(given)
        except ValidationError as error:
            raise BadArguments(_told(error)) from None
        except (ValueError, RecursionError) as error:
            raise BadArguments(f"The arguments cannot be read: {error}") from None
        fields = zip(self.names, type(found).model_fields, strict=True)
        return {name: getattr(found, field) for name, field in fields} | dict.fromkeys(self.run_parameters, run)


def parse_arguments(text: str) -> Any:
    """The JSON that a model wrote; nothing is an empty object. Raises ValueError, for NaN and infinities too."""
    try:
        return json.loads(text, parse_constant=_refuse) if text.strip() else {}
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is no value")


def read_arguments(text: str) -> Any:
    """A call's arguments for the log: JSON where they are, else the text."""
    try:
        value = parse_arguments(text)
        dumps(value)
    except (ValueError, RecursionError):
        return text
    return value


def shown_arguments(text: str) -> Any:
    """The same, cut to what is shown of a tool's result."""
    value = read_arguments(text)
    return value if len(dumps(value)) <= MAX_RESULT_BYTES else cut(text)


def make_tool(function: Callable[..., Any], *, default_timeout: float) -> Tool:
    """Of a function that was marked. Raises BadTool."""
    mark: _Mark = getattr(function, _MARK)
    name = mark.name if mark.name is not None else getattr(function, "__name__", "")
    if not NAME.fullmatch(name):
        raise BadTool(f"the name {name!r} is not 1 to 64 of a-z, A-Z, 0-9, _ and -")
    timeout = default_timeout if mark.timeout is None else mark.timeout
    if isinstance(timeout, bool) or not isinstance(timeout, (int, float)) or not 0 < timeout < float("inf"):
        raise BadTool(f"timeout={timeout!r} is not a number of seconds above 0")
    if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
        raise BadTool("it yields; a tool returns its result")
    fields, runs = _parameters(function)
    arguments = _model(name, fields)
    return Tool(
        name=name,
        description=inspect.getdoc(function) or "",
        function=function,
        timeout=float(timeout),
        schema=_schema(arguments),
        arguments=arguments,
        names=tuple(fields),
        run_parameters=runs,
    )


def _parameters(function: Callable[..., Any]) -> tuple[dict[str, tuple[Any, Any]], tuple[str, ...]]:
    """(type, default) of each parameter that the model fills, and the names of those that are given the run."""
    try:
        signature, hints = inspect.signature(function), get_type_hints(function, include_extras=True)
    except (NameError, TypeError, ValueError) as error:
        raise BadTool(f"its types cannot be read: {error}") from None
    fields: dict[str, tuple[Any, Any]] = {}
    runs = []
    for parameter in signature.parameters.values():
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise BadTool(f"its parameter {parameter.name} has no name that the model could use")
        if parameter.name not in hints:
            raise BadTool(f"its parameter {parameter.name} has no type")
        if hints[parameter.name] is Run:
            runs.append(parameter.name)
        else:
            default = ... if parameter.default is parameter.empty else parameter.default
            fields[parameter.name] = hints[parameter.name], default
    return fields, tuple(runs)


def _model(name: str, parameters: dict[str, tuple[Any, Any]]) -> type[BaseModel]:
    """The parameters are its aliases: a field of a model could not be called `schema` or `_id`."""
    fields: dict[str, Any] = {
        f"p{number}": (kind, Field(default, alias=parameter))
        for number, (parameter, (kind, default)) in enumerate(parameters.items())
    }
    try:
        return create_model(name, __config__=ConfigDict(extra="forbid", arbitrary_types_allowed=False), **fields)
    except (PydanticUserError, TypeError, NameError) as error:
        raise BadTool(f"its arguments cannot be checked: {_first_line(error)}") from None


def _schema(arguments: type[BaseModel]) -> dict[str, Any]:
    try:
        schema = arguments.model_json_schema()
    except (PydanticUserError, TypeError, ValueError) as error:
        raise BadTool(f"its arguments have no JSON schema: {_first_line(error)}") from None
    return _untitled(schema)


def _untitled(schema: dict[str, Any]) -> dict[str, Any]:
    """Without the titles that pydantic makes of names: they tell a model nothing, and cost tokens."""
    kept = {name: value for name, value in schema.items() if name != "title"}
    for group in ("properties", "$defs"):
        if group in kept:
            kept[group] = {name: _untitled(inner) for name, inner in kept[group].items()}
    return kept


def _told(error: ValidationError) -> str:
    """Each of the first few errors as `place: what is wrong`."""
    found = error.errors(include_url=False, include_input=False, include_context=False)
    lines = [f"{'.'.join(map(str, item['loc'])) or 'arguments'}: {item['msg']}" for item in found[:_SHOWN_ERRORS]]
    more = [f"{len(found) - _SHOWN_ERRORS} more"] if len(found) > _SHOWN_ERRORS else []
    return "The arguments do not fit. " + "; ".join([*lines, *more])


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
