"""Keeps the leases of a worker's runs while its event loop is blocked by one of them (PROTOCOL 4.5).

It has an event loop and connections of its own. It gives up after a while: a loop that is blocked for ever must not
keep its runs for ever. Reapers then give all of them to other workers, the one that blocks too.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence

from redis.asyncio import Redis

from broker.runs.clock import now_ms
from broker.runs.connections import connect, is_away
from broker.runs.leases import Leases
from broker.runs.scripts import RENEWAL, Lease, Scripts
from broker.settings import Settings

logger = logging.getLogger(__name__)

LEAST_SECONDS = 60.0
LEASES = 4
"""A blocked loop keeps its runs for so many leases, and LEAST_SECONDS at least."""
_CONNECTIONS = 4


class LeaseKeeper:
    """`leases()` is called in another thread than the one whose runs they are."""

    def __init__(self, settings: Settings, leases: Callable[[], Sequence[Lease]]) -> None:
        self._settings = settings
        self._leases = leases
        self._lease = settings.lease_seconds
        self._lease_ms = int(settings.lease_seconds * 1000)
        self._retention_ms = int(settings.retention_seconds * 1000)
        self.after = settings.lease_seconds / 4
        """For how long the loop is silent when this begins: an idle run renews its lease every third of it."""

    async def keep(self) -> None:
        """Until cancelled, or for as long as a loop may be blocked."""
        redis = connect(self._settings.redis_url, connections=_CONNECTIONS)
        queue = connect(self._settings.queue_url, connections=1)
        scripts = Scripts(redis)
        most = max(LEASES * self._lease, LEAST_SECONDS)
        try:
            async with asyncio.timeout(most - self.after):
                while True:
                    leases = self._leases()
                    await asyncio.gather(
                        *(self._tried(self._renew(scripts, lease)) for lease in leases),
                        self._tried(self._look_later(queue, leases)),
                    )
                    await asyncio.sleep(self._lease / 6)
        except TimeoutError:
            logger.error(
                "the event loop is blocked for too long: its runs are left to other workers", extra={"seconds": most}
            )
        finally:
            await redis.aclose(close_connection_pool=True)
            await queue.aclose(close_connection_pool=True)

    async def _renew(self, scripts: Scripts, lease: Lease) -> None:
        await scripts.append(lease, RENEWAL, lease_ms=self._lease_ms, retention_ms=self._retention_ms)

    async def _look_later(self, queue: Redis, leases: Sequence[Lease]) -> None:
        now = await now_ms(queue)
        await Leases(queue).put({lease.request_id: now + self._lease_ms for lease in leases})

    async def _tried(self, work: Awaitable[None]) -> None:
        """Once, and not for long: the next time comes soon, and another shard may answer."""
        try:
            async with asyncio.timeout(self._lease / 3):
                await work
        except Exception as error:
            if not is_away(error):
                logger.exception("a lease cannot be kept")
