"""The response object: a run as OpenAI's clients know it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from broker.events import dumps
from broker.ids import REQUEST_ID

PREFIX = "resp_"
OWN = "openai"
"""The key of a run's metadata under which is what of a request only the response tells."""
_MOST_TOKENS = 2**53


def response_id(request_id: str) -> str:
    return PREFIX + request_id


def request_id_of(text: str) -> str | None:
    """From a response's id, or a run's own; None for what cannot be one."""
    bare = text.removeprefix(PREFIX)
    return bare if REQUEST_ID.fullmatch(bare) else None


class End(NamedTuple):
    """How a response ended: its status, and the JSON of what goes with it."""

    status: str
    error: str = "null"
    incomplete_details: str = "null"
    usage: str = "null"


@dataclass(frozen=True, kw_only=True)
class Profile:
    """What never changes of a response."""

    request_id: str
    created_at: int
    """Seconds since the epoch."""
    agent: str
    parameters: Mapping[str, Any] = field(default_factory=dict)
    metadata: Mapping[str, Any] = field(default_factory=dict)

    def head(self) -> str:
        """The first members of the object."""
        return f'"id":"{response_id(self.request_id)}","object":"response","created_at":{self.created_at}'

    def tail(self) -> str:
        """The members after the output. Whoever started the run by another way may have given them other types, which
        are not told."""
        given = self.parameters
        own = self.metadata.get(OWN)
        asked: Mapping[str, Any] = own if isinstance(own, dict) else {}
        tools = given.get("functions")
        told = {
            "parallel_tool_calls": True,
            "tool_choice": "none" if given.get("tools") is False else "auto",
            "tools": [{"type": "function", **tool} for tool in tools if isinstance(tool, dict)]
            if isinstance(tools, list)
            else [],
            "background": asked.get("background") is True,
            "instructions": _of(str, given.get("instructions")),
            "max_output_tokens": _of(int, given.get("max_tokens")),
            "metadata": {
                name: value if isinstance(value, str) else dumps(value)
                for name, value in self.metadata.items()
                if not (name == OWN and isinstance(value, dict))
            },
            "previous_response_id": _of(str, asked.get("previous_response_id")),
            "reasoning": {"effort": _of(str, given.get("reasoning_effort")), "summary": None},
            "store": True,
            "temperature": _of((int, float), given.get("temperature")),
            "text": {"format": {"type": "text"}},
            "top_p": _of((int, float), given.get("top_p")),
            "truncation": "disabled",
        }
        return dumps(told)[1:-1]

    @property
    def model(self) -> str:
        """As the client named it: the model, where the agent was told one, else the agent."""
        return _of(str, self.parameters.get("model")) or self.agent


class Printer:
    """Writes the JSON of one response, as it is at different times."""

    def __init__(self, profile: Profile) -> None:
        self._head = profile.head()
        self._model = f'"model":{dumps(profile.model)}'
        self._tail = profile.tail()

    def json(self, status: str, output: Iterable[str], end: End | None = None) -> str:
        """`output` are the JSON of the items."""
        told = end or End(status)
        return (
            f'{{{self._head},"status":"{status}",{self._model},"output":[{",".join(output)}],{self._tail},'
            f'"error":{told.error},"incomplete_details":{told.incomplete_details},"usage":{told.usage}}}'
        )


def error_json(data: Mapping[str, Any]) -> str:
    """Of a run's `error`."""
    return dumps({"code": data.get("code"), "message": data.get("message")})


def usage_json(usage: Mapping[str, Any]) -> str:
    """An agent's usage, in OpenAI's older or newer names, as a response has it; null where it counts no tokens."""
    read = _tokens(usage, "input_tokens", "prompt_tokens")
    written = _tokens(usage, "output_tokens", "completion_tokens")
    if read is None and written is None:
        return "null"
    total = _tokens(usage, "total_tokens")
    told = {
        "input_tokens": read or 0,
        "input_tokens_details": {"cached_tokens": _tokens(usage, "cached_tokens") or 0, "cache_write_tokens": 0},
        "output_tokens": written or 0,
        "output_tokens_details": {"reasoning_tokens": _tokens(usage, "reasoning_tokens") or 0},
        "total_tokens": (read or 0) + (written or 0) if total is None else total,
    }
    return dumps(told)


def _tokens(usage: Mapping[str, Any], *names: str) -> int | None:
    """The first of the names that has a number."""
    for name in names:
        value = usage.get(name)
        if isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < _MOST_TOKENS:
            return int(value)
    return None


def _of(kind: Any, value: Any) -> Any:
    return value if isinstance(value, kind) and not isinstance(value, bool) else None
