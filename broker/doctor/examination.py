"""All checks of the settings, in order; what depends on what is away is left out, and said so."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from redis.asyncio import Redis
from redis.exceptions import RedisError

from broker.doctor.auth import judge_auth, look_at_auth
from broker.doctor.clock import judge_clocks
from broker.doctor.deployment import Deployment, open_redis, visit
from broker.doctor.finding import Finding, error, note, warning
from broker.doctor.memory import judge_memory
from broker.doctor.persistence import judge_persistence
from broker.doctor.queue import judge_queue, look_at_queue
from broker.doctor.redis import judge_deployment, judge_server
from broker.doctor.replication import judge_cluster, judge_replication, judge_sentinels
from broker.doctor.workers import judge_workers, look_at_workers
from broker.errors import Misconfigured
from broker.settings import Settings


async def examine(settings: Settings) -> list[Finding]:
    """What `settings` name. Never raises for what it finds."""
    found = judge_auth(await look_at_auth(settings))
    if settings.redis_url.startswith("fakeredis:") or settings.queue_url.startswith("fakeredis:"):
        return [*found, _fake()]
    try:
        runs = open_redis(settings.redis_url)
        queue = runs if settings.queue_url == settings.redis_url else open_redis(settings.queue_url)
    except Misconfigured as failure:
        return [*found, error("settings", failure.detail, "Check the URL and the files that it names.")]
    try:
        deployments = await _visit(settings, runs, queue)
        found += [finding for deployment in deployments for finding in judge(deployment, settings)]
        if servers := [server for deployment in deployments for server in deployment.servers]:
            found += judge_clocks(servers)
        if deployments[-1].failure:
            found.append(note("queue", "queue, workers and abandoned runs were not checked: their Redis is away"))
        else:
            found += await _look_at_work(queue, settings)
    finally:
        for redis in dict.fromkeys((runs, queue)):
            await redis.aclose(close_connection_pool=True)
    return found


async def _visit(settings: Settings, runs: Redis, queue: Redis) -> Sequence[Deployment]:
    """The queue's is the last."""
    if queue is runs:
        return [await visit(runs, settings.redis_url, holds_runs=True, holds_queue=True)]
    return await asyncio.gather(
        visit(runs, settings.redis_url, holds_runs=True, holds_queue=False),
        visit(queue, settings.queue_url, holds_runs=False, holds_queue=True),
    )


def judge(deployment: Deployment, settings: Settings) -> list[Finding]:
    found = [*judge_deployment(deployment), *judge_sentinels(deployment), *judge_cluster(deployment)]
    for server in deployment.servers:
        found += judge_server(server)
        found += judge_memory(server)
        found += judge_persistence(server, holds_runs=deployment.holds_runs)
        found += judge_replication(server, deployment, settings.durability)
    return found


async def _look_at_work(redis: Redis, settings: Settings) -> list[Finding]:
    try:
        queue = await look_at_queue(redis, settings.lease_seconds)
        workers = await look_at_workers(redis)
    except (RedisError, OSError) as failure:
        return [
            error("queue", f"queue and workers cannot be read: {failure}", "See what was found of their Redis above.")
        ]
    return [*judge_queue(queue), *judge_workers(workers, waiting=queue.waiting, agents=settings.agent_names)]


def _fake() -> Finding:
    return warning(
        "settings",
        "the Redis is a fake one, inside the process of the demo: nothing of it can be checked from here",
        "Install Redis or Valkey, or set BROKER_REDIS_URL.",
    )
