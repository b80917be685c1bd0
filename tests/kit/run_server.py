"""A run on a real Redis, on which time passes as a test says, and which can fall back to an earlier state.

Time is made to pass by moving every time of the run's record into the past: what the scripts compute from Redis' own
clock is then what they would compute later.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import NamedTuple, TypeVar

from broker.events import Entry
from broker.ids import EventId, new_request_id
from broker.runs import keys
from broker.runs.connections import connect
from broker.runs.scripts import Scripts
from tests.kit.run_model import Span
from tests.kit.runs import now_ms

T = TypeVar("T")

TIMES = ("claimed_at", "created_at", "started_at", "finished_at", "deadline", "watched_at")
MARGIN_MS = 5
"""Redis may have read its clock a little before the call."""
ELSEWHERE = "f" * 40
"""The `master_replid` of another primary."""

_MOVE = """
for i = 2, #ARGV do
  if redis.call('HEXISTS', KEYS[1], ARGV[i]) == 1 then
    redis.call('HINCRBY', KEYS[1], ARGV[i], ARGV[1])
  end
end
"""


class State(NamedTuple):
    """What Redis holds of a run."""

    log: list[Entry]
    fields: dict[str, str]
    """Of the record, without times."""
    times: dict[str, int]
    ttls: list[int]
    """Of record and log, in ms; -1: none, -2: not there."""
    dumps: list[bytes | None]
    moved: int
    """How far times had been moved then."""


class RunServer:
    def __init__(self, url: str) -> None:
        self._runner = asyncio.Runner()
        self.redis = connect(url, connections=2)
        self.scripts = Scripts(self.redis)
        self.request_id = new_request_id()
        self.names = [keys.run(self.request_id), keys.log(self.request_id)]
        self.moved = 0
        self.replid: str = self.run(self.redis.info("replication"))["master_replid"]

    def close(self) -> None:
        self.run(self.redis.delete(*self.names))
        self.run(self.redis.aclose(close_connection_pool=True))
        self._runner.close()

    def run(self, work: Awaitable[T]) -> T:
        async def wait() -> T:
            return await work

        return self._runner.run(wait())

    def call(self, make: Callable[[Scripts], Awaitable[T]]) -> tuple[T, Span]:
        """The answer, and when the call was made."""
        before = now_ms()
        answer = self.run(make(self.scripts))
        return answer, Span(before - MARGIN_MS + self.moved, now_ms() + MARGIN_MS + self.moved)

    def now(self) -> int:
        return now_ms() + self.moved

    def real(self, time: int) -> int:
        """How Redis must be told a time."""
        return time - self.moved

    def move(self, ms: int) -> None:
        """Time passes, or a clock is set."""
        self.moved += ms
        self._move(ms)

    def _move(self, ms: int) -> None:
        if ms:
            self.run(self.redis.eval(_MOVE, 1, self.names[0], str(-ms), *TIMES))  # type: ignore[arg-type]

    def state(self) -> State:
        return self.run(self._state())

    async def _state(self) -> State:
        record, log = self.names
        async with self.redis.pipeline(transaction=False) as pipe:
            pipe.xrange(log)
            pipe.hgetall(record)
            for name in self.names:
                pipe.pttl(name)
            for name in self.names:
                pipe.dump(name)
            raw, stored, *rest = await pipe.execute()
        fields = {name.decode(): value.decode() for name, value in stored.items()}
        times = {name: int(fields.pop(name)) + self.moved for name in TIMES if name in fields}
        return State(_entries(raw), fields, times, rest[:2], rest[2:], self.moved)

    def fall_back(self, state: State) -> None:
        """A failover: the run is as it was, and the clock goes on."""

        async def restore() -> None:
            await self.redis.delete(*self.names)
            for name, dump, ttl in zip(self.names, state.dumps, state.ttls, strict=True):
                if dump is not None:
                    await self.redis.restore(name, max(ttl, 0), dump)

        self.run(restore())
        self._move(self.moved - state.moved)

    def expire(self) -> None:
        self.run(self.redis.delete(*self.names))


def _entries(raw: list[tuple[bytes, Mapping[bytes, bytes]]]) -> list[Entry]:
    return [Entry(EventId.parse(name.decode()), row[b"t"].decode(), row[b"d"].decode()) for name, row in raw]
