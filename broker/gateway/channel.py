"""One run inside a gateway: its log's end, its readers, and the frames that they share. No I/O happens here."""

from __future__ import annotations

import asyncio
from bisect import bisect_right
from collections.abc import Callable, Iterable
from enum import Enum
from typing import NamedTuple, Protocol

from broker.events import Attempt, Entry
from broker.gateway.dialects import Dialect, Projection
from broker.ids import START, EventId
from broker.runs.record import FINISHED

RING_BYTES = 16 * 1024
"""What a view keeps for each of its readers, up to RING_BYTES_MAX: memory is bounded by connections."""
RING_BYTES_MAX = 512 * 1024
SLICE_BYTES = 64 * 1024
"""About the most that goes into a connection before its back-pressure is looked at."""

LOST = Entry(START, "attempt", Attempt(attempt=0, reason="cursor_lost", resume_from=str(START)).json_data())
"""The answer to a cursor that the log does not know: start again (PROTOCOL 6.5). Its id is the cursor 0-0."""


def chunk(data: bytes) -> bytes:
    """`data` as one chunk of a chunked HTTP/1.1 body."""
    return b"%x\r\n%b\r\n" % (len(data), data)


class State(NamedTuple):
    """What Redis says of a run, in one read."""

    status: str
    end: EventId
    lease_ms: int | None
    """What is left of its lease, negative when it has expired; None where nobody holds one."""


class Sink(Protocol):
    """Where a reader's bytes go."""

    chunked: bool
    """Whether it takes chunk-framed bytes, which its peers share."""

    @property
    def write(self) -> Callable[[bytes], None]:
        """Takes all of its data; may call the reader's `paused()` before it returns."""

    def attach(self, reader: Reader) -> None:
        """From now on the reader hears what happens to the connection."""

    @property
    def paused(self) -> bool: ...

    async def drain(self) -> None:
        """Returns when more may be written, or the connection is gone."""

    def abort(self) -> None:
        """Drops the connection, and what it has not sent."""


class End(Enum):
    """How a stream ended."""

    FINISHED = "finished"
    """The terminal event, or `gone`, is written: the body ends properly."""
    CUT = "cut"
    """The client shall come again, here or elsewhere: the body does not end properly."""
    CLOSED = "closed"
    """The client is gone."""


class Slice(NamedTuple):
    """Frames up to and including `last`, as they are and as a chunk."""

    last: EventId
    data: bytes
    chunk: bytes


class View:
    """A channel in one dialect and id form: each frame is encoded once, and shared by all readers."""

    __slots__ = (
        "_frames",
        "_ids",
        "_live_chunked",
        "_live_plain",
        "_long_ids",
        "_projection",
        "_size",
        "_unsent",
        "base",
        "channel",
        "dialect",
        "key",
        "readers",
    )

    def __init__(self, channel: Channel, dialect: Dialect, long_ids: bool) -> None:
        self.channel = channel
        self.dialect = dialect
        self.key = (dialect.name, long_ids)
        self.readers: set[Reader] = set()
        self.base = channel.end
        self._long_ids = long_ids
        self._projection = self.projection()
        self._ids: list[EventId] = []
        self._frames: list[bytes] = []
        self._size = 0
        self._unsent: list[bytes] = []
        self._live_chunked: dict[Reader, Callable[[bytes], None]] = {}
        self._live_plain: set[Reader] = set()

    def projection(self) -> Projection:
        return self.dialect.projection(self.channel.request_id, long_ids=self._long_ids)

    def join(self, reader: Reader) -> None:
        """`reader` has everything up to the channel's end, and gets what comes."""
        if reader.sink.chunked:
            self._live_chunked[reader] = reader.sink.write
        else:
            self._live_plain.add(reader)

    def leave(self, reader: Reader) -> None:
        """The reader goes on by itself from where the channel is now."""
        if self._live_chunked.pop(reader, None) is not None:
            reader.position = self.channel.end
        elif reader in self._live_plain:
            self._live_plain.discard(reader)
            reader.position = self.channel.end

    def extend(self, entries: Iterable[Entry]) -> None:
        for entry in entries:
            frame = self._projection.feed(entry)
            self._ids.append(entry.id)
            self._frames.append(frame)
            self._unsent.append(frame)
            self._size += len(frame)
        limit = min(RING_BYTES * len(self.readers), RING_BYTES_MAX)
        if self._size > 2 * limit and len(self._ids) > 1:
            self._trim(limit)

    def _trim(self, limit: int) -> None:
        drop = 0
        while self._size > limit and drop < len(self._ids) - 1:
            self._size -= len(self._frames[drop])
            drop += 1
        self.base = self._ids[drop - 1]
        del self._ids[:drop], self._frames[:drop]

    def flush(self) -> None:
        """One write for each reader, however many entries came."""
        data = b"".join(self._unsent)
        self._unsent.clear()
        if data:
            if self._live_chunked:
                framed = chunk(data)
                for write in tuple(self._live_chunked.values()):
                    write(framed)
            for reader in tuple(self._live_plain):
                reader.sink.write(data)
        if self.channel.finished:
            self.release()

    def release(self) -> None:
        """All readers go on by themselves, from where the channel is now."""
        for reader in (*self._live_chunked, *self._live_plain):
            self.leave(reader)
            reader.wake()

    def restart(self) -> None:
        """The ring begins anew at the channel's end."""
        self.base, self._size = self.channel.end, 0
        self._ids.clear()
        self._frames.clear()
        self._unsent.clear()

    def after(self, position: EventId) -> Slice | None:
        """What the ring has above `position`, a slice of it; None where the ring does not reach back so far."""
        if position < self.base:
            return None
        first = bisect_right(self._ids, position)
        last, size = first, 0
        while last < len(self._ids) and size < SLICE_BYTES:
            size += len(self._frames[last])
            last += 1
        if first == last:
            return None
        data = b"".join(self._frames[first:last])
        return Slice(self._ids[last - 1], data, chunk(data))

    def beat(self, text: str) -> None:
        """A heartbeat for every reader that can take one."""
        plain = {False: self.dialect.heartbeat(text), True: self.dialect.heartbeat("waiting for repair")}
        framed = {waiting: chunk(data) for waiting, data in plain.items()}
        for reader in tuple(self.readers):
            if not reader.sink.paused:
                reader.sink.write((framed if reader.sink.chunked else plain)[reader.waiting])


