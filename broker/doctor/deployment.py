"""What can be learned of the Redis behind a URL, without changing anything that matters: facts, no judgments."""

from __future__ import annotations

import asyncio
import itertools
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from redis.asyncio import Redis
from redis.exceptions import RedisError, ResponseError

from broker.doctor.permissions import try_all
from broker.redis_url import Kind, parse
from broker.runs import keys
from broker.runs.cluster import Cluster
from broker.runs.connections import connect
from broker.runs.layout import SLOTS
from broker.runs.shards import Shard, publish_verb, shard_of_key, shards
from broker.settings import redact_url
from broker.words import reason

PINGS = 50
PING_SECONDS = 5.0
"""Fewer pings where they take so long together."""
_CONFIG = (
    *("appendfsync", "save", "stop-writes-on-bgsave-error", "min-replicas-to-write", "maxmemory-policy"),
    *("client-output-buffer-limit", "timeout"),
)


@dataclass(frozen=True, kw_only=True)
class Server:
    """One primary, as it answered."""

    name: str
    """Its address."""
    info: Mapping[str, Any] | None
    """INFO; None where the user may not ask."""
    config: Mapping[str, str] | None
    """Some of CONFIG GET; None where the user may not ask, as with most managed servers."""
    pings_ms: Sequence[float]
    clock_ms: float
    """Its time less ours."""
    clock_error_ms: float
    """How much of that may be the way there and back."""
    refused: Sequence[str] = ()
    """Commands that we need and the user may not use, or not on our keys."""
    unwritable: str = ""
    """What it answers to a write; '' where it takes it."""
    confirmed: int = 0
    """Replicas that confirmed a write in time."""


class Opinion(NamedTuple):
    """A Sentinel's: where the primary is, or why it does not say."""

    primary: str = ""
    failure: str = ""


@dataclass(frozen=True, kw_only=True)
class Deployment:
    """All primaries behind one URL."""

    title: str
    """For people: what it holds, and its redacted URL."""
    kind: Kind
    failure: str = ""
    """Why nothing is known of it; '' where something is."""
    servers: Sequence[Server] = ()
    unreachable: Mapping[str, str] = field(default_factory=dict)
    """Primaries of a Cluster that do not answer, and why."""
    uncovered_slots: int = 0
    sentinels: Mapping[str, Opinion] = field(default_factory=dict)
    """What each Sentinel says."""
    holds_runs: bool = True


def open_redis(url: str) -> Redis:
    """Raises Misconfigured."""
    return connect(url, connections=4)


async def visit(redis: Redis, url: str, *, holds_runs: bool, holds_queue: bool) -> Deployment:
    where = parse(url)
    what = " and ".join(word for word, is_held in (("the runs", holds_runs), ("the queue", holds_queue)) if is_held)
    deployment = Deployment(
        title=f"The Redis of {what}, {redact_url(url)}",
        kind=where.kind,
        sentinels=await _opinions(redis),
        holds_runs=holds_runs,
    )
    try:
        found = await shards(redis)
    except (RedisError, OSError) as failure:
        return replace(deployment, failure=reason(failure))
    holds = {"holds_runs": holds_runs, "holds_queue": holds_queue}
    answers = await asyncio.gather(*(_server_or_reason(redis, shard, holds) for shard in found))
    unreachable = {shard.name: answer for shard, answer in zip(found, answers, strict=True) if isinstance(answer, str)}
    servers = [answer for answer in answers if isinstance(answer, Server)]
    if not servers:
        return replace(deployment, failure="; ".join(dict.fromkeys(unreachable.values())))
    uncovered = SLOTS - redis.known.covered if isinstance(redis, Cluster) else 0
    return replace(deployment, servers=servers, unreachable=unreachable, uncovered_slots=uncovered)


async def _opinions(redis: Redis) -> dict[str, Opinion]:
    sentinels = redis.connection_pool.connection_kwargs.get("sentinels")
    if sentinels is None:
        return {}
    return {
        _name(node): Opinion(failure=said) if isinstance(said, str) else Opinion(_name(said))
        for node, said in (await sentinels.opinions()).items()
    }


async def _server_or_reason(redis: Redis, shard: Shard, holds: Mapping[str, bool]) -> Server | str:
    try:
        return await _server(redis, shard, holds)
    except (RedisError, OSError) as failure:
        return reason(failure)


async def _server(redis: Redis, shard: Shard, holds: Mapping[str, bool]) -> Server:
    """Raises redis-py's exceptions where it cannot be reached."""
    pings = await _pings(shard.redis)
    clock_ms, clock_error_ms = await _clock(shard.redis)
    info = await _info(shard.redis)
    config = await _config(shard.redis)
    name = shard.name or _address(shard.redis)
    facts: dict[str, Any] = {
        "name": name,
        "info": info,
        "config": config,
        "pings_ms": pings,
        "clock_ms": clock_ms,
        "clock_error_ms": clock_error_ms,
    }
    if info is not None and info.get("role") == "slave":
        return Server(**facts)  # it takes no writes, and that says nothing of the user's rights
    scratch = _scratch(redis, shard)
    known = info or {}
    verb = "PUBLISH" if str(known.get("redis_version", "")).startswith("6.") else publish_verb(redis)
    tried = await try_all(shard.redis, scratch, **holds, verb=verb, replicas=int(known.get("connected_slaves", 0)))
    return Server(**facts, refused=tried.refused, unwritable=tried.unwritable, confirmed=tried.confirmed)


def _scratch(redis: Redis, shard: Shard) -> str:
    """The name of a run that nobody has, on this very shard."""
    names = (keys.scratch(number) for number in itertools.count(secrets.randbelow(10**9)))
    return next(name for name in names if shard_of_key(redis, keys.run(name)) == shard.name)


async def _pings(redis: Redis) -> list[float]:
    """Milliseconds. The first, which also connects, does not count."""
    await redis.ping()
    taken: list[float] = []
    ends = time.monotonic() + PING_SECONDS
    while len(taken) < PINGS and (not taken or time.monotonic() < ends):
        began = time.perf_counter()
        await redis.ping()
        taken.append((time.perf_counter() - began) * 1000)
    return taken


async def _clock(redis: Redis) -> tuple[float, float]:
    """Of three answers the one that came soonest."""
    best = (0.0, float("inf"))
    for _ in range(3):
        began, asked_at = time.perf_counter(), time.time()
        seconds, micros = await redis.time()
        half_ms = (time.perf_counter() - began) * 500
        if half_ms < best[1]:
            best = (int(seconds) * 1000 + int(micros) / 1000 - asked_at * 1000 - half_ms, half_ms)
    return best


async def _info(redis: Redis) -> dict[str, Any] | None:
    try:
        info: dict[str, Any] = await redis.info()
        return info
    except ResponseError:
        return None


async def _config(redis: Redis) -> dict[str, str] | None:
    found: dict[str, str] = {}
    try:
        for name in _CONFIG:  # 6.2 takes one at a time
            found.update(await redis.config_get(name))
    except ResponseError:
        return None
    return found


def _address(redis: Redis) -> str:
    """Of the connection that answered."""
    connection: Any = redis.connection_pool._available_connections[-1]
    return str(getattr(connection, "path", None) or _name((connection.host, connection.port)))


def _name(address: tuple[str, int]) -> str:
    host, port = address
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
