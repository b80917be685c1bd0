"""The items of a response: messages, reasoning, function calls and what they came to; their events, and their JSON.

Texts are kept as JSON without its quotes, as the log has them: joined, they are the JSON of the joined text.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple

from broker.events import dumps
from broker.gateway.dialects.known import Known
from broker.ids import EventId

Kind = Literal["message", "reasoning", "function_call", "function_call_output"]
Status = Literal["in_progress", "completed", "incomplete"]
Event = tuple[str, str]
"""A type, and the members of its JSON object after `type` and `sequence_number`."""

_NOTHING = '""'


class Text(NamedTuple):
    """A piece of a text, and those before it."""

    id: EventId
    json: str
    before: Text | None


class Call(NamedTuple):
    """A call or its result. `name`, `arguments` and `output` are JSON strings."""

    agents_id: str
    """What the agent calls it: it need not be unique in the run, and `id` is."""
    id: str
    name: str = _NOTHING
    arguments: str = _NOTHING
    output: str = _NOTHING


class Item(NamedTuple):
    """An item, and the surviving ones before it. Only the newest can be open: in progress."""

    kind: Kind
    id: str
    place: int
    """Its `output_index`."""
    at: EventId
    """The last event that it has something of."""
    status: Status = "in_progress"
    text: Text | None = None
    call: Call | None = None
    before: Item | None = None

    @property
    def open(self) -> bool:
        return self.status == "in_progress"

    def grown(self, at: EventId, text: str) -> Item:
        """With one more piece. Not by `_replace`, which takes thrice as long: it is done for each token."""
        pieces = Text(at, text, self.text)
        return Item(self.kind, self.id, self.place, at, self.status, pieces, self.call, self.before)


def arguments(tool_call: Mapping[str, Any]) -> str:
    """Of a call, from its event's data. OpenAI's are texts: JSON, unless they are texts already."""
    return _as_text(tool_call.get("args"), otherwise="{}")


def output(tool_result: Mapping[str, Any]) -> str:
    """What a call came to, as a text in the same way."""
    return _as_text(tool_result.get("result"), otherwise="")


def _as_text(value: Any, *, otherwise: str) -> str:
    if value is None:
        return otherwise
    return value if isinstance(value, str) else dumps(value)


def surviving(newest: Item | None) -> list[Item]:
    """The oldest first."""
    found = []
    while newest is not None:
        found.append(newest)
        newest = newest.before
    return found[::-1]


def chained(items: list[Item]) -> Item | None:
    """The newest of these items, the oldest of which is the first."""
    newest: Item | None = None
    for item in items:
        newest = item._replace(before=newest)
    return newest


def cut(newest: Item | None, resume_from: EventId) -> tuple[Item | None, Item | None]:
    """(the newest item that survives whole, what is left of the one after it): a rewind to `resume_from`."""
    while newest is not None and newest.at > resume_from:
        text = newest.text
        while text is not None and text.id > resume_from:
            text = text.before
        if text is not None:
            return newest.before, newest._replace(text=text, at=text.id)
        newest = newest.before
    return newest, None


def calls(newest: Item | None) -> Known:
    """The surviving ones, by what the agent calls them."""
    return Known(
        ({item.call.agents_id: item.call for item in surviving(newest) if item.kind == "function_call" and item.call},)
    )


def text_json(item: Item) -> str:
    """The whole text, as JSON without its quotes."""
    pieces, text = [], item.text
    while text is not None:
        pieces.append(text.json)
        text = text.before
    return "".join(reversed(pieces))


def json(item: Item) -> str:
    """As it stands in `output`, and in `response.output_item.done`."""
    return _json(item, item.status, text_json(item) if item.text is not None else None)


def opened(item: Item) -> Iterator[Event]:
    """The events that announce it, without a text."""
    yield "response.output_item.added", f'"output_index":{item.place},"item":{_json(item, "in_progress", None)}'
    if item.kind == "message":
        yield "response.content_part.added", f'{_place(item)},"content_index":0,"part":{_part("")}'
    elif item.kind == "reasoning":
        yield "response.reasoning_summary_part.added", f'{_place(item)},"summary_index":0,"part":{_summary("")}'


def delta(item: Item, text: str) -> Event:
    """A piece of its text, or the arguments of a call. `text` is JSON without its quotes."""
    if item.kind == "message":
        return "response.output_text.delta", f'{_place(item)},"content_index":0,"delta":"{text}","logprobs":[]'
    if item.kind == "reasoning":
        return "response.reasoning_summary_text.delta", f'{_place(item)},"summary_index":0,"delta":"{text}"'
    return "response.function_call_arguments.delta", f'{_place(item)},"delta":"{text}"'


def closed(item: Item) -> Iterator[Event]:
    """The events that end it, in the status that it has."""
    if item.kind == "message":
        text = text_json(item)
        yield "response.output_text.done", f'{_place(item)},"content_index":0,"text":"{text}","logprobs":[]'
        yield "response.content_part.done", f'{_place(item)},"content_index":0,"part":{_part(text)}'
    elif item.kind == "reasoning":
        text = text_json(item)
        yield "response.reasoning_summary_text.done", f'{_place(item)},"summary_index":0,"text":"{text}"'
        yield "response.reasoning_summary_part.done", f'{_place(item)},"summary_index":0,"part":{_summary(text)}'
    elif item.kind == "function_call" and item.call is not None:
        done = f'"name":{item.call.name},"arguments":{item.call.arguments}'
        yield "response.function_call_arguments.done", f"{_place(item)},{done}"
    yield "response.output_item.done", f'"output_index":{item.place},"item":{json(item)}'


def _place(item: Item) -> str:
    return f'"item_id":"{item.id}","output_index":{item.place}'


def _part(text: str) -> str:
    return f'{{"type":"output_text","text":"{text}","annotations":[]}}'


def _summary(text: str) -> str:
    return f'{{"type":"summary_text","text":"{text}"}}'


def _json(item: Item, status: Status, text: str | None) -> str:
    """`text` is None where it has not begun; a call in progress has neither arguments nor an output yet."""
    if item.kind == "message":
        content = "" if text is None else _part(text)
        return f'{{"id":"{item.id}","type":"message","role":"assistant","status":"{status}","content":[{content}]}}'
    if item.kind == "reasoning":
        summary = "" if text is None else _summary(text)
        return f'{{"id":"{item.id}","type":"reasoning","status":"{status}","summary":[{summary}]}}'
    call = item.call
    assert call is not None
    if item.kind == "function_call":
        facts = f'"name":{call.name},"arguments":{_NOTHING if status == "in_progress" else call.arguments}'
    else:
        facts = f'"output":{_NOTHING if status == "in_progress" else call.output}'
    return f'{{"id":"{item.id}","type":"{item.kind}","call_id":"{call.id}",{facts},"status":"{status}"}}'
