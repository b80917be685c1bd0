"""What a worker does when it is itself that fails."""

from __future__ import annotations

import json

from redis.asyncio import Redis

from broker.runs import log
from broker.runs.scripts import Scripts
from broker.settings import Settings
from tests.kit.checker import check_log
from tests.kit.redis_server import RedisServer
from tests.kit.runs import running
from worker.parts import make_parts
from worker.runner import Runner


async def test_an_accepted_run_ends_although_its_worker_fails(redis: Redis, redis_server: RedisServer) -> None:
    lease = await running(Scripts(redis))
    parts = make_parts(Settings(redis_url=redis_server.url))
    await Runner(parts, {})._fail(lease)
    await parts.close()
    entries = await log.read_all(redis, lease.request_id)
    check_log(entries)
    assert (entries[-1].type, json.loads(entries[-1].data)["code"]) == ("error", "internal")
