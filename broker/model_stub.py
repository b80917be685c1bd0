"""A stand-in for a model server: the wire format of OpenAI-compatible servers, without a model. For trials and tests.

    python -m broker.model_stub [--port N] [--no-responses]

prints its URL (the OPENAI_BASE_URL) as its first line. It serves POST /v1/chat/completions and /v1/responses, with
streaming and without, and GET /v1/models; `--no-responses` makes it a server of Chat Completions only. GET /journal is
what it was asked: [{path, time, model, messages, tools, parameters, key, ended}], the oldest first; `ended` is null
while it answers, then "complete", "refused" (an HTTP error), "broken" (on purpose) or "disconnected" (by the client).

Unless told otherwise it says that it is a stub, and repeats what it was told: the last message, the earlier ones, and
what tools have answered. Directives in the last user message tell it otherwise:

    [[say=TEXT]]              answers TEXT
    [[tokens=N]]              answers N tokens: "w1 w2 w3 …"
    [[pace=N]]                N tokens per second; without it as fast as it can
    [[reasoning=TEXT]]        reasons first: `reasoning_content`, or a reasoning summary in Responses
    [[thinking=TEXT]]         the same as vLLM has it: `reasoning`, or reasoning text in Responses
    [[tool=NAME ARGUMENTS]]   calls a tool first, where the request has tools; several at once when it stands several
                              times. [[tool2=…]] is the second round of calls, and so on, [[tool*=…]] is every round.
                              ARGUMENTS are sent as they are, in pieces; without any they are {}
    [[cached=N]]              so many tokens of the prompt were cached; [[usage=none]]: tells no usage
    [[fail=KIND …]]           fails, with `times=N` only the first N times that this message comes (else always)

KIND before an answer: `401`, `403`, `404` (no such model), `429` or any other status, with `retry_after=SECONDS` or
`retry_after=date+SECONDS` (an HTTP date); `quota` (a 429 that no waiting helps); `context` (400, too long); `blocked`
(400, content filter); `silent` (never answers).
KIND after the first `after=N` pieces of an answer, 0 by default: `break` (the connection is cut), `malformed` (a chunk
that is no JSON), `error` (an error instead of a chunk), `end` (a proper end without the last chunks), `stall` (nothing
more comes), `filter` (content filter), `refusal` (the model refuses), `empty` (no answer at all).

`[[NAME@WORD=…]]` counts only where a system message has the WORD. A text with `]]` cannot stand in a directive.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import re
import socket
import sys
import time
import uuid
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from email.utils import formatdate
from typing import Any, NamedTuple

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from broker.events import dumps

HOST = "127.0.0.1"
MODEL = "stub"
REMEMBERED = 10_000
_AT_ONCE = 32
"""Frames in one write, where there is no pace."""
_ARGUMENT_PIECE = 5
_QUOTED_CHARS = 500
_DIRECTIVE = re.compile(
    r"\[\[\s*(say|tokens|pace|reasoning|thinking|tool|cached|usage|fail)(\d+|\*)?(?:@([\w-]+))?=(.*?)\]\](?!\])", re.S
)
_BEFORE = ("quota", "context", "blocked", "silent")
_BREAKS = ("break", "malformed", "error", "end", "stall")
_AFTER = (*_BREAKS, "filter", "refusal", "empty")


class BadDirective(ValueError):
    """A directive that cannot be followed; the message says which and why."""


@dataclass(frozen=True, kw_only=True)
class Failure:
    """`kind` is a status or one of _BEFORE and _AFTER; `times` is None for always."""

    kind: str
    after: int = 0
    times: int | None = None
    retry_after: str | None = None

    @property
    def status(self) -> int | None:
        """Of the HTTP error that it is, if it is one."""
        named = {"quota": 429, "context": 400, "blocked": 400}
        return int(self.kind) if self.kind.isdigit() else named.get(self.kind)

    @property
    def breaks(self) -> bool:
        """Whether it ends a stream before its time; the others of _AFTER are in the answer itself."""
        return self.kind in _BREAKS


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A request, the same for both APIs: `messages` are in the shape of Chat Completions."""

    model: str
    messages: list[dict[str, Any]]
    tools: list[str]
    stream: bool = False
    limit: int | None = None
    tell_usage: bool = True

    @property
    def query(self) -> str:
        return next((_text(m) for m in reversed(self.messages) if m.get("role") == "user"), "")

    @property
    def round(self) -> list[dict[str, Any]]:
        """What came after the last user message: calls and results."""
        last = max((n for n, m in enumerate(self.messages) if m.get("role") == "user"), default=-1)
        return self.messages[last + 1 :]

    @property
    def directives(self) -> list[tuple[str, str, str]]:
        """(name, suffix, value) of all that count."""
        system = " ".join(_text(m) for m in self.messages if m.get("role") in ("system", "developer"))
        found = _DIRECTIVE.findall(self.query)
        return [(name, suffix, value.strip()) for name, suffix, word, value in found if not word or word in system]


