"""Closings: ends of runs, and erasures, that a failover could still take. Who made one keeps it until it is replicated,
and sends it again to every primary that comes (PROTOCOL 5.2).
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Awaitable, Callable, Iterable, Sequence
from itertools import islice
from typing import Protocol

from broker.events import AttemptReason, Event
from broker.ids import EventId
from broker.runs.connections import NotReplicated, is_away
from broker.runs.primaries import Primaries
from broker.runs.scripts import (
    MAX_BATCH_BYTES,
    MAX_BATCH_ENTRIES,
    STALE_AFTER_MS,
    Answer,
    Batch,
    Lease,
    Reply,
    Scripts,
)

logger = logging.getLogger(__name__)

KEPT_BYTES = 64 * 1024 * 1024
"""The most that a process keeps; beyond it the oldest are let go."""
UNREPLICATED_SECONDS = 1.0
"""How long a drain waits where there is no replica: until what was written is on the disk."""
TOMBSTONE_MS = 4 * STALE_AFTER_MS
"""The least that an erasure is remembered: longer than its request_id could be made again, and than it is kept here."""
_TICK_SECONDS = 0.5
_TAILS_AT_ONCE = 16
_NEVER = float("-inf")


class Kept(Protocol):
    """Something that was confirmed, and can be sent again."""

    request_id: str
    size: int

    async def send(self) -> bool:
        """Returns whether it is still to be kept. Raises redis-py's exceptions."""


class Closings:
    """Closes and erases runs, and keeps what was closed."""

    def __init__(self, scripts: Scripts, primaries: Primaries, *, retention_ms: int) -> None:
        self.scripts = scripts
        self.again = scripts.without_waiting()
        """For what is sent again: whether a replica has it shows in what is covered."""
        self.primaries = primaries
        self.retention_ms = retention_ms
        self._kept: dict[Kept, float] = {}
        """What is kept, and when it was last confirmed, by the event loop's clock."""
        self._size = 0
        self._under_way: set[Kept] = set()
        self._tails = asyncio.Semaphore(_TAILS_AT_ONCE)

    async def close(
        self,
        request_id: str,
        event: Event,
        reason: AttemptReason,
        *,
        token: str | None = None,
        if_still: tuple[str, str] = ("", ""),
    ) -> Reply:
        """Ends the run with `event` in an epoch of its own, worker or no worker, and keeps it.

        Waits while a primary settles. The same token makes it safe to repeat. Raises redis-py's exceptions; after
        NotReplicated it is kept as well, for it may be made (5.3).
        """
        return await self._make(_Closing(self, request_id, event, reason, token or secrets.token_hex(8), if_still))

    async def erase(self, request_id: str) -> Reply:
        """Erases the run, and keeps that. Raises as `close` does."""
        return await self._make(_Erasure(self, request_id))

    async def _make(self, kept: _Closing | _Erasure) -> Reply:
        began = asyncio.get_running_loop().time()
        try:
            reply = await kept.make(self.scripts)
        except NotReplicated:
            self._keep(kept, _NEVER)
            raise
        if reply.answer is Answer.OK:
            self._keep(kept, _NEVER)
            self._confirm(kept, began)
        return reply

    def keep_tail(self, tail: Tail, written_at: float, on_lost: Callable[[Lease], Awaitable[None]]) -> None:
        """Keeps the end of a run that its worker wrote. `on_lost(lease)` is called where it cannot be repaired."""
        self._keep(_Ending(self, tail, on_lost), written_at)

    def _keep(self, kept: Kept, confirmed: float) -> None:
        self._kept[kept] = confirmed
        self._size += kept.size
        while self._size > KEPT_BYTES:
            self._drop(next(iter(self._kept)))

    def _confirm(self, kept: Kept, began: float) -> None:
        """What came while the primary changed may be the old one's word."""
        if kept in self._kept and self.primaries.changed_at(kept.request_id) < began:
            self._kept[kept] = asyncio.get_running_loop().time()

    def _drop(self, kept: Kept) -> None:
        if self._kept.pop(kept, None) is not None:
            self._size -= kept.size

    async def run(self) -> None:
        """Sends again, and forgets what is safe, until cancelled."""
        async with asyncio.TaskGroup() as sending:
            while True:
                await asyncio.sleep(_TICK_SECONDS)
                for kept, confirmed in tuple(self._kept.items()):
                    if kept in self._under_way:
                        continue
                    if self._is_lost(kept, confirmed):
                        self._under_way.add(kept)
                        sending.create_task(self._send(kept))
                    elif confirmed < self.primaries.covered(kept.request_id):
                        self._drop(kept)

    def _is_lost(self, kept: Kept, confirmed: float) -> bool:
        """Perhaps: another primary has come since."""
        return confirmed <= self.primaries.changed_at(kept.request_id)

    async def _send(self, kept: Kept) -> None:
        began = asyncio.get_running_loop().time()
        try:
            if await kept.send():
                self._confirm(kept, began)
            else:
                self._drop(kept)
        except Exception as error:
            if not is_away(error):
                logger.exception("a closing cannot be sent again", extra={"request_id": kept.request_id})
                self._drop(kept)
        finally:
            self._under_way.discard(kept)

    async def append(self, tail: Tail) -> Reply:
        """Sends a tail again; a few at once, since they may be large, and others write as well."""
        async with self._tails:
            return await tail.send(self.again, self.retention_ms)

    async def settle(self, seconds: float) -> None:
        """For a drain: returns when nothing is kept that could be lost, or after `seconds`."""
        loop = asyncio.get_running_loop()
        give_up = loop.time() + seconds
        while self._kept and loop.time() < give_up:
            if not self.primaries.replicated and not self.primaries.away and self._all_on_disk():
                return
            await asyncio.sleep(0.1)

    def _all_on_disk(self) -> bool:
        young = asyncio.get_running_loop().time() - UNREPLICATED_SECONDS
        return all(confirmed < young and not self._is_lost(kept, confirmed) for kept, confirmed in self._kept.items())


