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
from redis.exceptions import NoScriptError

from broker.events import TERMINAL, Attempt, AttemptReason
from broker.ids import EventId
from broker.runs import keys
from broker.runs.connections import NotReplicated
from broker.runs.shards import publish_verb

WAIT_MS = 1000
"""How long a write may take to reach a replica."""
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
    UNSETTLED = "UNSETTLED"
    """Not on this primary: it is another one than the caller knows (PROTOCOL 4.6)."""
    SPENT = "SPENT"
    OVERDUE = "OVERDUE"


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
    reason: AttemptReason = "worker_lost"
    now_ms: int = 0
    record: dict[str, str] = field(default_factory=dict, repr=False)

    @property
    def opening(self) -> tuple[str, str]:
        """The `attempt` entry with which the epoch begins, exactly as the script wrote it."""
        opening = Attempt(attempt=self.attempt, reason=self.reason, resume_from=str(self.resume_from))
        return opening.type, opening.json_data()


MAX_BATCH_ENTRIES = 256
MAX_BATCH_BYTES = 256 * 1024


class Batch(NamedTuple):
    """Entries `first`, `first + 1`, … of an epoch. `kept_from` is the lowest seq that the worker still holds."""

    first: int
    entries: Sequence[tuple[str, str]]
    kept_from: int
    checkpoint: tuple[EventId, str] | None = None


RENEWAL = Batch(first=2, entries=(), kept_from=1)
"""Renews a lease whose epoch has begun in the log. Whatever its owner has under way meanwhile, this writes no entry: it
is answered DUP or refused (PROTOCOL 2), and what a failover took is the owner's to find."""


@cache
def source(name: str) -> str:
    """The script `name`; a file `<name>_usual` goes ahead of it, so that the usual case need not load the prelude."""
    folder = resources.files("broker.runs") / "lua"
    parts = [f"{name}_usual", "prelude", name]
    return "".join((folder / f"{part}.lua").read_text("utf-8") for part in parts if (folder / f"{part}.lua").is_file())


class Scripts:
    """The scripts on one Redis. All raise redis-py's exceptions when Redis is away."""

    def __init__(self, redis: Redis, *, publish: str | None = None, replicated: bool = False) -> None:
        """`replicated`: what a client is told of waits for a replica (PROTOCOL 5.3), else raises NotReplicated."""
        self._redis = redis
        self._publish = publish or publish_verb(redis)
        self._replicated = replicated
        self._scripts: dict[str, AsyncScript] = {}

    def without_waiting(self) -> Scripts:
        """The same, for what need not wait for a replica."""
        return Scripts(self._redis, publish=self._publish)

    async def _call(self, name: str, request_id: str, *args: str | int, lasting: bool = False) -> Reply:
        """`lasting` says that somebody will rely on what the script does."""
        script = self._script(name)
        names = [keys.run(request_id), keys.log(request_id)]
        arguments = [self._publish, keys.channel(request_id), *args]
        if lasting and self._replicated:
            raw: list[Any] = await _call_replicated(self._redis, script, names, arguments)
        else:
            raw = await script(keys=names, args=arguments)
        answer, end, status, *rest = raw
        return Reply(Answer(answer.decode()), EventId.parse(end.decode()), status.decode(), rest)

    def _script(self, name: str) -> AsyncScript:
        if name not in self._scripts:
            self._scripts[name] = self._redis.register_script(source(name))
        return self._scripts[name]

    async def create(self, request_id: str, claimed_at_ms: int, start: str, fields: dict[str, str]) -> Reply:
        pairs = [part for pair in fields.items() for part in pair]
        return await self._call("create", request_id, claimed_at_ms, STALE_AFTER_MS, start, *pairs, lasting=True)

    async def claim(self, request_id: str, attempt: int, token: str, lease_ms: int, replid: str = "") -> Reply | Lease:
        """A Lease, or the Reply that says why not. `replid` names the primary that has settled; '' takes any."""
        reply = await self._call("claim", request_id, attempt, token, lease_ms, replid, lasting=True)
        if reply.answer is not Answer.OK:
            return reply
        epoch, granted, reason, resume_from, now_ms, flat = reply.rest
        text = [part.decode() for part in flat]
        return Lease(
            request_id=request_id,
            epoch=int(epoch),
            token=token,
            attempt=granted,
            reason=reason.decode(),
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
            lasting=bool(batch.entries) and batch.entries[-1][0] in TERMINAL,
        )

    async def close(
        self,
        request_id: str,
        *,
        kind: str,
        data: str,
        reason: str,
        token: str,
        retention_ms: int,
        replid: str = "",
        if_still: tuple[str, str] = ("", ""),
    ) -> Reply:
        """Writes `attempt` and the terminal `kind` in an epoch of its own. OK: `rest` is [attempt, the end before].

        `if_still` names a field of the record and the value without which the run is left alone.
        """
        return await self._call(
            "close", request_id, kind, data, reason, token, retention_ms, replid, *if_still, lasting=True
        )

    async def fence(
        self, request_id: str, *, lease_ms: int, max_attempts: int, max_run_ms: int, replid: str = ""
    ) -> Reply:
        """Takes the run from an owner whose lease has expired. OK: `rest` is [next attempt]."""
        return await self._call("fence", request_id, replid, lease_ms, max_attempts, max_run_ms)

    async def hand_over(self, lease: Lease, reason: str) -> Reply:
        """Gives the run back for its next attempt, with `reason`. OK: `rest` is [next attempt]."""
        return await self._call("hand_over", lease.request_id, lease.epoch, lease.token, lease.attempt, reason)

    async def requeue(self, request_id: str, attempt: int, enqueues: int) -> Reply:
        """Counts that the job of `attempt` is enqueued again, after `enqueues` times. OK: `rest` is [times now]."""
        return await self._call("requeue", request_id, attempt, enqueues)

    async def watch(self, request_id: str) -> Reply:
        """Notes that somebody reads the run now."""
        return await self._call("watch", request_id)

    async def watch_all(self, request_ids: Sequence[str]) -> None:
        """The same of many runs, in one round trip."""
        script = self._script("watch")
        while True:
            async with self._redis.pipeline(transaction=False) as pipe:
                for request_id in request_ids:
                    names = [keys.run(request_id), keys.log(request_id)]
                    pipe.evalsha(script.sha, 2, *names, self._publish, keys.channel(request_id))
                answers = await pipe.execute(raise_on_error=False)
            if not any(isinstance(answer, NoScriptError) for answer in answers):
                break
            await self._redis.script_load(script.script)
        for answer in answers:
            if isinstance(answer, Exception):
                raise answer

    async def erase(self, request_id: str, *, tombstone_ms: int) -> Reply:
        return await self._call("erase", request_id, tombstone_ms, lasting=True)


