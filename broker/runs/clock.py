"""Redis' clock: the only one whose times are compared."""

from __future__ import annotations

from redis.asyncio import Redis


async def now_ms(redis: Redis) -> int:
    """Milliseconds since the epoch, as the server sees it. Raises redis-py's exceptions."""
    seconds, micros = await redis.time()
    return int(seconds) * 1000 + int(micros) // 1000
