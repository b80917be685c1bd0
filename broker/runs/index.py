"""Reading an index of runs, newest first. It only points: the records are the authority."""

from __future__ import annotations

from redis.asyncio import Redis


async def page(redis: Redis, key: str, *, below: tuple[str, int] | None, limit: int) -> list[tuple[str, int]]:
    """Up to limit + 1 (request_id, milliseconds) below such a pair, in falling order of (milliseconds, request_id)."""
    offset, found = 0, list[tuple[str, int]]()
    while len(found) <= limit:
        rows = await redis.zrevrangebyscore(
            key, below[1] if below else "+inf", "-inf", start=offset, num=limit + 1, withscores=True
        )
        offset += len(rows)
        for member, score in rows:
            item = (member.decode(), int(score))
            if below is None or (item[1], item[0]) < (below[1], below[0]):
                found.append(item)
        if len(rows) <= limit:
            break
    return found[: limit + 1]
