"""A reader's own way through the log: catching up, checking its cursor, waiting for a repair."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable

from redis.asyncio import Redis

from broker.gateway.channel import Channel
from broker.gateway.dialects.dialect import FoldFailed
from broker.gateway.pages import Damaged, Pages
from broker.gateway.reader import End, Reader
from broker.ids import START, EventId
from broker.runs import log
from broker.runs.connections import is_away

logger = logging.getLogger(__name__)

RETRY_SECONDS = 0.5


class Follower:
    """Brings readers to where the others are, and there leaves them to the channel."""

    def __init__(
        self, redis: Redis, pages: Pages, reread: Callable[[Channel], asyncio.Task[None]], repair_seconds: float
    ) -> None:
        """`reread` starts to read a channel's run again. A lost cursor is given up after `repair_seconds`."""
        self._redis = redis
        self._pages = pages
        self._reread = reread
        self._repair_seconds = repair_seconds

    async def follow(self, reader: Reader) -> End:
        """Writes the run until it ends, the client goes, or the stream is cut."""
        view, channel = reader.view, reader.view.channel
        while True:
            if reader.sink.paused and reader.ending is None:
                await reader.sink.drain()
                continue
            if reader.ending is not None:
                return reader.ending
            if channel.gone:
                reader.write_bytes(view.dialect.gone(reader.state))
                return End.FINISHED
            if reader.lost:
                reader.write_bytes(view.dialect.lost(reader.state))
                return End.FINISHED
            if view.dialect.ended(reader.folded.state):
                if reader.after is None or not (view.dialect.exact and reader.can_be_lost):
                    return End.FINISHED
                reader.lost = True
                continue
            if reader.shown is not None and reader.shown <= channel.end:
                await self._verify_shown(reader, reader.shown)
            elif not reader.verified:
                await self._verify(reader)
            elif reader.position < channel.end:
                await self._advance(reader)
            elif channel.finished and not (reader.ahead_of(channel.end) and reader.can_be_lost):
                return End.FINISHED
            elif reader.ahead_of(channel.end):
                await self._await_repair(reader)
            else:
                view.join(reader)
                await reader.sleep()
                view.leave(reader)

    async def _advance(self, reader: Reader) -> None:
        """Writes the next stretch: of the ring, else of the log."""
        part = reader.view.after(reader.position, marked=reader.after is not None)
        if part is not None:
            reader.write(part)
            return
        async with reader.turn:
            if reader.ending is None and not reader.sink.paused:
                await self._read_page(reader)

    async def _read_page(self, reader: Reader) -> None:
        try:
            page = await self._pages.after(reader.view, reader.position, reader.folded)
        except Damaged:
            await self._look_into(reader)
            return
        except Exception as error:
            await self._hold(reader, error)
            return
        for part in page:
            while reader.sink.paused and reader.ending is None:
                await reader.sink.drain()
            if reader.ending is not None or not reader.verified or reader.lost:
                return
            if reader.shown is not None and part.last >= reader.shown:
                await self._verify_shown(reader, reader.shown)
                return
            reader.write(part)

    async def _look_into(self, reader: Reader) -> None:
        """The log has not what its record promises: it was rolled back a moment ago, or somebody deleted from it."""
        channel, end = reader.view.channel, reader.view.channel.end
        if reader.position < end:
            await asyncio.wait([self._reread(channel)])
        if channel.end != end or reader.position >= end or channel.gone:
            return
        try:
            await self._pages.after(reader.view, reader.position, reader.folded)  # it may have been repaired in between
        except Damaged as damage:
            logger.error("a log is damaged", extra={"request_id": channel.request_id, "error": str(damage)})
            channel.erase()
        except Exception as error:
            await self._hold(reader, error)

    async def _verify(self, reader: Reader) -> None:
        """A cursor goes on only where the log has its epoch; to another the answer is the whole log (6.5)."""
        position, end = reader.position, reader.view.channel.end
        reader.verified = True
        if position > end or position.epoch in (START.epoch, end.epoch):
            return
        try:
            known = await log.has_epoch(self._redis, reader.view.channel.request_id, position.epoch)
        except Exception as error:
            reader.verified = False
            await self._hold(reader, error)
            return
        if not known and reader.position == position:
            self._lost(reader)

    async def _verify_shown(self, reader: Reader, shown: EventId) -> None:
        """What a client that cannot start again was shown of a log that was rolled back may be in no log any more."""
        channel = reader.view.channel
        try:
            found = await log.first_from(self._redis, channel.request_id, shown)
        except Exception as error:
            await self._hold(reader, error)
            return
        if found is None and channel.end >= shown:  # it was rolled back a moment ago, and may be repaired
            await asyncio.wait([self._reread(channel)])
            if channel.end < shown:
                return
        if reader.shown == shown:
            reader.shown, reader.lost = None, found != shown

    async def _await_repair(self, reader: Reader) -> None:
        """The log ends below the cursor. Its writer may yet append again what a failover took."""
        view, channel, loop = reader.view, reader.view.channel, asyncio.get_running_loop()
        if channel.finished:
            self._lost(reader)
            return
        give_up = loop.time() + self._repair_seconds if reader.can_be_lost else math.inf
        reader.waiting = reader.can_be_lost
        if reader.waiting:
            reader.write_bytes(view.dialect.heartbeat("waiting for repair"))
        try:
            while reader.ahead_of(channel.end) and reader.ending is None and not channel.gone:
                left = give_up - loop.time()
                if left <= 0 or (channel.finished and reader.can_be_lost):
                    self._lost(reader)
                    return
                if channel.finished:
                    return
                # The channel wakes no one who is not live, so look again: a repair is rare, and not urgent.
                await reader.sleep(min(left, 0.1))
        finally:
            reader.waiting = reader.verified = False

    def _lost(self, reader: Reader) -> None:
        """The log does not have what the cursor names."""
        if reader.view.dialect.seekable:
            reader.write_bytes(reader.view.dialect.lost(reader.state))
            reader.position = START
        else:
            reader.lost = True

    async def _hold(self, reader: Reader, error: Exception) -> None:
        """Redis is away: the stream stays open and beats. But one that cannot be shown is cut."""
        if isinstance(error, FoldFailed):
            request_id, dialect = reader.view.channel.request_id, repr(reader.view.key)
            logger.error("a fold failed", extra={"request_id": request_id, "dialect": dialect}, exc_info=error)
            reader.cut()
            return
        if not is_away(error):
            raise error
        await reader.sleep(RETRY_SECONDS)
