"""What a renewal and a repair cost Redis, in commands: `python -m tests.chaos.costs` prints the table."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path

from redis.asyncio import Redis

from broker.ids import EventId
from broker.runs import keys, log
from broker.runs.connections import connect
from broker.runs.primaries import Primaries
from broker.runs.scripts import Batch, Scripts
from tests.kit.redis_server import RedisServer
from tests.kit.runs import LEASE_MS, RETENTION_MS, append, running, words
from worker.publisher import Limits, Publisher

LOST = 50


async def counted(redis: Redis, work: Callable[[], Awaitable[object]]) -> dict[str, int]:
    """The commands that `work` made Redis execute, those inside scripts included."""
    await redis.config_resetstat()
    await work()
    stats = await redis.info("commandstats")
    counts = {name.removeprefix("cmdstat_"): int(stats[name]["calls"]) for name in stats}
    return {name: calls for name, calls in counts.items() if not name.startswith(("config", "info"))}


async def renewal(redis: Redis) -> dict[str, int]:
    scripts = Scripts(redis)
    lease = await running(scripts)
    await append(scripts, lease, 2, *words("a"))

    async def renew() -> None:
        await scripts.append(lease, Batch(3, [], 1), lease_ms=LEASE_MS, retention_ms=RETENTION_MS)

    await renew()
    return await counted(redis, renew)


async def repair(redis: Redis) -> dict[str, int]:
    """An idle run whose last LOST entries a failover took: the renewal that finds it, and what follows."""
    scripts = Scripts(redis)
    lease = await running(scripts)
    publisher = Publisher(scripts, lease, Limits(lease_ms=LEASE_MS, retention_ms=RETENTION_MS), Primaries(redis, redis))
    writing = asyncio.create_task(publisher.run())
    names = keys.run(lease.request_id), keys.log(lease.request_id)
    before = [await redis.dump(name) for name in names]
    for kind, data in words(*("word" for _ in range(LOST))):
        await publisher.put(kind, data)
    await publisher.finish()
    for name, dump in zip(names, before, strict=True):
        await redis.restore(name, 0, dump, replace=True)

    async def repaired() -> None:
        publisher.renew()
        while publisher.repairs == 0:
            await asyncio.sleep(0.01)
        await publisher.finish()

    counts = await counted(redis, repaired)
    assert (await log.read_all(redis, lease.request_id))[-1].id == EventId(lease.epoch, LOST + 1)
    await publisher.close(writing)
    return counts


async def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        server = RedisServer(Path(folder)).start()
        try:
            redis = connect(server.url, connections=2)
            await renewal(redis)  # loads the scripts
            for title, work in (("renewal", renewal), (f"repair of {LOST} entries", repair)):
                counts = await work(redis)
                print(f"{title}: " + ", ".join(f"{calls} {name.upper()}" for name, calls in sorted(counts.items())))
            await redis.aclose(close_connection_pool=True)
        finally:
            server.close()


if __name__ == "__main__":
    asyncio.run(main())
