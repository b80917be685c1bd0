"""The primaries that hold the runs: one, or one for each shard of a Cluster."""

from __future__ import annotations

from typing import NamedTuple

from redis.asyncio import Redis


class Shard(NamedTuple):
    """A primary. `name` stays the same for as long as its slots do; `redis` sends commands to this primary alone."""

    name: str
    redis: Redis


async def shards(redis: Redis) -> list[Shard]:
    """All primaries. Raises redis-py's exceptions when they cannot be told."""
    return [Shard("", redis)]


def shard_of(redis: Redis, request_id: str) -> str:
    """The name of the shard that holds the run."""
    return ""
