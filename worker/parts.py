"""What the parts of a worker share."""

from __future__ import annotations

from dataclasses import dataclass

from redis.asyncio import Redis

from broker.runs.closings import Closings
from broker.runs.connections import connect
from broker.runs.leases import Leases
from broker.runs.primaries import Primaries
from broker.runs.queue import Queue
from broker.runs.scripts import Scripts
from broker.settings import Settings

COMMAND_CONNECTIONS = 16
QUEUE_CONNECTIONS = 8


@dataclass(frozen=True, kw_only=True)
class Parts:
    settings: Settings
    redis: Redis
    scripts: Scripts
    queue: Queue
    leases: Leases
    primaries: Primaries
    closings: Closings

    @property
    def lease_ms(self) -> int:
        return int(self.settings.lease_seconds * 1000)

    @property
    def retention_ms(self) -> int:
        return int(self.settings.retention_seconds * 1000)

    async def close(self) -> None:
        await self.queue.close()
        await self.redis.aclose(close_connection_pool=True)


def make_parts(settings: Settings) -> Parts:
    redis = connect(settings.redis_url, connections=COMMAND_CONNECTIONS, wait=30)
    queue = Queue(settings.queue_url, connections=QUEUE_CONNECTIONS)
    replicated = settings.durability == "replicated"
    scripts = Scripts(redis, replicated=replicated)
    primaries = Primaries(redis, queue.redis, replicated=replicated)
    return Parts(
        settings=settings,
        redis=redis,
        scripts=scripts,
        queue=queue,
        leases=Leases(queue.redis),
        primaries=primaries,
        closings=Closings(scripts, primaries, retention_ms=int(settings.retention_seconds * 1000)),
    )
