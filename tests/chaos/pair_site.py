"""A primary with a replica, behind an address that follows the primary."""

from __future__ import annotations

import asyncio
import contextlib
import random
from typing import Any

from tests.chaos.site import Fault, Site
from tests.kit.load import Load
from tests.kit.pair import Pair


class PairSite(Site):
    async def start_redis(self, parts: contextlib.AsyncExitStack) -> dict[str, Any]:
        self.pair = Pair(self.folder / "redis")
        parts.callback(self.pair.close)
        await asyncio.to_thread(self.pair.start)
        return {"redis_url": self.pair.url}


async def connections_reset(site: PairSite, load: Load, chance: random.Random) -> None:
    site.pair.address.reset()


async def redis_slow(site: PairSite, load: Load, chance: random.Random) -> None:
    site.pair.address.delay(chance.uniform(0.01, 0.1))
    await asyncio.sleep(chance.uniform(0.5, 2))
    site.pair.address.heal()


async def redis_killed(site: PairSite, load: Load, chance: random.Random) -> None:
    """Loses nothing: the kernel has what was written."""
    site.pair.primary.kill()
    await asyncio.sleep(chance.uniform(0, 2))
    await asyncio.to_thread(site.pair.primary.start)


async def redis_stopped(site: PairSite, load: Load, chance: random.Random) -> None:
    site.pair.primary.pause()
    await asyncio.sleep(chance.uniform(0.2, 4))
    site.pair.primary.resume()


async def redis_cut(site: PairSite, load: Load, chance: random.Random) -> None:
    """A power cut takes what was written in the last second; the replica forgets it too, when the primary is back."""
    site.may_lose = site.may_lose_runs = True
    before = site.pair.primary.aof.stat().st_size
    await asyncio.sleep(chance.random())
    written = max(site.pair.primary.aof.stat().st_size - before, 1)
    await asyncio.to_thread(site.pair.primary.restart, cut=chance.randint(1, written))


async def redis_failed_over(site: PairSite, load: Load, chance: random.Random) -> None:
    """What was written since the replica heard the last is acknowledged, and lost."""
    site.may_lose = True
    site.pair.link.pause()
    await asyncio.sleep(chance.uniform(0, 0.6))
    await site.pair.fail_over()
    await site.pair.rejoin()


REDIS: tuple[Fault[PairSite], ...] = (connections_reset, redis_slow, redis_killed, redis_stopped)
LOSSES: tuple[Fault[PairSite], ...] = (redis_cut, redis_failed_over)
