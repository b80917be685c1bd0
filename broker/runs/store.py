"""Runs as a gateway uses them: submit, look up, list, cancel, erase."""

from __future__ import annotations

import asyncio
import base64
import binascii
import logging
import re
import secrets
from collections.abc import Awaitable, Iterable, Sequence
from typing import NamedTuple, cast

from redis.asyncio import Redis
from redis.exceptions import ConnectionError

from broker.errors import BadRequest, KeyReused, RunNotFound, Unavailable
from broker.events import Cancelled, Entry, Start
from broker.fold import Outcome
from broker.ids import EventId, Owner, new_request_id
from broker.runs import index, keys, log
from broker.runs.clock import now_ms
from broker.runs.closings import Closings
from broker.runs.connections import is_away, unavailable
from broker.runs.leases import Leases
from broker.runs.primaries import Primaries
from broker.runs.queue import Queue
from broker.runs.record import (
    HEAD_FIELDS,
    LIVE,
    QUESTION_FIELDS,
    RECORD_FIELDS,
    Head,
    Question,
    Record,
    Submission,
    parse_head,
    parse_question,
    parse_record,
)
from broker.runs.scripts import Answer, IdempotencyClaim, Scripts, claim_key
from broker.settings import Settings

logger = logging.getLogger(__name__)

_LIST_CURSOR = re.compile(r"([0-9]{1,15}):([0-9a-f]{32})")
CLOSINGS_SECONDS = 3.0
"""How long the end of a process waits for what it closed to be safe."""
FIRST_LOOK_MS = 10_000
"""A run of which nobody has heard anything so long after its submit is looked at."""
_MET_SECONDS = 0.5
"""How often it is told which runs were met."""
_SLICE = 200
_MOST_SLICES = 10
"""How many runs are looked at for one page of those that have a status: so many slices."""
RETRY_WINDOW_MS = 60_000
"""A submit that says it is a repeat joins a run that completed this recently (PROTOCOL 3.5)."""


class Accepted(NamedTuple):
    request_id: str
    session_id: str
    status: str
    joined: bool
    """Whether the run was there before this submit."""


class Page(NamedTuple):
    records: list[Record]
    next: str | None
    """The cursor of the page after this one."""


