"""Pages of logs, encoded once for all clients that replay the same stretch at the same time."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Hashable, Sequence

from redis.asyncio import Redis

from broker.events import Entry
from broker.gateway.channel import Channel
from broker.gateway.dialects.dialect import Dialect, Folded, Frame, step
from broker.gateway.reader import Marks, Slice, chunk
from broker.gateway.view import SLICE_BYTES, View
from broker.ids import EventId
from broker.runs import log

CACHE_BYTES = 32 * 1024 * 1024
PAGE_SLICES = 4
"""The most of a page: a reader whose client has stopped reading holds it, and there may be thousands of them."""


class Damaged(Exception):
    """A log that has not what its record promises: something in it was deleted."""


_Key = tuple[str, Hashable, EventId]


class Pages:
    """Concurrent reads of a page are one read; the last ones of runs with readers are kept, up to CACHE_BYTES."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._reads: dict[_Key, asyncio.Task[list[Slice]]] = {}
        self._kept: OrderedDict[_Key, list[Slice]] = OrderedDict()
        self._of_run: dict[str, set[_Key]] = {}
        self._size = 0

    async def after(self, view: View, position: EventId, folded: Folded) -> list[Slice]:
        """What the log has above `position`, which is below its end: the beginning of it, at most PAGE_SLICES. `folded`
        is the fold up to there.

        Raises Damaged, FoldFailed, and redis-py's exceptions.
        """
        key = (view.channel.request_id, view.key, position)
        kept = self._kept.get(key)
        if kept is not None:
            self._kept.move_to_end(key)
            return kept
        read = self._reads.get(key)
        if read is None:
            read = self._reads[key] = asyncio.create_task(self._read(key, view, folded))
            read.add_done_callback(lambda done: self._ended(key, view.channel, done))
        return await asyncio.shield(read)

    async def _read(self, key: _Key, view: View, folded: Folded) -> list[Slice]:
        request_id, _, position = key
        channel = view.channel
        entries = await log.read(self._redis, request_id, position, channel.page)
        check_contiguous(position, entries)
        size = sum(len(entry.data) for entry in entries) // len(entries)
        channel.page = max(1, min(log.PAGE, PAGE_SLICES * SLICE_BYTES // max(size, 1)))
        return encode(view.dialect, folded, entries)

    def _ended(self, key: _Key, channel: Channel, read: asyncio.Task[list[Slice]]) -> None:
        """A read of a run that was forgotten meanwhile is not kept: it may have seen the log as it was before.

        Nor is one that only a single reader asks for: nobody will come for it.
        """
        failed = read.cancelled() or read.exception() is not None
        if self._reads.get(key) is read:
            del self._reads[key]
            if not failed and channel.users > 1:
                self._keep(key, read.result())

    def _keep(self, key: _Key, slices: list[Slice]) -> None:
        self._kept[key] = slices
        self._of_run.setdefault(key[0], set()).add(key)
        self._size += _size(slices)
        while self._size > CACHE_BYTES:
            self._drop(next(iter(self._kept)))

    def _drop(self, key: _Key) -> None:
        self._size -= _size(self._kept.pop(key))
        of_run = self._of_run[key[0]]
        of_run.discard(key)
        if not of_run:
            del self._of_run[key[0]]

    def forget(self, request_id: str) -> None:
        """The run's log may have been rolled back, or has no readers any more."""
        for key in tuple(self._of_run.get(request_id, ())):
            self._drop(key)
        for key in [key for key in self._reads if key[0] == request_id]:
            del self._reads[key]


def check_contiguous(position: EventId, entries: list[Entry]) -> None:
    """Raises Damaged where something is missing above `position`, or between entries (PROTOCOL 1.2)."""
    if not entries:
        raise Damaged(f"nothing above {position}")
    previous = position
    for entry in entries:
        epoch, seq = entry.id
        if seq != (previous.seq + 1 if epoch == previous.epoch else 1):
            raise Damaged(f"{entry.id} follows {previous}")
        previous = entry.id


def encode(dialect: Dialect, folded: Folded, entries: list[Entry]) -> list[Slice]:
    """The first PAGE_SLICES slices of frames, each of about SLICE_BYTES, never a part of what shows an event."""
    slices: list[Slice] = []
    shown: list[Sequence[Frame]] = []
    size = 0
    for entry in entries:
        folded, frames = step(dialect, folded, entry)
        shown.append(frames)
        size += sum(len(frame.data) for frame in frames)
        if size >= SLICE_BYTES or entry is entries[-1]:
            data = b"".join(frame.data for of_entry in shown for frame in of_entry)
            marks = None if dialect.seekable else Marks.of(shown)
            slices.append(Slice(entry.id, data, chunk(data), folded, marks))
            if len(slices) == PAGE_SLICES:  # what a dialect shows may be several times what the log has
                break
            shown, size = [], 0
    return slices


_MARK_BYTES = 100
"""About what a frame's position and end take."""


def _size(slices: list[Slice]) -> int:
    return sum(2 * len(part.data) + (_MARK_BYTES * len(part.marks.ends) if part.marks else 0) for part in slices)
