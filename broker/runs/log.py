"""Reading a run's log, and the messages that its scripts publish."""

from __future__ import annotations

from typing import Any, NamedTuple

from redis.asyncio import Redis

from broker.events import Entry
from broker.fold import Outcome, outcome
from broker.ids import START, EventId
from broker.runs import keys
from broker.runs.record import Record

PAGE = 500
"""Entries in one read."""


async def read(redis: Redis, request_id: str, after: EventId = START, count: int = PAGE) -> list[Entry]:
    """The entries above `after`, at most `count`. Nothing is read from replicas (PROTOCOL 6.1)."""
    raw = await redis.xrange(keys.log(request_id), min=f"({after}", count=count)
    return [_entry(entry_id, fields) for entry_id, fields in raw]


async def read_all(redis: Redis, request_id: str) -> list[Entry]:
    entries: list[Entry] = []
    while page := await read(redis, request_id, entries[-1].id if entries else START):
        entries += page
        if len(page) < PAGE:
            break
    return entries


async def read_outcome(redis: Redis, record: Record) -> Outcome:
    """What a run has come to so far: from its `final` where that says it all, else folded from the log."""
    result = record.result
    if record.status == "completed" and result and result.get("answer") is not None:
        return Outcome(result["answer"], result.get("citations", []), result.get("usage", {}), None)
    entries = await read_all(redis, record.request_id)
    # What was appended since the record was read belongs to the next poll.
    return outcome(entry for entry in entries if entry.id <= record.end)


async def first_from(redis: Redis, request_id: str, event_id: EventId) -> EventId | None:
    """The first id that is not below `event_id`; None where the log ends below it. Ids rise, so that one which is left
    out for a later one will never be there."""
    found = await redis.xrange(keys.log(request_id), min=str(event_id), count=1)
    return _event_id(found[0][0].decode("ascii")) if found else None


async def has_epoch(redis: Redis, request_id: str, epoch: int) -> bool:
    """Whether the log has any entry of `epoch`: a cursor of another one is lost (PROTOCOL 6.5)."""
    return bool(await redis.xrange(keys.log(request_id), min=str(epoch), max=str(epoch), count=1))


def _entry(entry_id: bytes, fields: dict[bytes, bytes]) -> Entry:
    return Entry(_event_id(entry_id.decode("ascii")), fields[b"t"].decode("ascii"), fields[b"d"].decode("ascii"))


def _event_id(text: str) -> EventId:
    """Of an id that Redis gave us: not checked as EventId.parse does, because this is on the way of every event."""
    epoch, _, seq = text.partition("-")
    event_id: EventId = _new(EventId, (int(epoch), int(seq)))
    return event_id


_new: Any = tuple.__new__
"""Half the time of a NamedTuple's own constructor."""


class Appended(NamedTuple):
    """A message of the run's channel: what was appended, and the id before it."""

    prev: EventId
    entries: list[Entry]


def parse_message(payload: bytes) -> Appended | None:
    """None says that the run was erased. Raises ValueError for what this version did not write."""
    lines = payload.decode("ascii").split("\n")
    head = lines[0]
    if head[:2] != "1 ":
        raise ValueError(f"a message of version {head.partition(' ')[0]}; this gateway knows version 1")
    prev = head[2:]
    if prev == "erased":
        return None
    if len(lines) == 1:
        raise ValueError("a message without entries")
    entries = []
    for line in lines[1:]:
        entry_id, kind, data = line.split(" ", 2)
        entries.append(_new(Entry, (_event_id(entry_id), kind, data)))
    return Appended(_event_id(prev), entries)
