"""Connections to one server, and a bounded pool of them."""

from __future__ import annotations

import asyncio
import builtins
import re
import ssl
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from redis.asyncio import BlockingConnectionPool, Connection, SSLConnection, UnixDomainSocketConnection
from redis.asyncio.connection import AbstractConnection
from redis.exceptions import ConnectionError, ReadOnlyError, ResponseError, TimeoutError

from broker.runs.memory import is_out_of_memory, refused

_READ_ONLY_IN_SCRIPT = re.compile(r": -READONLY\b")
"""Of 6.2: "Error running script (call to f_…): @user_script:9: -READONLY …", which redis-py has no class for."""


class Cancellable(AbstractConnection if TYPE_CHECKING else object):  # type: ignore[misc]
    """redis-py sends inside `asyncio.wait_for`. On Python 3.11 that loses a cancellation which comes as the send ends:
    whoever was cancelled goes on for ever, and whoever waits for its end hangs. It also makes a task of each command.
    """

    demoted = False
    """Whether the server has said that it is a replica."""

    async def send_packed_command(self, command: bytes | str | Iterable[bytes], check_health: bool = True) -> None:
        if not self.is_connected:
            await self.connect()
        elif check_health:
            await self.check_health()
        whole = command.encode() if isinstance(command, str) else command
        try:
            async with asyncio.timeout(self.socket_timeout):
                await self._send_packed_command([whole] if isinstance(whole, bytes) else whole)
        except BaseException as error:
            # What was sent of it is not known: the connection cannot be used again.
            await self.disconnect(nowait=True)
            if isinstance(error, builtins.TimeoutError):
                raise TimeoutError("Timeout writing to Redis") from None
            if isinstance(error, (OSError, RuntimeError)):  # uvloop has the latter for a transport that was closed
                raise ConnectionError(f"Writing to Redis failed: {error}") from error
            raise

    async def read_response(self, *args: Any, **options: Any) -> Any:
        try:
            return await super().read_response(*args, **options)
        except ResponseError as error:
            if isinstance(error, ReadOnlyError) or _READ_ONLY_IN_SCRIPT.search(str(error)):
                self.demoted = True
            elif is_out_of_memory(error):
                refused(self._host_error())
            raise

    def abort(self) -> None:
        """Cuts it: who waits for an answer is told that the connection was lost."""
        if self._writer is not None:
            self._writer.transport.abort()


class Tcp(Cancellable, Connection):
    pass


class Tls(Cancellable, SSLConnection):
    def __init__(self, *, context: ssl.SSLContext, **options: Any) -> None:
        """`context` is shared: to make one takes many milliseconds."""
        super().__init__(**options)
        self.ssl_context.context = context


class Unix(Cancellable, UnixDomainSocketConnection):
    pass


def tls_context(options: dict[str, Any]) -> ssl.SSLContext:
    """Of the `ssl_…` options. Raises OSError and RedisError for a file that is missing or no certificate."""
    return SSLConnection(**options).ssl_context.get()


class Pool(BlockingConnectionPool):
    """Who finds no connection free waits. A server that turns out to be a replica loses all of its connections."""

    def __init__(self, *, on_trouble: Callable[[], None] = lambda: None, **options: Any) -> None:
        """`on_trouble()` is called when a connection failed, also where none could be made."""
        super().__init__(**options)
        self._on_trouble = on_trouble

    async def release(self, connection: Any) -> None:
        # redis-py's own also asks for listeners that would renew credentials: there are none, and it takes a while.
        async with self._condition:
            self._in_use_connections.remove(connection)
            self._available_connections.append(connection)
            self._condition.notify()
        if connection.demoted:
            connection.demoted = False
            self.drop()
        if not connection.is_connected:
            self._on_trouble()

    def connections(self) -> list[Any]:
        """Those in use and those that are not."""
        return [*self._available_connections, *self._in_use_connections]

    def drop(self) -> None:
        """Cuts all connections. Who comes next gets a new one."""
        for connection in self.connections():
            connection.abort()

    async def disconnect(self, inuse_connections: bool = True) -> None:
        # A polite end of TLS would wait for the other side, which may be gone.
        self.drop()
        await super().disconnect(inuse_connections)
