"""P2, P6, P25 on a Cluster where a shard is away for good: the runs on the others are submitted, claimed, streamed,
cancelled and recovered as ever.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from broker.ids import Owner
from broker.runs import keys
from tests.conftest import Launcher
from tests.kit.checker import check_log, check_poll, surviving_text
from tests.kit.cluster import Cluster
from tests.kit.http import Client
from tests.kit.processes import wait_for
from tests.kit.redis_server import RedisServer
from tests.kit.scale import LONG

SETTINGS: dict[str, Any] = {"lease_seconds": 2, "heartbeat_seconds": 1, "grace_seconds": 1}
STEPS: dict[str, Any] = {"agent": "steps", "parameters": {"count": 100, "every": 10, "pause": 0.1}}


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    """Where slots without a primary do not keep it from serving the others."""
    made = Cluster(tmp_path / "cluster", "--cluster-require-full-coverage", "no", replicas=0)
    try:
        yield made.start()
    finally:
        made.close()


def go_away(cluster: Cluster, server: RedisServer, how: str) -> None:
    if how == "stopped":
        cluster.pause(server)
    else:
        server.kill()


def come_back(cluster: Cluster, server: RedisServer, how: str) -> None:
    if how == "stopped":
        cluster.resume(server)
    else:
        server.start()


@pytest.mark.timeout(300)
@pytest.mark.parametrize("how", ["stopped", "killed"] if LONG else ["stopped"])
def test_a_shard_that_is_away_is_no_matter_to_the_runs_of_the_others(
    launch: Launcher, cluster: Cluster, how: str
) -> None:
    urls = {"queue_redis_url": launch.redis().url, **SETTINGS}
    gateways = [launch.gateway(cluster.url, **urls) for _ in range(2)]
    doomed = launch.worker(cluster.url, **urls)
    lost = cluster.servers[0]
    subject = next(
        name
        for name in (f"user-{n}" for n in itertools.count())
        if cluster.owner_of(keys.runs_of(Owner(name, name))) is not lost
    )
    with Client(gateways[0].url, subject) as one, Client(gateways[1].url, subject) as two:
        runs = [one.submit(f"before {n}", **STEPS) for n in range(16)]
        here = [run for run in runs if cluster.owner_of(keys.run(run)) is not lost]
        wait_for(lambda: all(one.run(run)["status"] == "running" for run in runs), seconds=30)
        launch.worker(cluster.url, **urls)

        go_away(cluster, lost, how)
        began = time.monotonic()
        try:
            cancelled = here.pop()
            reply = two.post(f"/api/v1/runs/{cancelled}/cancel")
            assert (reply.status_code, reply.json()["status"]) == (200, "cancelled")

            doomed.kill()
            wait_for(lambda: all(two.run(run)["attempt"] == 2 for run in here), seconds=60, every=0.2)
            print(f"{how}: {len(here)} runs were recovered within {time.monotonic() - began:.1f} s")

            added = [run for run in submitted(one, 16) if run]
            assert added, "none of sixteen runs could be submitted"
            wait_for(lambda: all(two.run(run)["status"] == "completed" for run in added), seconds=30, every=0.2)
            events = one.events(here[0])
            assert [next(events).type for _ in range(20)]
        finally:
            come_back(cluster, lost, how)
        for run in runs:
            finished(two, run)


def submitted(client: Client, count: int) -> Sequence[str | None]:
    """A submit needs the shards of its run, its key and its session; None where one of them is away."""

    def submit(n: int) -> str | None:
        reply = client.post("/api/v1/query", json={"query": f"meanwhile {n}"})
        assert reply.status_code in (202, 503), reply.text
        return str(reply.json()["request_id"]) if reply.status_code == 202 else None

    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(submit, range(count)))


def finished(client: Client, run: str) -> None:
    def ended() -> bool:
        reply = client.get(f"/api/v1/runs/{run}")
        return reply.status_code == 200 and reply.json()["finished_at"] is not None

    wait_for(ended, seconds=60, every=0.2)
    log = client.log(run)
    check_log(log)
    check_poll(client.run(run), log)
    if client.run(run)["status"] == "completed":
        words = [word.split(":") for word in surviving_text(log).split()]
        assert [int(n) for _, n in words] == list(range(100))