class Runs:
    """All raise Unavailable when Redis is away."""

    def __init__(self, redis: Redis, queue: Queue, settings: Settings) -> None:
        self._redis = redis
        self._queue = queue
        self._replicated = settings.durability == "replicated"
        self._scripts = Scripts(redis, replicated=self._replicated)
        self._life_ms = settings.key_life_ms
        self._leases = Leases(queue.redis)
        self._primaries = Primaries(redis, queue.redis, replicated=self._replicated)
        self._closings = Closings(self._scripts, self._primaries, retention_ms=int(settings.retention_seconds * 1000))
        self._met: set[str] = set()
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """What was cancelled and erased here is kept from now on until it is replicated."""
        background = (self._primaries.run(), self._closings.run(), self._tell_of_met())
        self._tasks = [asyncio.create_task(work) for work in background]

    async def close(self) -> None:
        await self._closings.settle(CLOSINGS_SECONDS)
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)

    async def submit(
        self, owner: Owner, submission: Submission, *, idempotency_key: str | None = None, repeated: bool = False
    ) -> Accepted:
        """Starts a run, or joins the one that answers this query or key (PROTOCOL 3).

        Three steps that can each be repeated; whoever meets an unfinished submit does the rest of it. `repeated`
        says that the client is sending again. Raises KeyReused where the key came with another body.
        """
        digest = submission.digest()
        key = keys.idempotency(owner, "query" if idempotency_key is None else "key", idempotency_key or digest)
        replace: IdempotencyClaim | None = None
        with unavailable():
            for _ in range(8):
                claim = await claim_key(
                    self._redis,
                    key,
                    replace=replace,
                    request_id=new_request_id(),
                    digest=digest,
                    life_ms=self._life_ms,
                    replicated=self._replicated,
                )
                if claim.digest != digest:
                    raise KeyReused
                accepted = await self._follow(owner, submission, key, claim)
                if accepted and await self._answers(accepted, idempotency_key, repeated):
                    return accepted
                replace = claim
        raise Unavailable("This query is being submitted and ended too often at once. Try again.")

    async def _follow(self, owner: Owner, submission: Submission, key: str, claim: IdempotencyClaim) -> Accepted | None:
        """Creates and enqueues the claim's run, or finds it there. None: it cannot answer, take another."""
        request_id = claim.request_id
        session_id = submission.session_id or _session_id(request_id)
        await self._index(owner, session_id, claim)
        await self._leases.put_back([request_id], claim.claimed_at_ms + FIRST_LOOK_MS)
        start = Start(request_id=request_id, session_id=session_id).json_data()
        fields = submission.fields(owner, session_id, claim.digest, key)
        reply = await self._scripts.create(request_id, claim.claimed_at_ms, start, fields)
        if reply.answer is Answer.STALE or reply.status == "erased":
            return None
        if reply.status == "queued" and reply.rest[0] == 0:
            await self._queue.enqueue(request_id, 1, enqueues=0, now_ms=claim.claimed_at_ms)
        if reply.answer is Answer.EXISTS and reply.status in LIVE:
            await self._scripts.watch(request_id)  # who joins a run will read it
        return Accepted(request_id, session_id, reply.status, joined=reply.answer is Answer.EXISTS)

    async def _answers(self, accepted: Accepted, idempotency_key: str | None, repeated: bool) -> bool:
        """Whether the run may answer the submit: a query is answered by a run under way, a key by any."""
        if not accepted.joined or accepted.status in LIVE or idempotency_key is not None:
            return True
        if not repeated or accepted.status != "completed":
            return False
        head = await self.head(accepted.request_id)
        return (
            head is not None
            and head.finished_at_ms is not None
            and (await self.now_ms() - head.finished_at_ms < RETRY_WINDOW_MS)
        )

    async def _index(self, owner: Owner, session_id: str, claim: IdempotencyClaim) -> None:
        """Written before the record that it points to, and checked against it when read."""
        async with self._redis.pipeline(transaction=False) as pipe:
            for key in (keys.runs_of(owner), keys.session_of(owner, session_id)):
                pipe.zadd(key, {claim.request_id: claim.claimed_at_ms}, nx=True)
                pipe.zremrangebyscore(key, "-inf", claim.claimed_at_ms - self._life_ms)
                pipe.pexpire(key, self._life_ms)
            await pipe.execute()

    async def head(self, request_id: str) -> Head | None:
        with unavailable():
            return parse_head(await _hmget(self._redis, request_id, HEAD_FIELDS))

    async def heads(self, request_ids: Sequence[str]) -> list[Head | None]:
        if not request_ids:
            return []
        with unavailable():
            async with self._redis.pipeline(transaction=False) as pipe:
                for request_id in request_ids:
                    pipe.hmget(keys.run(request_id), HEAD_FIELDS)
                return [parse_head(row) for row in await pipe.execute()]

    async def record(self, request_id: str) -> Record:
        """Raises RunNotFound."""
        with unavailable():
            record = parse_record(request_id, await _hmget(self._redis, request_id, RECORD_FIELDS))
        if record is None:
            raise RunNotFound
        return record

    async def question(self, request_id: str) -> Question:
        """Raises RunNotFound."""
        with unavailable():
            question = parse_question(await _hmget(self._redis, request_id, QUESTION_FIELDS))
        if question is None:
            raise RunNotFound
        return question

    async def outcome(self, record: Record) -> Outcome:
        """What the run has come to so far."""
        with unavailable():
            return await log.read_outcome(self._redis, record)

    async def log(self, record: Record) -> list[Entry]:
        """The whole log, as of the moment at which the record was read."""
        with unavailable():
            entries = await log.read_all(self._redis, record.request_id)
        return [entry for entry in entries if entry.id <= record.end]

    async def page(
        self,
        owner: Owner,
        *,
        session_id: str | None = None,
        status: str | None = None,
        cursor: str | None = None,
        limit: int,
    ) -> Page:
        """The owner's runs, newest first; with `status` only those that have it now. Where there are few of these, a
        page may have less than `limit` of them, or none, and a next one. Raises BadRequest for a cursor that is not
        ours."""
        key = keys.runs_of(owner) if session_id is None else keys.session_of(owner, session_id)
        below = _parse_list_cursor(cursor) if cursor else None
        size, slices = (limit, 1) if status is None else (_SLICE, _MOST_SLICES)
        fitting: list[tuple[tuple[str, int], Record]] = []
        with unavailable():
            for _ in range(slices):
                found = await index.page(self._redis, key, below=below, limit=size)
                fitting += [
                    (place, record)
                    for place, record in zip(found, await self._records(found[:size]), strict=False)
                    if record is not None and status in (None, record.status)
                ]
                if len(fitting) > limit or len(found) <= size:
                    break
                below = found[size - 1]
            else:
                return Page([record for _, record in fitting], _list_cursor(*found[size - 1]))
        following = _list_cursor(*fitting[limit - 1][0]) if len(fitting) > limit else None
        return Page([record for _, record in fitting[:limit]], following)

    async def under_way(self, owner: Owner, session_id: str) -> list[tuple[str, Head]]:
        """The session's runs that have not ended, newest first. In a session of thousands, of the newest of these."""
        found: list[tuple[str, Head]] = []
        below: tuple[str, int] | None = None
        for _ in range(_MOST_SLICES):
            with unavailable():
                rows = await index.page(self._redis, keys.session_of(owner, session_id), below=below, limit=_SLICE)
            request_ids = [request_id for request_id, _ in rows[:_SLICE]]
            found += [
                (request_id, head)
                for request_id, head in zip(request_ids, await self.heads(request_ids), strict=True)
                if head is not None and not head.finished and (head.owner, head.session_id) == (owner, session_id)
            ]
            if len(rows) <= _SLICE:
                break
            below = rows[_SLICE - 1]
        return found

    async def session_above(
        self, owner: Owner, session_id: str, time_ms: int, *, limit: int
    ) -> tuple[list[tuple[str, int]], bool, int]:
        """The session's first (request_id, submitted at) after a time, whether they are all, and Redis' time."""
        with unavailable():
            return await index.above(self._redis, keys.session_of(owner, session_id), time_ms, limit)

    def no_page(self, cursor: str | None) -> Page:
        """The page of an owner who has no runs. Raises BadRequest as `page` does."""
        if cursor:
            _parse_list_cursor(cursor)
        return Page([], None)

    async def _records(self, found: Sequence[tuple[str, int]]) -> list[Record | None]:
        async with self._redis.pipeline(transaction=False) as pipe:
            for request_id, _ in found:
                pipe.hmget(keys.run(request_id), RECORD_FIELDS)
            rows = await pipe.execute()
        return [parse_record(request_id, row) for (request_id, _), row in zip(found, rows, strict=True)]

    async def cancel(self, request_id: str, reason: str) -> None:
        """Closes the run at once, worker or no worker; one that has ended stays as it is. Raises RunNotFound."""
        token, event = secrets.token_hex(8), Cancelled(reason=reason)
        with unavailable():
            try:
                reply = await self._closings.close(request_id, event, "cancelled", token=token)
            except ConnectionError:  # it may be done; the token tells
                reply = await self._closings.close(request_id, event, "cancelled", token=token)
        if reply.answer is Answer.GONE:
            raise RunNotFound

    async def erase(self, request_id: str) -> None:
        """Raises RunNotFound."""
        with unavailable():
            reply = await self._closings.erase(request_id)
        if reply.answer is Answer.GONE:
            raise RunNotFound

    def met(self, request_ids: Iterable[str]) -> None:
        """Unfinished runs that somebody has met: a reaper shall know of them (PROTOCOL 4.2)."""
        self._met.update(request_ids)

    async def _tell_of_met(self) -> None:
        """Beside the polls: the queue's Redis may be away, and then the runs will be met again."""
        while True:
            await asyncio.sleep(_MET_SECONDS)
            met, self._met = self._met, set()
            now_ms = self._primaries.now_ms()
            if met and now_ms is not None:
                try:
                    await self._leases.put_back(met, now_ms)
                except Exception as error:
                    if not is_away(error):
                        logger.exception("the index of leases cannot be written")

    async def watched(self, request_ids: Sequence[str]) -> None:
        """Somebody reads the runs, or asks for them (PROTOCOL 5.6)."""
        with unavailable():
            await self._scripts.watch_all(request_ids)

    async def events(self, request_id: str, after: EventId, limit: int) -> list[Entry]:
        with unavailable():
            return await log.read(self._redis, request_id, after, limit)

    async def now_ms(self) -> int:
        """Redis' time."""
        with unavailable():
            return await now_ms(self._redis)

    async def ping(self) -> None:
        with unavailable():
            await self._redis.ping()


async def _hmget(redis: Redis, request_id: str, fields: list[str]) -> list[bytes | None]:
    return await cast("Awaitable[list[bytes | None]]", redis.hmget(keys.run(request_id), fields))


def _session_id(request_id: str) -> str:
    """A run without a session begins one; derived, so that a repeated submit says the same."""
    return f"s-{request_id}"


def _list_cursor(request_id: str, time_ms: int) -> str:
    return base64.urlsafe_b64encode(f"{time_ms}:{request_id}".encode()).decode().rstrip("=")


def _parse_list_cursor(cursor: str) -> tuple[str, int]:
    """(request_id, time) of the last run of the page before. Raises BadRequest."""
    try:
        padded = cursor + "=" * (-len(cursor) % 4)
        text = base64.urlsafe_b64decode(padded.encode("ascii")).decode("ascii")
    except (binascii.Error, ValueError):
        text = ""
    match = _LIST_CURSOR.fullmatch(text)
    if match is None:
        raise BadRequest("`cursor` is not one that this list gave out.")
    return match[2], int(match[1])
