"""Reading a run's log, and the messages that its scripts publish."""

from __future__ import annotations

from typing import NamedTuple

from redis.asyncio import Redis

from broker.events import Entry
from broker.ids import START, EventId
from broker.runs import keys

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


async def has_epoch(redis: Redis, request_id: str, epoch: int) -> bool:
    """Whether the log has any entry of `epoch`: a cursor of another one is lost (PROTOCOL 6.5)."""
    return bool(await redis.xrange(keys.log(request_id), min=str(epoch), max=str(epoch), count=1))


def _entry(entry_id: bytes, fields: dict[bytes, bytes]) -> Entry:
    epoch, _, seq = entry_id.partition(b"-")
    return Entry(EventId(int(epoch), int(seq)), fields[b"t"].decode("ascii"), fields[b"d"].decode("ascii"))


class Appended(NamedTuple):
    """A message of the run's channel: what was appended, and the id before it."""

    prev: EventId
    entries: list[Entry]


def parse_message(payload: bytes) -> Appended | None:
    """None says that the run was erased. Raises ValueError for what this version did not write."""
    head, *lines = payload.decode("ascii").split("\n")
    version, _, prev = head.partition(" ")
    if version != "1":
        raise ValueError(f"a message of version {version}; this gateway knows version 1")
    if prev == "erased":
        return None
    if not lines:
        raise ValueError("a message without entries")
    entries = []
    for line in lines:
        entry_id, kind, data = line.split(" ", 2)
        epoch, _, seq = entry_id.partition("-")
        entries.append(Entry(EventId(int(epoch), int(seq)), kind, data))
    epoch, _, seq = prev.partition("-")
    return Appended(EventId(int(epoch), int(seq)), entries)
