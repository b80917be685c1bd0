"""The primary that Sentinels watch: where it is now is asked at every connect."""

from __future__ import annotations

import asyncio
import builtins
from collections import Counter
from collections.abc import Sequence
from typing import Any

from redis.exceptions import ConnectionError, RedisError

from broker.redis_url import Address
from broker.runs.pool import Cancellable, Pool, Tcp, Tls

ANSWER_SECONDS = 1.0
"""A Sentinel that takes longer is not waited for."""


class Sentinels:
    """The Sentinels of one primary."""

    def __init__(self, nodes: Sequence[Address], master: str, kind: type[Tcp] | type[Tls], **options: Any) -> None:
        """`kind` and `options` are those of connections to a Sentinel."""
        self._nodes = nodes
        self._master = master
        self._kind = kind
        self._options = options
        self._asking: asyncio.Task[list[Address]] | None = None

    async def primaries(self) -> list[Address]:
        """Where the primary is said to be, what most Sentinels say first. Raises ConnectionError where none knows it.

        Callers at the same time share the answer: after a failover all connect at once.
        """
        if self._asking is None:
            self._asking = asyncio.create_task(self._ask_all())
            self._asking.add_done_callback(self._asked)
        return await asyncio.shield(self._asking)

    async def opinions(self) -> dict[Address, Address | str]:
        """What each Sentinel says: where the primary is, or why it does not say."""
        answers = await asyncio.gather(*(self._ask(node) for node in self._nodes))
        return dict(zip(self._nodes, answers, strict=True))

    def _asked(self, task: asyncio.Task[list[Address]]) -> None:
        self._asking = None
        if not task.cancelled():
            task.exception()  # whoever waits for it hears of it

    async def _ask_all(self) -> list[Address]:
        """At once, so that one that is away holds nobody up."""
        asked = {asyncio.create_task(self._ask(node)) for node in self._nodes}
        votes: Counter[Address] = Counter()
        failures: list[str] = []
        pending = asked
        try:
            while pending and max(votes.values(), default=0) * 2 <= len(self._nodes):
                done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    answer = task.result()
                    if isinstance(answer, str):
                        failures.append(answer)
                    else:
                        votes[answer] += 1
        finally:
            for task in pending:
                task.cancel()
            if pending:
                await asyncio.wait(pending)
        if not votes:
            raise ConnectionError(f"no Sentinel knows where {self._master!r} is: {'; '.join(failures)}")
        return [address for address, _ in votes.most_common()]

    async def _ask(self, node: Address) -> Address | str:
        """The address, or why there is none."""
        connection: Any = self._kind(host=node[0], port=node[1], **self._options)
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                await connection.connect()
                await connection.send_command("SENTINEL", "GET-MASTER-ADDR-BY-NAME", self._master)
                answer: Any = await connection.read_response()
        except (RedisError, OSError, builtins.TimeoutError) as error:
            return f"{node[0]}:{node[1]}: {str(error) or 'no answer'}"
        finally:
            connection.abort()
            await connection.disconnect(nowait=True)
        return (answer[0].decode(), int(answer[1])) if answer else f"{node[0]}:{node[1]} does not know it"


class Elected(Cancellable):
    """A connection to the primary, wherever that is when it connects."""

    def __init__(self, *, sentinels: Sentinels, **options: Any) -> None:
        self._sentinels = sentinels
        super().__init__(**options)

    async def connect(self) -> None:
        if self.is_connected:
            return
        failure: RedisError | None = None
        for host, port in await self._sentinels.primaries():
            self.host, self.port = host, port
            try:
                await super().connect()
                await self._check_role()
                return
            except RedisError as error:
                await self.disconnect(nowait=True)
                failure = error
        assert failure is not None
        raise failure

    async def _check_role(self) -> None:
        """Sentinels name a primary that has come back as a replica until they know better."""
        await self.send_command("ROLE")
        role, *_ = await self.read_response()
        if role != b"master":
            raise ConnectionError(f"{self.host}:{self.port} is a replica, not the primary")


class ElectedTcp(Elected, Tcp):
    pass


class ElectedTls(Elected, Tls):
    pass


class ElectedPool(Pool):
    """When a connection finds the primary elsewhere, all others leave where it was."""

    _primary: Address | None = None

    async def ensure_connection(self, connection: Any) -> None:
        await super().ensure_connection(connection)
        address = (connection.host, connection.port)
        if address != self._primary:
            self._primary = address
            for other in self.connections():
                if (other.host, other.port) != address:
                    other.abort()
