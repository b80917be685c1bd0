"""The run's state transitions: one Lua file each in lua/, called here, their answers parsed here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cache
from importlib import resources
from typing import Any, NamedTuple

from redis.asyncio import Redis
from redis.commands.core import AsyncScript

from broker.ids import EventId
from broker.runs import keys

STALE_AFTER_MS = 60_000
"""A claim of an idempotency key from which no run was made for this long never makes one (PROTOCOL 3.3)."""


class Answer(StrEnum):
    """What a script did, and so what its caller does next (PROTOCOL 2)."""

    OK = "OK"
    DUP = "DUP"
    GONE = "GONE"
    FENCED = "FENCED"
    CLOSED = "CLOSED"
    LOST = "LOST"
    GAP = "GAP"
    CREATED = "CREATED"
    EXISTS = "EXISTS"
    STALE = "STALE"
    REFUSED = "REFUSED"


class Reply(NamedTuple):
    answer: Answer
    end: EventId
    """The log's end."""
    status: str
    """The run's status; '' where there is no record."""
    rest: list[Any]


@dataclass(frozen=True, kw_only=True)
class Lease:
    """A claim that was granted: under what a worker writes."""

    request_id: str
    epoch: int
    token: str
    attempt: int
    resume_from: EventId
    now_ms: int
    record: dict[str, str] = field(repr=False)


class Batch(NamedTuple):
    """Entries `first`, `first + 1`, … of an epoch. `kept_from` is the lowest seq that the worker still holds."""

    first: int
    entries: Sequence[tuple[str, str]]
    kept_from: int
    checkpoint: tuple[EventId, str] | None = None


@cache
def source(name: str) -> str:
    """The script `name`; a file `<name>_usual` goes ahead of it, so that the usual case need not load the prelude."""
    folder = resources.files("broker.runs") / "lua"
    parts = [f"{name}_usual", "prelude", name]
    return "".join((folder / f"{part}.lua").read_text("utf-8") for part in parts if (folder / f"{part}.lua").is_file())


class Scripts:
    """The scripts on one Redis. All raise redis-py's exceptions when Redis is away."""

    def __init__(self, redis: Redis, *, publish: str = "PUBLISH") -> None:
        self._redis = redis
        self._publish = publish
        self._scripts: dict[str, AsyncScript] = {}

    async def _call(self, name: str, request_id: str, *args: str | int) -> Reply:
        script = self._scripts.get(name)
        if script is None:
            script = self._scripts[name] = self._redis.register_script(source(name))
        raw: list[Any] = await script(
            keys=[keys.run(request_id), keys.log(request_id)],
            args=[self._publish, keys.channel(request_id), *args],
        )
        answer, end, status, *rest = raw
        return Reply(Answer(answer.decode()), EventId.parse(end.decode()), status.decode(), rest)

    async def create(self, request_id: str, claimed_at_ms: int, start: str, fields: dict[str, str]) -> Reply:
        pairs = [part for pair in fields.items() for part in pair]
        return await self._call("create", request_id, claimed_at_ms, STALE_AFTER_MS, start, *pairs)

    async def claim(
        self, request_id: str, attempt: int, token: str, lease_ms: int, reason: str = "worker_lost"
    ) -> Reply | Lease:
        """A Lease, or the Reply that says why not."""
        reply = await self._call("claim", request_id, attempt, token, lease_ms, reason)
        if reply.answer is not Answer.OK:
            return reply
        epoch, granted, resume_from, now_ms, flat = reply.rest
        text = [part.decode() for part in flat]
        return Lease(
            request_id=request_id,
            epoch=int(epoch),
            token=token,
            attempt=granted,
            resume_from=EventId.parse(resume_from.decode()),
            now_ms=int(now_ms),
            record=dict(zip(text[::2], text[1::2], strict=True)),
        )

    async def append(self, lease: Lease, batch: Batch, *, lease_ms: int, retention_ms: int) -> Reply:
        """`lease_ms` renews the lease; 0 leaves it as it is."""
        checkpoint_id, state = batch.checkpoint or ("", "")
        return await self._call(
            "append",
            lease.request_id,
            lease.epoch,
            lease.token,
            lease.attempt,
            str(lease.resume_from),
            batch.kept_from,
            batch.first,
            lease_ms,
            retention_ms,
            str(checkpoint_id),
            state,
            *[part for entry in batch.entries for part in entry],
        )

    async def close(
        self, request_id: str, *, kind: str, data: str, reason: str, token: str, retention_ms: int
    ) -> Reply:
        """Writes `attempt` and the terminal `kind` in an epoch of its own."""
        return await self._call("close", request_id, kind, data, reason, token, retention_ms)

    async def erase(self, request_id: str, *, tombstone_ms: int) -> Reply:
        return await self._call("erase", request_id, tombstone_ms)


class IdempotencyClaim(NamedTuple):
    """Which run answers a query or an Idempotency-Key."""

    request_id: str
    digest: str
    claimed_at_ms: int

    def __str__(self) -> str:
        return f"{self.request_id} {self.digest} {self.claimed_at_ms}"


async def claim_key(
    redis: Redis, key: str, *, replace: IdempotencyClaim | None, request_id: str, digest: str, life_ms: int
) -> IdempotencyClaim:
    """Takes `key` for `request_id` if it is free or held by exactly `replace`; returns whoever holds it now."""
    text = (resources.files("broker.runs") / "lua" / "idempotency.lua").read_text("utf-8")
    script = redis.register_script(text)
    held: bytes = await script(keys=[key], args=[str(replace or ""), request_id, digest, life_ms])
    held_id, held_digest, claimed_at = held.decode().split(" ")
    return IdempotencyClaim(held_id, held_digest, int(claimed_at))


async def keep_key(redis: Redis, key: str, life_ms: int) -> None:
    """The key of a run that is claimed outlives the run's record (PROTOCOL 3.3)."""
    await redis.pexpire(key, life_ms)
