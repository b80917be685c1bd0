"""`broker serve` and `broker worker` as the processes that users run."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import httpx

from tests.kit.redis_server import free_port

SECRET = "a secret of the tests, at least thirty-two bytes long"


def environment(redis_url: str, **settings: object) -> dict[str, str]:
    """The settings of a service under test; keywords are BROKER_… names in lower case."""
    own = {
        "redis_url": redis_url,
        "auth": "jwt",
        "jwt_secret": SECRET,
        "agents": ",".join(f"{name}=tests.kit.agents:{name}" for name in AGENTS),
        "default_agent": "echo",
        "drain_delay_seconds": 0.2,
        "grace_seconds": 2,
    }
    clean = {name: value for name, value in os.environ.items() if not name.startswith("BROKER_")}
    values = {**own, **settings}
    return clean | {f"BROKER_{name.upper()}": str(value) for name, value in values.items() if value is not None}


AGENTS = (
    "echo",
    "slow",
    "tokens",
    "raises",
    "hangs",
    "stubborn",
    "yields_junk",
    "no_final",
    "speaks",
    "burst",
    "sleeper",
    "varied",
    "quiet",
    "about",
    "together",
    "recalls",
    "misbehaves",
    "coroutine",
    "checkpoints",
    "steps",
    "kills",
    "chatter",
    "stepper",
    "bulky",
    "clock",
    "plays",
    "blocks",
    "computes",
    "dies",
    "counts",
    "clutters",
    "where",
    "babbles",
    "marks",
)


class Process:
    """A process of ours, its log in a file. `prefix` is a command that runs it elsewhere (netns.Namespace)."""

    module = "broker"

    def __init__(self, command: list[str], env: dict[str, str], log: Path, prefix: Sequence[str] = ()) -> None:
        self.log_path = log
        with log.open("ab") as file:
            self.popen = subprocess.Popen(
                [*prefix, sys.executable, "-m", self.module, *command], env=env, stdout=file, stderr=file
            )

    @property
    def pid(self) -> int:
        return self.popen.pid

    def signal(self, number: signal.Signals) -> None:
        self.popen.send_signal(number)

    def wait(self, seconds: float = 15) -> int:
        return self.popen.wait(seconds)

    def stop(self, seconds: float = 15) -> int:
        """SIGTERM; returns the exit code."""
        self.signal(signal.SIGTERM)
        return self.wait(seconds)

    def ask(self) -> None:
        """SIGTERM, also to a process that was paused or has ended."""
        for number in (signal.SIGTERM, signal.SIGCONT):
            self.signal(number)

    def kill(self, *, after: float = 0) -> None:
        """`after` seconds, unless it ends by itself."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.popen.wait(after)
        with contextlib.suppress(ProcessLookupError):
            self.signal(signal.SIGCONT)
            self.popen.kill()
        self.popen.wait()

    def log_text(self) -> str:
        return self.log_path.read_text("utf-8")

    def log_lines(self) -> list[dict[str, Any]]:
        """The structured lines; whatever is not JSON is an error of ours."""
        return [json.loads(line) for line in self.log_text().splitlines() if line]

    def logged(self, message: str, **fields: object) -> list[dict[str, Any]]:
        return [
            line
            for line in self.log_lines()
            if line["message"] == message and all(line.get(name) == value for name, value in fields.items())
        ]


class Gateway(Process):
    def __init__(self, env: dict[str, str], folder: Path, port: int | None = None, prefix: Sequence[str] = ()) -> None:
        self.port = port or free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        super().__init__(["serve", "--port", str(self.port)], env, folder / f"gateway-{self.port}.log", prefix)

    def until_ready(self, path: str = "/readyz") -> Gateway:
        def ready() -> bool:
            assert self.popen.poll() is None, self.log_text()
            try:
                return httpx.get(self.url + path, verify=False).status_code == 200
            except httpx.TransportError:
                return False

        wait_for(ready, seconds=20)
        return self


class PlainGateway(Gateway):
    """A gateway under a server that does not offer its connections, so that streams go through ASGI's `send`."""

    module = "tests.kit.plain_gateway"


class Worker(Process):
    """`module` may be another than `broker`: one of the kit, which changes something first."""

    def __init__(self, env: dict[str, str], folder: Path, prefix: Sequence[str] = ()) -> None:
        super().__init__(["worker"], env, folder / f"worker-{time.monotonic_ns()}.log", prefix)

    def until_ready(self) -> Worker:
        def ready() -> bool:
            assert self.popen.poll() is None, self.log_text()
            return bool(self.logged("worker started"))

        wait_for(ready, seconds=60)  # imports of agents' libraries, on a machine that has other work
        return self


def wait_for(condition: Callable[[], bool], *, seconds: float = 10, every: float = 0.02) -> None:
    """Until `condition()` holds; fails the test after `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds} s in vain"
        time.sleep(every)
