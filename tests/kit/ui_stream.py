"""The AI SDK's UI message stream as its clients read it: the chunks that they accept, and the message that they make.

The rules are those of ai 5.0.0, the strictest of them (`uiMessageChunkSchema`, `processUIMessageStream`), with
`reset-step` of 7.0.70.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from tests.kit import sse

DONE = "[DONE]"
Chunk = dict[str, Any]

_FIELDS: dict[str, tuple[dict[str, type], dict[str, type]]] = {
    "start": ({"messageId": str}, {}),
    "start-step": ({}, {}),
    "text-start": ({"id": str}, {}),
    "text-delta": ({"id": str, "delta": str}, {}),
    "text-end": ({"id": str}, {}),
    "reasoning-start": ({"id": str}, {}),
    "reasoning-delta": ({"id": str, "delta": str}, {}),
    "reasoning-end": ({"id": str}, {}),
    "tool-input-start": ({"toolCallId": str, "toolName": str}, {"providerExecuted": bool}),
    "tool-input-available": ({"toolCallId": str, "toolName": str, "input": object}, {"providerExecuted": bool}),
    "tool-output-available": ({"toolCallId": str, "output": object}, {}),
    "tool-output-error": ({"toolCallId": str, "errorText": str}, {}),
    "source-url": ({"sourceId": str, "url": str}, {"title": str}),
    "finish-step": ({}, {}),
    "finish": ({}, {}),
    "abort": ({}, {}),
    "error": ({"errorText": str}, {}),
    "reset-step": ({}, {}),
}
_DATA = ({"data": object}, {"id": str, "transient": bool})


class Refused(Exception):
    """A client ends the stream with an error."""


class Part(NamedTuple):
    """A part of a message: `kind` is text, reasoning, source-url, data-… or tool-<name>."""

    kind: str
    value: Any
    """The text; of a tool call {input, output, error}; the URL; the data."""


class Message:
    """What a client makes of chunks, as far as they have come. Raises Refused as it would."""

    def __init__(self) -> None:
        self.id: str | None = None
        self.error: str | None = None
        self.aborted = False
        self.finished = False
        self.transient: list[Chunk] = []
        self._parts: list[list[Any]] = []
        self._open: dict[str, list[Any]] = {}
        self._tools: dict[str, list[Any]] = {}
        self._ids: set[str] = set()

    @property
    def parts(self) -> list[Part]:
        return [Part(*part) for part in self._parts]

    def take(self, chunk: Chunk) -> Message:
        """A chunk more; returns itself."""
        kind = chunk.get("type")
        if not isinstance(kind, str):
            raise Refused(f"a chunk without a type: {chunk}")
        _check_fields(kind, chunk)
        _check_keys(chunk)
        if self.finished:
            raise Refused(f"{kind} after finish")
        if (kind == "start") != (self.id is None):
            raise Refused(f"{kind} where the message has {self.id!r} as its id")
        if kind in ("abort", "error", "finish", "finish-step") and self._open:
            raise Refused(f"{kind} with {sorted(self._open)} open")
        if (self.error is not None or self.aborted) and kind not in ("finish-step", "finish"):
            raise Refused(f"{kind} after an error or an abort")
        getattr(self, "_" + kind.replace("-", "_") if not kind.startswith("data-") else "_data")(chunk)
        return self

    def take_all(self, chunks: Iterable[Chunk]) -> Message:
        for chunk in chunks:
            self.take(chunk)
        return self

    @property
    def text(self) -> str:
        """The answer: the text after the last `data-rewind`."""
        last = max((n for n, part in enumerate(self._parts) if part[0] == "data-rewind"), default=-1)
        return "".join(part[1] for part in self._parts[last + 1 :] if part[0] == "text")

    def all_of(self, kind: str) -> list[Any]:
        return [part[1] for part in self._parts if part[0] == kind]

    def _start(self, chunk: Chunk) -> None:
        self.id = chunk["messageId"]

    def _start_step(self, chunk: Chunk) -> None:
        pass

    _finish_step = _start_step

    def _begin(self, kind: str, chunk: Chunk) -> None:
        if chunk["id"] in self._ids:
            raise Refused(f"the part {chunk['id']!r} is there twice")
        self._ids.add(chunk["id"])
        self._open[chunk["id"]] = [kind, ""]
        self._parts.append(self._open[chunk["id"]])

    def _delta(self, kind: str, chunk: Chunk) -> None:
        if self._open.get(chunk["id"], [None])[0] != kind:
            raise Refused(f"a delta of {chunk['id']!r}, which is not open")
        self._open[chunk["id"]][1] += chunk["delta"]

    def _close(self, kind: str, chunk: Chunk) -> None:
        if self._open.pop(chunk["id"], [None])[0] != kind:
            raise Refused(f"the end of {chunk['id']!r}, which is not open")

    def _text_start(self, chunk: Chunk) -> None:
        self._begin("text", chunk)

    def _text_delta(self, chunk: Chunk) -> None:
        self._delta("text", chunk)

    def _text_end(self, chunk: Chunk) -> None:
        self._close("text", chunk)

    def _reasoning_start(self, chunk: Chunk) -> None:
        self._begin("reasoning", chunk)

    def _reasoning_delta(self, chunk: Chunk) -> None:
        self._delta("reasoning", chunk)

    def _reasoning_end(self, chunk: Chunk) -> None:
        self._close("reasoning", chunk)

    def _tool_input_available(self, chunk: Chunk) -> None:
        call = {"id": chunk["toolCallId"], "input": chunk["input"]}
        known = self._tools.get(chunk["toolCallId"])
        if known is not None:
            known[1] = call
            return
        self._tools[chunk["toolCallId"]] = [f"tool-{chunk['toolName']}", call]
        self._parts.append(self._tools[chunk["toolCallId"]])

    def _tool_output_available(self, chunk: Chunk) -> None:
        self._result(chunk, output=chunk["output"])

    def _tool_output_error(self, chunk: Chunk) -> None:
        self._result(chunk, error=chunk["errorText"])

    def _result(self, chunk: Chunk, **what: Any) -> None:
        part = self._tools.get(chunk["toolCallId"])
        if part is None:
            raise Refused(f"a result of {chunk['toolCallId']!r}, which was not called")
        part[1] = {"id": part[1]["id"], "input": part[1]["input"], **what}

    def _source_url(self, chunk: Chunk) -> None:
        self._parts.append(["source-url", chunk["url"]])

    def _data(self, chunk: Chunk) -> None:
        if chunk.get("transient"):
            self.transient.append(chunk)
        else:
            self._parts.append([chunk["type"], chunk["data"]])

    def _reset_step(self, chunk: Chunk) -> None:
        self._parts.clear()
        self._open.clear()
        self._tools.clear()

    def _abort(self, chunk: Chunk) -> None:
        self.aborted = True

    def _error(self, chunk: Chunk) -> None:
        self.error = chunk["errorText"]

    def _finish(self, chunk: Chunk) -> None:
        self.finished = True


def chunks_of(body: bytes) -> list[Chunk]:
    """The chunks of a stream, `[DONE]` left out. Raises Refused for what is no chunk, and for any after `[DONE]`."""
    events = sse.parse(body)
    if any(event.type != "message" for event in events):
        raise Refused("an event with a type of its own")
    done = [n for n, event in enumerate(events) if event.data == DONE]
    if done not in ([], [len(events) - 1]):
        raise Refused("[DONE] is not the last")
    chunks = [event.json for event in events if event.data != DONE]
    if not all(isinstance(chunk, dict) for chunk in chunks):
        raise Refused("a chunk that is no object")
    if bool(done) != any(chunk["type"] == "finish" for chunk in chunks):
        raise Refused("[DONE] comes with finish, and finish with [DONE]")
    return chunks


def message_of(chunks: Sequence[Chunk]) -> Message:
    return Message().take_all(chunks)


def _check_fields(kind: str, chunk: Chunk) -> None:
    if not kind.startswith("data-") and kind not in _FIELDS:
        raise Refused(f"an unknown type: {kind!r}")
    required, optional = _FIELDS.get(kind, _DATA)
    fields = {name: value for name, value in chunk.items() if name != "type"}
    if missing := required.keys() - fields.keys():
        raise Refused(f"{kind} without {sorted(missing)}")
    if unknown := fields.keys() - required.keys() - optional.keys():
        raise Refused(f"{kind} with {sorted(unknown)}")
    for name, value in fields.items():
        if not isinstance(value, {**required, **optional}[name]):
            raise Refused(f"{kind} with {name}={value!r}")


def _check_keys(value: Any) -> None:
    """What `secure-json-parse` refuses."""
    if isinstance(value, dict):
        made = value.get("constructor")
        if "__proto__" in value or (isinstance(made, dict) and "prototype" in made):
            raise Refused("an object with a forbidden property")
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _check_keys(inner)