class ToolCall(NamedTuple):
    """`arguments` is what a directive says: it may be no JSON."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What is to be said. `reason` is Chat Completions' `finish_reason`, or `refusal`."""

    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))
    model: str
    text: Sequence[str] = ()
    reasoning: Sequence[str] = ()
    plain_reasoning: bool = False
    calls: Sequence[ToolCall] = ()
    reason: str = "stop"
    prompt: int = 0
    cached: int = 0
    usage_told: bool = True
    pace: float | None = None
    failure: Failure | None = None

    @property
    def completion(self) -> int:
        """In tokens."""
        return len(self.text) + len(self.reasoning) + sum(1 + len(call.arguments) // 4 for call in self.calls)


def answer_to(asked: Asked) -> Answer:
    """Raises BadDirective."""
    directives = asked.directives
    values = {name: value for name, _, value in directives}
    failure = _failure(values["fail"]) if "fail" in values else None
    reasoning = values.get("reasoning", values.get("thinking", ""))
    calls = _calls(asked, directives)
    text = [] if calls and "say" not in values else _pieces(_said(asked, values))
    reason = "tool_calls" if calls else "stop"
    if not calls and asked.limit is not None and len(text) > asked.limit:
        text, reason = text[: asked.limit], "length"
    if failure is not None and failure.kind in ("filter", "refusal", "empty"):
        text, calls, reasoning = text[: failure.after], [], reasoning if failure.after else ""
        reason = {"filter": "content_filter", "refusal": "refusal", "empty": "stop"}[failure.kind]
    if reason == "refusal":
        text = _pieces("I cannot help with that.")
    prompt = sum(1 + len(_text(message)) // 4 for message in asked.messages)
    return Answer(
        model=asked.model,
        text=text,
        reasoning=_pieces(reasoning),
        plain_reasoning="thinking" in values,
        calls=calls,
        reason=reason,
        prompt=prompt,
        cached=min(int(_number("cached", values.get("cached", "0"))), prompt),
        usage_told=asked.tell_usage and values.get("usage") != "none",
        pace=_number("pace", values["pace"]) if "pace" in values else None,
        failure=failure,
    )


def _said(asked: Asked, values: dict[str, str]) -> str:
    if "say" in values:
        return values["say"]
    if "tokens" in values:
        return " ".join(f"w{n}" for n in range(1, int(_number("tokens", values["tokens"])) + 1))
    plain = _shown(_DIRECTIVE.sub("", asked.query))
    told = ["I am a stub, not a model.", f"You said: {plain}" if plain else "You said nothing."]
    earlier = [_shown(_DIRECTIVE.sub("", _text(m))) for m in asked.messages if m.get("role") == "user"][:-1]
    if earlier:
        told.append("Before that you said: " + "; ".join(earlier))
    results = [_text(m) for m in asked.round if m.get("role") == "tool"]
    told += [f"A tool answered: {_shown(result)}" for result in results]
    return "\n".join(told)


def _shown(text: str) -> str:
    plain = " ".join(text.split())
    return plain if len(plain) <= _QUOTED_CHARS else plain[: _QUOTED_CHARS - 1] + "…"


def _calls(asked: Asked, directives: list[tuple[str, str, str]]) -> list[ToolCall]:
    if not asked.tools:
        return []
    number = str(1 + sum(1 for m in asked.round if m.get("tool_calls")))
    wanted = [value for name, suffix, value in directives if name == "tool" and (suffix or "1") in (number, "*")]
    calls = []
    for value in wanted:
        name, _, arguments = value.partition(" ")
        calls.append(ToolCall("call_" + uuid.uuid4().hex[:24], name, arguments.strip() or "{}"))
    return calls


def _failure(value: str) -> Failure:
    kind, *options = value.split() or [""]
    if not (re.fullmatch(r"[45]\d\d", kind) or kind in _BEFORE + _AFTER):
        raise BadDirective(f"fail={kind}: not a status from 400 on, nor one of {', '.join(_BEFORE + _AFTER)}")
    given = dict(option.partition("=")[::2] for option in options)
    if unknown := given.keys() - {"after", "times", "retry_after"}:
        raise BadDirective(f"fail={kind}: {', '.join(sorted(unknown))} is not one of after, times, retry_after")
    if "after" in given and kind not in _AFTER:
        raise BadDirective(f"fail={kind}: comes before the answer, so after= does not go with it")
    _number("retry_after", given.get("retry_after", "0").removeprefix("date+"))
    return Failure(
        kind=kind,
        after=int(_number("after", given.get("after", "0"))),
        times=int(_number("times", given["times"])) if "times" in given else None,
        retry_after=given.get("retry_after"),
    )


def _number(name: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 10**9:
        raise BadDirective(f"{name}={text}: must be a number")
    return value


def _pieces(text: str) -> list[str]:
    """Its tokens: together they are the text."""
    return re.findall(r"\s*\S+|\s+", text)


def _text(message: dict[str, Any]) -> str:
    content = message.get("content") or ""
    if isinstance(content, str):
        return content
    return "".join(part.get("text") or "" for part in content if isinstance(part, dict))


class Frame(NamedTuple):
    """One event of a stream. `kind`: "piece" is a part of the answer, "end" says that it has ended, "frame" neither."""

    kind: str
    data: dict[str, Any]


class Completions:
    """The wire format of Chat Completions."""

    terminator = "data: [DONE]\n\n"

    @staticmethod
    def asked(body: dict[str, Any]) -> Asked:
        options = body.get("stream_options") or {}
        return Asked(
            model=str(body.get("model") or MODEL),
            messages=body.get("messages") or [],
            tools=[tool["function"]["name"] for tool in body.get("tools") or ()],
            stream=bool(body.get("stream")),
            limit=body.get("max_completion_tokens") or body.get("max_tokens"),
            tell_usage=not body.get("stream") or bool(options.get("include_usage")),
        )

    @staticmethod
    def encode(data: dict[str, Any]) -> str:
        return f"data: {dumps(data)}\n\n"

    @staticmethod
    def error(message: str) -> dict[str, Any]:
        return {"error": {"message": message, "type": "server_error", "param": None, "code": "server_error"}}

    @staticmethod
    def frames(answer: Answer) -> Iterator[Frame]:
        base = {
            "id": f"chatcmpl-{answer.id}",
            "object": "chat.completion.chunk",
            "created": answer.created,
            "model": answer.model,
            "service_tier": "default",
            "system_fingerprint": "fp_stub",
        }

        def chunk(delta: dict[str, Any], reason: str | None = None) -> dict[str, Any]:
            choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
            return {**base, "choices": [choice], "usage": None}

        yield Frame("frame", chunk({"role": "assistant", "content": "", "refusal": None}))
        for piece in answer.reasoning:
            yield Frame("piece", chunk({"reasoning" if answer.plain_reasoning else "reasoning_content": piece}))
        for piece in answer.text:
            yield Frame("piece", chunk({"refusal" if answer.reason == "refusal" else "content": piece}))
        for index, call in enumerate(answer.calls):
            function = {"name": call.name, "arguments": ""}
            start = {"index": index, "id": call.id, "type": "function", "function": function}
            yield Frame("piece", chunk({"tool_calls": [start]}))
            for part in _cut(call.arguments):
                yield Frame("piece", chunk({"tool_calls": [{"index": index, "function": {"arguments": part}}]}))
        yield Frame("end", chunk({}, "stop" if answer.reason == "refusal" else answer.reason))
        if answer.usage_told:
            yield Frame("frame", {**base, "choices": [], "usage": Completions._usage(answer)})

    @staticmethod
    def whole(answer: Answer) -> dict[str, Any]:
        text = "".join(answer.text)
        refused = answer.reason == "refusal"
        message: dict[str, Any] = {
            "role": "assistant",
            "content": None if refused or not text else text,
            "refusal": text if refused else None,
        }
        if answer.reasoning:
            message["reasoning" if answer.plain_reasoning else "reasoning_content"] = "".join(answer.reasoning)
        if answer.calls:
            message["tool_calls"] = [
                {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                for call in answer.calls
            ]
        reason = "stop" if refused else answer.reason
        return {
            "id": f"chatcmpl-{answer.id}",
            "object": "chat.completion",
            "created": answer.created,
            "model": answer.model,
            "choices": [{"index": 0, "message": message, "logprobs": None, "finish_reason": reason}],
            **({"usage": Completions._usage(answer)} if answer.usage_told else {}),
        }

    @staticmethod
    def _usage(answer: Answer) -> dict[str, Any]:
        return {
            "prompt_tokens": answer.prompt,
            "completion_tokens": answer.completion,
            "total_tokens": answer.prompt + answer.completion,
            "prompt_tokens_details": {"cached_tokens": answer.cached, "audio_tokens": 0},
            "completion_tokens_details": {"reasoning_tokens": len(answer.reasoning), "audio_tokens": 0},
        }


class Responses:
    """The wire format of Responses."""

    terminator = ""

    @staticmethod
    def asked(body: dict[str, Any]) -> Asked:
        given = body.get("input") or []
        messages: list[dict[str, Any]] = []
        if body.get("instructions"):
            messages.append({"role": "system", "content": body["instructions"]})
        for item in [{"role": "user", "content": given}] if isinstance(given, str) else given:
            match item.get("type", "message"):
                case "message":
                    messages.append({"role": item["role"], "content": item["content"]})
                case "function_call":
                    function = {"name": item["name"], "arguments": item["arguments"]}
                    call = {"id": item["call_id"], "type": "function", "function": function}
                    if messages and messages[-1]["role"] == "assistant":
                        messages[-1].setdefault("tool_calls", []).append(call)
                    else:
                        messages.append({"role": "assistant", "content": None, "tool_calls": [call]})
                case "function_call_output":
                    messages.append({"role": "tool", "tool_call_id": item["call_id"], "content": item["output"]})
        return Asked(
            model=str(body.get("model") or MODEL),
            messages=messages,
            tools=[tool["name"] for tool in body.get("tools") or ()],
            stream=bool(body.get("stream")),
            limit=body.get("max_output_tokens"),
        )

    @staticmethod
    def encode(data: dict[str, Any]) -> str:
        return f"event: {data['type']}\ndata: {dumps(data)}\n\n"

    @staticmethod
    def error(message: str) -> dict[str, Any]:
        return {"type": "error", "sequence_number": 0, "code": "server_error", "message": message, "param": None}

    @staticmethod
    def frames(answer: Answer) -> Iterator[Frame]:
        numbers = itertools.count()

        def frame(name: str, /, *, kind: str = "frame", **fields: Any) -> Frame:
            return Frame(kind, {"type": f"response.{name}", "sequence_number": next(numbers), **fields})

        begun = Responses._response(answer, "in_progress", [])
        yield frame("created", response=begun)
        yield frame("in_progress", response=begun)
        writers = {"reasoning": Responses._reasoning, "message": Responses._message, "function_call": Responses._call}
        for index, item in enumerate(Responses._items(answer)):
            yield from writers[item["type"]](answer, index, item, frame)
            yield frame("output_item.done", output_index=index, item=item)
        ended = Responses.whole(answer)
        yield frame(ended["status"], kind="end", response=ended)

    @staticmethod
    def _reasoning(answer: Answer, index: int, item: dict[str, Any], frame: Callable[..., Frame]) -> Iterator[Frame]:
        if answer.plain_reasoning:
            key, name, part_name, place = "content", "reasoning_text", "content_part", "content_index"
        else:
            key, name, part_name = "summary", "reasoning_summary_text", "reasoning_summary_part"
            place = "summary_index"
        [part] = item[key]
        at = {"item_id": item["id"], "output_index": index, place: 0}
        yield frame("output_item.added", output_index=index, item={**item, "status": "in_progress", key: []})
        yield frame(f"{part_name}.added", **at, part={**part, "text": ""})
        for piece in answer.reasoning:
            yield frame(f"{name}.delta", kind="piece", **at, delta=piece)
        yield frame(f"{name}.done", **at, text=part["text"])
        yield frame(f"{part_name}.done", **at, part=part)

    @staticmethod
    def _message(answer: Answer, index: int, item: dict[str, Any], frame: Callable[..., Frame]) -> Iterator[Frame]:
        refused = answer.reason == "refusal"
        name, key = ("refusal", "refusal") if refused else ("output_text", "text")
        more: dict[str, Any] = {} if refused else {"logprobs": []}
        [part] = item["content"]
        at = {"item_id": item["id"], "output_index": index, "content_index": 0}
        yield frame("output_item.added", output_index=index, item={**item, "status": "in_progress", "content": []})
        yield frame("content_part.added", **at, part={**part, key: ""})
        for piece in answer.text:
            yield frame(f"{name}.delta", kind="piece", **at, delta=piece, **more)
        yield frame(f"{name}.done", **at, **{key: part[key]}, **more)
        yield frame("content_part.done", **at, part=part)

    @staticmethod
    def _call(_: Answer, index: int, item: dict[str, Any], frame: Callable[..., Frame]) -> Iterator[Frame]:
        at = {"item_id": item["id"], "output_index": index}
        name, arguments = item["name"], item["arguments"]
        yield frame("output_item.added", output_index=index, item={**item, "status": "in_progress", "arguments": ""})
        for piece in _cut(arguments):
            yield frame("function_call_arguments.delta", kind="piece", **at, delta=piece)
        yield frame("function_call_arguments.done", **at, name=name, arguments=arguments)

    @staticmethod
    def whole(answer: Answer) -> dict[str, Any]:
        status = "incomplete" if answer.reason in ("length", "content_filter") else "completed"
        return Responses._response(answer, status, Responses._items(answer))

    @staticmethod
    def _response(answer: Answer, status: str, output: list[dict[str, Any]]) -> dict[str, Any]:
        cut = {"length": "max_output_tokens", "content_filter": "content_filter"}.get(answer.reason)
        usage = {
            "input_tokens": answer.prompt,
            "input_tokens_details": {"cached_tokens": answer.cached, "cache_write_tokens": 0},
            "output_tokens": answer.completion,
            "output_tokens_details": {"reasoning_tokens": len(answer.reasoning)},
            "total_tokens": answer.prompt + answer.completion,
        }
        return {
            "id": f"resp_{answer.id}",
            "object": "response",
            "created_at": answer.created,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": {"reason": cut} if status == "incomplete" else None,
            "instructions": None,
            "model": answer.model,
            "output": output,
            "parallel_tool_calls": True,
            "store": False,
            "tool_choice": "auto",
            "tools": [],
            "usage": usage if status != "in_progress" and answer.usage_told else None,
        }

    @staticmethod
    def _items(answer: Answer) -> list[dict[str, Any]]:
        items: list[dict[str, Any]] = []
        text = "".join(answer.text)
        if answer.reasoning:
            kind = "reasoning_text" if answer.plain_reasoning else "summary_text"
            parts = [{"type": kind, "text": "".join(answer.reasoning)}]
            told: dict[str, Any] = {"summary": [], "content": parts} if answer.plain_reasoning else {"summary": parts}
            items.append({"id": f"rs_{answer.id}", "type": "reasoning", "status": "completed", **told})
        if text:
            status = "incomplete" if answer.reason in ("length", "content_filter") else "completed"
            part: dict[str, Any] = {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
            if answer.reason == "refusal":
                part = {"type": "refusal", "refusal": text}
            message = {"type": "message", "role": "assistant", "status": status, "content": [part]}
            items.append({"id": f"msg_{answer.id}", **message})
        for number, call in enumerate(answer.calls):
            told = {"call_id": call.id, "name": call.name, "arguments": call.arguments}
            items.append({"id": f"fc_{number}_{answer.id}", "type": "function_call", "status": "completed", **told})
        return items


Api = Completions | Responses


def _cut(arguments: str) -> Iterator[str]:
    return (arguments[n : n + _ARGUMENT_PIECE] for n in range(0, len(arguments), _ARGUMENT_PIECE))


class Streamed(Response):
    """The answer as Server-Sent Events. It is an ASGI application, because only that can leave a body without an end:
    uvicorn then cuts the connection.
    """

    def __init__(self, api: Api, answer: Answer, entry: dict[str, Any]) -> None:
        super().__init__(media_type="text/event-stream")
        del self.headers["content-length"]
        self._api = api
        self._answer = answer
        self._entry = entry

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        gone = asyncio.create_task(_disconnect(receive))
        sending = asyncio.create_task(self._send(send))
        try:
            await asyncio.wait([gone, sending], return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                sending.result()
            else:
                self._entry["ended"] = "disconnected"
        finally:
            for task in (gone, sending):
                task.cancel()
            await asyncio.gather(gone, sending, return_exceptions=True)

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        failure, pace = self._answer.failure, self._answer.pace
        limit = failure.after if failure is not None and failure.breaks else None
        batch, pieces, started = list[str](), 0, time.monotonic()
        for kind, data in self._api.frames(self._answer):
            fails = limit is not None and (kind == "end" or (kind == "piece" and pieces >= limit))
            if fails or pace or pieces == 1 or len(batch) >= _AT_ONCE:
                await self._write(send, batch)
                batch.clear()
            if fails and failure is not None:
                await self._fail(send, failure.kind)
                return
            if pace and kind == "piece":
                await asyncio.sleep(started + pieces / pace - time.monotonic())
            batch.append(self._api.encode(data))
            pieces += kind == "piece"
        await self._write(send, [*batch, self._api.terminator])
        self._entry["ended"] = "complete"
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _fail(self, send: Send, kind: str) -> None:
        if kind == "stall":
            await asyncio.Event().wait()
        self._entry["ended"] = "broken"
        if kind == "malformed":
            await self._write(send, ['data: {"id": "chatcmpl-1", "choi\n\n'])
        elif kind == "error":
            await self._write(send, [self._api.encode(self._api.error("The server had an error."))])
        if kind != "break":
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    @staticmethod
    async def _write(send: Send, frames: list[str]) -> None:
        if frames:
            await send({"type": "http.response.body", "body": "".join(frames).encode(), "more_body": True})
            await asyncio.sleep(0)


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class Stub:
    """The server's state: what it was asked, and how often each message has failed."""

    def __init__(self) -> None:
        self.journal: deque[dict[str, Any]] = deque(maxlen=REMEMBERED)
        self._failed: Counter[str] = Counter()

    def endpoint(self, api: Api, *, exists: bool = True) -> Any:
        """Without it the server answers as if it had no such path."""

        async def answer(request: Request) -> Response:
            try:
                body = await request.json()
                asked = api.asked(body)
                if not all(isinstance(message, dict) for message in asked.messages):
                    raise TypeError("a message that is no object")
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                return error_response(
                    400, f"The request cannot be understood: {error!r}", "invalid_request_error", None
                )
            entry = self._note(request, body, asked)
            if not exists:
                entry["ended"] = "refused"
                return JSONResponse({"detail": "Not Found"}, 404)
            try:
                planned = self._still_failing(asked, answer_to(asked))
            except BadDirective as error:
                entry["ended"] = "refused"
                return error_response(
                    400, f"A directive of the stub: {error}", "invalid_request_error", "bad_directive"
                )
            return await self._answer(request, api, asked, planned, entry)

        return answer

    async def _answer(
        self, request: Request, api: Api, asked: Asked, planned: Answer, entry: dict[str, Any]
    ) -> Response:
        failure = planned.failure
        if failure is not None and failure.status is not None:
            entry["ended"] = "refused"
            return failed_response(failure, failure.status, asked.model)
        if failure is not None and (failure.kind == "silent" or (failure.kind == "stall" and not asked.stream)):
            await _disconnect(request.receive)
            entry["ended"] = "disconnected"
            return Response()
        if asked.stream:
            return Streamed(api, planned, entry)
        if failure is not None and failure.kind in ("break", "malformed", "end", "error"):
            entry["ended"] = "broken"
            return JSONResponse(api.error("The server had an error."), 500)
        entry["ended"] = "complete"
        return JSONResponse(api.whole(planned))

    def _note(self, request: Request, body: dict[str, Any], asked: Asked) -> dict[str, Any]:
        known = {"model", "messages", "input", "instructions", "tools", "stream"}
        entry = {
            "path": request.url.path,
            "time": time.time(),
            "model": asked.model,
            "messages": asked.messages,
            "tools": asked.tools,
            "parameters": {name: value for name, value in body.items() if name not in known},
            "key": request.headers.get("authorization", "").removeprefix("Bearer "),
            "ended": None,
        }
        self.journal.append(entry)
        return entry

    def _still_failing(self, asked: Asked, planned: Answer) -> Answer:
        """Without its failure, once that has happened often enough."""
        failure = planned.failure
        if failure is None or failure.times is None:
            return planned
        self._failed[asked.query] += 1
        if self._failed[asked.query] <= failure.times:
            return planned
        mended = [
            {**m, "content": re.sub(r"\[\[\s*fail.*?\]\]", "", _text(m))} if m.get("role") == "user" else m
            for m in asked.messages
        ]
        return answer_to(replace(asked, messages=mended))


def failed_response(failure: Failure, status: int, model: str) -> Response:
    headers = {}
    if failure.retry_after is not None:
        dated, seconds = failure.retry_after.startswith("date+"), failure.retry_after.removeprefix("date+")
        headers["Retry-After"] = formatdate(time.time() + float(seconds), usegmt=True) if dated else seconds
    message, kind, code = {
        "401": ("Incorrect API key provided.", "invalid_request_error", "invalid_api_key"),
        "404": (f"The model `{model}` does not exist or you do not have access to it.", "invalid_request_error", None),
        "429": ("Rate limit reached for requests.", "requests", "rate_limit_exceeded"),
        "quota": ("You exceeded your current quota.", "insufficient_quota", "insufficient_quota"),
        "context": (
            "This model's maximum context length is 8192 tokens. However, your messages resulted in 9999 tokens.",
            "invalid_request_error",
            "context_length_exceeded",
        ),
        "blocked": ("The prompt was filtered by the content policy.", "invalid_request_error", "content_filter"),
    }.get(failure.kind, (f"The stub answers {status}, as it was told.", "server_error", None))
    return error_response(status, message, kind, "model_not_found" if failure.kind == "404" else code, headers)


def error_response(
    status: int, message: str, kind: str, code: str | None, headers: dict[str, str] | None = None
) -> Response:
    return JSONResponse(
        {"error": {"message": message, "type": kind, "param": None, "code": code}}, status, headers=headers
    )


def make_app(*, responses: bool = True) -> Starlette:
    """`responses`: whether the server has that API."""
    stub = Stub()

    async def models(_: Request) -> Response:
        return JSONResponse({"object": "list", "data": [{"id": MODEL, "object": "model", "owned_by": "stub"}]})

    async def journal(_: Request) -> Response:
        return JSONResponse(list(stub.journal))

    routes = [
        Route("/v1/chat/completions", stub.endpoint(Completions()), methods=["POST"]),
        Route("/v1/responses", stub.endpoint(Responses(), exists=responses), methods=["POST"]),
        Route("/v1/models", models),
        Route("/journal", journal),
    ]
    return Starlette(routes=routes)


def serve(listener: socket.socket, *, responses: bool = True) -> None:
    """Until SIGTERM or SIGINT. What still streams then is cut."""
    config = uvicorn.Config(
        make_app(responses=responses),
        lifespan="off",
        ws="none",
        log_level="critical",
        access_log=False,
        timeout_graceful_shutdown=1,
    )
    uvicorn.Server(config).run(sockets=[listener])


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m broker.model_stub",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--port", type=int, default=0, help="Port to listen on; a free one by default.")
    parser.add_argument("--fd", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--no-responses", action="store_true", help="Chat Completions only.")
    given = parser.parse_args()
    try:
        listener = socket.socket(fileno=given.fd) if given.fd is not None else socket.create_server((HOST, given.port))
    except OSError as error:
        sys.exit(f"model_stub: cannot listen on {HOST}:{given.port}: {error.strerror or error}")
    if given.fd is None:
        sys.stdout.write(f"http://{HOST}:{listener.getsockname()[1]}/v1\n")
        sys.stdout.flush()
    serve(listener, responses=not given.no_responses)


if __name__ == "__main__":
    main()
