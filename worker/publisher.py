"""Group commit: one append in flight for each run; what the agent yields meanwhile goes into the next batch.

Latency is one round trip and throughput adapts. The buffer is bounded: an agent that outruns Redis waits. A lost
reply is safe, since the same batch is sent again under the same ids and answered DUP. What was written is kept for as
long as a failover could take it, and appended again where one did.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from dataclasses import dataclass
from typing import NamedTuple

from broker.ids import EventId
from broker.runs.closings import Tail, take
from broker.runs.connections import until_answered
from broker.runs.primaries import Primaries
from broker.runs.scripts import Answer, Batch, Lease, Reply, Scripts

logger = logging.getLogger(__name__)

BUFFER_ENTRIES = 1024
BUFFER_BYTES = 1024 * 1024
ENTRY_BYTES = 150
"""About what an entry takes beside its data."""
TAIL_BYTES = 1024 * 1024
"""The most that is kept of what was written. A loss that is larger ends in another attempt."""


class Stopped(Exception):
    """The run belongs to somebody else now, or is over: nothing more can be written."""

    def __init__(self, reply: Reply) -> None:
        super().__init__(f"{reply.answer}, status {reply.status or 'none'}")
        self.reply = reply


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The lease is renewed to `lease_ms` (4.2); a finished run is kept for `retention_ms`."""

    lease_ms: int
    retention_ms: int


class _Written(NamedTuple):
    """A batch that is in the log; `at` is when that was known, by the event loop's clock."""

    at: float
    entries: list[tuple[str, str]]
    bytes: int


