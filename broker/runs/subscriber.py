"""One pub/sub connection for a whole process, read in batches.

redis-py's PubSub costs more per message than the rest of the way to the socket. So redis-py opens the connection
(TLS, AUTH and the rest stay its business), and then its transport gets a protocol of ours, which parses everything
that one read brought and hands it over without a task or a queue between.
"""

from __future__ import annotations

import asyncio
import logging
import re
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

import hiredis
from redis.asyncio import Redis
from redis.asyncio.client import PubSub

logger = logging.getLogger(__name__)

_BACKOFF = (0.05, 0.1, 0.2, 0.5, 1.0)
_PING_SECONDS = 5.0
_STABLE_SECONDS = 1.0
_CLOSE_SECONDS = 3.0


class Subscriber:
    """Keeps its subscriptions over reconnects.

    `on_message(channel, payload)` is called for each message and `on_batch()` after all that one read brought; both
    must be quick and must not raise. `on_reset()` is called when messages may have been missed: everything that was
    subscribed is subscribed again by then.
    """

    def __init__(
        self,
        redis: Redis,
        *,
        on_message: Callable[[str, bytes], None],
        on_batch: Callable[[], None] = lambda: None,
        on_reset: Callable[[], None] = lambda: None,
        channels: Iterable[str] = (),
    ) -> None:
        self._redis = redis
        self._on_message = on_message
        self._on_batch = on_batch
        self._on_reset = on_reset
        self._channels = set(channels)
        self._confirmations: dict[str, deque[asyncio.Future[None]]] = {}
        self._link: _Link | None = None
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._supervise(), name="subscriber")

    async def close(self) -> None:
        if self._task:
            self._task.cancel()
            await asyncio.wait([self._task], timeout=_CLOSE_SECONDS)

    @property
    def connected(self) -> bool:
        return self._link is not None

    @property
    def replid(self) -> str | None:
        """The `master_replid` of the server that it is connected to, as it was when it connected."""
        return self._link.replid if self._link else None

    def reconnect(self) -> None:
        """Drops the connection; another one follows."""
        if self._link is not None:
            self._link.abort()

    async def subscribe(self, channel: str) -> None:
        """Returns when Redis has confirmed. Raises ConnectionError while there is no connection."""
        self._channels.add(channel)
        if self._link is None:
            raise ConnectionError("the subscriber is not connected")
        confirmed = self._expect(channel)
        self._link.send("SUBSCRIBE", channel)
        await confirmed

    def unsubscribe(self, channel: str) -> None:
        """Also for a subscription that was not confirmed; nothing where none was asked for."""
        if channel not in self._channels:
            return
        self._channels.discard(channel)
        if self._link is not None:
            self._link.send("UNSUBSCRIBE", channel)

    def _expect(self, channel: str) -> asyncio.Future[None]:
        confirmed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._confirmations.setdefault(channel, deque()).append(confirmed)
        return confirmed

    async def _resubscribe(self, link: _Link) -> None:
        """The reset is told only when every subscription holds again: what is read after it misses nothing."""
        if self._channels:
            confirmed = [self._expect(channel) for channel in self._channels]
            link.send("SUBSCRIBE", *self._channels)
            await asyncio.gather(*confirmed, return_exceptions=True)
        self._on_reset()

    async def _supervise(self) -> None:
        failures = 0
        while True:
            try:
                link = await _open(self._redis, self._received)
            except Exception as error:  # also a refusal, which the operator may yet mend
                if failures == 0:
                    logger.warning("pub/sub connection failed", extra={"error": repr(error)})
                await asyncio.sleep(_BACKOFF[min(failures, len(_BACKOFF) - 1)])
                failures += 1
                continue
            reconnected, began = failures > 0, asyncio.get_running_loop().time()
            self._link = link
            resubscribing = asyncio.create_task(self._resubscribe(link))
            try:
                if reconnected:
                    logger.info("pub/sub connection restored", extra={"channels": len(self._channels)})
                await link.run()
            except Exception as error:
                lived = asyncio.get_running_loop().time() - began
                failures = 1 if lived > _STABLE_SECONDS else failures + 1
                logger.warning("pub/sub connection lost", extra={"error": repr(error)})
            finally:
                self._link = None
                resubscribing.cancel()
                await link.close()
                self._fail_waiting()
            await asyncio.sleep(_BACKOFF[min(failures, len(_BACKOFF)) - 1])

    def _fail_waiting(self) -> None:
        waiting, self._confirmations = self._confirmations, {}
        for futures in waiting.values():
            for future in futures:
                if not future.done():
                    future.set_exception(ConnectionError("the connection was lost"))

    def _received(self, replies: list[list[Any]]) -> None:
        """Replies of one read: [kind, channel, payload]."""
        for reply in replies:
            kind = reply[0]
            if kind == b"message":
                self._on_message(reply[1].decode("ascii"), reply[2])
            elif kind == b"subscribe":
                self._confirmed(reply[1].decode("ascii"))
        self._on_batch()

    def _confirmed(self, channel: str) -> None:
        """Confirmations come in the order of the requests; a request that was given up still has its place."""
        futures = self._confirmations.get(channel)
        if futures:
            future = futures.popleft()
            if not futures:
                del self._confirmations[channel]
            if not future.done():
                future.set_result(None)


