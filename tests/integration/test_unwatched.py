"""`cancel_if_unwatched` (PROTOCOL 5.6): what is read goes on, and what nobody reads any more is cancelled."""

from __future__ import annotations

import asyncio
import itertools
import json
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import redis as sync_redis

from broker.runs import keys
from tests.conftest import Launcher
from tests.kit.checker import check_log
from tests.kit.eventsource import Stream
from tests.kit.http import Client
from tests.kit.processes import Gateway, wait_for
from tests.kit.redis_server import RedisServer
from tests.kit.watchers import AUTHORIZATION, KINDS

LEASE, HEARTBEAT = 1.0, 0.5
SETTINGS: dict[str, Any] = {"lease_seconds": LEASE, "heartbeat_seconds": HEARTBEAT}
LIMIT = 3 + LEASE
"""The least that these settings allow."""


@dataclass
class Stage:
    redis: RedisServer
    gateways: list[Gateway]
    client: Client
    direct: sync_redis.Redis

    def field(self, request_id: str, name: str) -> str:
        """Read without anybody noticing: a poll would count."""
        value = self.direct.hget(keys.run(request_id), name)
        assert value is None or isinstance(value, bytes)
        return value.decode() if value else ""

    def status(self, request_id: str) -> str:
        return self.field(request_id, "status")

    def time(self) -> float:
        """Seconds, by Redis' clock."""
        seconds, micros = self.direct.time()  # type: ignore[misc]
        return float(seconds) + float(micros) / 1e6

    def finished_at(self, request_id: str) -> float:
        return int(self.field(request_id, "finished_at")) / 1000

    def body(self, query: str, **more: Any) -> dict[str, Any]:
        return {"query": query, "agent": "hangs", "cancel_if_unwatched": LIMIT, **more}

    def submit(self, query: str, **more: Any) -> str:
        return self.client.submit(**self.body(query, **more))

    def unwatched(self, request_id: str) -> bool:
        """Cancelled, and for this reason. Of anything but that and a living run it complains."""
        if self.status(request_id) in ("queued", "running"):
            return False
        assert self.status(request_id) == "cancelled"
        assert json.loads(self.field(request_id, "result")) == {"reason": "unwatched"}
        return True


def place(launcher: Launcher) -> Iterator[Stage]:
    try:
        server = launcher.redis()
        gateways = [launcher.gateway(server.url, **SETTINGS) for _ in range(2)]
        with Client(gateways[0].url) as client, server.client() as direct:
            yield Stage(server, gateways, client, direct)
    finally:
        launcher.close()


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    yield from place(Launcher(tmp_path_factory.mktemp("unwatched")))


@pytest.fixture
def stage(shared: Stage) -> Stage:
    shared.direct.flushall()
    return shared


# -- the option ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seconds", [0, 1, LIMIT - 0.01])
def test_less_than_a_reader_needs_to_come_back_is_refused_with_the_least(stage: Stage, seconds: float) -> None:
    response = stage.client.post("/api/v1/query", json=stage.body("q", cancel_if_unwatched=seconds))
    assert response.status_code == 422
    [error] = response.json()["errors"]
    assert error["field"] == "cancel_if_unwatched"
    assert f"{LIMIT:g} seconds" in error["message"]


def test_the_least_is_the_longest_retry_and_the_longer_of_a_lease_and_a_heartbeat(launch: Launcher) -> None:
    server = launch.redis()
    for lease, heartbeat, least in ((15, 15, 18), (2, 30, 33), (20, 0.5, 23)):
        with Client(launch.gateway(server.url, lease_seconds=lease, heartbeat_seconds=heartbeat).url) as client:
            assert (
                client.post("/api/v1/query", json={"query": f"{least}", "cancel_if_unwatched": least}).status_code
                == 202
            )
            less = {"query": "less", "cancel_if_unwatched": least - 1}
            response = client.post("/api/v1/query", json=less)
            assert (response.status_code, f"{least} seconds" in response.text) == (422, True)


# -- readers -------------------------------------------------------------------------------------------------


