"""What a process knows of the primaries that hold the runs: whether they have settled, and what they could yet lose.

A failover or a restart can take back what was acknowledged. Until its writers have repaired it, nobody opens a new
epoch (PROTOCOL 4.6); and what is not replicated yet is kept by who wrote it (5.2).
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Collection
from dataclasses import dataclass, field
from typing import Any

from redis.asyncio import Redis
from redis.exceptions import ReadOnlyError, ResponseError

from broker.runs.connections import is_away
from broker.runs.memory import SOUND, Memory, memory_of, warn_of_eviction
from broker.runs.scripts import Answer, Reply, primary_ages
from broker.runs.shards import Shard, shard_of, shards

logger = logging.getLogger(__name__)

POLL_SECONDS = 1.0
SETTLE_SECONDS = 5.0
TAIL_SECONDS = 30.0
"""Without a replica: what a primary has had for so long is on its disk."""
FSYNC_SECONDS = 2.0
"""A primary that comes back after a power cut has lost the last second or two; its replicas forget them as well."""
CLOCK_JUMP_SECONDS = 1.0
SILENT_SECONDS = 2 * POLL_SECONDS
"""A primary that was asked so long ago and has not answered since may be away: nothing is judged until it does."""
_AGAIN_SECONDS = 0.1
_OTHERS_SECONDS = 0.5
"""How long a look waits for those that take longer than the first; what they say is heard by a later one."""


@dataclass
class _Primary:
    """Times are the event loop's."""

    replid: str = ""
    opens_at: float = 0.0
    """From when on new epochs may be opened here."""
    changed_at: float = 0.0
    """When it was found to be another one, or to be back: what was confirmed before may be gone."""
    calm_since: float = 0.0
    """Since when leases can be judged: no break, no jump of a clock (PROTOCOL 4.7)."""
    covered: float = float("-inf")
    """What was acknowledged before this time has reached every replica, or is TAIL_SECONDS old."""
    away: bool = False
    asked_at: float = 0.0
    """When it was asked what it has answered last."""
    memory: Memory = SOUND
    clock_ms: float | None = None
    """Its time less the event loop's."""
    replicas: int = 0
    marks: deque[tuple[float, int]] = field(default_factory=deque)
    """(time, the replication offset that covers all that was acknowledged until then)."""


