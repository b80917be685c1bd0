"""The workers that are there, by what they say of themselves."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from redis.asyncio import Redis

from broker import __version__
from broker.doctor.finding import Finding, error, note, ok, warning
from broker.runs.workers import WorkerInfo, Workers
from broker.words import count


async def look_at_workers(redis: Redis) -> list[WorkerInfo]:
    """`redis` is the queue's. Raises redis-py's exceptions."""
    return await Workers(redis).alive()


def judge_workers(
    workers: Sequence[WorkerInfo], *, waiting: int, agents: Sequence[str], version: str = __version__
) -> list[Finding]:
    """`waiting` runs are in the queue; `agents` and `version` are this environment's."""
    if not workers:
        advice = "Start one: broker worker. It must have the same BROKER_REDIS_URL and BROKER_QUEUE_REDIS_URL."
        if waiting:
            return [error("workers", "no worker is there, and runs wait", advice)]
        return [warning("workers", "no worker is there: runs would be accepted, and wait", advice)]
    return [_load(workers), *_versions(workers, version), *_agents(workers, agents)]


def _load(workers: Sequence[WorkerInfo]) -> Finding:
    runs, room = sum(worker.runs for worker in workers), sum(worker.max_jobs for worker in workers)
    said = f"{count(len(workers), 'worker')} with {runs} of at most {room} runs"
    if runs >= room:
        return note("workers", said, "They take no more until one ends: start more, or raise BROKER_MAX_JOBS.")
    return ok("workers", said)


def _versions(workers: Sequence[WorkerInfo], ours: str) -> list[Finding]:
    versions = sorted({worker.version for worker in workers} | {ours})
    if len(versions) == 1:
        return []
    there = _grouped(workers, lambda worker: worker.version)
    return [
        warning(
            "worker_versions",
            f"workers differ in their version, or from the {ours} here: {there}",
            "Fine while an update is under way. Else update those that are behind.",
        )
    ]


def _agents(workers: Sequence[WorkerInfo], ours: Sequence[str]) -> list[Finding]:
    sets = {frozenset(worker.agents) for worker in workers}
    if sets == {frozenset(ours)}:
        return []
    missing = sorted({name for agents in sets for name in set(ours) - agents})
    there = _grouped(workers, lambda worker: " ".join(sorted(worker.agents)) or "none")
    consequence = f"; runs of {', '.join(missing)} fail where a worker that lacks it takes them" if missing else ""
    return [
        warning(
            "worker_agents",
            f"workers have other agents than BROKER_AGENTS says here{consequence}: {there}",
            "Give gateways and workers one environment, or run this where theirs is set.",
        )
    ]


def _grouped(workers: Sequence[WorkerInfo], pick: Callable[[WorkerInfo], str]) -> str:
    """ "0.1.0 (host:12, host:13); 0.2.0 (other:7)" """
    groups: dict[str, list[str]] = {}
    for worker in workers:
        groups.setdefault(pick(worker), []).append(f"{worker.host}:{worker.pid}")
    return "; ".join(f"{value} ({', '.join(names)})" for value, names in sorted(groups.items()))
