"""The logs on a Cluster of three primaries with a replica each, the queue on a primary that three Sentinels watch."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import redis

from broker.runs import keys
from tests.chaos.site import Fault, Outage, Site
from tests.kit.cluster import SLOTS, Cluster, slot_of
from tests.kit.load import Load
from tests.kit.processes import Gateway, Process
from tests.kit.redis_server import RedisServer
from tests.kit.sentinel import Sentinels

PASSWORD = "pelican-and-heron"
_WATCH_SECONDS = 0.2


class ClusterSite(Site):
    def __init__(self, folder: Path, durability: str) -> None:
        super().__init__(folder, durability)
        self.whole = asyncio.Lock()
        """Held while a slot moves, and until a primary is replaced: of a slot whose primary goes when the slot is
        half-way, the Cluster forgets where the other half is, and an operator must tell it."""
        self.connections: Counter[str] = Counter()
        """The most that were seen of a `gateway` to a node, of a `worker` to a node, and of all by a `node`."""
        self.moves = 0
        """Slots that were moved."""

    async def start_redis(self, parts: contextlib.AsyncExitStack) -> dict[str, Any]:
        self.cluster = await parts.enter_async_context(Cluster(self.folder / "cluster", password=PASSWORD))
        self.queue = await parts.enter_async_context(Sentinels(self.folder / "queue", password=PASSWORD))
        parts.callback(asyncio.create_task(self._watch()).cancel)
        return {"redis_url": self.cluster.url, "queue_redis_url": self.queue.url}

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(_WATCH_SECONDS)
            for count in await asyncio.to_thread(self._by_node):
                self.connections["node"] = max(self.connections["node"], count)
            for process in (*self.gateways, *self.workers):
                kind = "gateway" if isinstance(process, Gateway) else "worker"
                most = max(await asyncio.to_thread(self._of, process), default=0)
                self.connections[kind] = max(self.connections[kind], most)

    def _by_node(self) -> list[int]:
        counts = []
        for server in self.cluster.living():
            with contextlib.suppress(redis.RedisError), server.client() as client:
                counts.append(sum(row["name"] == "stream-broker" for row in client.client_list()))
        return counts

    def _of(self, process: Process) -> list[int]:
        with contextlib.suppress(psutil.Error):
            found = psutil.Process(process.pid).net_connections("tcp")
            ports = Counter(one.raddr.port for one in found if one.raddr and one.status == "ESTABLISHED")
            return [ports[server.port] for server in self.cluster.servers]
        return []


async def redis_killed(site: ClusterSite, load: Load, chance: random.Random) -> None:
    """One of the three. It comes back as a replica."""
    async with site.whole:
        old = await _apart(site, load, chance)
        slots, at = await asyncio.to_thread(site.cluster.slots_of, old), load.history.now
        await asyncio.to_thread(old.kill)
        new = await _replaced(site, load, Outage("killed", at, 0, slots), old)
    await asyncio.sleep(chance.uniform(0, 1))
    await site.cluster.start_again(old)
    await site.cluster.replicate(old, new)


async def redis_stopped(site: ClusterSite, load: Load, chance: random.Random) -> None:
    """When it goes on it takes itself for a primary, until it hears of the other one."""
    async with site.whole:
        old = await _apart(site, load, chance)
        slots, at = await asyncio.to_thread(site.cluster.slots_of, old), load.history.now
        site.cluster.pause(old)
        new = await _replaced(site, load, Outage("stopped", at, 0, slots), old)
    await asyncio.sleep(chance.uniform(0, 1))
    site.cluster.resume(old)
    await site.cluster.until_whole()
    await site.cluster.replicate(old, new)


async def _apart(site: ClusterSite, load: Load, chance: random.Random) -> RedisServer:
    """A primary of which what is written from now on is confirmed, and lost in its failover."""
    site.may_lose = True
    old = await asyncio.to_thread(site.cluster.owner, _some_slot(load, chance))
    await site.cluster.part(old)
    await asyncio.sleep(chance.uniform(0, 0.6))
    return old


async def _replaced(site: ClusterSite, load: Load, outage: Outage, old: RedisServer) -> RedisServer:
    """Returns the other one, when the whole Cluster takes it for the primary."""
    assert outage.slots
    new = await site.cluster.until_failed_over(min(outage.slots), old)
    site.outages.append(replace(outage, over_at=load.history.now))
    await asyncio.to_thread(new.unite, PASSWORD)
    return new


async def slots_moved(site: ClusterSite, load: Load, chance: random.Random) -> None:
    """Those of several runs, to and fro, one after the other."""
    for _ in range(chance.randint(2, 5)):
        slot = _some_slot(load, chance)
        for _ in range(chance.randint(1, 3)):
            async with site.whole:
                owner = await asyncio.to_thread(site.cluster.owner, slot)
                target = chance.choice(await asyncio.to_thread(site.cluster.others, owner))
                await site.cluster.move_slot(slot, target, pause=chance.uniform(0, 0.2))
                site.moves += 1
            await asyncio.sleep(chance.uniform(0, 0.3))


def _some_slot(load: Load, chance: random.Random) -> int:
    """That of a run, where there is one."""
    runs = list(load.runs.values())[-8:]
    return slot_of(keys.run(chance.choice(runs))) if runs else chance.randrange(SLOTS)


async def queue_killed(site: ClusterSite, load: Load, chance: random.Random) -> None:
    """Jobs and the index of leases are lost with it; they are made whole from the records."""
    old = await site.queue.kill_primary()
    await site.queue.until_failed_over(old)
    await asyncio.sleep(chance.uniform(0, 1))
    await site.queue.start_again(old)


async def queue_stopped(site: ClusterSite, load: Load, chance: random.Random) -> None:
    """Until it hears of the other one, it takes jobs that nobody will find."""
    old = await asyncio.to_thread(lambda: site.queue.primary)
    old.pause()
    await site.queue.until_failed_over(old)
    await asyncio.sleep(chance.uniform(0, 1))
    old.resume()
    await site.queue.until_replicated()


REDIS: tuple[Fault[ClusterSite], ...] = (slots_moved, queue_killed, queue_stopped)
LOSSES: tuple[Fault[ClusterSite], ...] = (redis_killed, redis_stopped)
