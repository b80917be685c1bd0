"""What clients of others meet: gateways and a worker that a test may kill."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Launcher
from tests.kit.browser import Browser
from tests.kit.fleet import LEASE
from tests.kit.http import Client, token
from tests.kit.needs import needs
from tests.kit.node import Node
from tests.kit.page import Pages
from tests.kit.processes import Gateway, Process, Worker

NodeOf = Callable[..., Node]


class Deployment:
    """Three gateways and a worker. What was killed is there again in the next test."""

    def __init__(self, launch: Launcher, **settings: object) -> None:
        self._launch = launch
        self.redis_url = launch.redis().url
        self._settings: dict[str, Any] = {"heartbeat_seconds": 1, "lease_seconds": LEASE, **settings}
        with ThreadPoolExecutor() as pool:
            worker = pool.submit(self._worker)
            self.gateways = list(pool.map(self._gateway, [None] * 3))
            self.worker = worker.result()

    def _gateway(self, port: int | None = None) -> Gateway:
        return self._launch.gateway(self.redis_url, port=port, **self._settings)

    def _worker(self) -> Worker:
        return self._launch.worker(self.redis_url, **self._settings)

    def mend(self) -> Deployment:
        for n, gateway in enumerate(self.gateways):
            if gateway.popen.poll() is not None:
                self.gateways[n] = self._gateway(gateway.port)
        if self.worker.popen.poll() is not None:
            self.worker = self._worker()
        return self

    def replace_worker(self) -> None:
        """Its worker is killed, and another one takes over what it had under way."""
        kill(self.worker)
        self.worker = self._worker()

    @property
    def urls(self) -> list[str]:
        return [gateway.url for gateway in self.gateways]


def kill(process: Process) -> None:
    process.signal(signal.SIGKILL)
    process.wait()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("clients")


@pytest.fixture(scope="module")
def pages(folder: Path) -> Iterator[Pages]:
    with Pages(folder) as pages:
        yield pages


@pytest.fixture(scope="module")
def browser(folder: Path) -> Iterator[Browser]:
    browser = Browser(needs("chromium"), folder)
    yield browser
    browser.close()


@pytest.fixture(scope="module")
def _deployment(folder: Path, pages: Pages) -> Iterator[Deployment]:
    launcher = Launcher(folder)
    try:
        yield Deployment(launcher, cors_origins=pages.url)
    finally:
        launcher.close()


@pytest.fixture
def deployment(_deployment: Deployment) -> Deployment:
    return _deployment.mend()


@pytest.fixture(scope="module")
def node_of(folder: Path) -> Iterator[NodeOf]:
    """Makes a Node process of a script and its arguments, one for the whole module."""
    with ExitStack() as stack:
        made: dict[tuple[str, ...], Node] = {}

        def node(*script: str) -> Node:
            if script not in made:
                made[script] = stack.enter_context(Node(folder, *script))
            return made[script]

        yield node


@pytest.fixture
def alice(deployment: Deployment, subject: str) -> Iterator[Client]:
    """The owner's client of the last gateway, which no test kills."""
    with Client(deployment.urls[-1], subject) as client:
        yield client


@pytest.fixture
def gate(tmp_path: Path) -> Path:
    """A file that an agent may wait for."""
    return tmp_path / "go on"


@pytest.fixture
def bearer(subject: str) -> str:
    """The owner's token."""
    return token(subject)
