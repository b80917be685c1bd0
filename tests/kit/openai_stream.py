"""A strict reader of the stream of a response: what OpenAI's clients rely on, checked event by event."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from tests.kit import sse

TERMINALS = {"response.completed", "response.failed", "response.incomplete"}
_STATUSES = {
    "response.created": {"queued"},
    "response.in_progress": {"in_progress"},
    "response.completed": {"completed", "cancelled"},
    "response.failed": {"failed"},
    "response.incomplete": {"incomplete"},
}
_TEXT = {
    "message": ("response.output_text.delta", "response.output_text.done", "content_index"),
    "reasoning": (
        "response.reasoning_summary_text.delta",
        "response.reasoning_summary_text.done",
        "summary_index",
    ),
    "function_call": ("response.function_call_arguments.delta", "response.function_call_arguments.done", ""),
}
_PARTS = {
    "message": ("response.content_part.added", "response.content_part.done", "output_text"),
    "reasoning": ("response.reasoning_summary_part.added", "response.reasoning_summary_part.done", "summary_text"),
}


class Checker:
    """Takes the events of one stream, from its first on. Raises AssertionError."""

    def __init__(self) -> None:
        self.sequence = -1
        self.response: dict[str, Any] | None = None
        """As the last event that had it said."""
        self.ended = False
        self.done: dict[int, dict[str, Any]] = {}
        """The items that were closed, by their index."""
        self._open: dict[str, Any] | None = None
        self._part: dict[str, Any] | None = None
        self._text: str | None = None
        self._text_done = False
        self._seen: set[str] = set()

    def feed(self, event: dict[str, Any]) -> None:
        kind = event["type"]
        assert not self.ended, f"{kind} after the end"
        self._sequence(event["sequence_number"])
        if "response" in event:
            self._lifecycle(kind, event["response"])
        elif kind == "response.output_item.added":
            self._added(event)
        elif kind == "response.output_item.done":
            self._item_done(event)
        else:
            self._within(kind, event)

    def _sequence(self, number: int) -> None:
        jumped = number % 1_000_000 == 0 and number >= 2_000_000
        assert number == self.sequence + 1 or (jumped and number > self.sequence), f"{number} after {self.sequence}"
        self.sequence = number

    def _lifecycle(self, kind: str, response: dict[str, Any]) -> None:
        assert response["status"] in _STATUSES[kind], f"{kind} with the status {response['status']}"
        if self.response is None:
            assert kind == "response.created", f"the first event is {kind}"
            assert response["output"] == []
        else:
            assert kind != "response.created", "created twice"
            for name in response.keys() - {"status", "output", "error", "usage", "incomplete_details"}:
                assert response[name] == self.response[name], f"{name} has changed"
        self.response = response
        assert (response["status"] == "failed") == (response["error"] is not None)
        assert (response["status"] == "incomplete") == (response["incomplete_details"] is not None)
        if kind in TERMINALS:
            self.ended = True
            assert self._open is None, "an item is open at the end"
            known = [item for _, item in sorted(self.done.items())]
            positions = [known.index(item) for item in response["output"]]
            assert positions == sorted(positions), "the output has another order than the items"
            assert len(set(positions)) == len(positions)

    def _added(self, event: dict[str, Any]) -> None:
        assert self.response is not None and self._open is None, "an item begins within another"
        item = event["item"]
        assert event["output_index"] == len(self.done), f"{event['output_index']} after {len(self.done)} items"
        assert item["status"] == "in_progress"
        names = {item["id"]} | ({item["call_id"]} if item["type"] == "function_call" else set())
        assert not names & self._seen, f"{names & self._seen} is not new"
        self._seen |= names
        if item["type"] == "message":
            assert (item["role"], item["content"]) == ("assistant", [])
        elif item["type"] == "reasoning":
            assert item["summary"] == []
        elif item["type"] == "function_call":
            assert item["arguments"] == ""
        else:
            assert item["type"] == "function_call_output" and item["call_id"] in self._seen and item["output"] == ""
        self._open, self._part, self._text_done = event, None, False
        self._text = "" if item["type"] == "function_call" else None

    def _within(self, kind: str, event: dict[str, Any]) -> None:
        """A part or a text of the open item."""
        assert self._open is not None, f"{kind} without an item"
        item = self._open["item"]
        assert (event["item_id"], event["output_index"]) == (item["id"], self._open["output_index"])
        delta, done, index = _TEXT[item["type"]]
        if index:
            assert event[index] == 0
        if kind == delta:
            assert self._text is not None and not self._text_done
            assert isinstance(event["delta"], str) and (event["delta"] or item["type"] == "function_call")
            self._text += event["delta"]
        elif kind == done:
            told = event["arguments"] if item["type"] == "function_call" else event["text"]
            assert not self._text_done and _joined(self._text) == told, "the text is not what its deltas said"
            self._text_done = True
        else:
            added, part_done, part_type = _PARTS[item["type"]]
            assert event["part"]["type"] == part_type
            if kind == added:
                assert self._part is None and event["part"]["text"] == ""
                self._part, self._text = event["part"], ""
            else:
                assert kind == part_done, f"{kind} is no event of a {item['type']}"
                assert self._text_done and event["part"]["text"] == _joined(self._text)
                self._part = event["part"]

    def _item_done(self, event: dict[str, Any]) -> None:
        assert self._open is not None
        item, begun = event["item"], self._open["item"]
        assert event["output_index"] == self._open["output_index"]
        for name in ("id", "type", "call_id", "role", "name"):
            assert item.get(name) == begun.get(name), f"{name} has changed"
        assert item["status"] in ("completed", "incomplete")
        assert self._text_done or item["type"] == "function_call_output"
        if item["type"] == "message":
            assert item["content"] == [self._part]
        elif item["type"] == "reasoning":
            assert item["summary"] == [self._part]
        elif item["type"] == "function_call":
            assert item["arguments"] == _joined(self._text)
        self.done[event["output_index"]] = item
        self._open = None


def _joined(text: str | None) -> str:
    """Halves of a character that met in two pieces are one character in their sum, as in JSON."""
    assert text is not None
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "surrogatepass")


def check(events: Iterable[dict[str, Any]]) -> Checker:
    checker = Checker()
    for event in events:
        checker.feed(event)
    return checker


def parse(body: bytes) -> list[dict[str, Any]]:
    """The events of a body: the SSE type repeats the event's."""
    events = []
    for event in sse.parse(body):
        assert event.json["type"] == event.type
        events.append(event.json)
    return events


def output_text(response: dict[str, Any]) -> str:
    """As the SDKs' property of this name has it."""
    return "".join(
        part["text"]
        for item in response["output"]
        if item["type"] == "message"
        for part in item["content"]
        if part["type"] == "output_text"
    )
