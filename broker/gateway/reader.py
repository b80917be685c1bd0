"""One client's place in a run: a cursor, and a connection."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from enum import Enum
from typing import TYPE_CHECKING, NamedTuple, Protocol

from broker.ids import EventId

if TYPE_CHECKING:
    from broker.gateway.view import View


def chunk(data: bytes) -> bytes:
    """`data` as one chunk of a chunked HTTP/1.1 body."""
    return b"%x\r\n%b\r\n" % (len(data), data)


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
