"""A Redis Cluster of real processes: primaries that can be killed, slots that can be moved, step by step."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import redis
from redis.crc import key_slot

from tests.kit.redis_server import RedisServer
from tests.kit.tls import Certificates, TlsServer

SLOTS = 16384
_BUS = 10_000
"""What the port of the cluster's bus is above the node's own."""


def slot_of(key: str) -> int:
    slot: int = key_slot(key.encode())
    return slot


class Known(NamedTuple):
    """A node as another one knows it."""

    node_id: str
    port: int
    flags: frozenset[str]
    primary_id: str


class Cluster:
    """An async context manager: ready when every slot has a primary and every replica has its data.

    For a fixture that outlives a test's event loop there are `start` and `close`.
    """

    def __init__(
        self,
        folder: Path,
        *options: str,
        shards: int = 3,
        replicas: int = 1,
        spares: int = 0,
        node_timeout_ms: int = 1000,
        binary: str | None = None,
        certificates: Certificates | None = None,
        password: str | None = None,
    ) -> None:
        """`replicas` of each shard; `spares` are primaries without a slot."""
        self._folder = folder
        self._shards = shards
        self._replicas = replicas
        self._binary = binary
        self._certificates = certificates
        self._password = password
        self._options = ["--cluster-enabled", "yes", "--cluster-node-timeout", str(node_timeout_ms)]
        self._options += ["--cluster-replica-validity-factor", "0", *options]
        if password:
            self._options += ["--requirepass", password, "--masterauth", password]
        self.servers = [self._server() for _ in range(shards * (1 + replicas) + spares)]
        """At the start: the primaries, their replicas, the spares."""
        self._ids: dict[RedisServer, str] = {}
        self._paused: set[RedisServer] = set()

    def _server(self) -> RedisServer:
        while True:
            folder = self._folder / f"node-{len(list(self._folder.glob('node-*')))}"
            folder.mkdir(parents=True)
            if self._certificates:
                tls = ("--tls-cluster", "yes", "--tls-replication", "yes")
                server: RedisServer = TlsServer(folder, self._certificates, *tls, *self._options)
            else:
                server = RedisServer(folder, *self._options, binary=self._binary)
            if _free(server.port + _BUS):
                break
        if self._password:
            server.url = server.url.replace("://", f"://:{self._password}@")
        return server

    @property
    def url(self) -> str:
        first = urlsplit(self.servers[0].url)
        login, at, _ = first.netloc.rpartition("@")
        nodes = ",".join(f"127.0.0.1:{server.port}" for server in self.servers[: self._shards])
        return f"{first.scheme}+cluster://{login}{at}{nodes}{'?' if first.query else ''}{first.query}"

    # -- life ------------------------------------------------------------------------------------------------

    async def __aenter__(self) -> Cluster:
        try:
            await self._start()
        except BaseException:
            self.close()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def start(self) -> Cluster:
        """Outside of an event loop."""
        try:
            asyncio.run(self._start())
        except BaseException:
            self.close()
            raise
        return self

    def close(self) -> None:
        for server in self.servers:
            server.close()

    async def _start(self) -> None:
        await asyncio.gather(*(asyncio.to_thread(server.start) for server in self.servers))
        for number, server in enumerate(self.servers):
            self._ids[server] = server.ask("CLUSTER", "MYID").decode()
            server.ask("CLUSTER", "SET-CONFIG-EPOCH", number + 1)
            self.servers[0].ask("CLUSTER", "MEET", "127.0.0.1", server.port)
        primaries = self.servers[: self._shards]
        replicas = self.servers[self._shards : self._shards * (1 + self._replicas)]
        for number, server in enumerate(primaries):
            first, end = SLOTS * number // self._shards, SLOTS * (number + 1) // self._shards
            server.ask("CLUSTER", "ADDSLOTS", *range(first, end))
        await self._until(lambda: all(len(_nodes(server)) == len(self.servers) for server in self.servers))
        for number, server in enumerate(replicas):
            server.ask("CLUSTER", "REPLICATE", self._ids[primaries[number % self._shards]])
        await self.until_whole()

    # -- what it looks like ----------------------------------------------------------------------------------

    def owner(self, slot: int) -> RedisServer:
        """The primary that has the slot, by what most of the primaries say."""
        votes: list[int] = []
        for server in self.primaries:
            with contextlib.suppress(redis.RedisError):
                for first, last, primary, *_ in server.ask("CLUSTER", "SLOTS"):
                    if _int(first) <= slot <= _int(last):
                        votes.append(_int(primary[1]))
        assert votes, f"nobody has the slot {slot}"
        return self._by_port(max(votes, key=votes.count))

    def owner_of(self, key: str) -> RedisServer:
        return self.owner(slot_of(key))

    @property
    def primaries(self) -> list[RedisServer]:
        """The living ones, by their own account: one that has just come back may not know better."""
        return [server for server in self.living() if _role(server) == b"master"]

    def living(self) -> list[RedisServer]:
        """Nodes that run, and are not stopped."""
        return [server for server in self.servers if server.process.poll() is None and server not in self._paused]

    def _by_port(self, port: int) -> RedisServer:
        return next(server for server in self.servers if server.port == port)

    def _whole(self) -> bool:
        """Every living node says that the cluster is fine, and knows of the others what they are."""
        living = self.living()
        roles = {self._ids[server]: server.ask("ROLE")[0] for server in living}
        for server in living:
            if b"cluster_state:ok" not in server.ask("CLUSTER", "INFO"):
                return False
            if roles[self._ids[server]] == b"slave" and not server.synchronised:
                return False
            for known in _nodes(server):
                role = roles.get(known.node_id)
                if role is not None and ("slave" in known.flags) != (role == b"slave"):
                    return False
                if role is not None and known.flags & {"fail", "fail?", "handshake"}:
                    return False
        return True

    async def until_whole(self, seconds: float = 40) -> None:
        await self._until(self._whole, seconds)

    async def until_replicated(self, seconds: float = 40) -> None:
        """Until every replica has what its primary has."""

        def replicated() -> bool:
            offsets = {self._ids[server]: server.offset for server in self.primaries}
            for server in self.living():
                if self._ids[server] not in offsets:
                    primary = next(node.primary_id for node in _nodes(server) if "myself" in node.flags)
                    if primary in offsets and server.offset < offsets[primary]:
                        return False
            return True

        await self._until(replicated, seconds)

    # -- what happens to it ----------------------------------------------------------------------------------

    async def part(self, primary: RedisServer) -> None:
        """Its replicas do not hear any more what is written; it takes a password. See RedisServer.part."""
        for server in await asyncio.to_thread(self._replicas_of, primary):
            await asyncio.to_thread(server.part, primary)

    def _replicas_of(self, primary: RedisServer) -> list[RedisServer]:
        own = self._ids[primary]
        return [
            server
            for server in self.living()
            if any("myself" in node.flags and node.primary_id == own for node in _nodes(server))
        ]

    def others(self, primary: RedisServer) -> list[RedisServer]:
        """Primaries that have slots, by its account."""
        ports = {_int(node[1]) for _, _, node, *_ in primary.ask("CLUSTER", "SLOTS")}
        return [server for server in self.servers if server.port in ports - {primary.port}]

    def slots_of(self, server: RedisServer) -> frozenset[int]:
        """By its own account."""
        rows = server.ask("CLUSTER", "SLOTS")
        own = [range(_int(first), _int(last) + 1) for first, last, node, *_ in rows if _int(node[1]) == server.port]
        return frozenset(slot for slots in own for slot in slots)

    def pause(self, server: RedisServer) -> None:
        """SIGSTOP; it is asked for nothing until `resume`."""
        self._paused.add(server)
        server.pause()

    def resume(self, server: RedisServer) -> None:
        server.resume()
        self._paused.discard(server)

    async def kill_primary(self, slot: int) -> RedisServer:
        """SIGKILL. Returns the dead server."""
        old = await asyncio.to_thread(self.owner, slot)
        await asyncio.to_thread(old.kill)
        return old

    async def until_failed_over(self, slot: int, old: RedisServer, seconds: float = 40) -> RedisServer:
        """The new primary of the slot, once the whole cluster takes it for that."""
        await self._until(lambda: self.owner(slot) is not old and self._whole(), seconds)
        return self.owner(slot)

    async def start_again(self, server: RedisServer, seconds: float = 40) -> None:
        """A dead server comes back. Returns when everybody is at peace with it."""
        await asyncio.to_thread(server.start)
        await self.until_whole(seconds)

    async def replicate(self, replica: RedisServer, primary: RedisServer) -> None:
        """One that has come back is a replica of whoever took its last slot. After moves that may be another shard's
        primary, and then its own has none.
        """
        await asyncio.to_thread(replica.ask, "CLUSTER", "REPLICATE", self._ids[primary])
        await self.until_whole()

    async def fail_over(self, slot: int) -> RedisServer:
        """By hand: the primary lives, hands over without a loss, and is a replica then. Returns it."""
        old = await asyncio.to_thread(self.owner, slot)
        replica, *_ = self._replicas_of(old)
        replica.ask("CLUSTER", "FAILOVER")
        await self.until_failed_over(slot, old)
        return old

    async def move_slot(self, slot: int, target: RedisServer | None = None, *, pause: float = 0.0) -> RedisServer:
        """As `redis-cli --cluster reshard` does it, with a pause between the steps. Returns the new owner."""
        move = await asyncio.to_thread(self.begin_move, slot, target)
        await asyncio.sleep(pause)
        await asyncio.to_thread(move.keys)
        await asyncio.sleep(pause)
        await asyncio.to_thread(move.end)
        return move.target

    def begin_move(self, slot: int, target: RedisServer | None = None) -> Move:
        """The slot is MIGRATING and IMPORTING; the rest is up to the caller."""
        source = self.owner(slot)
        target = target or next(server for server in self.primaries if server is not source)
        return Move(self, slot, source, target)

    async def _until(self, condition: Callable[[], bool], seconds: float = 40) -> None:
        deadline = asyncio.get_running_loop().time() + seconds
        while True:
            with contextlib.suppress(redis.RedisError):
                if await asyncio.to_thread(condition):
                    return
            assert asyncio.get_running_loop().time() < deadline, f"waited {seconds} s in vain"
            await asyncio.sleep(0.05)


class Move:
    """A slot on its way from one primary to another."""

    def __init__(self, cluster: Cluster, slot: int, source: RedisServer, target: RedisServer) -> None:
        self.cluster = cluster
        self.slot = slot
        self.source = source
        self.target = target
        target.ask("CLUSTER", "SETSLOT", slot, "IMPORTING", cluster._ids[source])
        source.ask("CLUSTER", "SETSLOT", slot, "MIGRATING", cluster._ids[target])

    def keys(self, count: int = 1_000_000) -> int:
        """Moves up to `count` keys; meanwhile who asks for them is sent on with ASK. Returns how many."""
        names: list[Any] = self.source.ask("CLUSTER", "GETKEYSINSLOT", self.slot, count)
        password = self.cluster._password
        login = ["AUTH", password] if password else []
        if names:
            self.source.ask("MIGRATE", "127.0.0.1", self.target.port, "", 0, 5000, *login, "KEYS", *names)
        return len(names)

    def end(self) -> None:
        """From now on everybody is sent on with MOVED."""
        while self.keys(100):
            pass
        owner = self.cluster._ids[self.target]
        rest = [server for server in self.cluster.primaries if server not in (self.target, self.source)]
        for server in (self.target, self.source, *rest):
            server.ask("CLUSTER", "SETSLOT", self.slot, "NODE", owner)


def _nodes(server: RedisServer) -> list[Known]:
    found = []
    for line in server.ask("CLUSTER", "NODES").decode().splitlines():
        node_id, address, flags, primary_id, *_ = line.split()
        port = int(address.partition("@")[0].rpartition(":")[2])
        found.append(Known(node_id, port, frozenset(flags.split(",")), primary_id))
    return found


def _role(server: RedisServer) -> bytes:
    """b"" of one that does not answer yet."""
    with contextlib.suppress(redis.RedisError):
        role: bytes = server.ask("ROLE")[0]
        return role
    return b""


def _int(value: Any) -> int:
    return int(value)


def _free(port: int) -> bool:
    if port > 65535:
        return False
    with socket.socket() as sock:
        try:
            sock.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True
