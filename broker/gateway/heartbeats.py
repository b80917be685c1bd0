"""Heartbeats: one sweep for all streams of a process. They tell the truth, and find what pub/sub has missed."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence

from broker.errors import Unavailable
from broker.gateway.channel import Channel, State
from broker.ids import EventId
from broker.runs.connections import is_away
from broker.runs.record import FINISHED

logger = logging.getLogger(__name__)

_READ_BATCH = 200
_EXPECT_SECONDS = 0.5
SHARE = 0.75
"""A channel beats after this share of the interval: with the sweep's tick, no stream waits longer than one."""
_SHARE_UNHEARD = 0.125
"""And after this share where it could not be said that the run is watched, lest it be cancelled under its readers."""


class Heartbeats:
    def __init__(
        self,
        channels: Mapping[str, Channel],
        states: Callable[[Sequence[Channel]], Awaitable[list[State | None]]],
        by_shard: Callable[[Iterable[Channel]], list[list[Channel]]],
        reread: Callable[[Channel], asyncio.Task[None]],
        seconds: float,
        *,
        on_met: Callable[[Sequence[str]], None],
        on_watched: Callable[[Sequence[str]], Awaitable[None]],
    ) -> None:
        """`states` asks Redis, `by_shard` says what can be asked together, `reread` starts to read a run again; the
        others are the hub's."""
        self._channels = channels
        self._states = states
        self._by_shard = by_shard
        self._reread = reread
        self._heartbeat = seconds
        self._on_met = on_met
        self._on_watched = on_watched

    def first(self) -> float:
        """When a new channel beats, by the event loop's clock."""
        return asyncio.get_running_loop().time() + SHARE * self._heartbeat

    async def run(self) -> None:
        tick = min(self._heartbeat / 8, 1.0)
        while True:
            await asyncio.sleep(tick)
            await self._sweep(asyncio.get_running_loop().time())

    async def _sweep(self, now: float) -> None:
        """In a frame of its own, whose variables would keep channels and readers that have gone until the next ones."""
        for channel in self._channels.values():
            for view in channel.views.values():
                for reader in view.readers:
                    if reader.cut_at is not None and reader.cut_at <= now:
                        reader.cut()
        for due in self._by_shard([channel for channel in self._channels.values() if channel.next_beat <= now]):
            try:
                await self._beat(due)
            except Exception:
                logger.exception("heartbeats failed")

    async def _beat(self, due: list[Channel]) -> None:
        """Of one shard. A pipelined read tells what every heartbeat says, and finds what pub/sub has missed (6.2)."""
        timeout, away = min(self._heartbeat / 10, 1.0), False
        seen: list[tuple[Channel, State | None]] = []
        for first in range(0, len(due), _READ_BATCH):
            batch = due[first : first + _READ_BATCH]
            ends = [channel.end for channel in batch]
            states: list[State | None] | None = None
            if not away:
                try:
                    async with asyncio.timeout(timeout):
                        states = await self._states(batch)
                except Exception as error:
                    if not is_away(error) and not isinstance(error, TimeoutError):
                        raise
                    away = True
            now = asyncio.get_running_loop().time()
            for index, channel in enumerate(batch):
                channel.next_beat = now + SHARE * self._heartbeat
                if states is None:
                    channel.beat(None)
                    self._beat_again(channel)
                else:
                    self._compare(channel, ends[index], states[index])
                    seen.append((channel, states[index]))
        await self._tell(seen, timeout)

    async def _tell(self, seen: list[tuple[Channel, State | None]], timeout: float) -> None:
        """Tells others what only the readers of a run may know."""
        unfinished = [(channel, state) for channel, state in seen if state is not None and not channel.finished]
        idle = [channel.request_id for channel, state in unfinished if state.status == "queued" or state.expired]
        counted = [channel for channel, _ in unfinished if channel.counted]
        if counted:
            try:
                async with asyncio.timeout(timeout):
                    await self._on_watched([channel.request_id for channel in counted])
            except (Unavailable, TimeoutError) as error:
                logger.info("it cannot be said that runs are watched", extra={"error": repr(error)})
                for channel in counted:
                    self._beat_again(channel)
        if idle:
            self._on_met(idle)

    def _beat_again(self, channel: Channel) -> None:
        if channel.counted:
            channel.next_beat = asyncio.get_running_loop().time() + _SHARE_UNHEARD * self._heartbeat

    def _compare(self, channel: Channel, known: EventId, state: State | None) -> None:
        """`known` is the channel's end as it was before the read."""
        if self._channels.get(channel.request_id) is not channel:
            return
        if channel.reading is None and not channel.gone:
            if state is None:
                self._resubscribe(channel)
                return
            if state.end < known or (state.status not in FINISHED and channel.finished and channel.end == known):
                self._resubscribe(channel)
            elif state.end > channel.end:
                # Most likely its message is under way. If not, it was lost.
                asyncio.get_running_loop().call_later(
                    min(self._heartbeat / 8, _EXPECT_SECONDS), self._expect, channel, state.end
                )
        channel.beat(state)

    def _expect(self, channel: Channel, end: EventId) -> None:
        if channel.end < end and self._channels.get(channel.request_id) is channel and not channel.gone:
            self._resubscribe(channel)

    def _resubscribe(self, channel: Channel) -> None:
        """What pub/sub did not bring: perhaps its subscription is gone as well."""
        if channel.reading is None:
            channel.subscribed = False
        self._reread(channel)
