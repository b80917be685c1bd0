"""Responses: our messages and tools as its request, its events as our pieces."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

from worker.models import failures
from worker.models.completions import MOST_ARGUMENT_CHARS, free_id, text_of, tokens_of
from worker.models.model import Call, End, Message, Options, Piece, Text, Thought, ToolSpec, Usage

PATH = "/responses"
PARAMETERS = frozenset({"temperature", "top_p", "max_tokens", "reasoning_effort"})
"""The sampling parameters that this API has."""

_THOUGHTS = frozenset({"response.reasoning_summary_text.delta", "response.reasoning_text.delta"})
_ENDS = frozenset({"response.completed", "response.incomplete", "response.failed"})


def request(messages: Sequence[Message], tools: Sequence[ToolSpec], options: Options) -> dict[str, Any]:
    """The body. The parameters must be among PARAMETERS."""
    parameters = dict(options.parameters)
    if "max_tokens" in parameters:
        parameters["max_output_tokens"] = parameters.pop("max_tokens")
    if "reasoning_effort" in parameters:
        # Only then, because models that do not reason refuse it.
        parameters["reasoning"] = {"effort": parameters.pop("reasoning_effort"), "summary": "auto"}
    body: dict[str, Any] = {
        "model": options.model,
        "input": [item for message in messages for item in _items(message)],
        "stream": True,
        "store": False,
        **parameters,
    }
    if tools:
        body["tools"] = [
            {
                "type": "function",
                "name": tool.name,
                "description": tool.description,
                "parameters": tool.parameters,
                "strict": False,
            }
            for tool in tools
        ]
    return body


def _items(message: Message) -> Iterator[dict[str, Any]]:
    if message["role"] == "tool":
        yield {"type": "function_call_output", "call_id": message["tool_call_id"], "output": message["content"]}
        return
    if message.get("content"):
        yield {"role": message["role"], "content": message["content"]}
    for call in message.get("tool_calls") or ():
        function = call["function"]
        yield {
            "type": "function_call",
            "call_id": call["id"],
            "name": function["name"],
            "arguments": function["arguments"],
        }


class Reader:
    """Takes the events of one answer. Raises Failed; anything else that it raises is a malformed event.

    `taken` are the ids of earlier calls: some servers begin each answer with the same ones.
    """

    def __init__(self, model: str, taken: frozenset[str] = frozenset()) -> None:
        self._model = model
        self._taken = set(taken)
        self._arguments: dict[int, str] = {}
        self._calls: dict[int, dict[str, Any]] = {}
        self._refusal = ""
        self._has_text = False
        self._response: dict[str, Any] | None = None

    @property
    def complete(self) -> bool:
        return self._response is not None

    def feed(self, event: Any) -> Iterator[Piece]:
        kind = event["type"]
        if kind == "response.output_text.delta":
            if event["delta"]:
                self._has_text = True
                yield Text(text=text_of(event["delta"]))
        elif kind in _THOUGHTS:
            if event["delta"]:
                yield Thought(text=text_of(event["delta"]))
        elif kind == "response.reasoning_summary_part.added":
            if event["summary_index"]:
                yield Thought(text="\n\n")
        elif kind == "response.refusal.delta":
            self._refusal += event["delta"]
        elif kind in ("response.output_item.added", "response.output_item.done"):
            if event["item"]["type"] == "function_call":
                self._calls[event["output_index"]] = event["item"]
        elif kind == "response.function_call_arguments.delta":
            index = event["output_index"]
            self._arguments[index] = self._arguments.get(index, "") + event["delta"]
            if len(self._arguments[index]) > MOST_ARGUMENT_CHARS:
                raise failures.broken("the arguments of a call do not end")
        elif kind == "response.function_call_arguments.done":
            self._arguments[event["output_index"]] = event["arguments"]
        elif kind in _ENDS:
            self._response = event["response"]
            yield from self._untold(event["response"])
        elif kind == "error":
            raise failures.of_object(event, model=self._model)

    def end(self) -> Iterator[Piece]:
        """What the end of the stream brings: the calls, and the End."""
        response = self._response
        if response is None:
            raise failures.broken()
        if response.get("error") or response.get("status") == "failed":
            raise failures.of_object(response.get("error"), model=self._model)
        cut = (response.get("incomplete_details") or {}).get("reason")
        if cut == "content_filter":
            raise failures.filtered()
        if self._refusal:
            raise failures.refused(self._refusal)
        reason: Literal["stop", "length", "tool_calls"] = "tool_calls" if self._calls else "stop"
        if cut == "max_output_tokens":
            reason = "length"
        if not self._has_text and not self._calls:
            raise failures.empty(reason)
        for index, item in sorted(self._calls.items()):
            arguments = item.get("arguments") or self._arguments.get(index) or "{}"
            id = free_id(str(item.get("call_id") or item.get("id") or ""), self._taken)
            yield Call(id=id, name=text_of(item["name"]), arguments=text_of(arguments))
        yield End(reason=reason, usage=_usage(response.get("usage")))

    def _untold(self, response: dict[str, Any]) -> Iterator[Piece]:
        """What is in the response, but did not come as events: some servers send no deltas, and Ollama gives calls that
        come one after the other the same index.
        """
        output = response.get("output") or []
        calls = {index: item for index, item in enumerate(output) if item["type"] == "function_call"}
        if len(calls) > len(self._calls):
            self._calls = calls
        if not self._has_text:
            parts = [part for item in output if item["type"] == "message" for part in item["content"]]
            for part in parts:
                if part["type"] == "output_text" and part["text"]:
                    self._has_text = True
                    yield Text(text=text_of(part["text"]))


def _usage(told: Any) -> Usage | None:
    if not told:
        return None
    return Usage(
        prompt=tokens_of(told, "input_tokens"),
        completion=tokens_of(told, "output_tokens"),
        cached=tokens_of(told, "input_tokens_details", "cached_tokens"),
        reasoning=tokens_of(told, "output_tokens_details", "reasoning_tokens"),
    )
