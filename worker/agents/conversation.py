"""What a run of `chat` and its model have said to each other: messages, and the state from which a run goes on."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from worker.agent import Turn
from worker.agents.given import Given
from worker.models.model import Call, Message, Usage
from worker.tools.tool import parse_arguments

_SURROGATES = re.compile("[\ud800-\udfff]")
_NOT_IN_NAMES = re.compile("[^a-zA-Z0-9_-]")
_CUT = " […]"


class Conversation(BaseModel):
    """The rounds of a run so far: what each answer that called tools said and called, and their results.

    Not the query, nor what was before it: a checkpoint has little room.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: Literal[1] = 1
    rounds: int = 0
    """How many answers the model has given."""
    usage: Usage | None = None
    """Of these, as far as the server has told."""
    messages: tuple[Message, ...] = ()

    def answered(self, text: str, calls: Sequence[Call], usage: Usage | None) -> Conversation:
        """After an answer of the model, which gives each call an id that no earlier one has."""
        message: Message = {"role": "assistant", "content": text or None}
        if calls:
            message["tool_calls"] = [
                {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                for call in calls
            ]
        total = usage if self.usage is None else self.usage + (usage or Usage())
        return self._with(message, rounds=self.rounds + 1, usage=total)

    def resulted(self, call_id: str, text: str) -> Conversation:
        """After a tool has ended."""
        return self._with({"role": "tool", "tool_call_id": call_id, "content": text})

    def _with(self, message: Message, **changes: Any) -> Conversation:
        return self.model_copy(update={**changes, "messages": (*self.messages, message)})

    @property
    def pending(self) -> list[Call]:
        """The calls that have no result yet."""
        ended = {message["tool_call_id"] for message in self.messages if message["role"] == "tool"}
        return [call for call in self._calls() if call.id not in ended]

    @property
    def has_text(self) -> bool:
        """Whether an answer so far said something beside its calls."""
        return any(message["role"] == "assistant" and message["content"] for message in self.messages)

    def _calls(self) -> list[Call]:
        return [
            Call(id=called["id"], name=called["function"]["name"], arguments=called["function"]["arguments"])
            for message in self.messages
            for called in message.get("tool_calls", ())
        ]


def opening(system: str | None, history: Iterable[Turn], query: str, given: Given | None = None) -> list[Message]:
    """How a conversation begins: instructions, the session's earlier turns, what the run brings, the query.

    What goes on where an earlier run has left a call open tells that run's turn itself: in `after` where it is asked
    the same, else at the beginning of `before`. The turn is not told twice.
    """
    system = "\n\n".join(filter(None, (system, given.instructions if given else None)))
    messages: list[Message] = [{"role": "system", "content": system}] if system else []
    turns = list(history)
    if given and turns and turns[-1].query in _told_by(given, query):
        turns.pop()
    for turn in turns:
        messages.append({"role": "user", "content": turn.query})
        messages.append({"role": "assistant", "content": turn.answer + (_CUT if turn.cut else "")})
    asked: Message = {"role": "user", "content": query}
    return [*messages, *given.before, asked, *given.after] if given else [*messages, asked]


def _told_by(given: Given, query: str) -> list[str]:
    """The queries of turns that the run may tell itself."""
    first = [message["content"] for message in given.before[:1] if message["role"] == "user"]
    return [*first, query] if given.after else first


def sendable(messages: Iterable[Message]) -> list[Message]:
    """The messages as any server takes them, whatever the model or a client has written.

    HTTP carries UTF-8, which has no lone surrogates; and of a call that the model got wrong, many servers refuse to
    be reminded: arguments must be the JSON of an object, and a name must be one.
    """
    return [_sendable(message) for message in messages]


def _sendable(message: Message) -> Message:
    sent = dict(message)
    if isinstance(sent["content"], str):
        sent["content"] = _SURROGATES.sub("\ufffd", sent["content"])
    if "tool_calls" in sent:
        sent["tool_calls"] = [
            {
                **call,
                "function": {
                    "name": _name(call["function"]["name"]),
                    "arguments": _object(call["function"]["arguments"]),
                },
            }
            for call in sent["tool_calls"]
        ]
    return sent


def _name(name: str) -> str:
    return _NOT_IN_NAMES.sub("_", name)[:64] or "_"


def _object(arguments: str) -> str:
    try:
        found = isinstance(parse_arguments(arguments), dict) and arguments.strip()
    except ValueError:
        found = False
    return _SURROGATES.sub("\ufffd", arguments) if found else "{}"
