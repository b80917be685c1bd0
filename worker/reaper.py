"""The reaper: finds runs that nobody works on, and gives them to somebody, or ends them (PROTOCOL 4.2 to 4.7).

There is one in every worker and no leader: what it does is decided by the scripts, so any number of them may do it at
once. It is patient after every break, because whoever could not renew a lease is not dead.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections import Counter
from collections.abc import Awaitable, Callable

from broker.events import AttemptReason, Cancelled, Error
from broker.runs import keys
from broker.runs.connections import is_away
from broker.runs.leases import FORGET_MS
from broker.runs.queue import job_id
from broker.runs.record import FINISHED, LIVE
from broker.runs.scripts import Answer
from broker.runs.shards import Shard, shard_of, shards
from worker.parts import Parts
from worker.rows import Row, read_rows
from worker.unwatched import Watch

logger = logging.getLogger(__name__)

TICK_SECONDS = 1.0
BATCH = 200
"""Runs that are looked at in one go."""
QUEUED_MS = (10_000, 300_000)
"""How often a queued run is looked at: less often, the longer it has waited."""
MAX_ENQUEUES = 5
SCAN_SECONDS = 600.0
"""All records are looked at once in this time: an index that was lost is made whole from them."""

STALE_SECONDS = 1200.0
"""What is known of a run that this reaper has not looked at for so long is forgotten: the others look at it."""

_SPENT = Error(code="worker_lost", message="The workers that took this run were lost, and no attempt is left.")
_OVERDUE = Error(code="timeout", message="The run took longer than it may.")
_NOT_STARTED = Error(code="not_started", message="No worker could start this run.")


class Reaper:
    def __init__(self, parts: Parts) -> None:
        self._redis = parts.redis
        self._scripts = parts.scripts
        self._queue = parts.queue
        self._leases = parts.leases
        self._primaries = parts.primaries
        self._closings = parts.closings
        settings = parts.settings
        self._lease_ms = int(settings.lease_seconds * 1000)
        self._max_attempts = settings.max_attempts
        self._max_run_ms = int(settings.max_run_seconds * 1000)
        self._key_life_ms = settings.key_life_ms
        self._tick = min(TICK_SECONDS, settings.lease_seconds / 5)
        self._ended: dict[str, float] = {}
        """Runs without a record, or erased, and when this reaper first saw that, by the event loop's clock."""
        self._watches: dict[tuple[str, int], Watch] = {}
        """Of queued runs, for each attempt that they wait for."""
        self._swept_at = float("-inf")
        self._scanning: dict[str, int] = {}
        """How far each shard has been scanned."""
        self.counts: Counter[str] = Counter()
        """What this reaper has done, by kind."""

    async def run(self) -> None:
        """Until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._repeat(self.reap))
            tasks.create_task(self._repeat(self.scan))

    async def _repeat(self, work: Callable[[], Awaitable[None]]) -> None:
        away = False
        while True:
            await asyncio.sleep(self._tick * random.uniform(0.5, 1.0))
            try:
                await work()
                away = False
            except Exception as error:
                if not is_away(error):
                    logger.exception("the reaper failed")
                    continue
                if not away:
                    logger.warning("the reaper cannot reach Redis", extra={"error": repr(error)})
                away = True
                self._primaries.disturbed()

    # -- what is due -----------------------------------------------------------------------------------------

    async def reap(self) -> None:
        """Looks at every run that is due."""
        self._sweep()
        while True:
            due = await self._leases.due(BATCH)
            if not due.request_ids:
                return
            rows = await read_rows(self._redis, [run for run in due.request_ids if self._answers(run)])
            ended, later = [], dict[str, int]()
            for request_id in due.request_ids:
                if request_id not in rows:
                    later[request_id] = due.now_ms + max(self._lease_ms // 5, 200)
                    continue
                row = rows[request_id]
                if row is None or row.status in FINISHED or row.status == "erased":
                    if self._forgettable(request_id, row, due.now_ms):
                        ended.append(request_id)
                    else:
                        later[request_id] = due.now_ms + FORGET_MS // 4
                else:
                    self._ended.pop(request_id, None)
                    later[request_id] = self._next_look(row, due.now_ms)
            # Before anything is done: what dies half-way is looked at again.
            await self._leases.put(later)
            await self._leases.remove(ended)
            live = [row for row in rows.values() if row is not None and row.status in LIVE]
            if live:  # a clock may have been set a moment ago, and then they only seem to be late
                await self._primaries.look()
            for row in live:
                if row.status == "running":
                    await self._guarded(row, self._expired(row, due.now_ms))
            await self._look_at_queued([row for row in live if row.status == "queued"], due.now_ms)
            if len(due.request_ids) < BATCH:
                return

    def _answers(self, request_id: str) -> bool:
        """Nobody waits for a shard that stands still."""
        return self._primaries.answers(shard_of(self._redis, request_id))

    def _forgettable(self, request_id: str, row: Row | None, now_ms: int) -> bool:
        if row is not None and row.finished_at:
            return now_ms >= row.finished_at + FORGET_MS
        now = asyncio.get_running_loop().time()
        since = self._ended.setdefault(request_id, now)
        if now - since < FORGET_MS / 1000:
            return False
        del self._ended[request_id]
        return True

    def _sweep(self) -> None:
        """Lets go of what other reapers have dealt with meanwhile."""
        now = asyncio.get_running_loop().time()
        if now - self._swept_at < STALE_SECONDS / 10:
            return
        self._swept_at = now
        self._ended = {run: since for run, since in self._ended.items() if now - since < STALE_SECONDS}
        self._watches = {run: watch for run, watch in self._watches.items() if now - watch.asked_at < STALE_SECONDS}

    def _next_look(self, row: Row, now_ms: int) -> int:
        if row.status == "queued":
            least, most = QUEUED_MS
            waited = 0 if row.attempt or row.enqueues else now_ms - row.created_at
            wait = min(max(least, waited // 2), most)
            return now_ms + (min(wait, max(row.unwatched_ms // 4, 250)) if row.unwatched_ms else wait)
        if row.deadline > now_ms:
            return min(row.deadline, now_ms + self._lease_ms)
        return now_ms + max(self._lease_ms // 5, 200)

    async def _guarded(self, row: Row, work: Awaitable[None]) -> None:
        """One run that cannot be helped keeps no other from it."""
        try:
            await work
        except Exception as error:
            if is_away(error):
                raise
            logger.exception("a run cannot be reaped", extra={"request_id": row.request_id})

    def _calm(self, request_id: str) -> bool:
        """Whether a lease that has run out means that its owner is gone (4.7)."""
        calm_since = self._primaries.calm_since(request_id)
        return asyncio.get_running_loop().time() - calm_since >= self._lease_ms / 1000

    # -- running ---------------------------------------------------------------------------------------------

    async def _expired(self, row: Row, now_ms: int) -> None:
        late = row.deadline <= now_ms or row.deadline > now_ms + self._lease_ms
        if not late or not self._calm(row.request_id):
            return
        reply = await self._primaries.in_new_epoch(
            row.request_id,
            lambda replid: self._scripts.fence(
                row.request_id,
                lease_ms=self._lease_ms,
                max_attempts=self._max_attempts,
                max_run_ms=self._max_run_ms,
                replid=replid,
            ),
        )
        if reply.answer is Answer.OK:
            attempt = int(reply.rest[0])
            self._note("fenced", row, attempt=attempt)
            await self._queue.enqueue(row.request_id, attempt, enqueues=0, now_ms=now_ms)
        elif reply.answer in (Answer.SPENT, Answer.OVERDUE):
            error, reason = _SPENT_OR_OVERDUE[reply.answer]
            await self._close(row, error, reason, if_still=("deadline", reply.rest[0].decode()))

    # -- queued ----------------------------------------------------------------------------------------------

    async def _look_at_queued(self, rows: list[Row], now_ms: int) -> None:
        if not rows:
            return
        async with self._redis.pipeline(transaction=False) as pipe:
            for row in rows:  # a run's key outlives it, however long it waits
                pipe.pexpire(row.key, self._key_life_ms)
            await pipe.execute(raise_on_error=False)
        there = await self._queue.holds([job_id(row.request_id, row.attempt + 1, row.enqueues) for row in rows])
        for row, held in zip(rows, there, strict=True):
            await self._guarded(row, self._queued(row, held, now_ms))

    async def _queued(self, row: Row, held: bool, now_ms: int) -> None:
        unchanged = ("enqueues", str(row.enqueues))
        if row.started_at and now_ms >= row.started_at + self._max_run_ms:
            await self._close(row, _OVERDUE, "timeout", if_still=unchanged)
        elif await self._unwatched(row):
            await self._close(row, Cancelled(reason="unwatched"), "cancelled", if_still=("watched_at", row.watched_at))
        elif not held and not self._primaries.settling(row.request_id):  # whoever took its job may wait for just this
            if row.enqueues >= MAX_ENQUEUES:
                await self._close(row, _NOT_STARTED, "not_started", if_still=unchanged)
            else:
                await self._enqueue_again(row, now_ms)

    async def _enqueue_again(self, row: Row, now_ms: int) -> None:
        attempt = row.attempt + 1
        reply = await self._scripts.requeue(row.request_id, attempt, row.enqueues)
        if reply.answer is Answer.OK:
            self._note("requeued", row, attempt=attempt, times=int(reply.rest[0]))
            await self._queue.enqueue(row.request_id, attempt, enqueues=int(reply.rest[0]), now_ms=now_ms)

    async def _unwatched(self, row: Row) -> bool:
        if not row.unwatched_ms:
            return False
        watching = (row.request_id, row.attempt)
        watch = self._watches.get(watching)
        if watch is None:
            watch = self._watches[watching] = Watch(row.unwatched_ms / 1000, self._lease_ms / 1000)
        return watch.expired_on(self._primaries, row.request_id, row.created_at, row.watched_at)

    async def _close(
        self, row: Row, event: Error | Cancelled, reason: AttemptReason, *, if_still: tuple[str, str]
    ) -> None:
        if not self._calm(row.request_id):
            return
        reply = await self._closings.close(row.request_id, event, reason, if_still=if_still)
        if reply.answer is Answer.OK:
            self._note(f"closed_{event.code if isinstance(event, Error) else event.reason}", row)

    def _note(self, done: str, row: Row, **fields: int) -> None:
        self.counts[done] += 1
        logger.warning(
            "reaped", extra={"request_id": row.request_id, "done": done, **fields, "count": self.counts[done]}
        )

    # -- what the index has lost -----------------------------------------------------------------------------

    async def scan(self) -> None:
        """A slice of every shard's records, so that all have their turn within SCAN_SECONDS."""
        for shard in await shards(self._redis):
            if not self._primaries.answers(shard.name):
                continue
            try:
                await self._scan_slice(shard)
            except Exception as error:
                if not is_away(error):
                    raise

    async def _scan_slice(self, shard: Shard) -> None:
        share = self._tick / SCAN_SECONDS
        count = max(int(await shard.redis.dbsize() * share * 2), 20)
        cursor, names = await shard.redis.scan(self._scanning.get(shard.name, 0), match=keys.run("*"), count=count)
        self._scanning[shard.name] = int(cursor)
        request_ids = [keys.request_id_of(name.decode("ascii", "replace")) for name in names]
        rows = await read_rows(self._redis, request_ids, quiet=True)
        now_ms = self._primaries.now_ms()
        if now_ms is None:
            return
        for status, longest in (("running", self._lease_ms), ("queued", QUEUED_MS[1])):
            unfinished = [row.request_id for row in rows.values() if row is not None and row.status == status]
            await self._leases.put_back(unfinished, now_ms)
            await self._leases.put_no_later(unfinished, now_ms + longest)


_SPENT_OR_OVERDUE: dict[Answer, tuple[Error, AttemptReason]] = {
    Answer.SPENT: (_SPENT, "worker_lost"),
    Answer.OVERDUE: (_OVERDUE, "timeout"),
}
