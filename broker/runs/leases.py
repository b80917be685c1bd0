"""`sb:leases`: every unfinished run, and when somebody must look at it next (PROTOCOL 4.2).

It lives with the queue, so it may be lost or restored on its own: the record is the authority, and whoever meets an
unfinished run that is past its time puts it back. Times are milliseconds of Redis' clock.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from redis.asyncio import Redis

from broker.ids import REQUEST_ID
from broker.runs import keys
from broker.runs.clock import now_ms

logger = logging.getLogger(__name__)

FORGET_MS = 120_000
"""An entry is removed so long after the end of its run: until then a failover may take the end back."""


class Due(NamedTuple):
    request_ids: list[str]
    now_ms: int


class Leases:
    """All raise redis-py's exceptions."""

    def __init__(self, redis: Redis) -> None:
        """`redis` is the queue's."""
        self._redis = redis

    async def put(self, at_ms: Mapping[str, int]) -> None:
        """When each run is to be looked at, whatever was said before."""
        if at_ms:
            await self._redis.zadd(keys.LEASES, dict(at_ms))

    async def put_back(self, request_ids: Iterable[str], at_ms: int) -> None:
        """To be looked at then, where nothing is said."""
        if scores := dict.fromkeys(request_ids, at_ms):
            await self._redis.zadd(keys.LEASES, scores, nx=True)

    async def put_no_later(self, request_ids: Iterable[str], at_ms: int) -> None:
        """To be looked at then, where something later is said, as by a clock that was set back since."""
        if scores := dict.fromkeys(request_ids, at_ms):
            await self._redis.zadd(keys.LEASES, scores, lt=True)

    async def due(self, limit: int) -> Due:
        """At most `limit`, the longest due first. What is not the name of a run is removed, or it would stay first."""
        now = await now_ms(self._redis)
        found = await self._redis.zrangebyscore(keys.LEASES, "-inf", now, start=0, num=limit)
        names = {member: member.decode("ascii", "replace") for member in found}
        foreign = [member for member, name in names.items() if not REQUEST_ID.fullmatch(name)]
        if foreign:
            logger.warning("what is no run was removed from the index", extra={"members": repr(foreign)})
            await self._redis.zrem(keys.LEASES, *foreign)
        return Due([name for member, name in names.items() if member not in foreign], now)

    async def remove(self, request_ids: Iterable[str]) -> None:
        if members := list(request_ids):
            await self._redis.zrem(keys.LEASES, *members)
