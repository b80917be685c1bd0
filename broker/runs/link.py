"""One connection that carries subscriptions, read in batches.

redis-py's PubSub costs more per message than the rest of the way to the socket. So redis-py opens the connection
(TLS, AUTH and the rest stay its business), and then its transport gets a protocol of ours, which parses everything
that one read brought and hands it over without a task or a queue between.
"""

from __future__ import annotations

import asyncio
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection
from typing import Any

import hiredis
from redis.asyncio import Redis
from redis.asyncio.client import PubSub

from broker.runs.shards import HAS_SPUBLISH, publish_verb

PING_SECONDS = 5.0

Received = Callable[[list[Any]], None]
"""Takes the replies of one read: [kind, channel, payload], or hiredis.ReplyError."""


class Link(ABC):
    """A connection that carries subscriptions."""

    sharded = False
    """Whether they are those of SSUBSCRIBE."""
    replid: str | None = None
    """The `master_replid` of the server, as it was at the start."""

    @abstractmethod
    def subscribe(self, channels: Collection[str]) -> None:
        """The confirmations are among the replies."""

    @abstractmethod
    def unsubscribe(self, channel: str) -> None: ...

    @abstractmethod
    async def run(self) -> None:
        """Until the connection ends. Raises OSError or redis-py's exceptions."""

    @abstractmethod
    def abort(self) -> None:
        """Ends `run`."""

    @abstractmethod
    async def close(self) -> None: ...


async def open_link(redis: Redis, server: Redis, received: Received) -> Link:
    """To `server`, which is `redis` or one of its shards. Raises OSError or redis-py's exceptions."""
    connection: Any = server.connection_pool.make_connection()  # type: ignore[no-untyped-call]
    try:
        await connection.connect()
        if getattr(connection, "_writer", None) is None or not hasattr(connection._writer, "transport"):
            await connection.disconnect()
            return _PubSubLink(server.pubsub(), received)
        info: bytes = await _ask(connection, "INFO", "replication")
        if b"role:slave" in info:
            raise ConnectionError("this server is a replica")
        sharded = publish_verb(redis) == "SPUBLISH" and await _ask(connection, "EVAL", HAS_SPUBLISH, 0) == 1
    except BaseException:
        # redis-py leaves the socket open when it is cancelled between the connection and its greeting.
        await connection.disconnect(nowait=True)
        raise
    link = _RawLink(connection, received)
    replid = re.search(rb"master_replid:(\w+)", info)
    link.replid = replid[1].decode("ascii") if replid else None
    link.sharded = sharded
    return link


async def _ask(connection: Any, *command: str | int) -> Any:
    await connection.send_command(*command)
    return await connection.read_response(disable_decoding=True)


class _RawLink(Link, asyncio.Protocol):
    """The fast way: hiredis on the transport that redis-py opened."""

    def __init__(self, connection: Any, received: Received) -> None:
        self._received = received
        self._reader = hiredis.Reader()
        self._transport: asyncio.Transport = connection._writer.transport
        self._transport.set_protocol(self)
        # The transport is ours now: redis-py must neither read from it nor warn that it was left open. The writer is
        # kept because it closes its transport when it is collected.
        self._writer = connection._writer
        connection._reader = connection._writer = None
        self._lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._heard = True

    def subscribe(self, channels: Collection[str]) -> None:
        if self.sharded:  # channels of different slots cannot be in one command
            self._write(b"".join(_pack("SSUBSCRIBE", channel) for channel in channels))
        else:
            self._write(_pack("SUBSCRIBE", *channels))

    def unsubscribe(self, channel: str) -> None:
        self._write(_pack("SUNSUBSCRIBE" if self.sharded else "UNSUBSCRIBE", channel))

    def _write(self, data: bytes) -> None:
        if not self._transport.is_closing():  # uvloop raises; that it is lost is told by `run`
            self._transport.write(data)

    def data_received(self, data: bytes) -> None:
        self._heard = True
        self._reader.feed(data)
        replies = []
        while (reply := self._reader.gets()) is not False:
            replies.append(reply)
        self._received(replies)

    def connection_lost(self, exc: Exception | None) -> None:
        if not self._lost.done():
            self._lost.set_exception(exc if isinstance(exc, OSError) else ConnectionError("closed by Redis"))

    async def run(self) -> None:
        while True:
            done, _ = await asyncio.wait([self._lost], timeout=PING_SECONDS)
            if done:
                return self._lost.result()
            if not self._heard:
                raise ConnectionError("Redis did not answer a PING")
            self._heard = False
            self._write(_pack("PING"))

    def abort(self) -> None:
        self._transport.abort()

    async def close(self) -> None:
        self._transport.abort()
        if not self._lost.done():
            self._lost.cancel()
        elif not self._lost.cancelled():
            self._lost.exception()


def _pack(*command: str) -> bytes:
    packed: bytes = hiredis.pack_command(command)  # type: ignore[arg-type]
    return packed


class _PubSubLink(Link):
    """redis-py's own PubSub, where there is no socket: fakeredis."""

    def __init__(self, pubsub: PubSub, received: Received) -> None:
        self._pubsub = pubsub
        self._received = received
        self._subscribe: asyncio.Queue[tuple[bool, Collection[str]]] = asyncio.Queue()

    def subscribe(self, channels: Collection[str]) -> None:
        self._subscribe.put_nowait((True, channels))

    def unsubscribe(self, channel: str) -> None:
        self._subscribe.put_nowait((False, (channel,)))

    async def run(self) -> None:
        while True:
            while not self._subscribe.empty():
                wanted, channels = self._subscribe.get_nowait()
                await (self._pubsub.subscribe if wanted else self._pubsub.unsubscribe)(*channels)
            if not self._pubsub.subscribed:
                await asyncio.sleep(0.01)
                continue
            message = await self._pubsub.get_message(timeout=0.01)
            if message is not None:
                self._received([[message["type"].encode(), message["channel"], message["data"]]])

    def abort(self) -> None:
        """There is no other primary in this process."""

    async def close(self) -> None:
        await self._pubsub.aclose()  # type: ignore[no-untyped-call]
