"""A primary and its replica over a link that can be paused, behind an address that follows the primary."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path

from tests.kit.processes import wait_for
from tests.kit.proxy import Proxy
from tests.kit.redis_server import RedisServer


class Pair:
    """`url` is for the services. What is written while the `link` is paused is acknowledged, and lost in a failover.

    SIGSTOP of the replica would lose nothing: the bytes would wait in its socket.
    """

    def __init__(self, folder: Path, *options: str, binary: str | None = None) -> None:
        for name in ("one", "two"):
            (folder / name).mkdir(parents=True)
        self.primary = RedisServer(folder / "one", *options, binary=binary)
        self.replica = RedisServer(folder / "two", *options, binary=binary)
        self.link = Proxy(self.primary.port, raw=True)
        self.address = Proxy(self.primary.port, raw=True)
        self.url = self.address.url
        self.failovers = 0

    def start(self) -> Pair:
        for server in (self.primary, self.replica):
            server.start()
        self.replica.replicate(self.link.port)
        self.until_synchronised()
        return self

    def until_synchronised(self, seconds: float = 20) -> None:
        """Until the replica has all that was written before."""
        written = self.primary.offset
        wait_for(lambda: self.replica.synchronised and self.replica.offset >= written, seconds=seconds)

    async def fail_over(self, *, demote: bool = False) -> None:
        """The replica becomes the primary, with what it has got, and the address leads to it.

        Every client's connection is reset. The old primary is killed, or with `demote` it becomes the new one's replica
        and drops what only it had. The link is healed.
        """
        await asyncio.to_thread(self._fail_over, demote)

    def _fail_over(self, demote: bool) -> None:
        self.address.refuse()
        if not demote:
            self.primary.kill()
        self.replica.promote()
        self.primary, self.replica = self.replica, self.primary
        self.failovers += 1
        self.link.point_to(self.primary.port)
        self.link.heal()
        if demote:
            self.replica.replicate(self.link.port)
        self.address.point_to(self.primary.port)
        self.address.accept()

    async def rejoin(self) -> None:
        """The killed primary comes back as the replica, and gets all that the new one has."""
        await asyncio.to_thread(self._rejoin)

    def _rejoin(self) -> None:
        self.replica.start()
        self.replica.replicate(self.link.port)
        self.until_synchronised()

    def close(self) -> None:
        with contextlib.ExitStack() as stack:
            for part in (self.primary, self.replica, self.link, self.address):
                stack.callback(part.close)
