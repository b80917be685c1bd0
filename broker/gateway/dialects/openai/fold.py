"""The dialect `openai`: a run as the stream of an OpenAI response. The position of a frame is its `sequence_number`.

A rewind closes what is open as incomplete. Items that it voids wholly are left out of the response at its end; one that
it voids in part is begun anew, under another id, with what is left of its text. So nothing that was told is told
otherwise later, and a client that knows nothing of rewinds ends with the right output.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

from broker import sse
from broker.events import Entry, dumps
from broker.gateway.dialects.dialect import Frame, SseConnection
from broker.gateway.dialects.known import Known
from broker.gateway.dialects.openai import items
from broker.gateway.dialects.openai.items import Call, Event, Item, Kind, Status
from broker.gateway.dialects.openai.response import End, Printer, Profile, error_json, usage_json
from broker.gateway.dialects.place import JUMP
from broker.ids import EventId

_PREFIX: dict[Kind, str] = {
    "message": "msg",
    "reasoning": "rs",
    "function_call": "fc",
    "function_call_output": "fco",
}
_HEAD, _FOOT = '{"text":"', '"}'


class State(NamedTuple):
    """The fold, somewhere in a log."""

    sequence: int = 0
    """Of the next frame."""
    places: int = 0
    """Output indexes that have been used."""
    newest: Item | None = None
    """The surviving items."""
    status: str = "queued"
    end: End | None = None
    calls: Known = Known()
    """The surviving ones, by what the agent calls them: the last of each name."""


class Responses(SseConnection):
    """One run. Its frames hold nothing that is not in the log or in its profile."""

    key = ("openai",)
    seekable = False
    exact = True
    may_be_ahead = True
    start = State()

    def __init__(self, profile: Profile) -> None:
        self._request_id = profile.request_id
        self._printer = Printer(profile)
        self._steps: dict[str, Callable[[State, Entry], tuple[State, list[Event]]]] = {
            "start": self._started,
            "attempt": self._attempted,
            "token": self._told,
            "reasoning": self._thought,
            "tool_call": self._called,
            "tool_result": self._resulted,
            "final": self._completed,
            "error": self._failed,
            "cancelled": self._cancelled,
        }

    def step(self, state: State, entry: Entry) -> tuple[State, Sequence[Frame]]:
        handler = self._steps.get(entry.type)
        if handler is None:
            return state, ()
        state, events = handler(state, entry)
        frames = _frames(state.sequence, events, entry.id)
        sequence = state.sequence + len(events)
        return State(sequence, state.places, state.newest, state.status, state.end, state.calls), frames

    def ended(self, state: State) -> bool:
        return state.end is not None

    def response(self, state: State) -> str:
        """The response object as it is now: at the end, the one of the last event."""
        return self._printer.json(state.status, map(items.json, items.surviving(state.newest)), state.end)

    def call_id(self, event_id: EventId) -> str:
        """Of the call that the event tells of."""
        return self._id("call", event_id)

    def gone(self, state: Any) -> bytes:
        return _broken("run_not_found", "This response no longer exists.")

    def lost(self, state: Any) -> bytes:
        return _broken(
            "cursor_lost",
            "What was streamed was lost in a failover. Retrieve the response, or its stream from the start.",
        )

    # -- begin -----------------------------------------------------------------------------------------------

    def _started(self, state: State, entry: Entry) -> tuple[State, list[Event]]:
        return state, [self._lifecycle("response.created", state)]

    def _attempted(self, state: State, entry: Entry) -> tuple[State, list[Event]]:
        data = json.loads(entry.data)
        events: list[Event] = []
        if data["attempt"] > 1:
            state = state._replace(sequence=max(state.sequence, data["attempt"] * JUMP))
        if state.status == "queued":
            state = state._replace(status="in_progress")
            events.append(self._lifecycle("response.in_progress", state))
        kept, part = items.cut(state.newest, EventId.parse(data["resume_from"]))
        if kept is state.newest:
            return state, events
        _, closing = _closed(state, "incomplete")
        state = state._replace(newest=kept, calls=items.calls(kept))
        events += closing
        if part is not None and part.text is not None:
            state, opening = self._opened(state, part.kind, entry.id)
            assert state.newest is not None
            opening.append(items.delta(state.newest, items.text_json(part)))
            state = state._replace(newest=state.newest._replace(text=part.text, at=part.at))
            events += opening
        return state, events

    # -- go on -----------------------------------------------------------------------------------------------

    def _told(self, state: State, entry: Entry) -> tuple[State, list[Event]]:
        return self._grown(state, "message", entry.id, _text(entry.data))

    def _thought(self, state: State, entry: Entry) -> tuple[State, list[Event]]:
        return self._grown(state, "reasoning", entry.id, _text(entry.data))

    def _grown(self, state: State, kind: Kind, at: EventId, text: str) -> tuple[State, list[Event]]:
        """A piece of text for the open item of this kind, or for a new one."""
        if not text:
            return state, []
        events: list[Event] = []
        if state.newest is None or state.newest.kind != kind or not state.newest.open:
            state, closing = _closed(state, "completed")
            state, opening = self._opened(state, kind, at)
            events = closing + opening
        item = state.newest
        assert item is not None
        events.append(items.delta(item, text))
        newest = item.grown(at, text)
        return State(state.sequence, state.places, newest, state.status, state.end, state.calls), events

    def _opened(self, state: State, kind: Kind, at: EventId) -> tuple[State, list[Event]]:
        item = self._item(state, kind, at)
        return state._replace(newest=item, places=state.places + 1), list(items.opened(item))

    def _item(self, state: State, kind: Kind, at: EventId, call: Call | None = None) -> Item:
        """Ids are made of the event's, so that they are the same at every replay, and others after a rewind."""
        return Item(
            kind=kind, id=self._id(_PREFIX[kind], at), place=state.places, at=at, call=call, before=state.newest
        )

    def _id(self, prefix: str, at: EventId) -> str:
        return f"{prefix}_{self._request_id}_{at.epoch}_{at.seq}"

    def _called(self, state: State, entry: Entry) -> tuple[State, list[Event]]:
        data = json.loads(entry.data)
        call = Call(
            agents_id=data["id"],
            id=self.call_id(entry.id),
            name=dumps(data["tool"]),
            arguments=dumps(items.arguments(data)),
        )
        state = state._replace(calls=state.calls.plus(call.agents_id, call))
        return self._whole(state, "function_call", entry.id, call)

    def _resulted(self, state: State, entry: Entry) -> tuple[State, list[Event]]:
        data = json.loads(entry.data)
        called: Call | None = state.calls.get(data["id"])
        if called is None:
            return state, []
        call = Call(agents_id=data["id"], id=called.id, output=dumps(items.output(data)))
        return self._whole(state, "function_call_output", entry.id, call)

    def _whole(self, state: State, kind: Kind, at: EventId, call: Call) -> tuple[State, list[Event]]:
        """An item that comes whole."""
        state, events = _closed(state, "completed")
        item = self._item(state, kind, at, call)
        events += items.opened(item)
        if kind == "function_call":
            events.append(items.delta(item, call.arguments[1:-1]))
        item = item._replace(status="completed")
        events += items.closed(item)
        return state._replace(newest=item, places=state.places + 1), events

    # -- end -------------------------------------------------------------------------------------------------

    def _completed(self, state: State, entry: Entry) -> tuple[State, list[Event]]:
        data = json.loads(entry.data)
        usage = data.get("usage") or {}
        cut = usage.get("finish_reason") == "length"
        state, events = self._answered(state, entry.id, data.get("answer"))
        if cut:
            end = End("incomplete", incomplete_details='{"reason":"max_output_tokens"}', usage=usage_json(usage))
            return self._ended(state, events, "response.incomplete", end)
        return self._ended(state, events, "response.completed", End("completed", usage=usage_json(usage)))

    def _failed(self, state: State, entry: Entry) -> tuple[State, list[Event]]:
        end = End("failed", error=error_json(json.loads(entry.data)))
        return self._ended(state, [], "response.failed", end)

    def _cancelled(self, state: State, entry: Entry) -> tuple[State, list[Event]]:
        """As `completed`: OpenAI has no event for it, and this is the one that its helpers take for an end."""
        return self._ended(state, [], "response.completed", End("cancelled"))

    def _ended(self, state: State, events: list[Event], event_type: str, end: End) -> tuple[State, list[Event]]:
        state, closing = _closed(state, "completed" if end.status == "completed" else "incomplete")
        state = state._replace(status=end.status, end=end, calls=Known())
        return state, [*events, *closing, self._lifecycle(event_type, state)]

    def _answered(self, state: State, at: EventId, answer: str | None) -> tuple[State, list[Event]]:
        """After it, the messages together are the answer, as a poll has it.

        What is missing is added; where the last messages are the answer, the ones before them were on the way to it; in
        any other case the answer is a new message, in place of all others.
        """
        if answer is None:
            return state, []
        found = items.surviving(state.newest)
        texts = [items.text_json(item) if item.kind == "message" else "" for item in found]
        told, wanted = "".join(texts), dumps(answer)[1:-1]
        if wanted.startswith(told):
            return self._grown(state, "message", at, wanted[len(told) :])
        first = _first_of(texts, wanted)
        events: list[Event] = []
        if first == len(found):
            state, events = _closed(state, "incomplete" if found[-1].kind == "message" else "completed")
            found = items.surviving(state.newest)
        kept = [item for n, item in enumerate(found) if item.kind != "message" or n >= first]
        state = state._replace(newest=items.chained(kept))
        if first == len(found):
            state, telling = self._grown(state, "message", at, wanted)
            events += telling
        return state, events

    def _lifecycle(self, event_type: str, state: State) -> Event:
        return event_type, f'"response":{self.response(state)}'


