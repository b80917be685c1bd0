"""A primary and a replica that three Sentinels watch."""

from __future__ import annotations

import asyncio
import contextlib
import random
from pathlib import Path
from typing import Any

from tests.chaos.site import Fault, Outage, Site
from tests.kit.load import Load
from tests.kit.redis_server import RedisServer
from tests.kit.sentinel import Sentinels
from tests.kit.tls import Certificates

PASSWORD = "pelican-and-heron"


class SentinelSite(Site):
    def __init__(self, folder: Path, durability: str, certificates: Certificates | None = None) -> None:
        super().__init__(folder, durability)
        self._certificates = certificates

    async def start_redis(self, parts: contextlib.AsyncExitStack) -> dict[str, Any]:
        own = Sentinels(self.folder / "redis", password=PASSWORD, certificates=self._certificates)
        self.sentinels = await parts.enter_async_context(own)
        return {"redis_url": self.sentinels.url}


async def redis_killed(site: SentinelSite, load: Load, chance: random.Random) -> None:
    """It comes back as a replica."""
    old, at = await _apart(site, load, chance)
    await asyncio.to_thread(old.kill)
    await _replaced(site, load, "killed", old, at)
    await asyncio.sleep(chance.uniform(0, 1))
    await site.sentinels.start_again(old)


async def redis_stopped(site: SentinelSite, load: Load, chance: random.Random) -> None:
    """When it goes on it takes itself for the primary, until a Sentinel tells it otherwise."""
    old, at = await _apart(site, load, chance)
    old.pause()
    await _replaced(site, load, "stopped", old, at)
    await asyncio.sleep(chance.uniform(0, 1))
    old.resume()
    await site.sentinels.until_replicated()


async def _apart(site: SentinelSite, load: Load, chance: random.Random) -> tuple[RedisServer, float]:
    """What is written from now on is confirmed, and lost: a replica on the same machine would hear of it at once.

    Returns the primary, at the moment of its end.
    """
    site.may_lose = True
    await site.sentinels.part()
    await asyncio.sleep(chance.uniform(0, 0.6))
    return await asyncio.to_thread(lambda: site.sentinels.primary), load.history.now


async def _replaced(site: SentinelSite, load: Load, kind: str, old: RedisServer, at: float) -> None:
    new = await site.sentinels.until_failed_over(old)
    site.outages.append(Outage(kind, at, load.history.now))
    await asyncio.to_thread(new.unite, PASSWORD)


REDIS: tuple[Fault[SentinelSite], ...] = ()
LOSSES: tuple[Fault[SentinelSite], ...] = (redis_killed, redis_stopped)
