"""The fold of the dialects whose clients cannot take text back: what of each entry they are told.

It ends with the error `restarted` where a later attempt says something else than what was shown.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from hashlib import sha256
from typing import Any, NamedTuple

from broker.events import Entry, dumps
from broker.gateway.dialects.shown import Shown
from broker.ids import EventId


class Piece(NamedTuple):
    """Of the answer."""

    text: str


class Aside(NamedTuple):
    """Something beside the answer, as the dialect shows it."""

    value: dict[str, Any]


class Done(NamedTuple):
    """The end of a run that succeeded, with its right answer."""

    answer: str
    citations: list[dict[str, Any]]
    usage: dict[str, Any]


class Stopped(NamedTuple):
    """The end of a run that was cancelled, with what there is of its answer."""

    answer: str


class Failed(NamedTuple):
    """The end of a run that failed, or of what can be shown of it."""

    code: str
    message: str


Telling = Piece | Aside | Done | Stopped | Failed
Asides = Mapping[str, Callable[[dict[str, Any]], dict[str, Any]]]
"""By the type of an event, what a dialect shows of its data. Other types are not shown."""

RESTARTED = Failed(
    "restarted", "A later attempt gives another answer than the one that was shown. Poll the run for the right one."
)
GONE = Failed("gone", "This run no longer exists.")
LOST = Failed("cursor_lost", "What was shown was lost in a failover. Poll the run for its answer.")
CANCELLED = Failed("cancelled", "The run was cancelled.")
"""For dialects that have no other word for it."""


_NOTHING: Sequence[Telling] = ()


class Told(NamedTuple):
    """What the client was told so far."""

    shown: Shown = Shown()
    over: bool = False
    """Whether nothing follows."""
    attempts: int = 0
    """How many of the attempts have come that the fold knows beforehand (one_way)."""


def tell(told: Told, entry: Entry, asides: Asides) -> tuple[Told, Sequence[Telling]]:
    """What the client is told of the next entry."""
    if told.over:
        return told, ()
    match entry.type:
        case "token":
            return _token(told, entry.id, json.loads(entry.data)["text"])
        case "attempt":
            resume_from = EventId.parse(json.loads(entry.data)["resume_from"])
            return Told(told.shown.rewind(resume_from), attempts=told.attempts), ()
        case "final":
            return _final(told, entry.id, json.loads(entry.data))
        case "error":
            data = json.loads(entry.data)
            return _over(told, Failed(data["code"], data["message"]))
        case "cancelled":
            return _over(told, Stopped(told.shown.text))
    show = asides.get(entry.type)
    if show is None:
        return told, ()
    value = show(json.loads(entry.data))
    # The hash, since a state holds on to all of these, and they may be large.
    shown, new = told.shown.other(entry.id, sha256(dumps(value).encode("ascii")).digest())
    return Told(shown, attempts=told.attempts), (Aside(value),) if new else ()


def _token(told: Told, event_id: EventId, text: str) -> tuple[Told, Sequence[Telling]]:
    said = told.shown.token(event_id, text)
    if said is None:
        return _over(told, RESTARTED)
    shown, piece = said
    return Told(shown, attempts=told.attempts), () if piece is None else (Piece(piece),)


def _final(told: Told, event_id: EventId, data: dict[str, Any]) -> tuple[Told, Sequence[Telling]]:
    """Where no text survives, the answer is shown as a token."""
    answer, pieces = data.get("answer"), _NOTHING
    if answer and not told.shown.text:
        told, pieces = _token(told, event_id, answer)
        if told.over:
            return told, pieces
    text, unsaid = told.shown.text, told.shown.unsaid_text
    if answer is None:
        answer = text
    if unsaid and answer != text + unsaid:
        return _over(told, RESTARTED)
    return _over(told, *pieces, Done(answer, data.get("citations", []), data.get("usage", {})))


def _over(told: Told, *tellings: Telling) -> tuple[Told, Sequence[Telling]]:
    return Told(told.shown, over=True), tellings