class _Link(ABC):
    """A connection that carries subscriptions."""

    replid: str | None = None

    @abstractmethod
    def send(self, *command: str) -> None: ...

    @abstractmethod
    async def run(self) -> None:
        """Until the connection ends. Raises one of AWAY."""

    @abstractmethod
    def abort(self) -> None:
        """Ends `run`."""

    @abstractmethod
    async def close(self) -> None: ...


async def _open(redis: Redis, received: Callable[[list[list[Any]]], None]) -> _Link:
    connection: Any = redis.connection_pool.make_connection()  # type: ignore[no-untyped-call]
    try:
        await connection.connect()
        if getattr(connection, "_writer", None) is None or not hasattr(connection._writer, "transport"):
            await connection.disconnect()
            return _PubSubLink(redis.pubsub(), received)
        replid = await _replid(connection)
    except BaseException:
        # redis-py leaves the socket open when it is cancelled between the connection and its greeting.
        await connection.disconnect(nowait=True)
        raise
    link = _RawLink(connection, received)
    link.replid = replid
    return link


async def _replid(connection: Any) -> str | None:
    await connection.send_command("INFO", "replication")
    found = re.search(rb"master_replid:(\w+)", await connection.read_response(disable_decoding=True))
    return found[1].decode("ascii") if found else None


class _RawLink(_Link, asyncio.Protocol):
    """The fast way: hiredis on the transport that redis-py opened."""

    def __init__(self, connection: Any, received: Callable[[list[list[Any]]], None]) -> None:
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

    def send(self, *command: str) -> None:
        if not self._transport.is_closing():  # uvloop raises; that it is lost is told by `run`
            self._transport.write(hiredis.pack_command(command))  # type: ignore[arg-type]

    def data_received(self, data: bytes) -> None:
        self._heard = True
        self._reader.feed(data)
        replies = []
        while (reply := self._reader.gets()) is not False:
            if isinstance(reply, hiredis.ReplyError):
                self._transport.abort()
                return
            replies.append(reply)
        self._received(replies)

    def connection_lost(self, exc: Exception | None) -> None:
        if not self._lost.done():
            self._lost.set_exception(exc if isinstance(exc, OSError) else ConnectionError("closed by Redis"))

    async def run(self) -> None:
        while True:
            done, _ = await asyncio.wait([self._lost], timeout=_PING_SECONDS)
            if done:
                return self._lost.result()
            if not self._heard:
                raise ConnectionError("Redis did not answer a PING")
            self._heard = False
            self.send("PING")

    def abort(self) -> None:
        self._transport.abort()

    async def close(self) -> None:
        self._transport.abort()
        if not self._lost.done():
            self._lost.cancel()
        elif not self._lost.cancelled():
            self._lost.exception()


class _PubSubLink(_Link):
    """redis-py's own PubSub, where there is no socket: fakeredis."""

    def __init__(self, pubsub: PubSub, received: Callable[[list[list[Any]]], None]) -> None:
        self._pubsub = pubsub
        self._received = received
        self._commands: asyncio.Queue[tuple[str, ...]] = asyncio.Queue()

    def send(self, *command: str) -> None:
        self._commands.put_nowait(command)

    async def run(self) -> None:
        while True:
            while not self._commands.empty():
                verb, *channels = self._commands.get_nowait()
                await (self._pubsub.subscribe if verb == "SUBSCRIBE" else self._pubsub.unsubscribe)(*channels)
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
