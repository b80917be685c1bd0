"""Connections to Redis. Timeouts are explicit and nothing is repeated behind a caller's back (PROTOCOL 8.1)."""

from __future__ import annotations

import asyncio
import builtins
import contextlib
import logging
import re
from collections.abc import Awaitable, Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar, cast

from redis.asyncio import BlockingConnectionPool, Connection, Redis, SSLConnection, UnixDomainSocketConnection
from redis.asyncio.connection import AbstractConnection
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import (
    BusyLoadingError,
    ClusterDownError,
    ConnectionError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisError,
    TimeoutError,
    TryAgainError,
)

from broker.errors import Unavailable

logger = logging.getLogger(__name__)

T = TypeVar("T")

SOCKET_TIMEOUT = 5.0


class NotReplicated(RedisError):
    """A write that shall survive a failover has not reached a replica. The same call may succeed later."""


AWAY = (
    NotReplicated,
    ConnectionError,
    TimeoutError,
    BusyLoadingError,
    ReadOnlyError,
    OutOfMemoryError,
    TryAgainError,
    ClusterDownError,
    OSError,
)
"""Redis cannot answer now; the same call may succeed later."""


def connect(url: str, *, connections: int, wait: float = SOCKET_TIMEOUT) -> Redis:
    """A client over at most `connections` connections; a caller waits up to `wait` seconds for a free one."""
    if url.startswith("fakeredis://"):
        return _fake(url)
    pool = BlockingConnectionPool.from_url(
        url,
        max_connections=connections,
        timeout=wait,
        socket_timeout=SOCKET_TIMEOUT,
        socket_connect_timeout=SOCKET_TIMEOUT,
        **({} if url.startswith("unix://") else {"socket_keepalive": True}),
        retry=Retry(NoBackoff(), 0),
        retry_on_error=[],
        client_name="stream-broker",
    )
    pool.connection_class = _CANCELLABLE[pool.connection_class]
    return Redis.from_pool(pool)


class _Cancellable(AbstractConnection if TYPE_CHECKING else object):  # type: ignore[misc]
    """redis-py sends inside `asyncio.wait_for`. On Python 3.11 that loses a cancellation which comes as the send ends:
    whoever was cancelled goes on for ever, and whoever waits for its end hangs. It also makes a task of each command.
    """

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
            if isinstance(error, OSError):
                raise ConnectionError(f"Writing to Redis failed: {error}") from error
            raise


class _Tcp(_Cancellable, Connection):
    pass


class _Tls(_Cancellable, SSLConnection):
    pass


class _Unix(_Cancellable, UnixDomainSocketConnection):
    pass


_CANCELLABLE: dict[type[AbstractConnection], type[AbstractConnection]] = {
    Connection: _Tcp,
    SSLConnection: _Tls,
    UnixDomainSocketConnection: _Unix,
}


def _fake(url: str) -> Redis:
    """The demo's last resort: a server inside this process, shared by every client of the same URL."""
    import fakeredis  # an optional extra

    server = _FAKE_SERVERS.setdefault(url, fakeredis.FakeServer(server_type="redis", version=(7,)))
    return cast(Redis, fakeredis.FakeAsyncRedis(server=server))


_FAKE_SERVERS: dict[str, Any] = {}


def is_away(error: BaseException) -> bool:
    """Whether `error` says that Redis cannot answer now, by its class or by its words."""
    return isinstance(error, AWAY) or (isinstance(error, RedisError) and _AWAY_WORDS.search(str(error)) is not None)


# Inside a script's error 6.2 has them after "-": "Error running script (call to f_…): @user_script:9: -OOM command …"
_AWAY_WORDS = re.compile(
    r"(?:^|: -?)(?:OOM|READONLY|LOADING|TRYAGAIN|CLUSTERDOWN|MASTERDOWN|NOREPLICAS|MISCONF|BUSY)\b"
)


@contextlib.contextmanager
def unavailable() -> Iterator[None]:
    """Turns "Redis is away", in any of its forms, into Unavailable."""
    try:
        yield
    except Exception as error:
        if not is_away(error):
            raise
        raise Unavailable("Redis cannot be reached or does not accept writes. Nothing was lost; try again.") from error


async def until_answered(call: Callable[[], Awaitable[T]], what: str, **fields: str) -> T:
    """Calls again until Redis answers. Only for what may be repeated. `fields` stand in the log beside `what`."""
    failures = 0
    while True:
        try:
            return await call()
        except Exception as error:
            if not is_away(error):
                raise
            if failures == 0:
                logger.warning(f"{what} failed, trying again", extra={**fields, "error": repr(error)})
            await asyncio.sleep(_BACKOFF[min(failures, len(_BACKOFF) - 1)])
            failures += 1


_BACKOFF = (0.05, 0.1, 0.25, 0.5, 1.0)
