"""The subscriptions of a process: one connection to each shard, each subscription on its run's shard."""

from __future__ import annotations

import asyncio
import logging
import re
from collections import deque
from collections.abc import Callable, Collection, Iterable
from typing import Any

import hiredis
from redis.asyncio import Redis

from broker.redis_url import Address
from broker.runs.layout import slot_of_key
from broker.runs.link import Link, open_link
from broker.runs.shards import Shard, renew, shard_of_key, shards

logger = logging.getLogger(__name__)

_BACKOFF = (0.05, 0.1, 0.2, 0.5, 1.0)
_STABLE_SECONDS = 1.0
_CLOSE_SECONDS = 3.0
_LOOK_SECONDS = 5.0
_MOVED = re.compile(r"MOVED ([0-9]+) (.*):([0-9]+)")
_MOVING_SECONDS = 0.05
"""What moves from one shard to another seldom moves alone."""


class Subscriber:
    """Keeps its subscriptions over reconnects, and over moves of slots between the shards of a Cluster.

    `on_message(channel, payload)` is called for each message and `on_batch()` after all that one read brought; both
    must be quick and must not raise. `on_reset(channels)` is called when messages of these channels may have been
    missed: they are subscribed again by then.
    """

    def __init__(
        self,
        redis: Redis,
        *,
        on_message: Callable[[str, bytes], None],
        on_batch: Callable[[], None] = lambda: None,
        on_reset: Callable[[Collection[str]], None] = lambda channels: None,
        channels: Iterable[str] = (),
    ) -> None:
        """The connections are its own; of `redis` it only takes how they are made."""
        self.redis = redis
        self.on_message = on_message
        self.on_batch = on_batch
        self.on_reset = on_reset
        self._feeds: dict[str, _Feed] = {}
        self._homes: dict[str, _Feed] = {}
        """On which feed each channel is, or shall be."""
        self._homeless = set(channels)
        """Channels that are on no feed."""
        self._displaced = asyncio.Event()
        self._hint: Address | None = None
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._tend(), name="subscriber")

    async def close(self) -> None:
        if self._task:
            self._task.cancel()
            await asyncio.wait([self._task], timeout=_CLOSE_SECONDS)
        await asyncio.gather(*(feed.close() for feed in self._feeds.values()))

    @property
    def connected(self) -> bool:
        """To any shard: the runs on it can be served."""
        return any(feed.link for feed in self._feeds.values())

    def replid(self, shard: str = "") -> str | None:
        """The `master_replid` of the server that it is connected to, as it was when it connected."""
        feed = self._feeds.get(shard)
        return feed.link.replid if feed and feed.link else None

    def reconnect(self, shard: str = "") -> None:
        """Drops the connection; another one follows."""
        if shard in self._feeds:
            self._feeds[shard].reconnect()

    async def subscribe(self, channel: str) -> None:
        """Returns when Redis has confirmed. Raises ConnectionError while there is no connection."""
        feed = self._feeds.get(shard_of_key(self.redis, channel))
        home = self._homes.get(channel)
        if home is not None and home is not feed:
            self.displaced(home, [channel])
            home.leave(channel)
        if feed is None:
            self._homeless.add(channel)
            raise ConnectionError("the subscriber is not connected")
        self._homeless.discard(channel)
        self._homes[channel] = feed
        await feed.subscribe(channel)

    def unsubscribe(self, channel: str) -> None:
        """Also for a subscription that was not confirmed; nothing where none was asked for."""
        self._homeless.discard(channel)
        home = self._homes.pop(channel, None)
        if home is not None:
            home.leave(channel)

    def displaced(self, feed: _Feed, channels: Collection[str] = (), hint: Address | None = None) -> None:
        """The shards may not be what they were. `feed` cannot have these channels any more; `hint` knows who can."""
        for channel in channels:
            if self._homes.get(channel) is feed:
                del self._homes[channel]
                self._homeless.add(channel)
        self._hint = hint or self._hint
        self._displaced.set()

    async def _tend(self) -> None:
        """Keeps a feed for each shard, and each channel on the feed of its shard."""
        failures, before = 0, list[Shard]()
        while True:
            displaced = self._displaced.is_set()
            self._displaced.clear()
            try:
                if displaced:
                    hint, self._hint = self._hint, None
                    await renew(self.redis, hint)
                found = await shards(self.redis)
                if found != before:
                    await self._feed(found)
                self._settle()
                failures, before = 0, found
            except Exception as error:
                if failures == 0:
                    logger.warning("the shards are not known", extra={"error": repr(error)})
                if displaced:
                    self._displaced.set()
                await asyncio.sleep(_BACKOFF[min(failures, len(_BACKOFF) - 1)])
                failures += 1
                continue
            try:
                async with asyncio.timeout(_LOOK_SECONDS):
                    await self._displaced.wait()
                await asyncio.sleep(_MOVING_SECONDS)
            except TimeoutError:
                pass

    async def _feed(self, found: list[Shard]) -> None:
        servers = {shard.name: shard.redis for shard in found}
        for name in self._feeds.keys() - servers.keys():
            feed = self._feeds.pop(name)
            self.displaced(feed, [channel for channel, home in self._homes.items() if home is feed])
            await feed.close()
        for name, server in servers.items():
            if name not in self._feeds:
                self._feeds[name] = _Feed(self, name)
            self._feeds[name].follow(server)

    def _settle(self) -> None:
        """Whoever is on no feed goes to that of its shard, where there is one."""
        moved: dict[_Feed, list[str]] = {}
        for channel in self._homeless:
            feed = self._feeds.get(shard_of_key(self.redis, channel))
            if feed is not None:
                moved.setdefault(feed, []).append(channel)
        for feed, channels in moved.items():
            self._homeless.difference_update(channels)
            self._homes.update(dict.fromkeys(channels, feed))
            feed.adopt(channels)


