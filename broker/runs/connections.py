"""Connections to Redis. Timeouts are explicit and nothing is repeated behind a caller's back (PROTOCOL 8.1)."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import ssl
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, TypeVar, cast

from redis.asyncio import Connection, Redis, SSLConnection, UnixDomainSocketConnection
from redis.asyncio.cluster import ClusterParser
from redis.asyncio.connection import AbstractConnection, parse_url
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import (
    AskError,
    BusyLoadingError,
    ClusterDownError,
    ConnectionError,
    NoScriptError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisError,
    TimeoutError,
    TryAgainError,
)

from broker.errors import Misconfigured, Unavailable
from broker.redis_url import Address, parse
from broker.runs.cluster import Cluster
from broker.runs.memory import is_out_of_memory
from broker.runs.pool import Cancellable, Pool, Tcp, Tls, Unix, tls_context
from broker.runs.sentinel import ElectedPool, ElectedTcp, ElectedTls, Sentinels

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
    AskError,  # and MovedError, which is one: a run that has just moved to another primary
    TryAgainError,
    ClusterDownError,
    NoScriptError,  # it was loaded, but the primary is another one meanwhile
    OSError,
)
"""Redis cannot answer now; the same call may succeed later."""


def connect(url: str, *, connections: int, wait: float = SOCKET_TIMEOUT) -> Redis:
    """A client over at most `connections` connections, of a Cluster for each node; a caller waits up to `wait` seconds
    for a free one.

    Raises Misconfigured where the URL's certificates cannot be used.
    """
    if url.startswith("fakeredis://"):
        return _fake(url)
    where = parse(url)
    options: dict[str, Any] = {
        "socket_timeout": SOCKET_TIMEOUT,
        "socket_connect_timeout": SOCKET_TIMEOUT,
        "retry": Retry(NoBackoff(), 0),
        "retry_on_error": [],
        "client_name": "stream-broker",
        **parse_url(where.plain),
    }
    kind = _CANCELLABLE[options.pop("connection_class", Connection)]
    if kind is not Unix:
        options["socket_keepalive"] = True
    if kind is Tls:
        options["context"] = _tls_context(options)
    pool: dict[str, Any] = {"max_connections": connections, "timeout": wait}
    if where.kind == "sentinel":
        own = {"username": where.sentinel_username, "password": where.sentinel_password}
        asking = {name: value for name, value in options.items() if name not in ("host", "port", "db")} | own
        sentinels = Sentinels(where.nodes, where.master, kind, **asking)
        elected = ElectedTls if kind is Tls else ElectedTcp
        return Redis.from_pool(ElectedPool(connection_class=elected, sentinels=sentinels, **pool, **options))
    if where.kind == "cluster":
        common = {**options, **pool, "connection_class": kind, "parser_class": ClusterParser}

        def make_pool(address: Address, on_trouble: Callable[[], None]) -> Pool:
            return Pool(on_trouble=on_trouble, **{**common, "host": address[0], "port": address[1]})

        return Cluster(where.nodes, make_pool)
    return Redis.from_pool(Pool(connection_class=kind, **pool, **options))


_CANCELLABLE: dict[type[AbstractConnection], type[Cancellable]] = {
    Connection: Tcp,
    SSLConnection: Tls,
    UnixDomainSocketConnection: Unix,
}


def _tls_context(options: dict[str, Any]) -> ssl.SSLContext:
    # redis-py checks only that the certificate is from a known authority, not whose it is.
    options.setdefault("ssl_check_hostname", options.get("ssl_cert_reqs") != "none")
    try:
        return tls_context(options)
    except (OSError, RedisError, ValueError) as error:
        raise Misconfigured(f"the certificates of the Redis URL cannot be used: {error}") from None


def _fake(url: str) -> Redis:
    """The demo's last resort: a server inside this process, shared by every client of the same URL."""
    import fakeredis  # an optional extra

    server = _FAKE_SERVERS.setdefault(url, fakeredis.FakeServer(server_type="redis", version=(7,)))
    return cast(Redis, fakeredis.FakeAsyncRedis(server=server))


_FAKE_SERVERS: dict[str, Any] = {}


def is_away(error: BaseException) -> bool:
    """Whether `error` says that Redis cannot answer now, by its class or by its words."""
    return isinstance(error, AWAY) or (isinstance(error, RedisError) and _AWAY_WORDS.search(str(error)) is not None)


# UNBLOCKED: a primary became a replica while somebody waited for its replicas.
# Inside a script's error 6.2 has them after "-": "Error running script (call to f_…): @user_script:9: -OOM command …"
_AWAY_WORDS = re.compile(
    r"(?:^|: -?)(?:OOM|READONLY|LOADING|TRYAGAIN|CLUSTERDOWN|MASTERDOWN|NOREPLICAS|MISCONF|BUSY|UNBLOCKED)\b"
)


@contextlib.contextmanager
def unavailable() -> Iterator[None]:
    """Turns "Redis is away", in any of its forms, into Unavailable."""
    try:
        yield
    except Exception as error:
        if not is_away(error):
            raise
        raise Unavailable(f"Redis {_why(error)}. Nothing was lost; try again.") from error


def _why(error: Exception) -> str:
    if isinstance(error, NotReplicated):
        return "has no replica that confirms writes at present"
    return "is out of memory" if is_out_of_memory(error) else "cannot be reached or does not accept writes"


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
                reason = {"reason": "Redis is out of memory"} if is_out_of_memory(error) else {}
                logger.warning(f"{what} failed, trying again", extra={**fields, **reason, "error": repr(error)})
            await asyncio.sleep(_BACKOFF[min(failures, len(_BACKOFF) - 1)])
            failures += 1


_BACKOFF = (0.05, 0.1, 0.25, 0.5, 1.0)