class Channel:
    """A run with readers in this process."""

    __slots__ = (
        "end",
        "gone",
        "inbox",
        "next_beat",
        "opened",
        "reading",
        "request_id",
        "status",
        "subscribed",
        "users",
        "views",
        "watchers",
    )

    def __init__(self, request_id: str) -> None:
        self.request_id = request_id
        self.end = START
        self.status = ""
        self.gone = False
        self.subscribed = False
        self.opened = False
        """Whether the run was read since the subscription."""
        self.users = 0
        self.views: dict[tuple[str, bool], View] = {}
        self.watchers: set[asyncio.Future[None]] = set()
        self.inbox: list[tuple[EventId, list[Entry]]] = []
        """Messages that wait while the run is read again."""
        self.reading: asyncio.Task[None] | None = None
        self.next_beat = 0.0

    @property
    def finished(self) -> bool:
        """Nothing follows: the log's end is a terminal event, or the run was erased."""
        return self.gone or self.status in FINISHED

    def view(self, dialect: Dialect, long_ids: bool) -> View:
        key = (dialect.name, long_ids)
        if key not in self.views:
            self.views[key] = View(self, dialect, long_ids)
        return self.views[key]

    def accept(self, prev: EventId, entries: list[Entry]) -> bool:
        """Takes a message. False: it does not follow the channel's end, so the run must be read again (6.1)."""
        last = entries[-1]
        if last.id <= self.end:
            return True  # known: an id never has two contents, so there is nothing new in it
        if prev != self.end:
            return False
        self.end = last.id
        self.status = "running"
        for view in self.views.values():
            view.extend(entries)
        if last.terminal:
            self.status = {"final": "completed", "error": "failed"}.get(last.type, "cancelled")
            self._finish()
        return True

    def flush(self) -> None:
        for view in self.views.values():
            view.flush()

    def update(self, state: State | None) -> None:
        """The run was read again: readers go on by themselves, through the log, to where it ends now."""
        if state is None:
            self.erase()
            return
        moved = state.end != self.end
        for view in self.views.values():
            if moved:
                view.release()
            for reader in view.readers:
                reader.verified = False
                reader.wake()
        self.end, self.status = state.end, state.status
        if moved:
            for view in self.views.values():
                view.restart()
        if self.finished:
            self._finish()

    def erase(self) -> None:
        self.gone = True
        self._finish()

    def _finish(self) -> None:
        for watcher in self.watchers:
            if not watcher.done():
                watcher.set_result(None)
        if self.gone:
            for view in self.views.values():
                view.release()

    def beat(self, state: State | None) -> None:
        text = heartbeat_text(self.end, state)
        for view in self.views.values():
            view.beat(text)


def heartbeat_text(end: EventId, state: State | None) -> str:
    """The truth as far as it is known: `heartbeat 12-812 lease=1.3s`."""
    if state is None:
        return f"heartbeat {end} lease=unknown"
    if state.lease_ms is None:
        return f"heartbeat {end} {state.status}"
    lease = f"{state.lease_ms / 1000:.1f}s" if state.lease_ms > 0 else "expired"
    return f"heartbeat {end} lease={lease}"


class Reader:
    """One client's place in a run: a cursor, and a connection."""

    __slots__ = ("_ending", "_waiter", "cut_at", "position", "sink", "verified", "view", "waiting")

    def __init__(self, view: View, sink: Sink, position: EventId, cut_at: float | None) -> None:
        self.view = view
        self.sink = sink
        self.position = position
        self.verified = False
        """Whether the log is known to have the epoch of `position`."""
        self.waiting = False
        """For the repair of a log that ends below `position`."""
        self.cut_at = cut_at
        """When the stream is cut, by the event loop's clock."""
        self._ending: End | None = None
        self._waiter: asyncio.Future[None] | None = None

    @property
    def ending(self) -> End | None:
        return self._ending

    def write(self, part: Slice) -> None:
        self.position = part.last
        self.sink.write(part.chunk if self.sink.chunked else part.data)

    def write_bytes(self, data: bytes) -> None:
        self.sink.write(chunk(data) if self.sink.chunked else data)

    def paused(self) -> None:
        """The connection takes no more for now."""
        self.view.leave(self)
        self.wake()

    def closed(self) -> None:
        """The client is gone."""
        self._stop(End.CLOSED)

    def cut(self) -> None:
        """To be called between events only; every write is of whole events."""
        self._stop(End.CUT)

    def _stop(self, ending: End) -> None:
        if self._ending is None:
            self._ending = ending
            self.view.leave(self)
            self.wake()

    def wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def sleep(self, seconds: float | None = None) -> asyncio.Future[None]:
        """To be awaited: until woken, or for `seconds`. No coroutine, since an idle stream consists of this."""
        loop = asyncio.get_running_loop()
        self._waiter = waiter = loop.create_future()
        if seconds is not None:
            timer = loop.call_later(seconds, self.wake)
            waiter.add_done_callback(lambda _: timer.cancel())
        return waiter
