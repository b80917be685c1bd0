"""Chat Completions: our messages and tools as its request, its chunks as our pieces.

Servers differ: ids, indexes and usage may be missing, a tool call may come whole in one chunk, reasoning has two names,
or stands in the text.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal
from uuid import uuid4

from broker.events import dumps
from worker.models import failures
from worker.models.model import Call, End, Message, Options, Piece, Text, Thought, ToolSpec, Usage
from worker.models.thinking import Thinking

PATH = "/chat/completions"

_FILTERED = frozenset({"content_filter", "safety"})
_CUT = frozenset({"length", "max_tokens", "model_length"})
MOST_ARGUMENT_CHARS = 1024 * 1024
"""Of one call. A model that repeats itself for ever would fill the worker's memory, as nobody takes them meanwhile."""
_ID = re.compile(r"[!-~]{1,256}")
_MOST_TOKENS = 2**53
"""Above it is no count, nor a number that JavaScript has."""


def request(
    messages: Sequence[Message], tools: Sequence[ToolSpec], options: Options, *, newest: bool
) -> dict[str, Any]:
    """The body. `newest`: OpenAI's own server, some of whose models refuse `max_tokens`; others know no other name."""
    parameters = dict(options.parameters)
    if newest and "max_tokens" in parameters:
        parameters["max_completion_tokens"] = parameters.pop("max_tokens")
    body: dict[str, Any] = {
        "model": options.model,
        "messages": list(messages),
        "stream": True,
        "stream_options": {"include_usage": True},
        **parameters,
    }
    if tools:
        body["tools"] = [
            {
                "type": "function",
                "function": {"name": tool.name, "description": tool.description, "parameters": tool.parameters},
            }
            for tool in tools
        ]
    return body


@dataclass
class _Open:
    """A call that may still grow."""

    id: str = ""
    name: str = ""
    arguments: str = ""


class Reader:
    """Takes the chunks of one answer. Raises Failed; anything else that it raises is a malformed chunk.

    `taken` are the ids of earlier calls: some servers begin each answer with the same ones.
    """

    def __init__(self, taken: frozenset[str] = frozenset()) -> None:
        self._taken = set(taken)
        self._calls: list[_Open] = []
        self._places: dict[int, _Open] = {}
        self._usage: Usage | None = None
        self._reason = ""
        self._refusal = ""
        self._thinking = Thinking()
        self._has_text = False

    @property
    def complete(self) -> bool:
        """Whether the answer has ended; only its usage may still come."""
        return bool(self._reason)

    def feed(self, chunk: Any) -> Iterator[Piece]:
        if usage := chunk.get("usage"):
            self._usage = _usage(usage)
        for choice in chunk.get("choices") or ():
            if choice.get("index"):
                continue
            delta = choice.get("delta") or {}
            yield from self._pieces(delta)
            self._refusal += delta.get("refusal") or ""
            for part in delta.get("tool_calls") or ():
                self._call(part)
            self._reason = text_of(choice.get("finish_reason") or self._reason)

    def end(self) -> Iterator[Piece]:
        """What the end of the stream brings: the calls, and the End."""
        if not self._reason:
            raise failures.broken()
        if self._reason in _FILTERED:
            raise failures.filtered()
        if self._refusal:
            raise failures.refused(self._refusal)
        if self._reason == "error":
            raise failures.broken()
        yield from self._told(self._thinking.end())
        reason: Literal["stop", "length", "tool_calls"] = "tool_calls" if self._calls else "stop"
        if self._reason in _CUT:
            reason = "length"
        if not self._has_text and not self._calls:
            raise failures.empty(reason)
        for call in self._calls:
            yield Call(id=free_id(call.id, self._taken), name=call.name, arguments=call.arguments or "{}")
        yield End(reason=reason, usage=self._usage)

    def _pieces(self, delta: dict[str, Any]) -> Iterator[Piece]:
        thought = delta.get("reasoning_content") or delta.get("reasoning")
        if thought and isinstance(thought, str):
            yield Thought(text=thought)
        if text := delta.get("content"):
            yield from self._told(self._thinking.feed(text_of(text)))

    def _told(self, pieces: Iterator[Text | Thought]) -> Iterator[Piece]:
        for piece in pieces:
            self._has_text = self._has_text or isinstance(piece, Text)
            yield piece

    def _call(self, part: dict[str, Any]) -> None:
        """A call, or more of one: known by its index, else by its id, else it is the last one, unless it has a name."""
        index, id, function = part.get("index"), str(part.get("id") or ""), part.get("function") or {}
        name, arguments = text_of(function.get("name") or ""), function.get("arguments") or ""
        call = self._known(index, id, name)
        if call is None or (id and call.id and id != call.id):
            call = _Open()
            self._calls.append(call)
        if index is not None:
            self._places[index] = call
        call.id = call.id or id
        call.name = call.name or name
        call.arguments += arguments if isinstance(arguments, str) else dumps(arguments)
        if len(call.arguments) > MOST_ARGUMENT_CHARS:
            raise failures.broken("the arguments of a call do not end")

    def _known(self, index: int | None, id: str, name: str) -> _Open | None:
        if index is not None:
            return self._places.get(index)
        if id:
            return next((call for call in self._calls if call.id == id), None)
        return self._calls[-1] if self._calls and not name else None


def free_id(id: str, taken: set[str]) -> str:
    """The id, or another one where it is taken or is none that could be sent back; it is taken from now on."""
    if not _ID.fullmatch(id) or id in taken:
        id = f"call_{uuid4().hex}"
    taken.add(id)
    return id


def text_of(value: Any) -> str:
    """Raises TypeError for what is none."""
    if not isinstance(value, str):
        raise TypeError(f"{type(value).__name__} where a text must be")
    return value


def tokens_of(told: Any, *path: str) -> int:
    """A number of a usage; 0 where there is none. An answer is not lost because the server counts nonsense."""
    for name in path:
        told = told.get(name) if isinstance(told, dict) else None
    return int(told) if isinstance(told, (int, float)) and 0 <= told < _MOST_TOKENS else 0


def _usage(told: Any) -> Usage:
    return Usage(
        prompt=tokens_of(told, "prompt_tokens"),
        completion=tokens_of(told, "completion_tokens"),
        cached=tokens_of(told, "prompt_tokens_details", "cached_tokens") or tokens_of(told, "prompt_cache_hit_tokens"),
        reasoning=tokens_of(told, "completion_tokens_details", "reasoning_tokens"),
    )
