"""Connections to Redis. Timeouts are explicit and nothing is repeated behind a caller's back (PROTOCOL 8.1)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, cast

from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import (
    BusyLoadingError,
    ClusterDownError,
    ConnectionError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisError,
    ResponseError,
    TimeoutError,
    TryAgainError,
)

from broker.errors import Unavailable

SOCKET_TIMEOUT = 5.0

AWAY = (
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
    return Redis.from_pool(pool)


def _fake(url: str) -> Redis:
    """The demo's last resort: a server inside this process, shared by every client of the same URL."""
    import fakeredis  # an optional extra

    server = _FAKE_SERVERS.setdefault(url, fakeredis.FakeServer(server_type="redis", version=(7,)))
    return cast(Redis, fakeredis.FakeAsyncRedis(server=server))


_FAKE_SERVERS: dict[str, Any] = {}


@contextlib.contextmanager
def unavailable() -> Iterator[None]:
    """Turns "Redis is away", in any of its forms, into Unavailable."""
    try:
        yield
    except AWAY as error:
        raise Unavailable(_AWAY_TEXT) from error
    except ResponseError as error:
        if str(error).startswith(_AWAY_ANSWERS):
            raise Unavailable(_AWAY_TEXT) from error
        raise


def is_away(error: BaseException) -> bool:
    """Whether `error` says that Redis cannot answer now, by its class or, inside a script's error, by its words."""
    return isinstance(error, AWAY) or (isinstance(error, RedisError) and str(error).startswith(_AWAY_ANSWERS))


_AWAY_TEXT = "Redis cannot be reached or does not accept writes. Nothing was lost; try again."
_AWAY_ANSWERS = ("OOM", "READONLY", "LOADING", "TRYAGAIN", "CLUSTERDOWN", "MASTERDOWN", "NOREPLICAS", "MISCONF")
