"""Several runs over one connection: each has a reader of its own, as if it were alone, and its place in every id."""

from __future__ import annotations

import asyncio
from typing import Protocol

from broker import sse
from broker.errors import RunNotFound, Unavailable
from broker.gateway.dialects.native.many.cursor import Places
from broker.gateway.dialects.native.many.fold import NativeOfMany
from broker.gateway.hub import Hub
from broker.gateway.reader import End, Reader, Sleeper, chunk
from broker.gateway.sinks import StreamSink
from broker.ids import EventId
from broker.runs.record import Head

LOOK_SECONDS = 1.0
"""How often is looked at what no reader tells, at most."""
BEAT_SHARE = 0.75


class Source(Protocol):
    """Which runs a stream is of."""

    @property
    def places(self) -> Places:
        """Where the client stands in them."""

    async def begin(self, multiplexer: Multiplexer) -> None:
        """Begins the runs; returns when there are no more to come."""


class Multiplexer(Sleeper):
    """To the connection it is the one reader; to the readers of the runs its parts are the connections.

    A frame comes from a run's view with the id `<request_id>/<event id>`, encoded once for all; behind it go the places
    of the other runs. Where a write of one run fills the connection, the readers of all of them leave it.
    """

    def __init__(
        self, hub: Hub, source: Source, sink: StreamSink, *, seconds: float | None, heartbeat_seconds: float
    ) -> None:
        """Cut after `seconds`."""
        super().__init__()
        now = asyncio.get_running_loop().time()
        self.sink = sink
        self.turn = asyncio.Lock()
        """Held with a page of a log: a connection that is stuck shall hold one, and not one for each of its runs."""
        self.pause = min(LOOK_SECONDS, heartbeat_seconds / 8)
        """Seconds between two looks."""
        self._hub = hub
        self._source = source
        self._cut_at = None if seconds is None else now + seconds
        self.heartbeat = BEAT_SHARE * heartbeat_seconds
        """Seconds after which what is idle beats."""
        self._beat_at = now + self.heartbeat
        self._ending: End | None = None
        self._parts: dict[str, Part] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._group = asyncio.TaskGroup()

    async def follow(self) -> End:
        """Writes the runs until all have ended, the client goes, or the stream is cut."""
        self.sink.attach(self)
        async with self._group:
            looking = self._group.create_task(self._look())
            try:
                await self._run(looking)
            finally:
                looking.cancel()
                self._end_parts()
        return self._ending or End.FINISHED

    async def _look(self) -> None:
        await self._source.begin(self)
        super().wake()

    async def _run(self, looking: asyncio.Task[None]) -> None:
        while self._ending is None and (self._tasks or not looking.done()):
            if self.sink.paused:
                await self.sink.drain()
                if not self.sink.paused:
                    self._wake_parts()
            elif looking.done():
                await self.sleep()
            elif self._hub.cutting or self._seconds_left() == 0:
                self.cut()
            else:
                self._beat()
                await self.sleep(self.pause)

    def _beat(self) -> None:
        """Runs that are under way beat by themselves."""
        now = asyncio.get_running_loop().time()
        if not self._parts:
            if now < self._beat_at:
                return
            self.write_bytes(sse.comment("heartbeat"))
        self._beat_at = now + self.heartbeat

    def _seconds_left(self) -> float | None:
        return None if self._cut_at is None else max(self._cut_at - asyncio.get_running_loop().time(), 0.0)

    # -- runs ------------------------------------------------------------------------------------------------

    def begin(self, request_id: str, head: Head, after: EventId | None = None) -> None:
        """From now on the run is written: what comes after the event `after` of it, or all of it."""
        part = self._parts[request_id] = Part(self, request_id)
        self._tasks[request_id] = self._group.create_task(self._follow_part(part, head, after))

    def gone(self, request_id: str) -> None:
        """The client is told that the run is not there any more."""
        self.write(request_id, NativeOfMany(request_id).gone(None))
        self._source.places.over(request_id)

    async def _follow_part(self, part: Part, head: Head, after: EventId | None) -> None:
        try:
            end = await self._serve(part, head, after)
        finally:
            del self._parts[part.request_id], self._tasks[part.request_id]
        if end is End.FINISHED:
            self._source.places.over(part.request_id)
        else:
            self._stop(end)
        super().wake()

    async def _serve(self, part: Part, head: Head, after: EventId | None) -> End:
        request_id, hub = part.request_id, self._hub
        try:
            reader = await hub.open(
                request_id, head, NativeOfMany(request_id), part, after=after, seconds=self._seconds_left()
            )
        except RunNotFound:
            self.gone(request_id)
            return End.FINISHED
        except Unavailable:
            return End.CUT
        try:
            return await hub.follow(reader)
        finally:
            hub.close_reader(reader)

    def _end_parts(self) -> None:
        for request_id, part in self._parts.items():
            if part.reader is None:
                self._tasks[request_id].cancel()
            elif self._ending is End.CUT:
                part.reader.cut()
            else:
                part.reader.closed()

    # -- what is written -------------------------------------------------------------------------------------

    def write(self, request_id: str, data: bytes) -> None:
        """Whole frames of one run, or a comment."""
        if data.startswith(b":"):
            self.write_bytes(data)
            return
        self.write_bytes(self._source.places.complete(request_id, data))

    def write_bytes(self, data: bytes) -> None:
        self.sink.write(chunk(data) if self.sink.chunked else data)

    # -- what happens to the connection ----------------------------------------------------------------------

    def paused(self) -> None:
        for reader in self._readers():
            reader.paused()
        super().wake()

    def wake(self) -> None:
        self._wake_parts()
        super().wake()

    def closed(self) -> None:
        self._stop(End.CLOSED)

    def cut(self) -> None:
        self._stop(End.CUT)

    def _stop(self, ending: End) -> None:
        if self._ending is None:
            self._ending = ending
            super().wake()

    def _wake_parts(self) -> None:
        for reader in self._readers():
            reader.wake()

    def _readers(self) -> list[Reader]:
        return [part.reader for part in self._parts.values() if part.reader is not None]


class Part:
    """What one run's reader writes to."""

    __slots__ = ("_multiplexer", "reader", "request_id")
    chunked = False

    def __init__(self, multiplexer: Multiplexer, request_id: str) -> None:
        self.request_id = request_id
        self.reader: Reader | None = None
        self._multiplexer = multiplexer

    def attach(self, reader: Reader) -> None:
        self.reader = reader
        reader.turn = self._multiplexer.turn

    @property
    def paused(self) -> bool:
        return self._multiplexer.sink.paused

    def write(self, data: bytes) -> None:
        self._multiplexer.write(self.request_id, data)

    async def drain(self) -> None:
        """The multiplexer wakes its readers when the connection takes more, or is gone."""
        assert self.reader is not None
        await self.reader.sleep()

    def abort(self) -> None:
        self._multiplexer.sink.abort()