class Tail:
    """The last entries of an epoch, `first`, `first + 1`, …, as its writer kept them."""

    def __init__(self, lease: Lease, first: int, entries: Sequence[tuple[str, str]]) -> None:
        self.lease = lease
        self.first = first
        self.entries = entries
        self.size = sum(len(data) + 100 for _, data in entries)

    async def send(self, scripts: Scripts, retention_ms: int) -> Reply:
        """Appends what of it the log does not have: in the usual case one entry is sent, and nothing is missing."""
        begin = len(self.entries) - 1
        while True:
            batch = Batch(self.first + begin, take(self.entries, begin), self.first)
            reply = await scripts.append(self.lease, batch, lease_ms=0, retention_ms=retention_ms)
            if reply.answer is Answer.GAP:
                begin = (reply.end.seq if reply.end.epoch == self.lease.epoch else 0) + 1 - self.first
            elif reply.answer in (Answer.OK, Answer.DUP) and begin + len(batch.entries) < len(self.entries):
                begin += len(batch.entries)
            else:
                return reply


def take(entries: Iterable[tuple[str, str]], begin: int = 0) -> list[tuple[str, str]]:
    """As many of `entries` from index `begin` on as one append takes."""
    taken: list[tuple[str, str]] = []
    size = 0
    for entry in islice(entries, begin, begin + MAX_BATCH_ENTRIES):
        size += len(entry[1])
        if taken and size > MAX_BATCH_BYTES:
            break
        taken.append(entry)
    return taken


class _Ending:
    """The end of a run, written by its own worker."""

    def __init__(self, closings: Closings, tail: Tail, on_lost: Callable[[Lease], Awaitable[None]]) -> None:
        self._closings = closings
        self._tail = tail
        self._on_lost = on_lost
        self.request_id = tail.lease.request_id
        self.size = tail.size

    async def send(self) -> bool:
        reply = await self._closings.append(self._tail)
        if reply.answer is Answer.LOST:
            await self._on_lost(self._tail.lease)
        return reply.answer in (Answer.OK, Answer.DUP)


class _Closing:
    """A cancel, or a closing by a reaper, in an epoch of its own."""

    def __init__(
        self,
        closings: Closings,
        request_id: str,
        event: Event,
        reason: AttemptReason,
        token: str,
        if_still: tuple[str, str],
    ) -> None:
        self._closings = closings
        self._event = event
        self._data = event.json_data()
        self._reason: AttemptReason = reason
        self._token = token
        self._if_still = if_still
        self._tail: Tail | None = None
        self.request_id = request_id
        self.size = len(self._data) + 1000

    async def make(self, scripts: Scripts) -> Reply:
        """Closes the run, in a new epoch. The same token makes it safe to repeat."""
        closings = self._closings
        reply = await closings.primaries.in_new_epoch(
            self.request_id,
            lambda replid: scripts.close(
                self.request_id,
                kind=self._event.type,
                data=self._data,
                reason=self._reason,
                token=self._token,
                retention_ms=closings.retention_ms,
                replid=replid,
                if_still=self._if_still,
            ),
        )
        if reply.answer is Answer.OK:
            self._if_still = ("", "")  # it was so, and the run was closed: this is what is kept
            attempt, before = reply.rest
            lease = Lease(
                request_id=self.request_id,
                epoch=reply.end.epoch,
                token=self._token,
                attempt=attempt,
                reason=self._reason,
                resume_from=EventId.parse(before.decode()),
            )
            self._tail = Tail(lease, 1, [lease.opening, (self._event.type, self._data)])
        return reply

    async def send(self) -> bool:
        """Where it does not fit any more, the run is closed anew. What closed the run meanwhile stands."""
        if self._tail is not None:
            reply = await self._closings.append(self._tail)
            if reply.answer not in (Answer.LOST, Answer.FENCED):
                return reply.answer in (Answer.OK, Answer.DUP)
            self._tail = None
        return (await self.make(self._closings.again)).answer is Answer.OK


class _Erasure:
    size = 200

    def __init__(self, closings: Closings, request_id: str) -> None:
        self._closings = closings
        self.request_id = request_id

    async def make(self, scripts: Scripts) -> Reply:
        return await scripts.erase(self.request_id, tombstone_ms=max(self._closings.retention_ms, TOMBSTONE_MS))

    async def send(self) -> bool:
        """GONE is kept too: it may be another failover's tombstone."""
        await self.make(self._closings.again)
        return True
