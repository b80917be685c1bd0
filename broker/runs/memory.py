"""What a server's memory means for runs: a full one refuses writes, and one that evicts deletes runs."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

from redis.exceptions import OutOfMemoryError, RedisError

logger = logging.getLogger(__name__)

MARGIN_BYTES = 2 * 1024 * 1024
"""So close to its limit a server may refuse a large batch, and take the small writes of others."""
TOLD_SECONDS = 60.0
_told_at: dict[str, float] = {}
"""When the log was last told of each server, by the machine's clock."""


class Memory(NamedTuple):
    full: bool = False
    """Whether writes are refused, or some of them could be."""
    evicts: str = ""
    """The maxmemory-policy by which keys are deleted; '' where none are."""


SOUND = Memory()


def memory_of(info: Mapping[str, Any]) -> Memory:
    """Of INFO memory. A server that does not tell is taken for a sound one."""
    limit, policy = info.get("maxmemory", 0), info.get("maxmemory_policy", "noeviction")
    if not limit:
        return SOUND
    if policy != "noeviction":
        return Memory(evicts=policy)
    return Memory(full=info.get("used_memory", 0) - info.get("mem_not_counted_for_evict", 0) + MARGIN_BYTES > limit)


def warn_of_eviction(policy: str, shard: str) -> None:
    logger.error(
        f"Redis is to delete keys when its memory is full (maxmemory-policy {policy}): runs that were accepted will "
        "vanish, also while they are under way. Set maxmemory-policy to noeviction.",
        extra={"shard": shard},
    )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether Redis has refused a write because its memory is full: an outage that somebody has to end."""
    # A script's error is no class of its own before Redis 7.
    return isinstance(error, OutOfMemoryError) or (isinstance(error, RedisError) and ": -OOM " in str(error))


def refused(server: str) -> None:
    """The server has refused a write for want of memory. Says so, but not each time."""
    now = time.monotonic()
    if now - _told_at.get(server, float("-inf")) >= TOLD_SECONDS:
        _told_at[server] = now
        logger.error(
            "Redis is out of memory (maxmemory): it accepts and writes nothing until there is room again. "
            "Raise maxmemory, or delete runs; nothing is lost meanwhile.",
            extra={"redis": server},
        )
