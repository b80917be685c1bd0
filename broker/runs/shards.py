"""The primaries that hold the runs: one, or one for each shard of a Cluster."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from redis.asyncio import Redis

from broker.redis_url import Address
from broker.runs import keys
from broker.runs.cluster import Cluster
from broker.runs.layout import slot_of_key

HAS_SPUBLISH = "return redis.REDIS_VERSION_NUM and 1 or 0"
"""Whether a server has SPUBLISH: since 7.0, as has this. The run's scripts ask in the same way."""


class Shard(NamedTuple):
    """A primary. `name` stays the same for as long as its slots do; `redis` sends commands to this primary alone."""

    name: str
    redis: Redis


async def shards(redis: Redis) -> list[Shard]:
    """All primaries. Raises redis-py's exceptions when they cannot be told."""
    if not isinstance(redis, Cluster):
        return [Shard("", redis)]
    layout = await redis.layout()
    redis.renew_if_old()
    return [Shard(name, redis.node(address)) for address, name in layout.names.items()]


def shard_of(redis: Redis, request_id: str) -> str:
    """The name of the shard that holds the run; "" where it is not known yet."""
    return shard_of_key(redis, keys.run(request_id))


def shard_of_key(redis: Redis, key: str) -> str:
    """The same, of a key or a channel."""
    if not isinstance(redis, Cluster):
        return ""
    owner = redis.known.owners[slot_of_key(key)]
    return redis.known.names[owner] if owner is not None else ""


async def renew(redis: Redis, hint: Address | None = None) -> None:
    """Finds out what a Cluster looks like now; `hint` is a node that knows. Raises ConnectionError."""
    if isinstance(redis, Cluster):
        await redis.renew(hint)


def publish_verb(redis: Redis) -> str:
    """What the run's scripts publish with: SPUBLISH for a Cluster, and on a server that has it not, PUBLISH."""
    return "SPUBLISH" if isinstance(redis, Cluster) else "PUBLISH"


async def read_with_time(
    redis: Redis, request_ids: Sequence[str], fields: list[str]
) -> list[tuple[list[bytes | None], int]]:
    """Fields of the runs' records, each with the time (ms) of the server that it is on, whose are the deadlines in it.

    One pipelined read for each shard (PROTOCOL 6.2).
    """
    each = isinstance(redis, Cluster)
    async with redis.pipeline(transaction=False) as pipe:
        for request_id in request_ids:
            pipe.hmget(keys.run(request_id), fields)
            if each:
                pipe.time()
        if not each:
            pipe.time()
        found = await pipe.execute()
    rows, times = (found[::2], found[1::2]) if each else (found[:-1], found[-1:] * len(request_ids))
    return [(row, seconds * 1000 + micros // 1000) for row, (seconds, micros) in zip(rows, times, strict=True)]
