"""The machine: which cores do what, how busy others keep them, and what it is."""

from __future__ import annotations

import contextlib
import os
import platform
import re
import resource
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version

from tests.kit.redis_server import redis_binary

_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, kw_only=True)
class Cores:
    """The server has a core to itself where there are two; clients, publisher, worker and Redis share the others."""

    server: frozenset[int]
    others: frozenset[int]

    def __str__(self) -> str:
        if self.server == self.others:
            return "one core for everything: the figures say little about the gateway"
        others = ", ".join(map(str, sorted(self.others)))
        return f"gateway on core {min(self.server)}; load, publisher, worker and Redis on {others}"


def cores() -> Cores:
    allowed = sorted(os.sched_getaffinity(0))
    server = frozenset(allowed[-1:])
    return Cores(server=server, others=frozenset(allowed) - server or server)


@contextlib.contextmanager
def pinned(to: frozenset[int]) -> Iterator[None]:
    """What is started inside runs on these cores only."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, to)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def raise_open_files() -> int:
    """As many connections as this process and its children may have."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


def busy_seconds(of: frozenset[int]) -> float:
    """CPU time that anybody has spent on these cores, since the machine's start."""
    spent = 0.0
    with open("/proc/stat", encoding="ascii") as file:
        for line in file:
            name, *fields = line.split()
            if name.startswith("cpu") and name[3:].isdecimal() and int(name[3:]) in of:
                user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, fields[:8])
                spent += (user + nice + system + irq + softirq + steal) / _TICKS
    return spent


def cpu_seconds(pid: int) -> float:
    """CPU time of a process."""
    with open(f"/proc/{pid}/stat", encoding="utf-8") as file:
        fields = file.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


def rss_kib(pid: int) -> int:
    with open(f"/proc/{pid}/status", encoding="utf-8") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmRSS"))


def wait_until_quiet(patience: float) -> None:
    """Until others leave the cores alone for two seconds, or for `patience` seconds."""
    everything = frozenset(os.sched_getaffinity(0))
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        began, before = time.monotonic(), busy_seconds(everything)
        time.sleep(2)
        if (busy_seconds(everything) - before) / (time.monotonic() - began) < 0.1:
            return


@dataclass(frozen=True, kw_only=True)
class Machine:
    cpu: str
    core_count: int
    kernel: str
    versions: str

    @classmethod
    def this(cls) -> Machine:
        names = ("stream-broker", "uvicorn", "uvloop", "starlette", "sse-starlette", "redis", "hiredis", "arq")
        versions = [f"Python {platform.python_version()}", _redis_version()]
        versions += [f"{name} {version(name)}" for name in names]
        return cls(
            cpu=_cpu_model(),
            core_count=os.cpu_count() or 1,
            kernel=f"{platform.system()} {platform.release()}",
            versions=", ".join(versions),
        )


def _redis_version() -> str:
    output = subprocess.run([redis_binary(), "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"v=(\S+)", output)
    return f"redis-server {found[1] if found else output.strip()}"


def _cpu_model() -> str:
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        for line in file:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()
