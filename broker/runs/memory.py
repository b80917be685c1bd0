"""What a server's memory means for runs: a full one refuses writes, and one that evicts deletes runs."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, NamedTuple

logger = logging.getLogger(__name__)


class Memory(NamedTuple):
    full: bool = False
    """Whether writes are refused."""
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
    return Memory(full=info.get("used_memory", 0) - info.get("mem_not_counted_for_evict", 0) > limit)


def report(before: Memory, now: Memory, shard: str) -> None:
    """Logs what is other than before."""
    if now.evicts and now.evicts != before.evicts:
        logger.error(
            f"Redis is to delete keys when its memory is full (maxmemory-policy {now.evicts}): runs that were accepted "
            "will vanish, also while they are under way. Set maxmemory-policy to noeviction.",
            extra={"shard": shard},
        )
    if now.full and not before.full:
        logger.error(
            "Redis is out of memory (maxmemory): nothing is accepted or written until there is room again. "
            "Raise maxmemory, or delete runs; nothing is lost meanwhile.",
            extra={"shard": shard},
        )
    if before.full and not now.full:
        logger.info("Redis has memory again", extra={"shard": shard})
