"""Fan-out: one subscription per run and process, however many clients read it.

Subscribe first, read the log from the client's cursor, then go live. What Redis pushes goes to the sockets of the
readers that are up to date within the call that received it: no task, no queue and no coroutine per reader on the way.
A reader that is behind reads pages of the log in its own task, and joins the others when it has caught up.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine, Sequence
from typing import Any

from redis.asyncio import Redis

from broker.errors import RunNotFound, Unavailable
from broker.gateway.channel import LOST, Channel, End, Reader, Sink, State
from broker.gateway.dialects import Dialect
from broker.gateway.pages import Damaged, Pages
from broker.ids import START, EventId
from broker.runs import keys, log
from broker.runs.connections import is_away
from broker.runs.record import FINISHED, Head
from broker.runs.subscriber import Subscriber
from broker.settings import Settings

logger = logging.getLogger(__name__)

_STATE_FIELDS = ["status", "end", "deadline"]
_READ_BATCH = 200
_OPEN_TIMEOUT = 5.0
_RETRY_SECONDS = 0.5


class Hub:
    """The runs that this process has readers of."""

    def __init__(self, redis: Redis, subscriptions: Redis, settings: Settings) -> None:
        self._redis = redis
        self._heartbeat = settings.heartbeat_seconds
        self._repair_seconds = settings.lease_seconds + 5
        self._channels: dict[str, Channel] = {}
        self._dirty: set[Channel] = set()
        self._pages = Pages(redis)
        self._tasks: set[asyncio.Task[Any]] = set()
        self._subscriber = Subscriber(
            subscriptions, on_message=self._message, on_batch=self._flush, on_reset=self._read_all_again
        )
        self.draining = False

    def start(self) -> None:
        self._subscriber.start()
        self._spawn(self._sweep())

    async def close(self) -> None:
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._subscriber.close()

    @property
    def connected(self) -> bool:
        return self._subscriber.connected

    @property
    def readers(self) -> int:
        return sum(len(view.readers) for channel in self._channels.values() for view in channel.views.values())

    def drain(self) -> None:
        """Cuts every stream at an event boundary, and every one to come."""
        self.draining = True
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
        position: EventId,
        long_ids: bool,
        seconds: float | None,
    ) -> Reader:
        """A reader at `position` that writes to `sink`; to be followed, and closed. Cut after `seconds`.

        Raises Unavailable when the run cannot be watched, RunNotFound when it went meanwhile.
        """
        cut_at = asyncio.get_running_loop().time() + seconds if seconds is not None else None
        channel = await self._acquire(request_id, head)
        reader = Reader(channel.view(dialect, long_ids), sink, position, cut_at)
        reader.view.readers.add(reader)
        sink.attach(reader)
        if self.draining:
            reader.cut()
        return reader

    def close_reader(self, reader: Reader) -> None:
        view = reader.view
        view.leave(reader)
        view.readers.discard(reader)
        if not view.readers:
            view.channel.views.pop(view.key, None)
        self._release(view.channel)

    async def wait_end(self, request_id: str, head: Head, seconds: float) -> None:
        """Returns when the run has ended, after `seconds`, or when this gateway drains."""
        channel = await self._acquire(request_id, head)
        ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        channel.watchers.add(ended)
        try:
            if not channel.finished and not self.draining:
                await asyncio.wait([ended], timeout=seconds)
        finally:
            channel.watchers.discard(ended)
            self._release(channel)

    # -- a reader's own way through the log ------------------------------------------------------------------

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
                reader.write_bytes(view.dialect.gone())
                return End.FINISHED
            if not reader.verified:
                await self._verify(reader)
            elif reader.position < channel.end:
                await self._advance(reader)
            elif reader.position > channel.end:
                await self._await_repair(reader)
            elif channel.finished:
                return End.FINISHED
            else:
                view.join(reader)
                await reader.sleep()
                view.leave(reader)

    async def _advance(self, reader: Reader) -> None:
        """Writes the next stretch: of the ring, else of the log."""
        part = reader.view.after(reader.position)
        if part is not None:
            reader.write(part)
            return
        try:
            page = await self._pages.after(reader.view, reader.position)
        except Damaged as damage:
            await self._look_into(reader.view.channel, damage)
            return
        except Exception as error:
            await self._hold(reader, error)
            return
        for part in page:
            while reader.sink.paused and reader.ending is None:
                await reader.sink.drain()
            if reader.ending is not None or not reader.verified:
                return
            reader.write(part)

    async def _look_into(self, channel: Channel, damage: Damaged) -> None:
        """The log has not what its record promises: it was rolled back a moment ago, or somebody deleted from it."""
        end = channel.end
        await asyncio.wait([self._start_reading(channel)])
        if channel.end == end and not channel.gone:
            logger.error("a log is damaged", extra={"request_id": channel.request_id, "error": str(damage)})
            channel.erase()

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
            self._restart(reader)

    async def _await_repair(self, reader: Reader) -> None:
        """The log ends below the cursor. Its writer may yet append again what a failover took."""
        channel, loop = reader.view.channel, asyncio.get_running_loop()
        give_up = loop.time() + self._repair_seconds
        reader.waiting = True
        reader.write_bytes(reader.view.dialect.heartbeat("waiting for repair"))
        try:
            while reader.position > channel.end and reader.ending is None and not channel.gone:
                left = give_up - loop.time()
                if channel.finished or left <= 0:
                    self._restart(reader)
                    return
                # The channel wakes no one who is not live, so look again: a repair is rare, and not urgent.
                await reader.sleep(min(left, 0.1))
        finally:
            reader.waiting = reader.verified = False

    def _restart(self, reader: Reader) -> None:
        reader.write_bytes(reader.view.projection().feed(LOST))
        reader.position = START

    async def _hold(self, reader: Reader, error: Exception) -> None:
        """Redis is away: the stream stays open and beats."""
        if not is_away(error):
            raise error
        await reader.sleep(_RETRY_SECONDS)

    # -- channels --------------------------------------------------------------------------------------------

    async def _acquire(self, request_id: str, head: Head) -> Channel:
        """The run's channel, open; to be released."""
        channel = self._channels.get(request_id)
        if channel is None:
            channel = self._channels[request_id] = Channel(request_id)
            channel.next_beat = asyncio.get_running_loop().time() + 0.75 * self._heartbeat
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
        self._dirty.discard(channel)
        if channel.reading is not None:
            channel.reading.cancel()
        if channel.subscribed:
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
                    await asyncio.sleep(_RETRY_SECONDS)
            self._update(channel, state)
            channel.opened = True
        finally:
            channel.reading = None
        self._take_inbox(channel)

    def _update(self, channel: Channel, state: State | None) -> None:
        if state is None or state.end < channel.end:
            self._pages.forget(channel.request_id)
        channel.update(state)

    def _take_inbox(self, channel: Channel) -> None:
        """Messages that came while the run was read."""
        inbox, channel.inbox = channel.inbox, []
        for index, (prev, entries) in enumerate(inbox):
            if not channel.accept(prev, entries):
                channel.inbox = inbox[index:]
                self._start_reading(channel)
                break
        channel.flush()

    async def _states(self, channels: Sequence[Channel]) -> list[State | None]:
        async with self._redis.pipeline(transaction=False) as pipe:
            for channel in channels:
                pipe.hmget(keys.run(channel.request_id), _STATE_FIELDS)
            pipe.time()
            *rows, (seconds, micros) = await pipe.execute()
        now_ms = seconds * 1000 + micros // 1000
        return [_state(row, now_ms) for row in rows]

    # -- what Redis pushes -----------------------------------------------------------------------------------

    def _message(self, name: str, payload: bytes) -> None:
        channel = self._channels.get(keys.request_id_of(name))
        if channel is None:
            return
        message = log.parse_message(payload)
        if message is None:
            channel.erase()
        elif channel.reading is not None:
            channel.inbox.append(message)
        elif channel.accept(*message):
            self._dirty.add(channel)
        else:
            channel.inbox.append(message)
            self._start_reading(channel)

    def _flush(self) -> None:
        for channel in self._dirty:
            channel.flush()
        self._dirty.clear()

    def _read_all_again(self) -> None:
        """The connection was lost and is back: messages may have been missed."""
        for channel in self._channels.values():
            if channel.subscribed:
                self._start_reading(channel)

    # -- heartbeats ------------------------------------------------------------------------------------------

    async def _sweep(self) -> None:
        loop = asyncio.get_running_loop()
        tick = min(self._heartbeat / 8, 1.0)
        while True:
            await asyncio.sleep(tick)
            now = loop.time()
            for channel in self._channels.values():
                for view in channel.views.values():
                    for reader in view.readers:
                        if reader.cut_at is not None and reader.cut_at <= now:
                            reader.cut()
            try:
                await self._beat([channel for channel in self._channels.values() if channel.next_beat <= now])
            except Exception:
                logger.exception("heartbeats failed")

    async def _beat(self, due: list[Channel]) -> None:
        """One pipelined read tells what every heartbeat says, and finds what pub/sub has missed (6.2)."""
        timeout, away = min(self._heartbeat / 10, 1.0), False
        for first in range(0, len(due), _READ_BATCH):
            batch = due[first : first + _READ_BATCH]
            ends = [channel.end for channel in batch]
            states: list[State | None] | None = None
            if not away:
                try:
                    states = await asyncio.wait_for(self._states(batch), timeout)
                except Exception as error:
                    if not is_away(error) and not isinstance(error, TimeoutError):
                        raise
                    away = True
            now = asyncio.get_running_loop().time()
            for index, channel in enumerate(batch):
                channel.next_beat = now + 0.75 * self._heartbeat
                if states is None:
                    channel.beat(None)
                else:
                    self._compare(channel, ends[index], states[index])

    def _compare(self, channel: Channel, known: EventId, state: State | None) -> None:
        """`known` is the channel's end as it was before the read."""
        if channel.reading is None and not channel.gone:
            if state is None:
                self._update(channel, None)
                return
            if state.end < known or (state.status not in FINISHED and channel.finished and channel.end == known):
                self._start_reading(channel)
            elif state.end > channel.end:
                # Most likely its message is under way. If not, it was lost.
                asyncio.get_running_loop().call_later(
                    min(self._heartbeat / 8, _RETRY_SECONDS), self._expect, channel, state.end
                )
        channel.beat(state)

    def _expect(self, channel: Channel, end: EventId) -> None:
        if channel.end < end and self._channels.get(channel.request_id) is channel and not channel.gone:
            self._start_reading(channel)

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
