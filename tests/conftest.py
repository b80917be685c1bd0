"""Fixtures: a service under test, of real processes on a real Redis. A test that changes a process starts its own."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

import hypothesis
import pytest
from redis.asyncio import Redis

from broker.runs.connections import connect
from tests.kit.fleet import LEASE, Fleet
from tests.kit.http import Client
from tests.kit.netns import Namespace, Network
from tests.kit.pair import Pair
from tests.kit.processes import Gateway, Process, Worker, environment
from tests.kit.redis_server import RedisServer

# How fast a machine is decides no test.
hypothesis.settings.register_profile("patient", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("patient")

_subjects = (f"user-{n}" for n in itertools.count(1))


@dataclass
class Service:
    """A service that a test may use, but not change."""

    redis: RedisServer
    gateways: list[Gateway]
    worker: Worker

    def client(self, subject: str, gateway: int = 0) -> Client:
        return Client(self.gateways[gateway].url, subject)


class Launcher:
    """Starts processes that end with the test."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._redis: list[RedisServer | Pair] = []
        self._networks: list[Network] = []
        self._processes: list[Process] = []

    def network(self) -> Network:
        """Two namespaces and a wire; skips the test where this is not root."""
        network = Network()
        self._networks.append(network)
        return network

    def redis(self, *options: str, binary: str | None = None, namespace: Namespace | None = None) -> RedisServer:
        """In a namespace it is there for all who are in it or reach it, and for the test as ever."""
        folder = self.folder / f"redis-{len(self._redis)}"
        folder.mkdir()
        if namespace is not None:
            options = (*options, "--bind", "0.0.0.0", "--protected-mode", "no")
        server = RedisServer(folder, *options, binary=binary, prefix=namespace.prefix if namespace else ())
        if namespace is not None:
            namespace.expose(server.port)
        self._redis.append(server)
        return server.start()

    def pair(self, *options: str, binary: str | None = None) -> Pair:
        """A primary and a replica, and an address that follows the primary."""
        pair = Pair(self.folder / f"redis-{len(self._redis)}", *options, binary=binary)
        self._redis.append(pair)
        return pair.start()

    def gateway(
        self,
        redis_url: str,
        *,
        ready: str = "/readyz",
        port: int | None = None,
        namespace: Namespace | None = None,
        **settings: object,
    ) -> Gateway:
        prefix = namespace.prefix if namespace else ()
        gateway = Gateway(environment(redis_url, **settings), self.folder, port, prefix)
        if namespace is not None:
            namespace.expose(gateway.port)
        self._processes.append(gateway)
        return gateway.until_ready(ready)

    def worker(self, redis_url: str, *, namespace: Namespace | None = None, **settings: object) -> Worker:
        worker = Worker(environment(redis_url, **settings), self.folder, namespace.prefix if namespace else ())
        self._processes.append(worker)
        return worker.until_ready()

    def close(self) -> None:
        """Asked first, and killed only then: a killed process leaves no coverage behind."""
        for pause in (0.1, 0):  # the second time means at once, where the first has been heard
            for process in self._processes:
                process.ask()
            time.sleep(pause if self._processes else 0)
        for process in self._processes:
            process.kill(after=3)
        for part in (*self._redis, *self._networks):
            part.close()


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """One for all tests that need no more than an empty Redis, and leave it running."""
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    try:
        yield server.start()
    finally:
        server.close()


@pytest.fixture
async def redis(redis_server: RedisServer) -> AsyncIterator[Redis]:
    """A client of an empty Redis."""
    client = connect(redis_server.url, connections=8)
    await client.flushall()
    yield client
    await client.aclose(close_connection_pool=True)


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Launcher]:
    launcher = Launcher(tmp_path)
    yield launcher
    launcher.close()


@pytest.fixture(scope="session")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """Two gateways, one worker, one Redis; JWT."""
    launcher = Launcher(tmp_path_factory.mktemp("service"))
    try:
        server = launcher.redis()
        gateways = [launcher.gateway(server.url) for _ in range(2)]
        yield Service(server, gateways, launcher.worker(server.url))
    finally:
        launcher.close()


@pytest.fixture
def subject() -> str:
    """An owner that no other test has."""
    return next(_subjects)


@pytest.fixture
def alice(service: Service, subject: str) -> Iterator[Client]:
    """The owner's client of the first gateway."""
    with service.client(subject) as client:
        yield client


@pytest.fixture
def alice_elsewhere(service: Service, subject: str) -> Iterator[Client]:
    """The same owner's client of the second gateway."""
    with service.client(subject, gateway=1) as client:
        yield client


@pytest.fixture(scope="session")
def gateway_of_fleets(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    launcher = Launcher(tmp_path_factory.mktemp("fleet"))
    try:
        server = launcher.redis()
        gateway = launcher.gateway(server.url, heartbeat_seconds=1, lease_seconds=LEASE)
        with Client(gateway.url) as client, server.client() as direct:
            yield Fleet(server, client, direct)
    finally:
        launcher.close()


@pytest.fixture
def fleet(gateway_of_fleets: Fleet) -> Fleet:
    """A Redis that is empty and a gateway, without a worker."""
    gateway_of_fleets.direct.flushall()
    return gateway_of_fleets


@pytest.fixture
def chance() -> random.Random:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    return random.Random(seed)