async def test_a_run_is_cancelled_when_nobody_reads_it_any_more_and_never_while_somebody_does(
    stage: Stage, launch: Launcher
) -> None:
    """Running, where its worker counts, and queued, where reapers do; each kind of reader."""
    names = [*KINDS, "left", "never", "uncounted"]
    worker = await asyncio.to_thread(launch.worker, stage.redis.url, **SETTINGS, max_jobs=len(names))

    def have(state: str, request_ids: list[str]) -> bool:
        return all(stage.status(request_id) == state for request_id in request_ids)

    bodies, runs = dict[tuple[str, str], dict[str, Any]](), dict[tuple[str, str], str]()
    for state in ("running", "queued"):
        for name in names:
            body = stage.body(f"{state} {name}", cancel_if_unwatched=None if name == "uncounted" else LIMIT)
            bodies[state, name], runs[state, name] = body, await asyncio.to_thread(stage.client.submit, **body)
        await asyncio.to_thread(
            wait_for, partial(have, state, [run for (kind, _), run in runs.items() if kind == state])
        )

    # The reaper's first look, else after ten seconds.
    stage.direct.zadd(keys.LEASES, {run: 0 for (state, _), run in runs.items() if state == "queued"})
    for state in ("running", "queued"):
        passing = await Stream().open(
            stage.gateways[0].url, f"/api/v1/runs/{runs[state, 'left']}/stream", AUTHORIZATION
        )
        await passing.until(lambda passing=passing: bool(passing.events))  # type: ignore[misc]
        await passing.close()
    left_at = stage.time()
    urls = itertools.cycle([gateway.url for gateway in stage.gateways])
    watching = [
        asyncio.create_task(KINDS[name](lambda: next(urls), runs[state, name], bodies[state, name]))
        for state in ("running", "queued")
        for name in KINDS
    ]
    try:
        # The queued run first: else the slot of the running one would be its.
        gone = [runs["queued", "left"], runs["running", "left"]]
        await asyncio.to_thread(wait_for, lambda: all(map(stage.unwatched, gone)), seconds=30)
        for request_id in gone:
            took = stage.finished_at(request_id) - left_at
            print(f"cancelled {took:.2f} s after its reader had left")
            assert took >= LIMIT - HEARTBEAT
        await asyncio.sleep(max(left_at + 2.5 * LIMIT - stage.time(), 0))
        for (state, name), request_id in runs.items():
            assert (name == "left") == stage.unwatched(request_id), f"{state} {name}"
    finally:
        for task in watching:
            task.cancel()
        await asyncio.gather(*watching, return_exceptions=True)
    stopped_at = stage.time()
    watched = [request_id for (_, name), request_id in runs.items() if name in KINDS]
    try:
        await asyncio.to_thread(wait_for, lambda: all(map(stage.unwatched, watched)), seconds=30)
    finally:
        for k, r in runs.items():
            print(k, stage.status(r), stage.field(r, "watched_at"), stage.time())
    assert min(map(stage.finished_at, watched)) >= stopped_at + LIMIT - POLLED_BEFORE
    for request_id in [*watched, *gone]:
        check_log(await asyncio.to_thread(stage.client.log, request_id))
    for (_, name), request_id in runs.items():
        if name in ("never", "uncounted"):
            assert stage.status(request_id) in ("queued", "running"), "nobody has to have come within a minute"
    await asyncio.to_thread(
        wait_for, lambda: len(worker.logged("run ended", outcome="cancelled")) >= len(KINDS) + 1, seconds=10
    )


POLLED_BEFORE = 2.5
"""A poll may have been so long ago when the polling ended."""


def test_an_attempt_and_a_break_of_redis_begin_the_count_anew(stage: Stage, launch: Launcher) -> None:
    first = launch.worker(stage.redis.url, **SETTINGS, grace_seconds=0)
    request_id = stage.submit("count")
    wait_for(lambda: stage.status(request_id) == "running")
    stage.client.run(request_id)  # nobody comes after this
    time.sleep(LIMIT / 2)
    second = launch.worker(stage.redis.url, **SETTINGS)
    first.signal(signal.SIGTERM)
    wait_for(lambda: bool(second.logged("run started", request_id=request_id)))
    time.sleep(LIMIT * 0.7)
    assert stage.status(request_id) == "running", "the attempt has begun a new count"
    stage.redis.pause()
    time.sleep(2.5)
    stage.redis.resume()
    resumed_at = stage.time()
    wait_for(lambda: stage.unwatched(request_id), seconds=30)
    took = stage.finished_at(request_id) - resumed_at
    print(f"cancelled {took:.2f} s after the break")
    assert took >= LEASE + LIMIT - 0.5