class Publisher:
    """Writes one attempt's events. `put` and `finish` raise Stopped once the log takes no more from us."""

    def __init__(self, scripts: Scripts, lease: Lease, limits: Limits, primaries: Primaries) -> None:
        self._scripts = scripts
        self._lease = lease
        self._limits = limits
        self._primaries = primaries
        self._next_seq = 2  # 1 is the `attempt` entry that the claim wrote
        self._buffer: deque[tuple[str, str]] = deque()
        self._first = 2
        """The seq of the buffer's first entry."""
        self._bytes = 0
        now = asyncio.get_running_loop().time()
        self._tail = deque([_Written(now, [lease.opening], ENTRY_BYTES)])
        """What a failover could take, up to the buffer's first entry."""
        self._tail_first = 1
        self._tail_bytes = ENTRY_BYTES
        self._checkpoints: deque[tuple[EventId, str]] = deque()
        self._stored: tuple[EventId, str] | None = None
        """The last checkpoint that is in the record, and that a failover could take as well (PROTOCOL 5.7)."""
        self._work = asyncio.Event()
        self._room = asyncio.Event()
        self._room.set()
        self._idle = asyncio.Event()
        self._idle.set()
        self._stopped: Stopped | None = None
        self._failure: BaseException | None = None
        self._renew_at = 0.0
        """When an append shall renew the lease. Not each one does: it is a tenth of what an append costs Redis."""
        self.repairs = 0
        """How often something was gone from the log, and was appended again."""

    @property
    def request_id(self) -> str:
        return self._lease.request_id

    @property
    def lease(self) -> Lease:
        return self._lease

    @property
    def stopped(self) -> Stopped | None:
        return self._stopped

    async def put(self, kind: str, data: str) -> EventId:
        """Takes one event; waits while the buffer is full. Returns the id that it will have."""
        await self._room.wait()
        self._check()
        event_id = EventId(self._lease.epoch, self._next_seq)
        self._next_seq += 1
        self._buffer.append((kind, data))
        self._bytes += len(data)
        if len(self._buffer) >= BUFFER_ENTRIES or self._bytes >= BUFFER_BYTES:
            self._room.clear()
        self._idle.clear()
        self._work.set()
        return event_id

    async def checkpoint(self, state: str) -> None:
        """Takes JSON that covers the events put so far; it goes out with the last of them (PROTOCOL 5.7)."""
        await self._room.wait()
        self._check()
        covered = EventId(self._lease.epoch, self._next_seq - 1)
        replaced = bool(self._checkpoints) and self._checkpoints[-1][0] == covered
        if replaced:
            self._checkpoints.pop()
        self._checkpoints.append((covered, state))
        self._idle.clear()
        self._work.set()
        if replaced:
            await asyncio.sleep(0)  # or an agent that yields nothing else would never let go of the event loop

    async def finish(self) -> None:
        """Returns when everything put is in the log."""
        await self._idle.wait()
        self._check()

    def renew(self) -> None:
        """Appends now, if only nothing: the answer tells what a failover has taken."""
        self._store_again()
        self._renew_at = 0.0
        self._work.set()

    def tail(self) -> Tail:
        """What is in the log, and could still be lost."""
        return Tail(self._lease, self._tail_first, [entry for written in self._tail for entry in written.entries])

    @property
    def written_at(self) -> float:
        """When the last of the tail was known to be in the log, by the event loop's clock."""
        return self._tail[-1].at if self._tail else float("-inf")

    def _check(self) -> None:
        if self._stopped is not None:
            raise self._stopped
        if self._failure is not None:
            raise self._failure

    async def run(self) -> None:
        """Appends until cancelled or stopped; renews the lease when there is nothing to append (4.5)."""
        try:
            while self._stopped is None:
                await self._wait_for_work()
                self._work.clear()
                await self._append(self._batch())
                if self._buffer or self._checkpoints:
                    self._work.set()
                elif self._stopped is None:
                    self._idle.set()
        except Exception as error:
            self._failure = error
            raise
        finally:
            self._room.set()
            self._idle.set()

    async def _wait_for_work(self) -> None:
        if self._work.is_set():
            return
        try:
            async with asyncio.timeout(self._limits.lease_ms / 3000):
                await self._work.wait()
        except TimeoutError:
            pass

    async def close(self, running: asyncio.Task[None]) -> None:
        """Ends `running`, the task of `run`."""
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)

    def _batch(self) -> Batch:
        entries = take(self._buffer)
        last = self._first + len(entries) - 1
        covered = None
        for checkpoint in self._checkpoints:
            if checkpoint[0].seq <= last:
                covered = checkpoint
        return Batch(self._first, entries, kept_from=self._tail_first, checkpoint=covered)

    async def _append(self, batch: Batch) -> None:
        """Sends the batch until it is answered. Redis being away is not a lost lease (4.5)."""
        now = asyncio.get_running_loop().time()
        renew = not batch.entries or now >= self._renew_at
        if renew:
            self._renew_at = now + self._limits.lease_ms / 6000
        reply = await until_answered(
            lambda: self._scripts.append(
                self._lease,
                batch,
                lease_ms=self._limits.lease_ms if renew else 0,
                retention_ms=self._limits.retention_ms,
            ),
            "append",
            request_id=self._lease.request_id,
        )
        if reply.answer in (Answer.OK, Answer.DUP):
            self._written(batch)
        elif reply.answer is Answer.GAP:
            self._repair(reply.end)
        else:
            self._stopped = Stopped(reply)

    def _written(self, batch: Batch) -> None:
        now, size = asyncio.get_running_loop().time(), 0
        for _ in batch.entries:
            size += len(self._buffer.popleft()[1])
        self._bytes -= size
        self._first += len(batch.entries)
        if batch.checkpoint is not None:
            # One of the same id that came meanwhile has not been sent.
            while self._checkpoints and self._checkpoints[0][0] < batch.checkpoint[0]:
                self._checkpoints.popleft()
            if self._checkpoints and self._checkpoints[0] is batch.checkpoint:
                self._checkpoints.popleft()
            self._stored = batch.checkpoint
        if batch.entries:
            size += ENTRY_BYTES * len(batch.entries)
            self._tail.append(_Written(now, list(batch.entries), size))
            self._tail_bytes += size
        self._forget(self._primaries.covered(self._lease.request_id))
        if len(self._buffer) < BUFFER_ENTRIES // 2 and self._bytes < BUFFER_BYTES // 2:
            self._room.set()

    def _forget(self, covered: float) -> None:
        """Called only after the log was seen to be whole: what every replica has now, no failover can take."""
        tail = self._tail
        while tail and (tail[0].at < covered or self._tail_bytes > TAIL_BYTES):
            written = tail.popleft()
            self._tail_first += len(written.entries)
            self._tail_bytes -= written.bytes

    def _repair(self, end: EventId) -> None:
        """A failover took what is above `end`: it is appended again, under the same ids."""
        have = end.seq if end.epoch == self._lease.epoch else 0
        lost = 0
        while self._tail and self._first > have + 1:
            written = self._tail.pop()
            self._buffer.extendleft(reversed(written.entries))
            self._first -= len(written.entries)
            self._bytes += written.bytes - ENTRY_BYTES * len(written.entries)
            self._tail_bytes -= written.bytes
            lost += len(written.entries)
        if self._first > have + 1:
            raise AssertionError(f"the log ends at {end}, below what is kept")
        self._store_again()
        self._renew_at = 0.0
        self._idle.clear()
        self.repairs += 1
        logger.warning(
            "a part of a log was lost and is appended again",
            extra={"request_id": self._lease.request_id, "end": str(end), "entries": lost},
        )

    def _store_again(self) -> None:
        """The last checkpoint, which is in no entry: whether it was lost does not show in the log's end."""
        if self._stored is not None and (not self._checkpoints or self._stored[0] < self._checkpoints[0][0]):
            self._checkpoints.appendleft(self._stored)
