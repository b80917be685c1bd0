"""A run in one dialect: the frames that its readers share, and who of them is up to date."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from broker.events import Entry
from broker.gateway.dialects.dialect import Dialect, Folded, Frame, step
from broker.gateway.reader import Marks, Reader, Slice, chunk
from broker.ids import START, EventId

if TYPE_CHECKING:
    from broker.gateway.channel import Channel

RING_BYTES = 16 * 1024
"""What a view keeps for each of its readers, up to RING_BYTES_MAX: memory is bounded by connections."""
RING_BYTES_MAX = 512 * 1024
SLICE_BYTES = 64 * 1024
"""About the most that goes into a connection before its back-pressure is looked at."""


class View:
    """A channel in one dialect: each frame is encoded once, and shared by all readers."""

    __slots__ = (
        "_before",
        "_data",
        "_folded",
        "_folds",
        "_frames",
        "_ids",
        "_live_chunked",
        "_live_plain",
        "_size",
        "_unsent",
        "base",
        "channel",
        "dialect",
        "key",
        "readers",
    )

    def __init__(self, channel: Channel, dialect: Dialect) -> None:
        self.channel = channel
        self.dialect = dialect
        self.key = dialect.key
        self.readers: set[Reader] = set()
        self.base = channel.end
        self._folded = self._fold_at_end()
        self._ids: list[EventId] = []
        self._data: list[bytes] = []
        self._frames: list[Sequence[Frame]] = []
        self._folds: list[Folded] = []
        self._size = 0
        self._unsent: list[bytes] = []
        self._before = (channel.end, self._folded)
        """Where the live readers are while something is unsent."""
        self._live_chunked: dict[Reader, Callable[[bytes], None]] = {}
        self._live_plain: dict[Reader, Callable[[bytes], None]] = {}

    def _fold_at_end(self) -> Folded | None:
        """None where it is not known before a reader brings it, which has folded the log up to there."""
        return Folded(self.dialect.start, None) if self.dialect.seekable or self.channel.end == START else None

    def join(self, reader: Reader) -> None:
        """`reader` has everything up to the channel's end, and gets what comes."""
        if self._folded is None:
            self._folded = reader.folded
        if reader.sink.chunked:
            self._live_chunked[reader] = reader.sink.write
        else:
            self._live_plain[reader] = reader.sink.write

    def leave(self, reader: Reader) -> None:
        """The reader goes on by itself from what it has got."""
        if self._live_chunked.pop(reader, None) is None and self._live_plain.pop(reader, None) is None:
            return
        # Unsent: a write of another run has just filled the connection that the two share.
        position, folded = self._before if self._unsent else (self.channel.end, self._folded)
        assert folded is not None
        reader.position, reader.folded = position, folded

    def extend(self, entries: Sequence[Entry]) -> None:
        """Raises FoldFailed, and then is of no use any more."""
        dialect, folded, size = self.dialect, self._folded, 0
        if folded is None:
            self.base = entries[-1].id
            return
        if not self._unsent:
            self._before = (self._ids[-1] if self._ids else self.base, folded)
        for entry in entries:
            folded, frames = step(dialect, folded, entry)
            data = frames[0].data if len(frames) == 1 else b"".join(frame.data for frame in frames)
            self._ids.append(entry.id)
            self._data.append(data)
            self._frames.append(frames)
            self._folds.append(folded)
            self._unsent.append(data)
            size += len(data)
        self._folded = folded
        self._size += size
        if self._size > 2 * RING_BYTES:
            self._trim(min(RING_BYTES * len(self.readers), RING_BYTES_MAX))

    def _trim(self, limit: int) -> None:
        """Not at each event, but when the ring is twice as large as it may stay."""
        if self._size <= 2 * limit or len(self._ids) < 2:
            return
        drop = 0
        while self._size > limit and drop < len(self._ids) - 1:
            self._size -= len(self._data[drop])
            drop += 1
        self.base = self._ids[drop - 1]
        del self._ids[:drop], self._data[:drop], self._frames[:drop], self._folds[:drop]

    def flush(self) -> None:
        """One write for each reader, however many entries came."""
        unsent = self._unsent
        if unsent:
            data = unsent[0] if len(unsent) == 1 else b"".join(unsent)
            unsent.clear()
            if self._live_chunked:
                framed = chunk(data)
                for write in tuple(self._live_chunked.values()):
                    write(framed)
            for write in tuple(self._live_plain.values()):
                write(data)
        if self.channel.finished or (self._folded is not None and self.dialect.ended(self._folded.state)):
            self.release()

    def release(self) -> None:
        """All readers go on by themselves, from where the channel is now."""
        for reader in (*self._live_chunked, *self._live_plain):
            self.leave(reader)
            reader.wake()

    def fail(self) -> None:
        """What came cannot be shown: all readers are cut."""
        for reader in tuple(self.readers):
            reader.cut()

    def restart(self) -> None:
        """The ring begins anew at the channel's end."""
        self.base, self._size = self.channel.end, 0
        self._folded = self._fold_at_end()
        for kept in (self._ids, self._data, self._frames, self._folds, self._unsent):
            kept.clear()

    def after(self, position: EventId, *, marked: bool = False) -> Slice | None:
        """What the ring has above `position`, a slice of it; None where the ring does not reach back so far."""
        if position < self.base:
            return None
        first = bisect_right(self._ids, position)
        last, size = first, 0
        while last < len(self._ids) and size < SLICE_BYTES:
            size += len(self._data[last])
            last += 1
        if first == last:
            return None
        data = b"".join(self._data[first:last])
        marks = Marks.of(self._frames[first:last]) if marked else None
        return Slice(self._ids[last - 1], data, chunk(data), self._folds[last - 1], marks)

    def beat(self, text: str) -> None:
        """A heartbeat for every reader that can take one."""
        plain = {False: self.dialect.heartbeat(text), True: self.dialect.heartbeat("waiting for repair")}
        framed = {waiting: chunk(data) for waiting, data in plain.items()}
        for reader in tuple(self.readers):
            if reader.ending is None and not reader.sink.paused:  # uvloop raises for a connection that is gone
                reader.sink.write((framed if reader.sink.chunked else plain)[reader.waiting])
