"""What a stretch of time costs: the CPU of gateway, worker and Redis, and whether others disturbed it."""

from __future__ import annotations

import resource
import time
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import psutil

from tests.bench.machine import busy_seconds, cpu_seconds
from tests.bench.targets import Target


class _Reading(NamedTuple):
    at: float
    server: float
    workers: float
    redis: float
    ours: float
    server_core: float
    other_cores: float
    commands: int


@dataclass(frozen=True, kw_only=True)
class Cost:
    """CPU in seconds."""

    seconds: float
    server: float
    workers: float
    redis: float
    commands: int
    disturbed: float


class Meter:
    """Runs from its making until `stop`."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._began = self._read()

    def stop(self) -> Cost:
        began, ended = self._began, self._read()
        seconds = ended.at - began.at
        server, workers = ended.server - began.server, ended.workers - began.workers
        redis, ours = ended.redis - began.redis, ended.ours - began.ours
        server_core, other_cores = ended.server_core - began.server_core, ended.other_cores - began.other_cores
        if self._target.cores.server == self._target.cores.others:
            foreign = server_core - server - workers - redis - ours
        else:
            foreign = max(server_core - server, other_cores - workers - redis - ours)
        return Cost(
            seconds=seconds,
            server=server,
            workers=workers,
            redis=redis,
            commands=ended.commands - began.commands,
            disturbed=max(foreign / seconds, 0.0),
        )

    def _read(self) -> _Reading:
        target = self._target
        own, children = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
        info = cast("dict[str, Any]", target.client.info("everything"))
        return _Reading(
            at=time.monotonic(),
            server=cpu_seconds(target.pid),
            workers=sum(cpu_seconds(worker.pid) for worker in target.workers),
            redis=info["used_cpu_user"] + info["used_cpu_sys"],
            ours=own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime,
            server_core=busy_seconds(target.cores.server),
            other_cores=busy_seconds(target.cores.others),
            commands=info["total_commands_processed"],
        )


def redis_connections(target: Target) -> int:
    """How many the gateway has open."""
    connections = psutil.Process(target.pid).net_connections("tcp")
    return sum(1 for each in connections if each.raddr and each.raddr[1] == target.redis.port)
