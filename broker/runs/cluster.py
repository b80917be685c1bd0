"""A Redis Cluster as one Redis: each command goes to the primary that has the slot of its key.

redis-py's own asyncio client of a Cluster repeats commands, fails where all connections to a node are in use, cuts the
connections to every node when one of them fails, and may send ASKING on another connection than the command that it is
for. So this one has only redis-py's parser and errors, above the pools that everything else uses too.
"""

from __future__ import annotations

import asyncio
import builtins
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from redis.asyncio import Redis
from redis.asyncio.client import Pipeline
from redis.exceptions import (
    AskError,
    BusyLoadingError,
    ClusterDownError,
    ConnectionError,
    MovedError,
    RedisError,
    TimeoutError,
    TryAgainError,
)

from broker.redis_url import Address
from broker.runs.layout import NOTHING, SLOTS, Layout, parse, slot_of
from broker.runs.pool import Pool

ANSWER_SECONDS = 1.0
"""A node that takes longer to tell the layout, or to take a script, is not waited for."""
REDIRECTIONS = 5
RENEW_SECONDS = 5.0
"""A layout that is older is asked for again when somebody wants to know all primaries."""
_PAUSE_SECONDS = 0.2

Command = tuple[tuple[Any, ...], Mapping[str, Any]]
Unit = list[int]
"""Commands of a pipeline, by their places, that go to one slot one after the other."""