class _Feed:
    """The connection to a shard, opened again whenever it ends, and the subscriptions on it."""

    def __init__(self, owner: Subscriber, name: str) -> None:
        self._owner = owner
        self._name = name
        self._server: Redis | None = None
        self._channels: set[str] = set()
        self._confirmations: dict[str, deque[asyncio.Future[None]]] = {}
        self._leaving: dict[str, int] = {}
        """How many of our own SUNSUBSCRIBEs are not answered: what is beyond them is the server's doing."""
        self.link: Link | None = None
        self._subscribing: set[asyncio.Task[None]] = set()
        self._task: asyncio.Task[None] | None = None

    def follow(self, server: Redis) -> None:
        """The shard's primary is `server` now."""
        if self._server is not None and self._server is not server:
            self.reconnect()
        self._server = server
        if self._task is None:
            self._task = asyncio.create_task(self._supervise(), name="subscriptions")

    def reconnect(self) -> None:
        if self.link is not None:
            self.link.abort()

    async def close(self) -> None:
        if self._task:
            self._task.cancel()
            await asyncio.wait([self._task], timeout=_CLOSE_SECONDS)

    async def subscribe(self, channel: str) -> None:
        self._channels.add(channel)
        if self.link is None:
            raise ConnectionError("the subscriber is not connected")
        confirmed = self._expect(channel)
        self.link.subscribe([channel])
        await confirmed

    def adopt(self, channels: Collection[str]) -> None:
        """Subscribes to them in the background, or with the next connection."""
        self._channels.update(channels)
        if self.link is not None:
            self._subscribe_again(self.link, channels)

    def leave(self, channel: str) -> None:
        self._channels.discard(channel)
        if self.link is not None:
            self.link.unsubscribe(channel)
            if self.link.sharded:
                self._leaving[channel] = self._leaving.get(channel, 0) + 1

    def _expect(self, channel: str) -> asyncio.Future[None]:
        confirmed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._confirmations.setdefault(channel, deque()).append(confirmed)
        return confirmed

    def _subscribe_again(self, link: Link, channels: Collection[str]) -> None:
        """Asked for at once, so that who gives one up a moment later is heard later."""
        confirmed = {channel: self._expect(channel) for channel in channels}
        if confirmed:
            link.subscribe(confirmed)
        task = asyncio.create_task(self._confirm(confirmed))
        self._subscribing.add(task)
        task.add_done_callback(self._subscribing.discard)

    async def _confirm(self, confirmed: dict[str, asyncio.Future[None]]) -> None:
        """The reset is told only when every subscription holds again: what is read after it misses nothing."""
        results = await asyncio.gather(*confirmed.values(), return_exceptions=True)
        self._owner.on_reset([channel for channel, failure in zip(confirmed, results, strict=True) if failure is None])

    async def _supervise(self) -> None:
        failures = 0
        while True:
            try:
                link = await self._open()
            except Exception as error:  # also a refusal, which the operator may yet mend
                if failures == 0:
                    logger.warning("pub/sub connection failed", extra={"shard": self._name, "error": repr(error)})
                self._owner.displaced(self)
                await asyncio.sleep(_BACKOFF[min(failures, len(_BACKOFF) - 1)])
                failures += 1
                continue
            reconnected, began = failures > 0, asyncio.get_running_loop().time()
            self.link = link
            self._leaving.clear()
            self._subscribe_again(link, self._channels)
            try:
                if reconnected:
                    fields = {"shard": self._name, "channels": len(self._channels)}
                    logger.info("pub/sub connection restored", extra=fields)
                await link.run()
            except Exception as error:
                lived = asyncio.get_running_loop().time() - began
                failures = 1 if lived > _STABLE_SECONDS else failures + 1
                logger.warning("pub/sub connection lost", extra={"shard": self._name, "error": repr(error)})
            finally:
                self.link = None
                for task in self._subscribing:
                    task.cancel()
                await link.close()
                self._fail(tuple(self._confirmations), "the connection was lost")
            await asyncio.sleep(_BACKOFF[min(failures, len(_BACKOFF)) - 1])

    async def _open(self) -> Link:
        while True:
            server = self._server
            assert server is not None
            link = await open_link(self._owner.redis, server, self._received)
            if server is self._server:
                return link
            await link.close()

    def _fail(self, channels: Collection[str], why: str) -> None:
        for channel in channels:
            for future in self._confirmations.pop(channel, ()):
                if not future.done():
                    future.set_exception(ConnectionError(why))
                    future.exception()  # whoever asked may be gone already: asyncio need not tell of it

    def _received(self, replies: list[Any]) -> None:
        """Replies of one read."""
        refusals = []
        for reply in replies:
            if isinstance(reply, hiredis.ReplyError):
                refusals.append(str(reply))
                continue
            kind = reply[0]
            if kind in (b"message", b"smessage"):
                self._owner.on_message(reply[1].decode("ascii"), reply[2])
            elif kind in (b"subscribe", b"ssubscribe"):
                self._confirmed(reply[1].decode("ascii"))
            elif kind == b"sunsubscribe" and reply[1] is not None:
                self._unsubscribed(reply[1].decode("ascii"))
        if refusals:
            self._refused(refusals)
        self._owner.on_batch()

    def _confirmed(self, channel: str) -> None:
        """Confirmations come in the order of the requests; a request that was given up still has its place."""
        futures = self._confirmations.get(channel)
        if futures:
            future = futures.popleft()
            if not futures:
                del self._confirmations[channel]
            if not future.done():
                future.set_result(None)
        if channel not in self._channels and channel not in self._leaving:
            self.leave(channel)  # it was thought to be lost, and was given up meanwhile

    def _unsubscribed(self, channel: str) -> None:
        """By us, or by a server from which the channel's slot has gone."""
        if own := self._leaving.pop(channel, 0):
            if own > 1:
                self._leaving[channel] = own - 1
        else:
            self._displace([channel])

    def _refused(self, errors: list[str]) -> None:
        """Each of the form `MOVED slot host:port`: about some channel of that slot, of which none can stay here."""
        slots: set[int] = set()
        hint: Address | None = None
        for error in errors:
            moved = _MOVED.fullmatch(error)
            if moved is None:
                self.reconnect()
                return
            slots.add(int(moved[1]))
            hint = (moved[2], int(moved[3])) if moved[2] else hint
        here = {*self._channels, *self._confirmations, *self._leaving}
        channels = [channel for channel in here if slot_of_key(channel) in slots]
        for channel in channels:
            self._leaving.pop(channel, None)
        self._displace(channels, hint)

    def _displace(self, channels: Collection[str], hint: Address | None = None) -> None:
        self._channels.difference_update(channels)
        self._fail(channels, "the run is moving to another shard")
        self._owner.displaced(self, channels, hint)
