"""The `input` of a request: what is asked, and what was said before and after it.

Messages have the shape of Chat Completions: {"role", "content"}, an assistant's with `tool_calls`, a tool's with a
`tool_call_id`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from broker.errors import Invalid
from broker.events import Entry
from broker.fold import fold
from broker.gateway.dialects.openai import items
from broker.gateway.requests import refuse
from broker.ids import EventId

Message = dict[str, Any]
_TEXTS = ("input_text", "output_text", "text")
_UNTOLD = ("reasoning",)
"""Items that clients send back, and that say nothing to another model."""


@dataclass(frozen=True, kw_only=True)
class Conversation:
    query: str | None
    """The last text of the user; None where the input has none, but outputs of functions."""
    instructions: tuple[str, ...] = ()
    """Of its messages of the system and the developer."""
    before: list[Message] = field(default_factory=list)
    after: list[Message] = field(default_factory=list)
    """What followed the query: calls of functions, and their outputs."""

    @property
    def goes_on(self) -> bool:
        """Whether it only makes sense behind an earlier response: without a query, or with outputs of its calls."""
        called = {call["id"] for message in self.before for call in message.get("tool_calls", ())}
        return self.query is None or any(
            message["role"] == "tool" and message["tool_call_id"] not in called for message in self.before
        )

    def after_run(self, query: str, said: Sequence[Message]) -> Conversation:
        """This one behind a run that was asked `query` and has `said` so much. Without a query it answers the same."""
        if self.query is None:
            return replace(self, query=query, after=[*said, *self.after])
        return replace(self, before=[{"role": "user", "content": query}, *said, *self.before])


def read(given: Any) -> Conversation:
    """Raises Invalid, which names the place in the input."""
    if isinstance(given, str):
        return Conversation(query=given or refuse("input", "It is empty: there is nothing to answer."))
    if not isinstance(given, list) or not given:
        refuse("input", "It must be a text, or a list of items that is not empty.")
    instructions, messages = [], list[Message]()
    for number, item in enumerate(given):
        place = f"input[{number}]"
        if not isinstance(item, dict):
            refuse(place, "It must be an object.")
        kind = item.get("type", "message")
        if kind == "message" and item.get("role") in ("system", "developer"):
            instructions.append(_text(item.get("content"), f"{place}.content"))
        elif kind == "message":
            messages.append(_message(item, place))
        elif kind == "function_call":
            called(messages, *(_string(item, name, place) for name in ("call_id", "name", "arguments")))
        elif kind == "function_call_output":
            output = _text(item.get("output"), f"{place}.output")
            messages.append({"role": "tool", "tool_call_id": _string(item, "call_id", place), "content": output})
        elif kind not in _UNTOLD:
            refuse(f"{place}.type", f"Items of the type {str(kind)[:64]!r} are not supported here.")
    return _around_query(tuple(instructions), messages)


def _around_query(instructions: tuple[str, ...], messages: list[Message]) -> Conversation:
    asked = [number for number, message in enumerate(messages) if message["role"] == "user"]
    if not asked:
        if not any(message["role"] == "tool" for message in messages):
            refuse("input", "It has no message of the user, and no output of a function.")
        return Conversation(query=None, instructions=instructions, after=messages)
    last = asked[-1]
    query = messages[last]["content"] or refuse("input", "The user's last message is empty.")
    return Conversation(query=query, instructions=instructions, before=messages[:last], after=messages[last + 1 :])


def called(messages: list[Message], id: str, name: str, arguments: str) -> None:
    """Adds a call: to the assistant's message that it is a part of, or in one of its own."""
    if not messages or messages[-1]["role"] != "assistant":
        messages.append({"role": "assistant", "content": None})
    call = {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}
    messages[-1].setdefault("tool_calls", []).append(call)


def of_run(entries: Iterable[Entry], call_id: Callable[[EventId], str]) -> list[Message]:
    """What a run said: its text, its calls, their results. `call_id` is how its client knows the call of an event."""
    messages: list[Message] = []
    ids: dict[str, str] = {}
    for entry in fold(entries):
        data = json.loads(entry.data)
        if entry.type == "token":
            if not messages or messages[-1]["role"] != "assistant" or "tool_calls" in messages[-1]:
                messages.append({"role": "assistant", "content": ""})
            messages[-1]["content"] += data["text"]
        elif entry.type == "tool_call":
            ids[data["id"]] = call_id(entry.id)
            called(messages, ids[data["id"]], data["tool"], items.arguments(data))
        elif entry.type == "tool_result" and data["id"] in ids:
            messages.append({"role": "tool", "tool_call_id": ids[data["id"]], "content": items.output(data)})
    return messages


def check_outputs(messages: Iterable[Message]) -> None:
    """Raises Invalid unless each call has one output, and each output a call before it."""
    pending: list[str] = []
    for message in messages:
        if message["role"] == "tool":
            if message["tool_call_id"] not in pending:
                _refuse_input(f"No tool call found for function call output with call_id {message['tool_call_id']}.")
            pending.remove(message["tool_call_id"])
        elif pending:
            break
        pending += [call["id"] for call in message.get("tool_calls", ())]
    if pending:
        _refuse_input(f"No tool output found for function call {pending[0]}.")


def _refuse_input(message: str) -> None:
    raise Invalid(message, errors=[{"field": "input", "message": message}])


def _message(item: dict[str, Any], place: str) -> Message:
    if item.get("role") not in ("user", "assistant"):
        refuse(f"{place}.role", "It must be one of user, assistant, system, developer.")
    return {"role": item["role"], "content": _text(item.get("content"), f"{place}.content")}


def _text(content: Any, place: str) -> str:
    """A text, or a list of parts that are."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        refuse(place, "It must be a text, or a list of parts with texts.")
    texts = []
    for number, part in enumerate(content):
        if not isinstance(part, dict):
            refuse(f"{place}[{number}]", "It must be an object.")
        if part.get("type") not in _TEXTS:
            refuse(f"{place}[{number}].type", f"Only text is supported here, not {str(part.get('type'))[:64]!r}.")
        texts.append(_string(part, "text", f"{place}[{number}]"))
    return "".join(texts)


def _string(item: dict[str, Any], name: str, place: str) -> str:
    value = item.get(name)
    if not isinstance(value, str):
        refuse(f"{place}.{name}", "It must be a text.")
    return value