class Primaries:
    """Asks every primary once a second. `registry` is the Redis on which all processes note what they find."""

    def __init__(self, redis: Redis, registry: Redis, *, replicated: bool = False) -> None:
        """`replicated`: there shall be replicas, so nothing is safe before one has it (PROTOCOL 5.3)."""
        self._redis = redis
        self._registry = registry
        self._replicated = replicated
        self.on_change: Callable[[], None] = lambda: None
        """Called when a primary is another one, or is back."""
        self._known: dict[str, _Primary] = {}
        self._looking: asyncio.Task[None] | None = None
        self._asking: dict[str, asyncio.Task[tuple[float, dict[str, Any]]]] = {}

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            try:
                await self.look()
            except Exception as error:
                if not is_away(error):
                    logger.exception("asking the primaries failed")
            await asyncio.sleep(POLL_SECONDS)

    async def look(self) -> None:
        """Asks now; callers at the same time share one look. Raises redis-py's exceptions where no primary answers."""
        if self._looking is None:
            self._looking = asyncio.create_task(self._look())
            self._looking.add_done_callback(self._looked)
        await asyncio.shield(self._looking)

    def _looked(self, task: asyncio.Task[None]) -> None:
        self._looking = None
        if not task.cancelled():
            task.exception()  # whoever waits for it hears of it

    async def settled(self, request_id: str) -> str:
        """The `master_replid` of the run's primary, once new epochs may be opened there (PROTOCOL 4.6)."""
        loop = asyncio.get_running_loop()
        while True:
            primary = self._of(request_id)
            if primary is None:
                await self.look()
                primary = self._of(request_id)
            if primary is None:
                raise ConnectionError("the run's shard is not known")
            left = primary.opens_at - loop.time()
            if left <= 0:
                return primary.replid
            await asyncio.sleep(left)

    async def in_new_epoch(self, request_id: str, call: Callable[[str], Awaitable[Reply]]) -> Reply:
        """What `call(replid)` answers on a primary that has settled. Raises redis-py's exceptions."""
        while True:
            reply = await call(await self.settled(request_id))
            if reply.answer is not Answer.UNSETTLED:
                return reply
            await asyncio.sleep(_AGAIN_SECONDS)
            await self.look()

    def settling(self, request_id: str) -> bool:
        """Whether new epochs still wait on the run's primary."""
        primary = self._of(request_id)
        return primary is None or primary.opens_at > asyncio.get_running_loop().time()

    def covered(self, request_id: str) -> float:
        """The time (the event loop's) before which everything acknowledged is safe from a failover."""
        primary = self._of(request_id)
        return primary.covered if primary else float("-inf")

    def changed_at(self, request_id: str) -> float:
        """When the run's primary was last found to be another one, or to be back."""
        primary = self._of(request_id)
        return primary.changed_at if primary else float("-inf")

    def calm_since(self, request_id: str) -> float:
        """Since when the run's primary has answered without a break, so that leases and clocks mean something."""
        primary, now = self._of(request_id), asyncio.get_running_loop().time()
        return primary.calm_since if primary and now - primary.asked_at <= SILENT_SECONDS else now

    def answers(self, shard: str) -> bool:
        """Whether its primary has answered, a moment ago."""
        primary, now = self._known.get(shard), asyncio.get_running_loop().time()
        return primary is not None and not primary.away and now - primary.asked_at <= SILENT_SECONDS

    def disturbed(self, request_id: str | None = None) -> None:
        """A read or write of the run, or of anything, was refused: owners could not renew either."""
        now = asyncio.get_running_loop().time()
        for primary in self._known.values() if request_id is None else filter(None, [self._of(request_id)]):
            primary.calm_since = now

    @property
    def replicated(self) -> bool:
        """Whether the primaries have replicas, as far as is known, or shall have some."""
        return self._replicated or any(primary.replicas for primary in self._known.values())

    @property
    def away(self) -> bool:
        """Whether one of them did not answer when it was asked last."""
        return any(primary.away for primary in self._known.values())

    def now_ms(self) -> int | None:
        """About the time of a primary; None before the first look."""
        for primary in self._known.values():
            if primary.clock_ms is not None:
                return int(asyncio.get_running_loop().time() * 1000 + primary.clock_ms)
        return None

    def _of(self, request_id: str) -> _Primary | None:
        return self._known.get(shard_of(self._redis, request_id))

    # -- looking ---------------------------------------------------------------------------------------------

    async def _look(self) -> None:
        """One that is away, or stands still, keeps nobody from the others."""
        found = await self._shards()
        names = {shard.name for shard in found}
        for name in self._known.keys() - names:
            del self._known[name]
        for name in self._asking.keys() - names:
            self._asking.pop(name).cancel()
        for shard in found:
            if shard.name not in self._asking:
                self._asking[shard.name] = asyncio.create_task(_ask(shard))
        await _until_one_answers(self._asking.values())
        answers: dict[str, tuple[float, dict[str, Any]]] = {}
        failure: Exception | None = None
        for name in [name for name, task in self._asking.items() if task.done()]:
            try:
                answers[name] = self._asking.pop(name).result()
            except Exception as error:
                if not is_away(error):
                    raise
                failure = error
                self._lost(name)
        await self._note(answers)
        if failure is not None and not answers:
            raise failure

    async def _shards(self) -> list[Shard]:
        try:
            return await shards(self._redis)
        except Exception as error:
            if is_away(error):
                for name in self._known:
                    self._lost(name)
            raise

    def _lost(self, name: str) -> None:
        primary = self._known.get(name)
        if primary is not None:
            primary.away = True
            primary.calm_since = asyncio.get_running_loop().time()

    async def _note(self, found: dict[str, tuple[float, dict[str, Any]]]) -> None:
        replids = {name: str(info.get("master_replid", "")) for name, (_, info) in found.items()}
        changed = any(self._known.get(name, _NOBODY).replid != replid for name, replid in replids.items())
        ages: dict[str, float] = {}
        if changed and all(replids.values()):
            known = await primary_ages(self._registry, list(replids.values()), first=not self._known)
            ages = {name: age / 1000 for name, age in zip(replids, known, strict=True)}
        back = False
        for name, (asked, info) in found.items():
            back |= self._update(name, replids[name], asked, info, ages.get(name))
        if back:
            self.on_change()

    def _update(self, name: str, replid: str, asked: float, info: dict[str, Any], age: float | None) -> bool:
        """Returns whether what was confirmed before may be gone."""
        first = name not in self._known
        now = asyncio.get_running_loop().time()
        primary = self._known.setdefault(name, _Primary(changed_at=now, calm_since=now))
        changed = first or primary.replid != replid
        if changed:
            if not first:
                logger.warning("another primary, or it was restarted", extra={"shard": name, "replid": replid})
            since = now - age if age is not None else float("-inf")
            primary.replid, primary.opens_at = replid, since + SETTLE_SECONDS
            primary.calm_since = max(primary.calm_since, since)
            primary.marks.clear()
        back = (changed or primary.away) and not first
        if back:
            primary.changed_at = now
        if primary.away:
            primary.away, primary.calm_since = False, now
        clock_ms = info["time_ms"] - asked * 1000
        if primary.clock_ms is not None and abs(clock_ms - primary.clock_ms) > CLOCK_JUMP_SECONDS * 1000:
            logger.info(
                "a clock was set, or this process stood still",
                extra={"shard": name, "by_ms": round(clock_ms - primary.clock_ms)},
            )
            primary.calm_since = now
        primary.clock_ms, primary.asked_at = clock_ms, asked
        memory: Memory = info["memory"]
        if memory.full:  # so that an owner may be unable to renew its lease
            primary.calm_since = now
        if memory.evicts and memory.evicts != primary.memory.evicts:
            warn_of_eviction(memory.evicts, name)
        primary.memory = memory
        primary.covered = max(primary.covered, self._covers(primary, asked, info))
        return back

    def _covers(self, primary: _Primary, asked: float, info: dict[str, Any]) -> float:
        """Up to when everything that was acknowledged is safe now."""
        offsets = [value["offset"] for value in info.values() if isinstance(value, dict) and "offset" in value]
        primary.replicas = len(offsets)
        if not offsets:
            primary.marks.clear()
            return float("-inf") if self._replicated else asked - TAIL_SECONDS
        primary.marks.append((asked, int(info["master_repl_offset"])))
        covered = float("-inf")
        while primary.marks and primary.marks[0][1] <= min(offsets):
            covered, _ = primary.marks.popleft()
        return min(covered, asked - FSYNC_SECONDS)


_NOBODY = _Primary()


async def _until_one_answers(asking: Collection[asyncio.Task[Any]]) -> None:
    """And the others have had a moment for it, too."""
    done, pending = set[asyncio.Task[Any]](), set(asking)
    while pending and not any(task.exception() is None for task in done):
        done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
    if pending:
        await asyncio.wait(pending, timeout=_OTHERS_SECONDS)


async def _ask(shard: Shard) -> tuple[float, dict[str, Any]]:
    """When it was asked; INFO replication, `time_ms`, and `memory`. A server that does not tell, or a fake one, has no
    `master_replid`.
    """
    asked = asyncio.get_running_loop().time()
    seconds, micros = await shard.redis.time()
    try:
        info: dict[str, Any] = await shard.redis.info("replication")
        memory: dict[str, Any] = await shard.redis.info("memory")
    except ResponseError as error:
        if is_away(error):
            raise
        info, memory = {}, {}
    if info.get("role") == "slave":
        raise ReadOnlyError("this server is a replica")
    return asked, {**info, "memory": memory_of(memory), "time_ms": int(seconds) * 1000 + int(micros) // 1000}
