"""Where the fold of a run into a UI message stands: what the client has of it, and what survives of the log."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from broker.gateway.dialects.aisdk.chunks import Part
from broker.gateway.dialects.known import Known
from broker.gateway.dialects.shown import Shown
from broker.ids import START, EventId


class Beside(NamedTuple):
    """A surviving event that the message shows beside its text, and those before it."""

    id: EventId
    kind: str
    """tool_call, tool_result or sources."""
    call: str
    """The tool call's id."""
    data: str
    """The event's, where it may have to be shown again."""
    below: Beside | None


class Rewind(NamedTuple):
    """Why text is taken back: `reason` is an attempt's, or `final`, where the answer is not what the tokens said."""

    attempt: int | None = None
    reason: str = ""


class State(NamedTuple):
    """What the client has of the message, and what survives of the log."""

    chunks: int = 0
    """So many it has."""
    part: Part | None = None
    """The part that is open."""
    text: Shown = Shown()
    reasoning: Shown = Shown()
    beside: Beside | None = None
    calls: Known = Known()
    """The tool calls that the message has: a result without its call is an error in the client."""
    links: Known = Known()
    """The sources that it has."""
    length: int = 0
    """Characters of text, since the text was last begun anew."""
    last_part: int = 0
    """How many of them are before the last part."""
    rewind: Rewind = Rewind()
    """The last one that voided text."""
    ended: bool = False


def open_calls(beside: Beside | None, above: EventId = START) -> list[str]:
    """The calls above an id that have no result, in order."""
    answered, found = set[str](), list[str]()
    for each in backwards(beside):
        if each.id <= above:
            break
        if each.kind == "tool_result":
            answered.add(each.call)
        elif each.kind == "tool_call" and each.call not in answered:
            found.append(each.call)
            answered.add(each.call)
    return found[::-1]


def backwards(beside: Beside | None) -> Iterator[Beside]:
    while beside is not None:
        yield beside
        beside = beside.below


def pieces_of(shown: Shown) -> Iterator[tuple[EventId, str]]:
    kept = shown.kept
    while kept is not None:
        yield kept.id, kept.text or ""
        kept = kept.below
