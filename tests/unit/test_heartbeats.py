"""PROTOCOL 5.6: what a gateway says of the runs that have readers there, and when it says it again."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence

import pytest
from redis.exceptions import ConnectionError

from broker.errors import Unavailable
from broker.gateway.channel import Channel, State
from broker.gateway.heartbeats import SHARE, Heartbeats
from broker.ids import EventId

SECONDS = 0.8
END = EventId(1, 1)


class Sweep:
    """Heartbeats over runs whose records and listeners are the test's."""

    def __init__(self) -> None:
        self.channels: dict[str, Channel] = {}
        self.status, self.lease_ms = "running", 1000
        self.failures: list[Exception] = []
        """Raised, one after the other, by whoever is asked or told."""
        self.fails = "told"
        self.watched: list[tuple[float, list[str]]] = []
        """When it was tried to tell of which runs."""
        self.met: list[str] = []
        self.beats = Heartbeats(
            self.channels,
            self._states,
            lambda channels: [list(channels)],
            self._reread,
            SECONDS,
            on_met=self._met,
            on_watched=self._watched,
        )

    def add(self, name: str, *, counted: bool) -> None:
        channel = self.channels[name] = Channel(name)
        channel.end, channel.status, channel.counted = END, "running", counted

    def _fail(self, who: str) -> None:
        if self.failures and self.fails == who:
            raise self.failures.pop(0)

    async def _states(self, channels: Sequence[Channel]) -> list[State | None]:
        self._fail("asked")
        return [State(self.status, END, self.lease_ms if self.status == "running" else None) for _ in channels]

    async def _watched(self, request_ids: Sequence[str]) -> None:
        self.watched.append((asyncio.get_running_loop().time(), list(request_ids)))
        self._fail("told")

    def _met(self, request_ids: Sequence[str]) -> None:
        self.met += request_ids

    def _reread(self, channel: Channel) -> asyncio.Task[None]:
        raise AssertionError("nothing was missed")

    async def tells(self, times: int) -> None:
        async with asyncio.timeout(15):
            while len(self.watched) < times:
                await asyncio.sleep(0.01)


@pytest.fixture
async def sweep() -> AsyncIterator[Sweep]:
    made = Sweep()
    running = asyncio.create_task(made.beats.run())
    yield made
    running.cancel()
    await asyncio.wait([running])


async def test_of_all_runs_that_are_counted_it_is_said_together_that_they_are_watched(sweep: Sweep) -> None:
    for n in range(5):
        sweep.add(f"{n}", counted=n != 2)
    await sweep.tells(2)
    assert [names for _, names in sweep.watched] == [["0", "1", "3", "4"]] * 2


@pytest.mark.parametrize("fails", ["told", "asked"])
@pytest.mark.parametrize("error", [Unavailable(), TimeoutError()])
async def test_what_was_not_heard_is_said_again_soon(sweep: Sweep, fails: str, error: Exception) -> None:
    """By the next heartbeat the run may have been cancelled under its readers."""
    sweep.fails, sweep.failures = fails, [error if fails == "told" else ConnectionError("gone")] * 4
    began = asyncio.get_running_loop().time()
    sweep.add("run", counted=True)
    await sweep.tells(5 if fails == "told" else 1)
    # Four heartbeats more, if it waited for each.
    assert sweep.watched[-1][0] - began < 4 * SHARE * SECONDS
    assert not sweep.failures


@pytest.mark.parametrize("status", ["queued", "running"])
async def test_readers_of_a_run_that_seems_to_have_nobody_have_met_it(sweep: Sweep, status: str) -> None:
    """PROTOCOL 4.2: queued, or with a lease that has expired."""
    sweep.status, sweep.lease_ms = status, -1
    sweep.add("run", counted=False)
    async with asyncio.timeout(15):
        while not sweep.met:
            await asyncio.sleep(0.01)
    assert sweep.met == ["run"]


async def test_readers_of_a_run_that_has_a_worker_need_not_tell_of_it(sweep: Sweep) -> None:
    sweep.add("run", counted=True)
    await sweep.tells(2)
    assert not sweep.met
