"""How an event is shown in a UI message stream, after what the client already has."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import groupby
from typing import Any, cast

from broker.events import Entry, dumps
from broker.gateway.dialects.aisdk.chunks import PART_KINDS, PartKind, Pen, harmless
from broker.gateway.dialects.aisdk.state import Beside, Rewind, State, backwards, open_calls, pieces_of
from broker.gateway.dialects.known import Known
from broker.gateway.dialects.shown import Shown
from broker.ids import EventId

VOID_CALL = "This call was taken back: its run has begun again."
OPEN_CALL = "This call has no result: its run ended before."


class Scribe:
    """Shows one entry."""

    def __init__(self, state: State, event_id: EventId, request_id: str, *, reset_step: bool) -> None:
        self.state = state
        self.pen = Pen(event_id, state.chunks, state.part)
        self._id = event_id
        self._request_id = request_id
        self._reset_step = reset_step

    def show(self, entry: Entry) -> None:
        data = json.loads(entry.data)
        match entry.type:
            case "start":
                self.pen.chunk("start", messageId=self._request_id)
                self.pen.chunk("start-step")
            case "attempt":
                self._rewind(data)
            case "token" | "reasoning" as kind:
                self._say("text" if kind == "token" else "reasoning", data["text"])
            case "tool_call":
                self._keep("tool_call", data["id"], entry.data)
                self._call(data)
            case "tool_result":
                self._keep("tool_result", data["id"], entry.data)
                self._result(data)
            case "sources":
                self.pen.transient("sources", entry.data)
                if data["stage"] == "analyzed":
                    self._keep("sources", "", entry.data)
                    self._link(data["items"])
            case "message" | "progress":
                self.pen.transient(entry.type, entry.data)
            case "data":
                self.pen.transient(data["name"], dumps(data["value"]))
            case "final":
                self._final(data)
            case "error":
                self._end("error", errorText=data["message"] or data["code"])
            case "cancelled":
                self._end("abort")

    def _set(self, **changes: Any) -> None:
        self.state = self.state._replace(**changes)

    # -- text --------------------------------------------------------------------------------------------------

    def _say(self, kind: PartKind, text: str) -> None:
        shown: Shown = getattr(self.state, kind)
        told = shown.token(self._id, text)
        if told is not None:
            shown, rest = told
            self._show(kind, rest or "", **{kind: shown})
            return
        told = Shown(shown.kept).token(self._id, text)
        assert told is not None
        self._set(**{kind: told[0]})
        self._instead(kind, told[0].text, self.state.rewind)

    def _show(self, kind: PartKind, text: str, /, **changes: Any) -> None:
        begins = bool(text) and self.pen.say(kind, text)
        if kind == "text":
            length = self.state.length
            changes |= {"length": length + len(text), "last_part": length if begins else self.state.last_part}
        if changes:
            self._set(**changes)

    def _instead(self, kind: PartKind, text: str, why: Rewind) -> None:
        """What the message has of this kind is void; `text` is what it is to have."""
        if self._reset_step:
            self._show_all_again()
            return
        self.pen.close()
        if kind == "text":
            self.pen.chunk("data-rewind", id=f"rewind-{self.pen.count}", data=why._asdict())
            self._set(length=0, last_part=0)
        self._show(kind, text)

    def _show_all_again(self, answer: str | None = None) -> None:
        """Everything that survives, with `answer` in place of the text where it is given."""
        text, reasoning = Shown(self.state.text.kept), Shown(self.state.reasoning.kept)
        self.pen.reset()
        self._set(text=text, reasoning=reasoning, calls=Known(), links=Known(), length=0, last_part=0)
        survivors = [(each.id, each.kind, each.data) for each in backwards(self.state.beside)]
        survivors += [(event_id, "reasoning", piece) for event_id, piece in pieces_of(reasoning)]
        if answer is None:
            survivors += [(event_id, "text", piece) for event_id, piece in pieces_of(text)]
        for kind, group in groupby(sorted(survivors), key=lambda survivor: survivor[1]):
            self._show_again(kind, [value for _, _, value in group])
        self._show("text", answer or "")

    def _show_again(self, kind: str, values: Sequence[str]) -> None:
        if kind in PART_KINDS:
            self._show(cast("PartKind", kind), "".join(values))
            return
        for value in map(json.loads, values):
            if kind == "tool_call":
                self._call(value)
            elif kind == "tool_result":
                self._result(value)
            else:
                self._link(value["items"])

    # -- beside the text ---------------------------------------------------------------------------------------

    def _keep(self, kind: str, call: str, data: str) -> None:
        data = data if self._reset_step else ""
        self._set(beside=Beside(self._id, kind, call, data, self.state.beside))

    def _call(self, data: dict[str, Any]) -> None:
        """`providerExecuted`: the client shall not try to execute it, nor answer for it."""
        self.pen.close()
        self.pen.chunk(
            "tool-input-available",
            toolCallId=data["id"],
            toolName=data["tool"],
            input=harmless(data["args"]),
            providerExecuted=True,
        )
        self._set(calls=self.state.calls.plus(data["id"]))

    def _result(self, data: dict[str, Any]) -> None:
        if not self.state.calls.holds(data["id"]):
            self._call({**data, "args": {}})
        failure = _failure(data["result"])
        if failure is not None:
            self.pen.chunk("tool-output-error", toolCallId=data["id"], errorText=failure)
        else:
            self.pen.chunk("tool-output-available", toolCallId=data["id"], output=harmless(data["result"]))

    def _link(self, items: Sequence[dict[str, Any]]) -> None:
        """Of an item with a URL; never of another scheme, as pages show it as a link."""
        for item in items:
            url, title = item.get("url"), item.get("title")
            if not isinstance(url, str) or not url.startswith(("https://", "http://")) or self.state.links.holds(url):
                continue
            titled = {"title": title} if isinstance(title, str) else {}
            self.pen.chunk("source-url", sourceId=f"source-{self.pen.count}", url=url, **titled)
            self._set(links=self.state.links.plus(url))

    def _give_up(self, calls: Sequence[str], why: str) -> None:
        """A tool part without an output looks as if its tool were still at work."""
        for call in calls:
            self.pen.chunk("tool-output-error", toolCallId=call, errorText=why)

    # -- the run -----------------------------------------------------------------------------------------------

    def _rewind(self, data: dict[str, Any]) -> None:
        resume_from = EventId.parse(data["resume_from"])
        state = self.state
        text, reasoning, beside = state.text.rewind(resume_from), state.reasoning.rewind(resume_from), state.beside
        self._give_up(open_calls(beside, resume_from), VOID_CALL)
        while beside is not None and beside.id > resume_from:
            beside = beside.below
        self._set(text=text, reasoning=reasoning, beside=beside)
        if text.kept is not state.text.kept:
            self._set(rewind=Rewind(data["attempt"], data["reason"]))

    def _final(self, data: dict[str, Any]) -> None:
        self._settle(data["answer"])
        self.pen.close()
        self._link(data["citations"])
        if data["citations"] or data["usage"]:
            self.pen.transient("final", dumps({"citations": data["citations"], "usage": data["usage"]}))
        self._end()

    def _settle(self, answer: str | None) -> None:
        """In the end the message has the answer, as its text or as the last part of it."""
        text = self.state.text
        shown = text.text + text.unsaid_text
        wanted = text.text if answer is None else answer
        if wanted.strip() in (shown.strip(), shown[self.state.last_part :].strip()):
            return
        if wanted.startswith(shown):
            self._show("text", wanted[len(shown) :])
        elif self._reset_step:
            self._show_all_again(answer)
        else:
            self._instead("text", wanted, self.state.rewind if answer is None else Rewind(None, "final"))

    def _end(self, *kind: str, **fields: Any) -> None:
        self.pen.close()
        self._give_up(open_calls(self.state.beside), OPEN_CALL)
        for each in kind:
            self.pen.chunk(each, **fields)
        if kind != ("abort",):
            self.pen.chunk("finish-step")
        self.pen.finish()
        self._set(ended=True, text=Shown(), reasoning=Shown(), beside=None, calls=Known(), links=Known())


def _failure(result: Any) -> str | None:
    """What a tool's result says of its failure: the worker's form of one."""
    if isinstance(result, dict) and result.keys() == {"error"} and isinstance(result["error"], str):
        return result["error"]
    return None
