"""What a model is to an agent: messages and tools in, a stream of pieces out."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

Message = dict[str, Any]
"""One message in the shape of Chat Completions: plain JSON, so that it can stand in a checkpoint.

{"role": "system" | "user", "content": str}
{"role": "assistant", "content": str | None,
 "tool_calls"?: [{"id": str, "type": "function", "function": {"name": str, "arguments": str}}]}
{"role": "tool", "tool_call_id": str, "content": str}
"""


@dataclass(frozen=True, kw_only=True)
class ToolSpec:
    """A tool as the model is told of it. `parameters` is a JSON schema of an object."""

    name: str
    description: str
    parameters: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Options:
    """How one answer is to be made. `parameters` are the sampling parameters, already checked against the allow-list.

    `deadline` is when the answer must be there: seconds since the epoch. `request_id` is the run's, for the log.
    """

    model: str
    deadline: float
    request_id: str = ""
    parameters: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Text:
    """A piece of the answer."""

    text: str


@dataclass(frozen=True, kw_only=True)
class Thought:
    """A piece of the model's reasoning."""

    text: str


@dataclass(frozen=True, kw_only=True)
class Call:
    """The model wants a tool called. `arguments` is JSON text as the model wrote it: it may be malformed."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True, kw_only=True)
class Usage:
    """In tokens. `cached` is a part of `prompt`, `reasoning` a part of `completion`."""

    prompt: int = 0
    completion: int = 0
    cached: int = 0
    reasoning: int = 0

    def __add__(self, other: Usage) -> Usage:
        return Usage(
            prompt=self.prompt + other.prompt,
            completion=self.completion + other.completion,
            cached=self.cached + other.cached,
            reasoning=self.reasoning + other.reasoning,
        )

    def told(self) -> dict[str, int]:
        """As the usage of a run has it."""
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
            "cached_tokens": self.cached,
            "reasoning_tokens": self.reasoning,
        }


@dataclass(frozen=True, kw_only=True)
class End:
    """The answer is complete: always the last piece. `usage` is None where the server does not tell."""

    reason: Literal["stop", "length", "tool_calls"]
    usage: Usage | None = None


Piece = Text | Thought | Call | End


class ModelError(Exception):
    """The model gave no answer, or broke off in the middle of one. `code` is stable, the message safe to show."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class Model(Protocol):
    """A model server."""

    def stream(self, messages: Sequence[Message], tools: Sequence[ToolSpec], options: Options) -> AsyncIterator[Piece]:
        """One answer. Before the first piece failures are retried within the deadline. Raises ModelError.

        Calls come whole, after the text, and before the End.
        """
        ...
