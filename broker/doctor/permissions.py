"""Whether a Redis lets us do what the service does: every command is tried, on keys that nobody else has."""

from __future__ import annotations

import asyncio
import builtins
import hashlib
import re
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from redis.asyncio import Redis
from redis.exceptions import ConnectionError, NoPermissionError, ResponseError

from broker.runs import keys
from broker.runs.connections import is_away
from broker.runs.queue import job_keys

WAIT_MS = 1000
"""How long a replica has for confirming a write."""
_LIFE_MS = 10_000
"""Nothing stays behind, whatever happens on the way."""
_ANSWER_SECONDS = 5.0
_SCRIPT = "return 1"
_MISSING = re.compile(r"unknown (?:sub)?command", re.IGNORECASE)

Command = tuple[str | int, ...]


@dataclass(frozen=True, kw_only=True)
class Tried:
    refused: Sequence[str]
    """Commands that the user may not use, or not on our keys and channels, or that were renamed."""
    unwritable: str
    """What it answers to a write; '' where it takes it."""
    confirmed: int
    """Replicas that have confirmed a write."""


def _on_runs(name: str) -> list[Command]:
    """What gateways and workers do with a run; it ends without a trace."""
    run, log = keys.run(name), keys.log(name)
    beside = keys.beside(run)
    return [
        ("HSET", run, "field", "1"),
        ("PEXPIRE", run, _LIFE_MS),
        *(("HMGET", run, "field"), ("HGET", run, "field"), ("HGETALL", run), ("HKEYS", run), ("HLEN", run)),
        *(("HINCRBY", run, "field", 1), ("HDEL", run, "field"), ("EXISTS", run)),
        ("XADD", log, "1-1", "t", "doctor"),
        ("PEXPIRE", log, _LIFE_MS),
        ("XRANGE", log, "-", "+", "COUNT", 1),
        ("SET", beside, "", "PX", _LIFE_MS),
        ("GET", beside),
        ("SCRIPT LOAD", _SCRIPT),
        ("EVALSHA", hashlib.sha1(_SCRIPT.encode()).hexdigest(), 1, run),
        ("UNLINK", run, log, beside),
        *_on_zset(keys.scratch_index(name)),
    ]


def _on_zset(key: str) -> list[Command]:
    return [
        *(("ZADD", key, 1, "doctor"), ("PEXPIRE", key, _LIFE_MS), ("ZREVRANGEBYSCORE", key, "+inf", "-inf")),
        *(("ZRANGEBYSCORE", key, "-inf", "+inf"), ("ZSCORE", key, "doctor"), ("ZCARD", key)),
        *(("ZREM", key, "doctor"), ("ZREMRANGEBYSCORE", key, "-inf", "+inf"), ("DEL", key)),
    ]


def _on_queue(name: str) -> list[Command]:
    job, retry, _ = names = job_keys(name)
    return [
        ("SET", job, "", "PX", _LIFE_MS),
        *(("GET", job), ("MGET", job), ("EXISTS", job), ("PEXPIRE", job, _LIFE_MS), ("PSETEX", job, _LIFE_MS, "")),
        *(("INCR", retry), ("EXPIRE", retry, _LIFE_MS // 1000)),
        ("DEL", *names),
        *_on_zset(keys.scratch_index(name)),
    ]


async def try_all(redis: Redis, name: str, *, holds_runs: bool, holds_queue: bool, verb: str, replicas: int) -> Tried:
    """`name` is in the place of a request_id, `verb` is what the run's scripts publish with, `replicas` are connected.

    Raises redis-py's exceptions where the server cannot be reached.
    """
    tries = _Tries(redis, name)
    for command in [*(_on_runs(name) if holds_runs else ()), *(_on_queue(name) if holds_queue else ())]:
        await tries.command(*command)
    channel = keys.channel(name)
    await tries.command(verb, channel, "")
    subscribe = "SSUBSCRIBE" if verb == "SPUBLISH" else "SUBSCRIBE"
    await tries.call(f"{subscribe} {channel}", lambda: _subscribe(redis, subscribe, channel))
    if holds_queue:
        await tries.call("WATCH, MULTI, EXEC", lambda: _transaction(redis, job_keys(name)[0]))
    confirmed = await tries.call("WAIT", lambda: _confirmed(redis, keys.beside(keys.run(name)), replicas))
    return Tried(refused=tuple(tries.refused), unwritable=tries.unwritable, confirmed=confirmed or 0)


class _Tries:
    def __init__(self, redis: Redis, name: str) -> None:
        self._redis = redis
        self._name = name
        self.refused: dict[str, None] = {}
        self.unwritable = ""

    async def command(self, *command: str | int) -> None:
        label = command[0] if command[0] == "SCRIPT LOAD" else f"{command[0]} {command[1]}"
        if command[0] == "EVALSHA":
            label = "EVALSHA"
        await self.call(str(label), lambda: self._redis.execute_command(*command))  # type: ignore[no-untyped-call]

    async def call(self, label: str, call: Callable[[], Awaitable[Any]]) -> Any:
        """What it answers; None where it is refused."""
        try:
            return await call()
        except ResponseError as failure:
            if isinstance(failure, NoPermissionError) or _MISSING.search(str(failure)):
                self.refused[label.replace(self._name, "*")] = None
            elif is_away(failure):
                self.unwritable = self.unwritable or str(failure)
        return None


async def _subscribe(redis: Redis, command: str, channel: str) -> None:
    """On a connection of its own."""
    connection: Any = redis.connection_pool.make_connection()  # type: ignore[no-untyped-call]
    try:
        async with asyncio.timeout(_ANSWER_SECONDS):
            await connection.connect()
            await connection.send_command(command, channel)
            await connection.read_response()
    except builtins.TimeoutError:
        raise ConnectionError(f"no answer to {command}") from None
    finally:
        connection.abort()
        await connection.disconnect(nowait=True)


async def _transaction(redis: Redis, key: str) -> None:
    async with redis.pipeline(transaction=True) as pipe:
        await pipe.watch(key)
        pipe.multi()  # type: ignore[no-untyped-call]
        pipe.get(key)
        await pipe.execute()


async def _confirmed(redis: Redis, key: str, replicas: int) -> int:
    """Replicas that have confirmed a write; without any connected nobody waits."""
    async with redis.pipeline(transaction=False) as pipe:
        pipe.set(key, "", px=1)
        pipe.execute_command("WAIT", 1 if replicas else 0, WAIT_MS)
        _, confirmed = await pipe.execute()
    return int(confirmed)
