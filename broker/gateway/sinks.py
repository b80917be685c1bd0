"""Where a stream's bytes go: straight to the connection's transport, or through ASGI's `send`."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Protocol

from starlette.types import Receive, Scope, Send

from broker.gateway.reader import Sink, chunk

EXTENSION = "broker.connection"
"""The key in an ASGI scope's `extensions` under which our server offers the connection itself."""


class Connection(Protocol):
    """What our server's protocol class offers: its transport, and news of it."""

    transport: asyncio.Transport
    sink: TransportSink | None


class Listener(Protocol):
    """What reads through a connection: a Reader, or several of them."""

    def paused(self) -> None:
        """The connection takes no more for now."""

    def wake(self) -> None:
        """It takes more."""

    def closed(self) -> None:
        """The client is gone."""

    def sleep(self) -> asyncio.Future[None]:
        """To be awaited: until woken."""


class StreamSink(Sink, Protocol):
    """A Sink that belongs to a connection."""

    def attach(self, reader: Listener) -> None: ...

    async def cut(self, last_words: bytes) -> None:
        """Ends the connection without the last chunk, so that no client takes this for the end of the run."""

    async def close(self) -> None:
        """Lets go of the connection."""


class TransportSink:
    """The fast path. `send` has written the response's head; in between, chunks go to the transport directly."""

    __slots__ = ("_connection", "_lost", "_reader", "_receive", "_timeout", "_write", "paused")
    chunked = True

    def __init__(self, connection: Connection, receive: Receive, send_timeout: float) -> None:
        self._write: Callable[[bytes], None] = connection.transport.write
        self._connection = connection
        self._receive = receive
        self._timeout = send_timeout
        self._reader: Listener | None = None
        self.paused = False
        self._lost = connection.transport.is_closing()
        connection.sink = self

    def attach(self, reader: Listener) -> None:
        self._reader = reader
        if self._lost:
            reader.closed()

    def write(self, data: bytes) -> None:
        try:
            self._write(data)
        except RuntimeError:  # uvloop's, of a connection that is gone; the reader hears of that by `lost`
            pass

    def pause(self) -> None:
        self.paused = True
        if self._reader is not None:
            self._reader.paused()

    def resume(self) -> None:
        self.paused = False
        if self._reader is not None:
            self._reader.wake()

    def lost(self) -> None:
        self._lost = True
        if self._reader is not None:
            self._reader.closed()

    async def drain(self) -> None:
        """The connection itself aborts after the send timeout."""
        assert self._reader is not None
        await self._reader.sleep()

    def abort(self) -> None:
        self._connection.transport.abort()
        if self._reader is not None:
            self._reader.closed()

    async def cut(self, last_words: bytes) -> None:
        if not self.paused:
            self.write(chunk(last_words))
        transport = self._connection.transport
        transport.close()
        # Closing waits until what is buffered is sent; a client that does not read must not hold up a drain.
        timer = asyncio.get_running_loop().call_later(min(self._timeout, 2.0), transport.abort)
        try:
            while (await self._receive())["type"] != "http.disconnect":
                pass
        finally:
            timer.cancel()

    async def close(self) -> None:
        self._connection.sink = None


class SendSink:
    """The fall-back for other servers and HTTP versions: the reader's own task sends."""

    chunked = False

    def __init__(self, receive: Receive, send: Send, send_timeout: float) -> None:
        self._send = send
        self._timeout = send_timeout
        self._pending: list[bytes] = []
        self._reader: Listener | None = None
        self._listener = asyncio.create_task(self._listen(receive))

    def attach(self, reader: Listener) -> None:
        self._reader = reader
        if self._listener.done():
            reader.closed()

    async def _listen(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        if self._reader is not None:
            self._reader.closed()

    def write(self, data: bytes) -> None:
        self._pending.append(data)
        if self._reader is not None:
            self._reader.paused()

    @property
    def paused(self) -> bool:
        return bool(self._pending)

    async def drain(self) -> None:
        pending, self._pending = self._pending, []
        try:
            async with asyncio.timeout(self._timeout):
                await self._send({"type": "http.response.body", "body": b"".join(pending), "more_body": True})
                # `send` may return without yielding once the client is gone; never spin on it.
                await asyncio.sleep(0)
        except TimeoutError:
            self.abort()

    def abort(self) -> None:
        """Nothing more is sent; returning without the last body message makes the server drop the connection."""
        if self._reader is not None:
            self._reader.closed()

    async def cut(self, last_words: bytes) -> None:
        self.write(last_words)
        await self.drain()

    async def close(self) -> None:
        while self._pending and not self._listener.done():
            await self.drain()
        self._listener.cancel()


def open_sink(scope: Scope, receive: Receive, send: Send, send_timeout: float) -> StreamSink:
    """The fast path where our own server runs HTTP/1.1, else the fall-back."""
    connection: Any = scope.get("extensions", {}).get(EXTENSION)
    if connection is not None and scope["http_version"] == "1.1":
        return TransportSink(connection, receive, send_timeout)
    return SendSink(receive, send, send_timeout)
