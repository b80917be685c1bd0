"""Fan-out: one subscription per run and process, however many clients read it.

Subscribe first, read the log from the client's cursor, then go live. What Redis pushes goes to the sockets of the
readers that are up to date within the call that received it: no task, no queue and no coroutine per reader on the way.
A reader that is behind reads pages of the log in its own task, and joins the others when it has caught up.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection, Coroutine, Iterable, Sequence
from typing import Any

from redis.asyncio import Redis
from redis.exceptions import ResponseError

from broker.errors import RunNotFound, Unavailable
from broker.gateway.channel import Channel, State
from broker.gateway.dialects.dialect import Dialect
from broker.gateway.follower import RETRY_SECONDS, Follower
from broker.gateway.heartbeats import Heartbeats
from broker.gateway.pages import Pages
from broker.gateway.reader import End, Reader, Sink
from broker.ids import EventId
from broker.runs import keys, log
from broker.runs.connections import is_away
from broker.runs.record import Head
from broker.runs.shards import Shard, read_with_time, shard_of, shards
from broker.runs.subscriber import Subscriber
from broker.settings import Settings

logger = logging.getLogger(__name__)

_STATE_FIELDS = ["status", "end", "deadline"]
_OPEN_TIMEOUT = 5.0
_CLOSE_SECONDS = 3.0
_PRIMARY_SECONDS = 5.0


def _unheard(_: object) -> None:
    """For a hub on its own."""


async def _unwatched(_: object) -> None:
    """The same."""


async def _for_ever() -> None:
    await asyncio.Event().wait()


class Hub:
    """The runs that this process has readers of."""

    def __init__(
        self,
        redis: Redis,
        subscriptions: Redis,
        settings: Settings,
        *,
        on_met: Callable[[Sequence[str]], None] = _unheard,
        on_watched: Callable[[Sequence[str]], Awaitable[None]] = _unwatched,
    ) -> None:
        """`on_met` hears of unfinished runs that seem to have nobody, `on_watched` of runs that have readers here and
        are cancelled without; both at heartbeats."""
        self._redis = redis
        self._channels: dict[str, Channel] = {}
        self._dirty: set[Channel] = set()
        self._pages = Pages(redis)
        self._follower = Follower(redis, self._pages, self._start_reading, settings.lease_seconds + 5)
        self._heartbeats = Heartbeats(
            self._channels,
            self._states,
            self._by_shard,
            self._start_reading,
            settings.heartbeat_seconds,
            on_met=on_met,
            on_watched=on_watched,
        )
        self._tasks: set[asyncio.Task[Any]] = set()
        self._subscriber = Subscriber(
            subscriptions, on_message=self._message, on_batch=self._flush, on_reset=self._read_again
        )
        self.cutting = False

    def start(self) -> None:
        self._subscriber.start()
        self._spawn(self._heartbeats.run())
        self._spawn(self._watch_primaries())

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(tuple(self._tasks), timeout=_CLOSE_SECONDS)
        await self._subscriber.close()

    @property
    def connected(self) -> bool:
        return self._subscriber.connected

    @property
    def readers(self) -> int:
        return sum(len(view.readers) for channel in self._channels.values() for view in channel.views.values())

    def drain(self) -> None:
        """Cuts every stream at an event boundary, and every one to come."""
        self.cutting = True
        for channel in self._channels.values():
            for view in channel.views.values():
                for reader in tuple(view.readers):
                    reader.cut()
            for watcher in channel.watchers:
                if not watcher.done():
                    watcher.set_result(None)

    async def open(
        self,
        request_id: str,
        head: Head,
        dialect: Dialect,
        sink: Sink,
        *,
        after: Any = None,
        seconds: float | None,
    ) -> Reader:
        """A reader that writes to `sink`; to be followed, and closed. Cut after `seconds`.

        It begins above the frame at the position `after`, which is None for all of them.

        Raises Unavailable when the run cannot be watched, RunNotFound when it went meanwhile.
        """
        cut_at = asyncio.get_running_loop().time() + seconds if seconds is not None else None
        channel = await self._acquire(request_id, head)
        reader = Reader(channel.view(dialect), sink, after, cut_at)
        reader.view.readers.add(reader)
        sink.attach(reader)
        if self.cutting:
            reader.cut()
        return reader

    def close_reader(self, reader: Reader) -> None:
        view = reader.view
        view.leave(reader)
        view.readers.discard(reader)
        if not view.readers:
            view.channel.drop(view)
        self._release(view.channel)

    async def follow(self, reader: Reader) -> End:
        """Writes the run until it ends, the client goes, or the stream is cut."""
        return await self._follower.follow(reader)

    async def wait_end(
        self,
        request_id: str,
        head: Head,
        seconds: float | None,
        left: Callable[[], Coroutine[Any, Any, None]] = _for_ever,
    ) -> None:
        """Returns when the run has ended, after `seconds` (None: not for that), when this gateway drains, or when
        `left` returns: the client has gone."""
        channel = await self._acquire(request_id, head)
        ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        channel.watchers.append(ended)
        leaving = asyncio.create_task(left())
        try:
            if not channel.finished and not self.cutting:
                await asyncio.wait([ended, leaving], timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        finally:
            leaving.cancel()
            channel.watchers.remove(ended)
            self._release(channel)

    # -- channels --------------------------------------------------------------------------------------------

    async def _acquire(self, request_id: str, head: Head) -> Channel:
        """The run's channel, open; to be released."""
        channel = self._channels.get(request_id)
        if channel is None:
            channel = self._channels[request_id] = Channel(request_id)
            channel.next_beat = self._heartbeats.first()
            channel.counted = head.cancel_if_unwatched
            if head.finished:
                channel.end, channel.status = head.end, head.status
            else:
                self._start_reading(channel)
        channel.users += 1
        try:
            if channel.reading is not None and not channel.opened:
                await asyncio.wait([channel.reading], timeout=_OPEN_TIMEOUT)
            if not channel.opened and not channel.finished:
                raise Unavailable
            if channel.gone:
                raise RunNotFound
        except BaseException:
            self._release(channel)
            raise
        return channel

    def _release(self, channel: Channel) -> None:
        """After its last user a channel is forgotten."""
        channel.users -= 1
        if channel.users == 0 and self._channels.get(channel.request_id) is channel:
            self._forget(channel)

    def _forget(self, channel: Channel) -> None:
        del self._channels[channel.request_id]
        self._pages.forget(channel.request_id)
        self._dirty.discard(channel)
        if channel.reading is not None:
            channel.reading.cancel()
        self._subscriber.unsubscribe(keys.channel(channel.request_id))

    def _start_reading(self, channel: Channel) -> asyncio.Task[None]:
        """Reads the run again; one read at a time for each channel."""
        reading = channel.reading
        if reading is None:
            reading = channel.reading = self._spawn(self._read(channel))
        return reading

    async def _read(self, channel: Channel) -> None:
        try:
            while True:
                try:
                    if not channel.subscribed:
                        channel.subscribed = True
                        await self._subscriber.subscribe(keys.channel(channel.request_id))
                    [state] = await self._states([channel])
                    break
                except Exception as error:
                    channel.subscribed = False
                    if not is_away(error):
                        raise
                    await asyncio.sleep(RETRY_SECONDS)
            self._update(channel, state)
            channel.opened = True
        finally:
            channel.reading = None
        self._take_inbox(channel)

    def _update(self, channel: Channel, state: State | None) -> None:
        """An end that is not the one that messages led to may stand on another log: a failover took the kept pages'."""
        if state is None or state.end != channel.end:
            self._pages.forget(channel.request_id)
        channel.update(state)

    def _take_inbox(self, channel: Channel) -> None:
        """Messages that came while the run was read."""
        inbox, channel.inbox = channel.inbox, []
        stale, channel.stale = channel.stale, False
        if stale or not all(channel.accept(prev, entries) for prev, entries in inbox):
            # A read that starts now is younger than all of them and covers them. They are not tried again after it:
            # one that belongs to a log that a failover took would never fit.
            self._start_reading(channel)
        channel.flush()

    async def _states(self, channels: Sequence[Channel]) -> list[State | None]:
        request_ids = [channel.request_id for channel in channels]
        return [_state(row, now_ms) for row, now_ms in await read_with_time(self._redis, request_ids, _STATE_FIELDS)]

    # -- what Redis pushes -----------------------------------------------------------------------------------

    def _message(self, name: str, payload: bytes) -> None:
        channel = self._channels.get(keys.request_id_of(name))
        if channel is None:
            return
        try:
            message = log.parse_message(payload)
        except ValueError as error:
            self._puzzled(channel, error)
            return
        if message is None:
            channel.erase()
        elif channel.reading is not None:
            channel.inbox.append(message)
        elif channel.accept(*message):
            self._dirty.add(channel)
        else:
            self._start_reading(channel)

    def _puzzled(self, channel: Channel, error: ValueError) -> None:
        """In a rolling upgrade a newer version writes: what its messages say is in the log too."""
        if channel.reading is not None:
            channel.stale = True
            return
        logger.warning(
            "a message is not understood, the log is read instead",
            extra={"request_id": channel.request_id, "error": repr(error)},
        )
        self._start_reading(channel)

    def _flush(self) -> None:
        if self._dirty:
            for channel in self._dirty:
                channel.flush()
            self._dirty.clear()

    def _read_again(self, names: Collection[str]) -> None:
        """Messages of these channels may have been missed."""
        for name in names:
            channel = self._channels.get(keys.request_id_of(name))
            if channel is None:
                continue
            if channel.reading is not None:
                channel.stale = True  # what is being read may be older than the loss
            elif channel.subscribed:
                self._start_reading(channel)

    async def _watch_primaries(self) -> None:
        """Commands and subscriptions go to the same primaries, or are connected anew (PROTOCOL 8.2)."""
        while True:
            await asyncio.sleep(_PRIMARY_SECONDS)
            try:
                for shard in await shards(self._redis):
                    await self._compare_primaries(shard)
            except Exception as error:
                if not is_away(error):
                    logger.exception("asking for the primaries failed")

    async def _compare_primaries(self, shard: Shard) -> None:
        try:
            replid = (await shard.redis.info("replication")).get("master_replid")
        except ResponseError:
            return  # a server that does not tell, as a fake one
        except Exception as error:
            if not is_away(error):
                raise
            return
        subscribed = self._subscriber.replid(shard.name)
        if None not in (replid, subscribed) and replid != subscribed:
            logger.warning(
                "commands and subscriptions are on different primaries: connecting anew", extra={"shard": shard.name}
            )
            await shard.redis.connection_pool.disconnect()
            self._subscriber.reconnect(shard.name)

    def _by_shard(self, channels: Iterable[Channel]) -> list[list[Channel]]:
        groups: dict[str, list[Channel]] = {}
        for channel in channels:
            groups.setdefault(shard_of(self._redis, channel.request_id), []).append(channel)
        return list(groups.values())

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("a task of the hub failed", exc_info=error)


def _state(row: list[bytes | None], now_ms: int) -> State | None:
    status, end, deadline = row
    if status is None or status == b"erased" or end is None:
        return None
    lease_ms = int(deadline) - now_ms if deadline and status == b"running" else None
    return State(status.decode(), EventId.parse(end.decode()), lease_ms)
