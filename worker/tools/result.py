"""What a tool's result becomes: for the log, and for the model. Both are shown the same."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from pydantic_core import to_jsonable_python

from broker.events import dumps

MAX_RESULT_BYTES = 32 * 1024
"""Of JSON, in ASCII. An event may have twice as much; a checkpoint, with all results of a run, too."""


class BadResult(ValueError):
    """A tool returned what JSON cannot carry."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """`value` is JSON, for the event; `text` is the same for the model."""

    value: Any
    text: str


def make_result(returned: object) -> Result:
    """Models of pydantic, dataclasses, dates and the like are dumped; what is too large is cut, and says so.

    Raises BadResult.
    """
    if isinstance(returned, str):
        text = cut(returned)
        return Result(value=text, text=text)
    try:
        written = json.dumps(
            returned, default=to_jsonable_python, ensure_ascii=True, allow_nan=False, separators=(",", ":")
        )
        if len(written) > MAX_RESULT_BYTES:
            text = cut(_readable(json.loads(written)))
            return Result(value=text, text=text)
        value = json.loads(written)
        return Result(value=value, text=_readable(value))
    except (TypeError, ValueError, RecursionError) as error:
        raise BadResult(f"The tool returned a {type(returned).__name__} that JSON cannot carry: {error}") from None


def failure(message: str) -> Result:
    """A call that failed: the model is told why, and may try another way."""
    value = {"error": cut(message)}
    return Result(value=value, text=_readable(value))


def cut(text: str, limit: int = MAX_RESULT_BYTES) -> str:
    """The text, if it is within the limit as JSON, else its beginning and a line that says so."""
    if len(text) <= limit and len(dumps(text)) <= limit:
        return text
    note = f"\n[cut: these are the first {{}} of {len(text)} characters]"
    room = limit - len(note) - 24
    low, high = 0, min(len(text), room)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if len(dumps(text[:middle])) <= room else (low, middle - 1)
    return text[:low] + note.format(low)


def _readable(value: Any) -> str:
    """JSON with its characters as they are: escapes cost a model several tokens each."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
