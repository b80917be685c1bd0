"""The fold: what survives of a log after its rewinds (PROTOCOL 1.5). Every reader uses this one."""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

from broker.events import TERMINAL, Entry
from broker.ids import EventId


class Rewind(NamedTuple):
    """An `attempt` entry: it voids the ids above `resume_from` and below its own."""

    id: EventId
    resume_from: EventId


class _Numbered(Protocol):
    @property
    def id(self) -> EventId: ...


N = TypeVar("N", bound=_Numbered)


def rewind(kept: list[N], resume_from: EventId) -> None:
    """Drops what is above `resume_from` from the end of `kept`, whose ids rise."""
    del kept[bisect_right(kept, resume_from, key=lambda entry: entry.id) :]


def fold(entries: Iterable[Entry]) -> list[Entry]:
    """The surviving entries, `attempt` entries left out."""
    kept: list[Entry] = []
    for entry in entries:
        if entry.type == "attempt":
            rewind(kept, EventId.parse(json.loads(entry.data)["resume_from"]))
        else:
            kept.append(entry)
    return kept


def is_void(event_id: EventId, rewinds: Sequence[Rewind]) -> bool:
    """Whether a later rewind of the same log voids `event_id`."""
    return any(rewind.resume_from < event_id < rewind.id for rewind in rewinds)


class Outcome(NamedTuple):
    """What a run has come to, as a poll shows it."""

    answer: str | None
    citations: list[dict[str, Any]]
    usage: dict[str, Any]
    error: dict[str, Any] | None


def outcome(entries: Iterable[Entry]) -> Outcome:
    """Folds a log, whole or as far as it goes: `Final.answer`, else the surviving tokens."""
    kept = fold(entries)
    tokens = [json.loads(entry.data)["text"] for entry in kept if entry.type == "token"]
    end = kept[-1] if kept and kept[-1].type in TERMINAL else None
    data: dict[str, Any] = json.loads(end.data) if end else {}
    answer = data.get("answer")
    if answer is None and tokens:
        answer = "".join(tokens)
    return Outcome(
        answer=answer,
        citations=data.get("citations", []),
        usage=data.get("usage", {}),
        error=data if end and end.type == "error" else None,
    )
