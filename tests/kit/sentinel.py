"""A primary, its replicas, and the Sentinels that watch them: real processes, quick to fail over."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import redis

from tests.kit.redis_server import RedisServer, free_port, redis_binary
from tests.kit.tls import Certificates, TlsServer

QUICK = {
    "info-period": 300,
    "ping-period": 200,
    "ask-period": 200,
    "publish-period": 200,
    "slave-reconf-timeout": 1000,
    "min-link-reconnect-period": 200,
    # On a busy machine a Sentinel sees its own clock jump, and would do nothing for half a minute.
    "tilt-trigger": 60_000,
    "tilt-period": 500,
}
"""Milliseconds, of SENTINEL DEBUG (Redis 7): without them a server that comes back is a primary for ten seconds."""


class Sentinel:
    """One redis-sentinel; it keeps its port and its configuration from one `start` to the next."""

    def __init__(self, folder: Path, config: str, certificates: Certificates | None, password: str | None) -> None:
        self.port = free_port()
        self._password = password
        self._certificates = certificates
        self._folder = folder / f"sentinel-{self.port}"
        self._folder.mkdir()
        listen = [f"port {self.port}"]
        if certificates:
            pairs = zip(certificates.server[::2], certificates.server[1::2], strict=True)
            listen = ["port 0", f"tls-port {self.port}", "tls-replication yes"]
            listen += [f"{option.removeprefix('--')} {value}" for option, value in pairs]
        if password:
            listen += [f"requirepass {password}", f"sentinel sentinel-pass {password}"]
        self._config = self._folder / "sentinel.conf"
        self._config.write_text("\n".join([*listen, "bind 127.0.0.1", f"dir {self._folder}", config]) + "\n")
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with (self._folder / "log").open("ab") as log:
            command = [redis_binary(), str(self._config), "--sentinel"]
            self._process = subprocess.Popen(command, stdout=log, stderr=log)

    def client(self) -> redis.Redis:
        secure: dict[str, Any] = {}
        if self._certificates:
            secure = {"ssl": True, "ssl_ca_certs": str(self._certificates.ca), "ssl_check_hostname": True}
        return redis.Redis("127.0.0.1", self.port, password=self._password, socket_timeout=2, **secure)

    def ask(self, *command: str | int) -> Any:
        with self.client() as client:
            return client.execute_command(*command)

    def master(self, name: str) -> dict[str, Any]:
        """What it knows of a primary."""
        with self.client() as client:
            known: dict[str, Any] = client.sentinel_master(name)
            return known

    def pause(self) -> None:
        """SIGSTOP: it accepts connections, and answers nothing."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()


