"""A hub with clients that are not on a network: what each gets, and how it behaves."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

from redis.asyncio import Redis

from broker.events import Entry
from broker.gateway.dialects.dialect import Dialect
from broker.gateway.dialects.native.fold import Native
from broker.gateway.hub import Hub
from broker.gateway.reader import End, Reader
from broker.gateway.sinks import Listener
from broker.ids import START, EventId
from broker.runs import keys
from broker.runs.connections import connect
from broker.runs.record import HEAD_FIELDS, Head, parse_head
from broker.runs.scripts import Lease
from broker.settings import Settings
from tests.kit import sse
from tests.kit.checker import entries_of
from tests.kit.waiting import until


class Connection:
    """The client's side of a stream: takes everything, unless it stops reading."""

    def __init__(self, *, chunked: bool = True) -> None:
        self.chunked = chunked
        self.paused = False
        self.body = bytearray()
        self.writes = 0
        self.overruns = 0
        """Writes while it took nothing."""
        self.room: int | None = None
        """Bytes that it still takes before it stops reading."""
        self._reader: Listener | None = None

    def attach(self, reader: Listener) -> None:
        self._reader = reader

    @property
    def write(self) -> Callable[[bytes], None]:
        return self._write

    def _write(self, data: bytes) -> None:
        self.body += data
        self.writes += 1
        self.overruns += self.paused
        if self.room is not None and len(self.body) >= self.room and not self.paused:
            self.stop_reading()

    def stop_reading(self) -> None:
        self.paused = True
        if self._reader is not None:
            self._reader.paused()

    def read_on(self) -> None:
        self.room, self.paused = None, False
        assert self._reader is not None
        self._reader.wake()

    async def drain(self) -> None:
        assert self._reader is not None
        if self.paused:
            await self._reader.sleep()

    async def cut(self, last_words: bytes) -> None: ...

    async def close(self) -> None: ...

    def abort(self) -> None:
        assert self._reader is not None
        self._reader.closed()

    def leave(self) -> None:
        assert self._reader is not None
        self._reader.closed()

    def data(self) -> bytes:
        """What has come, without chunks."""
        return _dechunked(bytes(self.body)) if self.chunked else bytes(self.body)

    def entries(self) -> list[Entry]:
        return entries_of(sse.parse(self.data()))

    def comments(self) -> list[str]:
        stream = sse.EventStream()
        stream.feed(self.data())
        return stream.comments


def _dechunked(body: bytes) -> bytes:
    data = b""
    while body:
        size, _, body = body.partition(b"\r\n")
        data, end, body = data + body[: int(size, 16)], body[int(size, 16) :][:2], body[int(size, 16) + 2 :]
        assert end == b"\r\n", "a chunk of another size than it says"
    return data


@dataclass
class Stream:
    connection: Connection
    reader: Reader
    following: asyncio.Task[End]

    def entries(self) -> list[Entry]:
        return self.connection.entries()

    async def end(self, seconds: float = 15) -> End:
        async with asyncio.timeout(seconds):
            return await self.following

    async def leave(self) -> None:
        self.connection.leave()
        assert await self.end() is End.CLOSED


@dataclass
class Gateway:
    """A hub, and what is needed to watch a run through it."""

    hub: Hub
    redis: Redis
    opened: list[Stream] = field(default_factory=list)

    async def head(self, request_id: str) -> Head:
        head = parse_head(await self.redis.hmget(keys.run(request_id), HEAD_FIELDS))  # type: ignore[misc]
        assert head is not None
        return head

    async def watch(
        self,
        request_id: str,
        after: EventId = START,
        *,
        chunked: bool = True,
        long_ids: bool = False,
        seconds: float | None = None,
        head: Head | None = None,
        room: int | None = None,
    ) -> Stream:
        native = Native(request_id, long_ids=long_ids)
        return await self.open(request_id, native, chunked=chunked, head=head, room=room, after=after, seconds=seconds)

    async def open(
        self,
        request_id: str,
        dialect: Dialect,
        *,
        chunked: bool = True,
        head: Head | None = None,
        room: int | None = None,
        after: Any = None,
        seconds: float | None = None,
    ) -> Stream:
        connection = Connection(chunked=chunked)
        connection.room = room
        found = head or await self.head(request_id)
        reader = await self.hub.open(request_id, found, dialect, connection, after=after, seconds=seconds)
        stream = Stream(connection, reader, asyncio.create_task(self._follow(reader)))
        self.opened.append(stream)
        return stream

    async def _follow(self, reader: Reader) -> End:
        try:
            return await self.hub.follow(reader)
        finally:
            self.hub.close_reader(reader)


@contextlib.asynccontextmanager
async def hub_of(redis: Redis, url: str, **settings: Any) -> AsyncIterator[Gateway]:
    """A hub that reaches Redis at `url`; the test reaches it by `redis`."""
    commands, subscriptions = connect(url, connections=4), connect(url, connections=1)
    hub = Hub(commands, subscriptions, Settings(**settings))
    hub.start()
    await until(lambda: hub.connected)
    made = Gateway(hub, redis)
    yield made
    for stream in made.opened:
        stream.following.cancel()
    await asyncio.gather(*(stream.following for stream in made.opened), return_exceptions=True)
    await hub.close()
    for client in (commands, subscriptions):
        await client.aclose(close_connection_pool=True)


async def append_silently(redis: Redis, lease: Lease, first: int, *entries: tuple[str, str]) -> None:
    """As the script does, but without its message."""
    async with redis.pipeline(transaction=True) as pipe:
        for seq, (kind, data) in enumerate(entries, first):
            pipe.xadd(keys.log(lease.request_id), {"t": kind, "d": data}, id=f"{lease.epoch}-{seq}")
        pipe.hset(keys.run(lease.request_id), "end", f"{lease.epoch}-{first + len(entries) - 1}")
        await pipe.execute()