def _first_of(texts: Sequence[str], wanted: str) -> int:
    """From which of the texts on they are `wanted`, together; their number where they are so from none on, or from 0.

    By lengths: to join the texts from each place on would take a long run's gateway seconds.
    """
    starts = list(accumulate(map(len, texts), initial=0))
    start = starts[-1] - len(wanted)
    if not "".join(texts).endswith(wanted):
        return len(texts)
    return next((n for n in range(1, len(texts)) if starts[n] == start), len(texts))


def _closed(state: State, status: Status) -> tuple[State, list[Event]]:
    """Without an open item."""
    if state.newest is None or not state.newest.open:
        return state, []
    item = state.newest._replace(status=status)
    return state._replace(newest=item), list(items.closed(item))


def _frames(sequence: int, events: Sequence[Event], at: EventId) -> list[Frame]:
    """The last one has the event's id: who has it has all of the event."""
    last = len(events) - 1
    return [
        Frame(
            sequence + n,
            sse.frame(
                event_type,
                f'{{"type":"{event_type}","sequence_number":{sequence + n},{members}}}',
                str(at) if n == last else "",
            ),
        )
        for n, (event_type, members) in enumerate(events)
    ]


def _text(data: str) -> str:
    """The `text` of an event, as JSON without its quotes. It is taken as it stands in the log, and not decoded."""
    if data.startswith(_HEAD) and data.endswith(_FOOT):
        return data[len(_HEAD) : -len(_FOOT)]
    return dumps(json.loads(data)["text"])[1:-1]


def _broken(code: str, message: str) -> bytes:
    """An error in the middle of a stream, for which the SDKs raise an APIError."""
    error = {"message": message, "type": "invalid_request_error", "param": None, "code": code}
    return sse.frame("error", dumps({"type": "error", "error": error}))