async def _call_replicated(redis: Redis, script: AsyncScript, names: list[str], args: list[Any]) -> Any:
    """WAIT speaks for its own connection only, and for what was written on it: hence one pipeline, and a write of its
    own, since a script that is repeated may write nothing.
    """
    while True:
        async with redis.pipeline(transaction=False) as pipe:
            pipe.evalsha(script.sha, len(names), *names, *args)
            pipe.set(keys.beside(names[0]), "", px=1)
            pipe.execute_command("WAIT", 1, WAIT_MS)
            answer, _, replicas = await pipe.execute(raise_on_error=False)
        if isinstance(answer, NoScriptError):
            await redis.script_load(script.script)
            continue
        for result in (answer, replicas):
            if isinstance(result, Exception):
                raise result
        if replicas < 1:
            raise NotReplicated(f"no replica confirmed the write within {WAIT_MS} ms")
        return answer


class IdempotencyClaim(NamedTuple):
    """Which run answers a query or an Idempotency-Key."""

    request_id: str
    digest: str
    claimed_at_ms: int

    def __str__(self) -> str:
        return f"{self.request_id} {self.digest} {self.claimed_at_ms}"


async def claim_key(
    redis: Redis,
    key: str,
    *,
    replace: IdempotencyClaim | None,
    request_id: str,
    digest: str,
    life_ms: int,
    replicated: bool = False,
) -> IdempotencyClaim:
    """Takes `key` for `request_id` if it is free or held by exactly `replace`; returns whoever holds it now."""
    script = redis.register_script(_text("idempotency"))
    args: list[Any] = [str(replace or ""), request_id, digest, life_ms]
    held: bytes = await (_call_replicated(redis, script, [key], args) if replicated else script([key], args))
    held_id, held_digest, claimed_at = held.decode().split(" ")
    return IdempotencyClaim(held_id, held_digest, int(claimed_at))


async def primary_ages(redis: Redis, replids: Sequence[str], *, first: bool = True) -> list[int]:
    """For how many milliseconds each primary is known to have its present data, noted for all (PROTOCOL 4.6).

    `first`: the caller has known no others, so where nothing is noted these are the first of all.
    """
    script = redis.register_script(_text("primaries"))
    ages: list[int] = await script(keys=[keys.PRIMARIES], args=[int(first), *replids])
    return ages


@cache
def _text(name: str) -> str:
    return (resources.files("broker.runs") / "lua" / f"{name}.lua").read_text("utf-8")


async def keep_key(redis: Redis, key: str, life_ms: int) -> None:
    """The key of a run that is claimed outlives the run's record (PROTOCOL 3.3)."""
    await redis.pexpire(key, life_ms)
