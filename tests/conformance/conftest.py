"""A service for the wire: two gateways in each of two modes, with a quick heartbeat, on one Redis with one worker.

`direct` is the service's own server, which writes to the transports; `fallback` is uvicorn's own protocol classes (the
first gateway has httptools, the second h11), where streams go through ASGI's `send`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Launcher
from tests.kit.checker import check_log, check_poll
from tests.kit.http import Client, token
from tests.kit.processes import Gateway, PlainGateway, Worker, environment
from tests.kit.readers import Target
from tests.kit.redis_server import RedisServer

MODES = ("direct", "fallback")
HEARTBEAT = 0.3


class WireLauncher(Launcher):
    def wire_gateway(self, redis_url: str, mode: str, number: int = 0, **settings: Any) -> Gateway:
        if mode == "direct":
            return self.gateway(redis_url, **settings)
        env = environment(redis_url, **settings) | {"PLAIN_HTTP": ("httptools", "h11")[number % 2]}
        gateway = PlainGateway(env, self.folder)
        self._processes.append(gateway)
        gateway.until_ready()
        return gateway


class Wire:
    """The service in one mode."""

    def __init__(self, mode: str, redis: RedisServer, gateways: list[Gateway]) -> None:
        self.mode = mode
        self.redis = redis
        self.gateways = gateways

    @property
    def urls(self) -> list[str]:
        return [gateway.url for gateway in self.gateways]

    def client(self, subject: str, gateway: int = 0) -> Client:
        return Client(self.gateways[gateway].url, subject)

    def get(self, subject: str, request_id: str, gateway: int = 0, *, url: str = "") -> Target:
        """The run's own stream: short ids."""
        return Target(
            url=f"{url or self.urls[gateway]}/api/v1/runs/{request_id}/stream",
            headers={"Authorization": f"Bearer {token(subject)}"},
        )

    def post(self, subject: str, query: str, gateway: int = 0, *, url: str = "", key: str = "", **body: Any) -> Target:
        """Submit and stream: long ids. `key`: an Idempotency-Key, without which a repeat after the end is a new run."""
        headers = {"Authorization": f"Bearer {token(subject)}"} | ({"Idempotency-Key": key} if key else {})
        return Target(
            url=f"{url or self.urls[gateway]}/api/v1/query/stream", headers=headers, body={"query": query, **body}
        )


@pytest.fixture(scope="session")
def wire_base(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[WireLauncher, RedisServer, Worker]]:
    launcher = WireLauncher(tmp_path_factory.mktemp("wire"))
    try:
        redis = launcher.redis()
        yield launcher, redis, launcher.worker(redis.url)
    finally:
        launcher.close()


@pytest.fixture(scope="session", params=MODES)
def wire(request: pytest.FixtureRequest, wire_base: tuple[WireLauncher, RedisServer, Worker]) -> Wire:
    launcher, redis, _ = wire_base
    mode: str = request.param
    gateways = [launcher.wire_gateway(redis.url, mode, n, heartbeat_seconds=HEARTBEAT) for n in range(2)]
    return Wire(mode, redis, gateways)


@pytest.fixture
def launch_wire(tmp_path: Path) -> Iterator[WireLauncher]:
    """For a test that changes a process, and so starts its own."""
    launcher = WireLauncher(tmp_path)
    yield launcher
    launcher.close()


@pytest.fixture
def alice(wire: Wire, subject: str) -> Iterator[Client]:
    with wire.client(subject) as client:
        yield client


@pytest.fixture
def alice_elsewhere(wire: Wire, subject: str) -> Iterator[Client]:
    with wire.client(subject, gateway=1) as client:
        yield client


_checked: set[str] = set()


@pytest.fixture(autouse=True)
def every_run_polls_as_it_streams(request: pytest.FixtureRequest) -> Iterator[None]:
    """P3, P7 and P23 for every run that a test of this suite has left behind."""
    yield
    if "wire" not in request.fixturenames:
        return
    wire: Wire = request.getfixturevalue("wire")
    with wire.redis.client() as redis:
        for key in redis.scan_iter("sb:{*}:run", count=1000):
            request_id = key[4:36].decode()
            if request_id in _checked:
                continue
            status, subject = redis.hmget(key, "status", "subject")
            if status not in (b"completed", b"failed", b"cancelled"):
                continue
            _checked.add(request_id)
            with wire.client(json.loads(subject)) as client:
                log = client.log(request_id)
                check_log(log)
                check_poll(client.run(request_id), log)