class Sentinels:
    """An async context manager: ready when all know each other and the replicas have their data."""

    name = "main"

    def __init__(
        self,
        folder: Path,
        *,
        replicas: int = 1,
        down_after_ms: int = 1000,
        certificates: Certificates | None = None,
        password: str | None = None,
        sentinel_password: str | None = None,
    ) -> None:
        self._folder = folder
        self._password = password
        self._certificates = certificates
        self._sentinel_password = sentinel_password
        self._down_after_ms = down_after_ms
        self.servers = [self._server(n) for n in range(1 + replicas)]
        self.sentinels: list[Sentinel] = []

    def _server(self, number: int) -> RedisServer:
        folder = self._folder / f"server-{number}"
        folder.mkdir(parents=True)
        options: list[str] = []
        if self._password:
            options += ["--requirepass", self._password, "--masterauth", self._password]
        if self._certificates:
            server: RedisServer = TlsServer(folder, self._certificates, "--tls-replication", "yes", *options)
        else:
            server = RedisServer(folder, *options)
        if self._password:
            server.url = server.url.replace("://", f"://:{self._password}@")
        return server

    @property
    def url(self) -> str:
        nodes = ",".join(f"127.0.0.1:{sentinel.port}" for sentinel in self.sentinels)
        login = f":{self._password}@" if self._password else ""
        options = [self._certificates.query] if self._certificates else []
        if self._sentinel_password:
            options.append(f"sentinel_password={self._sentinel_password}")
        query = "?" + "&".join(options) if options else ""
        return f"redis{'s' if self._certificates else ''}+sentinel://{login}{nodes}/{self.name}{query}"

    # -- life ------------------------------------------------------------------------------------------------

    async def __aenter__(self) -> Sentinels:
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

    async def _start(self) -> None:
        for server in self.servers:
            await asyncio.to_thread(server.start)
        primary, *replicas = self.servers
        for replica in replicas:
            replica.ask("REPLICAOF", "127.0.0.1", primary.port)  # not for ever: a restart asks the Sentinels
        await self._until(lambda: all(replica.synchronised for replica in replicas))
        auth = [f"sentinel auth-pass {self.name} {self._password}"] if self._password else []
        config = [
            f"sentinel monitor {self.name} 127.0.0.1 {primary.port} 2",
            f"sentinel down-after-milliseconds {self.name} {self._down_after_ms}",
            f"sentinel failover-timeout {self.name} 2000",
            *auth,
        ]
        for _ in range(3):
            sentinel = Sentinel(self._folder, "\n".join(config), self._certificates, self._sentinel_password)
            self.sentinels.append(sentinel)
            await self.start_sentinel(sentinel)
        await self._until(self._know_each_other)

    def _know_each_other(self) -> bool:
        masters = [sentinel.master(self.name) for sentinel in self.sentinels]
        return all(
            (known["num-other-sentinels"], known["num-slaves"]) == (len(masters) - 1, len(self.servers) - 1)
            for known in masters
        )

    async def start_sentinel(self, sentinel: Sentinel) -> None:
        sentinel.start()
        await self._until(lambda: bool(sentinel.ask("PING")))
        sentinel.ask("SENTINEL", "DEBUG", *[part for pair in QUICK.items() for part in pair])

    def close(self) -> None:
        for each in self.sentinels:
            each.kill()
        for server in self.servers:
            server.close()

    # -- what happens to them --------------------------------------------------------------------------------

    @property
    def primary(self) -> RedisServer:
        """By what the Sentinels say."""
        for sentinel in self.sentinels:
            with contextlib.suppress(redis.RedisError):
                _, port = sentinel.ask("SENTINEL", "GET-MASTER-ADDR-BY-NAME", self.name)
                return next(server for server in self.servers if server.port == int(port))
        raise AssertionError("no Sentinel answers")

    async def kill_primary(self) -> RedisServer:
        """SIGKILL. Returns the dead server."""
        old = self.primary
        await asyncio.to_thread(old.kill)
        return old

    async def until_failed_over(self, old: RedisServer, seconds: float = 30) -> RedisServer:
        """The new primary, once it takes writes."""
        await self._until(lambda: self.primary is not old and self.primary.ask("ROLE")[0] == b"master", seconds)
        return self.primary

    async def part(self) -> None:
        """The replicas do not hear any more what is written; it takes a password."""
        primary = await asyncio.to_thread(lambda: self.primary)
        for server in self.servers:
            if server is not primary:
                await asyncio.to_thread(server.part, primary)

    async def start_again(self, server: RedisServer, seconds: float = 30) -> None:
        """A dead server comes back, as the primary that it was, and is made a replica. Returns when it has the data."""
        await asyncio.to_thread(server.start)
        await self.until_replicated(seconds)

    async def until_replicated(self, seconds: float = 30) -> None:
        """Until all servers but the primary are its replicas and have all that it has."""

        def replicated() -> bool:
            primary = self.primary
            replicas = [server for server in self.servers if server is not primary]
            return all(replica.synchronised and replica.offset >= primary.offset for replica in replicas)

        await self._until(replicated, seconds)

    async def _until(self, condition: Callable[[], bool], seconds: float = 30) -> None:
        deadline = asyncio.get_running_loop().time() + seconds
        while True:
            with contextlib.suppress(redis.RedisError):
                if await asyncio.to_thread(condition):
                    return
            assert asyncio.get_running_loop().time() < deadline, f"waited {seconds} s in vain"
            await asyncio.sleep(0.05)