class Cluster(Redis):
    """Commands of one key or of keys in one slot; pipelines without transactions. PING and TIME go to any primary."""

    def __init__(self, seeds: Sequence[Address], make_pool: Callable[[Address, Callable[[], None]], Pool]) -> None:
        """`make_pool(address, on_trouble)` makes the pool of a node."""
        super().__init__(connection_pool=make_pool(seeds[0], self.suspect))
        self._seeds = seeds
        self._make_pool = make_pool
        self._nodes: dict[Address, Redis] = {}
        self.known = NOTHING
        """The layout as it was last seen."""
        self._asked_at = float("-inf")
        self._importing: set[Address] = set()
        """Nodes to which a slot is being moved: they may not be primaries yet."""
        self._troubled: set[Address] = set()
        """Nodes with which something went wrong since the layout was asked for."""
        self._lock = asyncio.Lock()
        self._hint: Address | None = None
        self._suspected = False
        self._asking: asyncio.Task[None] | None = None
        self._closed = False

    def node(self, address: Address) -> Redis:
        """A client of one node alone."""
        node = self._nodes.get(address)
        if node is None:
            node = self._nodes[address] = Redis.from_pool(self._make_pool(address, lambda: self._trouble(address)))
        return node

    def _trouble(self, address: Address) -> None:
        self._troubled.add(address)
        self.suspect()

    async def aclose(self, close_connection_pool: bool | None = None) -> None:
        self._closed = True
        if self._asking is not None:
            self._asking.cancel()
            await asyncio.wait([self._asking])
        for node in self._nodes.values():
            await node.aclose(close_connection_pool=True)

    # -- the layout ------------------------------------------------------------------------------------------

    async def layout(self) -> Layout:
        """Raises ConnectionError where no node tells it."""
        if self.known is NOTHING:
            async with self._lock:
                if self.known is NOTHING:
                    await self._renew()
        return self.known

    async def renew(self, hint: Address | None = None) -> None:
        """Asks for the layout; `hint`, who seems to know better, is asked first. Raises ConnectionError."""
        self._hint = hint or self._hint
        async with self._lock:
            await self._renew()

    def renew_if_old(self) -> None:
        if asyncio.get_running_loop().time() - self._asked_at > RENEW_SECONDS:
            self.suspect()

    def suspect(self, hint: Address | None = None) -> None:
        """Something was not where it should be: asks for the layout soon, in the background."""
        self._hint = hint or self._hint
        self._suspected = True
        if self._asking is None and not self._closed:
            self._asking = asyncio.create_task(self._ask_again())

    async def _ask_again(self) -> None:
        try:
            while self._suspected:
                self._suspected = False
                try:
                    await self.renew()
                except ConnectionError:
                    pass  # who needs a node finds out, and suspects again
                await asyncio.sleep(_PAUSE_SECONDS)
        finally:
            self._asking = None

    async def _renew(self) -> None:
        best, failures = NOTHING, []
        for address in self._to_ask():
            rows = await self._ask(address)
            if isinstance(rows, str):
                failures.append(f"{address[0]}:{address[1]}: {rows}")
                continue
            best = max(best, parse(rows, address, self.known), key=lambda layout: layout.covered)
            if best.covered == SLOTS:
                break
        if best is NOTHING:
            raise ConnectionError(f"no node of the Cluster tells where its slots are: {'; '.join(failures)}")
        self._troubled.clear()
        self._importing.clear()
        gone = self.known.names.keys() - best.names.keys()
        self.known, self._asked_at = best, asyncio.get_running_loop().time()
        for address in gone:  # what waits for a primary that was replaced waits in vain
            pool: Any = self.node(address).connection_pool
            pool.drop()

    def _to_ask(self) -> list[Address]:
        """In random order, because one that lives on an island must not be believed for ever."""
        hint, self._hint = [self._hint] if self._hint else [], None
        primaries, replicas = list(self.known.names), list(self.known.replicas)
        random.shuffle(primaries)
        random.shuffle(replicas)
        primaries.sort(key=self._troubled.__contains__)
        return list(dict.fromkeys([*hint, *primaries, *replicas, *self._seeds]))

    async def _ask(self, address: Address) -> Any:
        """The reply to CLUSTER SLOTS, or a text that says why there is none. On a connection of its own."""
        connection: Any = self.node(address).connection_pool.make_connection()  # type: ignore[no-untyped-call]
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                await connection.connect()
                await connection.send_command("CLUSTER", "SLOTS")
                return await connection.read_response() or "it is not part of a Cluster yet"
        except (RedisError, OSError, builtins.TimeoutError) as error:
            return str(error) or "no answer"
        finally:
            connection.abort()
            await connection.disconnect(nowait=True)

    # -- commands --------------------------------------------------------------------------------------------

    async def execute_command(self, *args: Any, **options: Any) -> Any:
        layout = await self.layout()
        if args[0] == "SCRIPT LOAD":
            return await self._everywhere(args, options)
        slot = slot_of(args)
        if slot is None:
            return await self._anywhere(args, options)
        try:
            address = layout.owner(slot)
            return await self._execute(address, args, options)
        except AskError as error:
            [answer] = await self._redirected([(args, options)], address, error)
        except ClusterDownError:
            self.suspect()
            raise
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def _execute(self, address: Address, args: Any, options: Any) -> Any:
        node: Any = self.node(address)
        return await node.execute_command(*args, **options)

    async def _anywhere(self, args: Any, options: Any) -> Any:
        """It must be harmless to send twice."""
        failure: RedisError | None = None
        for address in self.known.names:
            try:
                return await self._execute(address, args, options)
            except (ConnectionError, TimeoutError, BusyLoadingError) as error:
                failure = error
        assert failure is not None
        raise failure

    async def _everywhere(self, args: Any, options: Any) -> Any:
        """Scripts are not replicated. A node that does not answer is not waited for."""
        addresses = {*self.known.names, *self._importing}
        tasks = [asyncio.create_task(self._execute(address, args, options)) for address in addresses]
        try:
            done, _ = await asyncio.wait(tasks, timeout=ANSWER_SECONDS)
        finally:
            for task in tasks:
                task.cancel()
        failures = [task.exception() for task in done]
        for task, failure in zip(done, failures, strict=True):
            if failure is None:
                return task.result()
        raise next(filter(None, failures), TimeoutError("no node answers"))

    async def _redirected(self, commands: Sequence[Command], asked: Address, error: AskError) -> list[Any]:
        """Sends again what was refused with MOVED or ASK, and so was not executed: answers, or exceptions."""
        address = asked
        for _ in range(REDIRECTIONS):
            address = (error.host or address[0], error.port)
            asking = not isinstance(error, MovedError)
            if asking:
                self._importing.add(address)
            else:
                self.suspect(address)
            with_asking = [(("ASKING",), {}) if even else command for command in commands for even in (True, False)]
            answers = await self._send(address, with_asking if asking else commands)
            if asking:
                answers = answers[1::2]
            if not isinstance(answers[0], AskError):
                return answers
            error = answers[0]
        return [_try_again("the slot is on its way from node to node")] * len(commands)

    async def _send(self, address: Address, commands: Sequence[Command]) -> list[Any]:
        """To one node: answers, or exceptions."""
        pipe = self.node(address).pipeline(transaction=False)
        for args, options in commands:
            pipe.execute_command(*args, **options)
        try:
            return await pipe.execute(raise_on_error=False)
        except RedisError as error:
            return [error] * len(commands)

    # -- pipelines -------------------------------------------------------------------------------------------

    def pipeline(self, transaction: bool = True, shard_hint: str | None = None) -> Pipeline:
        if transaction:
            raise RedisError("there are no transactions over a Cluster")
        return _Pipeline(self)

    async def send_all(self, commands: Sequence[Command]) -> list[Any]:
        """To the nodes that they need, one pipeline for each, at the same time: answers, or exceptions."""
        layout = await self.layout()
        found: list[Any] = [None] * len(commands)
        units: dict[Address, list[Unit]] = {}
        for slot, unit in _units(commands):
            try:
                units.setdefault(layout.owner(slot), []).append(unit)
            except ClusterDownError as error:
                for place in unit:
                    found[place] = error

        async def send(address: Address, mine: list[Unit]) -> None:
            places = [place for unit in mine for place in unit]
            answers = await self._send(address, [commands[place] for place in places])
            for place, answer in zip(places, answers, strict=True):
                found[place] = answer
            moved = [unit for unit in mine if any(isinstance(found[place], AskError) for place in unit)]
            await asyncio.gather(*(self._follow(address, unit, commands, found) for unit in moved))

        await asyncio.gather(*(send(address, mine) for address, mine in units.items()))
        if any(isinstance(answer, ClusterDownError) for answer in found):
            self.suspect()
        return found

    async def _follow(self, asked: Address, unit: Unit, commands: Sequence[Command], found: list[Any]) -> None:
        """Replaces the answers of a unit that was redirected, or a part of which was."""
        first = found[unit[0]]
        if isinstance(first, AskError):
            answers = await self._redirected([commands[place] for place in unit], asked, first)
            for place, answer in zip(unit, answers, strict=True):
                found[place] = answer
            return
        for place in unit:
            if isinstance(found[place], AskError):
                [found[place]] = await self._redirected([commands[place]], asked, found[place])
            elif slot_of(commands[place][0]) is None:
                # WAIT and TIME speak of the node that has executed the commands before them.
                found[place] = _try_again("the slot has moved in the middle of a pipeline")


class _Pipeline(Pipeline):
    """Commands for any slots. One without a key goes where the one before it goes."""

    def __init__(self, cluster: Cluster) -> None:
        super().__init__(cluster.connection_pool, cluster.response_callbacks, False, None)
        self._cluster = cluster

    async def execute(self, raise_on_error: bool = True) -> list[Any]:
        """Without `raise_on_error` a node that is away fails only the commands that it was to execute."""
        stack, self.command_stack = self.command_stack, []
        answers = await self._cluster.send_all(stack)
        if raise_on_error:
            self.raise_first_error(stack, answers)
            for answer in answers:
                if isinstance(answer, Exception):
                    raise answer
        return answers


def _try_again(why: str) -> TryAgainError:
    return TryAgainError(why)  # type: ignore[no-untyped-call]


def _units(commands: Sequence[Command]) -> list[tuple[int, Unit]]:
    """With the slot of each."""
    units: list[tuple[int, Unit]] = []
    for place, (args, _) in enumerate(commands):
        slot = slot_of(args)
        if units and slot in (None, units[-1][0]):
            units[-1][1].append(place)
        elif slot is None:
            raise RedisError(f"{args[0]} has no key and nothing before it that has one")
        else:
            units.append((slot, [place]))
    return units
