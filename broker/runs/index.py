"""Reading an index of runs, newest first. It only points: the records are the authority."""

from __future__ import annotations

from redis.asyncio import Redis


async def above(redis: Redis, key: str, time_ms: int, limit: int) -> tuple[list[tuple[str, int]], bool, int]:
    """The first (request_id, milliseconds) after `time_ms`, the lowest first; whether they are all; Redis' time.

    About `limit` of them, and never a part of those of one millisecond, but where this is all that there is.
    """
    async with redis.pipeline(transaction=False) as pipe:
        pipe.zrangebyscore(key, f"({time_ms}", "+inf", start=0, num=limit + 1, withscores=True)
        pipe.time()
        rows, (seconds, micros) = await pipe.execute()
    now_ms = int(seconds) * 1000 + int(micros) // 1000
    found = [(member.decode(), int(score)) for member, score in rows]
    if len(found) <= limit:
        return found, True, now_ms
    whole = [item for item in found if item[1] < found[-1][1]]
    return whole or found, False, now_ms


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
