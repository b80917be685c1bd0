"""Several runs over one connection: each has a reader of its own, as if it were alone, and its place in every id."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from broker.gateway.dialects.native.many.cursor import Places
from broker.gateway.reader import End, Reader, Sleeper, chunk
from broker.gateway.sinks import StreamSink

Serve = Callable[["Part"], Awaitable[End]]
"""Opens a reader that writes to the part, and follows it to its end."""


class Multiplexer(Sleeper):
    """To the connection it is the one reader; to the readers of the runs its parts are the connections.

    A frame comes from a run's view with the id `<request_id>/<event id>`, encoded once for all; behind it go the places
    of the other runs. Where a write of one run fills the connection, the readers of all of them leave it.
    """

    def __init__(self, places: Places) -> None:
        super().__init__()
        self.places = places
        self.sink: StreamSink
        self.turn = asyncio.Lock()
        """Held with a page of a log: a connection that is stuck shall hold one, and not one for each of its runs."""
        self.ending: End | None = None
        self._parts: dict[str, Part] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._group: asyncio.TaskGroup

    @property
    def busy(self) -> bool:
        """Whether any run is under way."""
        return bool(self._parts)

    # -- runs ------------------------------------------------------------------------------------------------

    async def follow(
        self, sink: StreamSink, serve: Serve, begin: Callable[[], Awaitable[None]], tick: Callable[[], float]
    ) -> End:
        """Writes the runs until all have ended, the client goes, or the stream is cut.

        `begin` begins runs until there are no more to come. As long, `tick` is called, each time after as many seconds
        as it returns: it does what the readers of the runs do by themselves, since there may be none.
        """
        self.sink = sink
        self._serve = serve
        sink.attach(self)
        try:
            async with asyncio.TaskGroup() as self._group:
                looking = self._group.create_task(self._look(begin))
                try:
                    await self._run(looking, tick)
                finally:
                    looking.cancel()
                    self._end_parts()
        finally:
            del self._serve, self._group
        return self.ending or End.FINISHED

    async def _look(self, begin: Callable[[], Awaitable[None]]) -> None:
        await begin()
        super().wake()

    async def _run(self, looking: asyncio.Task[None], tick: Callable[[], float]) -> None:
        while self.ending is None and (self._tasks or not looking.done()):
            if self.sink.paused:
                await self.sink.drain()
                if not self.sink.paused:
                    self._wake_parts()
            elif looking.done():
                await self.sleep()
            else:
                await self.sleep(tick())

    def begin(self, request_id: str) -> None:
        part = self._parts[request_id] = Part(self, request_id)
        self._tasks[request_id] = self._group.create_task(self._follow_part(part))

    async def _follow_part(self, part: Part) -> None:
        try:
            end = await self._serve(part)
        finally:
            del self._parts[part.request_id], self._tasks[part.request_id]
        if end is End.FINISHED:
            self.places.over(part.request_id)
        else:
            self._stop(end)
        super().wake()

    def _end_parts(self) -> None:
        for request_id, part in self._parts.items():
            if part.reader is None:
                self._tasks[request_id].cancel()
            elif self.ending is End.CUT:
                part.reader.cut()
            else:
                part.reader.closed()

    # -- what is written -------------------------------------------------------------------------------------

    def write(self, request_id: str, data: bytes) -> None:
        """Whole frames of one run, or a comment."""
        if data.startswith(b":"):
            self.write_bytes(data)
            return
        self.write_bytes(self.places.complete(request_id, data))

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
        if self.ending is None:
            self.ending = ending
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
