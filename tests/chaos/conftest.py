from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from tests.conftest import Launcher
from tests.kit.fleet import LEASE, Fleet
from tests.kit.http import Client


@pytest.fixture(scope="package")
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
