"""One client's place in a run: a cursor, and a connection."""

from __future__ import annotations

import asyncio
import contextlib
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from enum import Enum
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from broker.gateway.dialects.dialect import Folded, Frame
from broker.ids import START, EventId

if TYPE_CHECKING:
    from broker.gateway.view import View


def chunk(data: bytes) -> bytes:
    """`data` as one chunk of a chunked HTTP/1.1 body; nothing for nothing, since an empty chunk is the body's end."""
    if not data:
        return b""
    return b"%x\r\n%b\r\n" % (len(data), data)


class Sink(Protocol):
    """Where a reader's bytes go."""

    chunked: bool
    """Whether it takes chunk-framed bytes, which its peers share."""

    @property
    def write(self) -> Callable[[bytes], None]:
        """Takes all of its data; may call the reader's `paused()` before it returns."""

    def attach(self, reader: Reader) -> None:
        """From now on the reader hears what happens to its connection."""

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


class Marks(NamedTuple):
    """Where the frames of a slice end."""

    positions: list[Any]
    ends: list[int]
    """Bytes from the slice's beginning."""

    @classmethod
    def of(cls, frames: Iterable[Sequence[Frame]]) -> Marks:
        marks, end = cls([], []), 0
        for of_entry in frames:
            for position, data in of_entry:
                end += len(data)
                marks.positions.append(position)
                marks.ends.append(end)
        return marks


class Slice(NamedTuple):
    """Frames up to and including those of `last`, as they are and as a chunk."""

    last: EventId
    data: bytes
    chunk: bytes
    folded: Folded
    """The fold after it."""
    marks: Marks | None = None


class Sleeper:
    """What sleeps until it is woken."""

    __slots__ = ("_waiter",)

    def __init__(self) -> None:
        self._waiter: asyncio.Future[None] | None = None

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


_NO_TURN = contextlib.nullcontext()


class Reader(Sleeper):
    """One client's place in a run: a cursor, and a connection."""

    __slots__ = (
        "_ending",
        "_had",
        "after",
        "cut_at",
        "folded",
        "lost",
        "position",
        "shown",
        "sink",
        "turn",
        "verified",
        "view",
        "waiting",
    )

    def __init__(self, view: View, sink: Sink, after: Any, cut_at: float | None) -> None:
        """The client has the frames up to the position `after`; None for nothing."""
        super().__init__()
        seekable = view.dialect.seekable
        self.view = view
        self.sink = sink
        self.position: EventId = after if seekable and after is not None else START
        """What has been read and folded. Reading begins where the fold can."""
        self.after = None if seekable else after
        """What is read up to here is left out; None as soon as there is nothing more to leave out."""
        self.folded = Folded(view.dialect.start, None)
        self.shown: EventId | None = None
        """The last event that the client was shown before the log was found rolled back; None once it is there."""
        self.lost = False
        """Whether the frame at `after` is not in the log, though what comes after it is."""
        self.verified = False
        """Whether the log is known to have the epoch of `position`."""
        self.waiting = False
        """For the repair of a log that ends below the client's cursor."""
        self.cut_at = cut_at
        """When the stream is cut, by the event loop's clock."""
        self.turn: contextlib.AbstractAsyncContextManager[object] = _NO_TURN
        """To be held with a page of the log, where several readers share a connection."""
        self._ending: End | None = None
        self._had = view.dialect.start
        """The fold's state where the client was when the log was found rolled back."""

    @property
    def ending(self) -> End | None:
        return self._ending

    def write(self, part: Slice) -> None:
        self.position, self.folded = part.last, part.folded
        if self.after is None:
            self.sink.write(part.chunk if self.sink.chunked else part.data)
        elif rest := self._unseen(part):
            self.write_bytes(rest)

    def _unseen(self, part: Slice) -> bytes:
        """What the client does not have of it."""
        assert part.marks is not None
        positions, ends = part.marks
        known = bisect_right(positions, self.after)
        if known and positions[known - 1] == self.after:
            self.after = None
        elif known < len(positions):
            self.lost = self.view.dialect.exact
            self.after = None
        return part.data[ends[known - 1] if known else 0 :] if not self.lost else b""

    @property
    def state(self) -> Any:
        """Of the fold, where the client stands; the start where that is not known."""
        return self.folded.state if self.after is None else self._had

    @property
    def can_be_lost(self) -> bool:
        """Whether what the client has may turn out not to be in the log."""
        dialect = self.view.dialect
        return dialect.seekable or (dialect.exact and not dialect.may_be_ahead) or self.shown is not None

    def ahead_of(self, end: EventId) -> bool:
        """Whether the client has more than a log that ends there."""
        if self.shown is not None and self.shown > end:
            return self.position == end
        return self.position > end or (self.after is not None and self.position == end)

    def fold_again(self) -> None:
        """The log may have been rolled back: what was folded of it may not be in it."""
        if self.view.dialect.seekable or self.position == START:
            return
        if self.after is None:
            self.after, self._had = self.folded.seen, self.folded.state
        self.shown = max(self.shown or START, self.position)
        self.position, self.folded = START, Folded(self.view.dialect.start, None)

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
