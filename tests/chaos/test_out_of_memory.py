"""Memory that is full is an outage that somebody has to end: nothing is lost by it, and it is called by its name."""

from __future__ import annotations

import asyncio
import random
import time
from functools import partial
from typing import Any

import httpx
import pytest

from tests.conftest import Launcher
from tests.kit.http import token
from tests.kit.load import Load, Plan
from tests.kit.processes import Process, wait_for
from tests.kit.waiting import until

LEASE = 2.0
SETTINGS: dict[str, Any] = {"heartbeat_seconds": 1, "lease_seconds": LEASE, "grace_seconds": 1}
CHATTING = Plan(runs=8, readers=2, count=80, pause=0.05, spread=0.5, late=0, silence=60, limit=60)
BULKY = Plan(name="bulky-", runs=2, readers=1, agents=("bulky",), count=60, pause=0.05, spread=0.5, torn=0, slow=0)
FULL = "Redis is out of memory (maxmemory)"
EVICTS = "Redis is to delete keys when its memory is full"


def says(process: Process, words: str) -> bool:
    return any(line["message"].startswith(words) and line["level"] == "ERROR" for line in process.log_lines())


async def test_when_memory_is_full_under_load_nothing_is_lost(launch: Launcher) -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    server = launch.redis()
    gateway = launch.gateway(server.url, **SETTINGS)
    workers = [launch.worker(server.url, **SETTINGS) for _ in range(2)]
    headers = {"Authorization": f"Bearer {token('alice')}"}
    loads = [Load([gateway.url], server.url, plan, chance=chance, folder=launch.folder) for plan in (CHATTING, BULKY)]
    async with httpx.AsyncClient(base_url=gateway.url, headers=headers, timeout=30) as client:
        done = await finished(client, "an old run")
        other = await started(client, "hangs", "one to be cancelled")
        async with loads[0], loads[1]:
            async with asyncio.timeout(20):
                while sum(len(load.runs) for load in loads) < CHATTING.runs + BULKY.runs:
                    await asyncio.sleep(0.02)
            server.ask("CONFIG", "SET", "maxmemory", server.info("memory")["used_memory"] + 2**20)
            began = time.monotonic()
            for worker in workers:
                await until(partial(says, worker, FULL))
            # A large append is refused, and small ones of others are not: for longer than a lease.
            await asyncio.sleep(max(began + 2 * LEASE - time.monotonic(), 0))
            server.fill_memory()

            submit = await client.post("/api/v1/query", json={"query": "one more"})
            cancel = await client.post(f"/api/v1/runs/{other}/cancel")
            for refused in (submit, cancel):
                assert (refused.status_code, refused.json()["code"]) == (503, "unavailable")
                assert "out of memory" in refused.json()["detail"]
            await until(partial(says, gateway, FULL))
            assert (await client.get(f"/api/v1/runs/{other}")).json()["status"] == "running"
            assert (await client.get("/readyz")).status_code == 200, "what is there can be read"

            assert (await client.delete(f"/api/v1/runs/{done}")).status_code == 204, "PROTOCOL 5.4"
            assert (await client.get(f"/api/v1/runs/{done}")).status_code == 404

            await asyncio.sleep(max(began + 3 * LEASE - time.monotonic(), 0))
            frames = sum(len(r.frames) for load in loads for r in load.history.readings.values())
            server.free_memory()
            freed = time.monotonic()
            async with asyncio.timeout(20):
                while sum(len(r.frames) for load in loads for r in load.history.readings.values()) == frames:
                    await asyncio.sleep(0.01)
            print(f"full for {freed - began:.1f} s; the first event {time.monotonic() - freed:.2f} s after it")
            assert (await client.post(f"/api/v1/runs/{other}/cancel")).json()["status"] == "cancelled"
            evidence = [await load.finish() for load in loads]
    for one in evidence:
        print(one)
        assert not one.violations()
        assert {run["status"] for run in one.polls.values() if run} == {"completed"}
        assert one.rewinds == 0, "whoever could not renew a lease is not dead (PROTOCOL 4.7)"
    for process in (gateway, *workers):
        [error] = [line["message"] for line in process.log_lines() if line["level"] == "ERROR"]
        assert error.startswith(FULL)
    waiting = [line for worker in workers for line in worker.logged("append failed, trying again")]
    assert {line["reason"] for line in waiting} == {"Redis is out of memory"}


async def started(client: httpx.AsyncClient, agent: str, query: str) -> str:
    request_id: str = (await client.post("/api/v1/query", json={"query": query, "agent": agent})).json()["request_id"]
    async with asyncio.timeout(20):
        while (await client.get(f"/api/v1/runs/{request_id}")).json()["status"] == "queued":
            await asyncio.sleep(0.02)
    return request_id


async def finished(client: httpx.AsyncClient, query: str) -> str:
    request_id = await started(client, "echo", query)
    reply = await client.get(f"/api/v1/runs/{request_id}", params={"wait": 20})
    assert reply.json()["status"] == "completed"
    return request_id


@pytest.mark.parametrize("policy", ["allkeys-lru", "volatile-ttl", "noeviction"])
def test_a_server_that_would_delete_runs_is_named_at_the_start(launch: Launcher, policy: str) -> None:
    server = launch.redis("--maxmemory", "100mb", "--maxmemory-policy", policy)
    gateway, worker = launch.gateway(server.url), launch.worker(server.url)
    if policy == "noeviction":
        # Both have looked when the worker has noted the primary, or the gateway has: it is the first thing they do.
        wait_for(lambda: bool(server.ask("EXISTS", "sb:server")))
        assert not says(gateway, EVICTS) and not says(worker, EVICTS)
        return
    for process in (gateway, worker):
        wait_for(partial(says, process, EVICTS))
        [line] = [line for line in process.log_lines() if line["level"] == "ERROR"]
        assert policy in line["message"] and line["message"].endswith("Set maxmemory-policy to noeviction.")
