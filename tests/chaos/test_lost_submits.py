"""P2: what was accepted will end, and a submit that broke off half-way leaves nothing that does not.

The gateway is killed, or Redis is, or replies are lost, between any two of a submit's commands: the claim of the key,
the indexes, the record, the job.
"""

from __future__ import annotations

import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import count

import httpx
import pytest

from tests.conftest import Launcher
from tests.kit.fleet import Fleet
from tests.kit.http import Client, token
from tests.kit.processes import Gateway, wait_for
from tests.kit.proxy import Command, Proxy, calls
from tests.kit.scale import LONG, scaled

LEASE = 1.5
CLIENTS = 6
MOST_COMMANDS = 90
"""What the clients' submits need before each of them is through."""
IDLE = {b"TIME", b"INFO", b"AUTH", b"CLIENT", b"SELECT", b"PING", b"CONFIG"}
"""Commands that a gateway sends also when nobody submits anything."""


@pytest.fixture
def fleet(launch: Launcher) -> Iterator[Fleet]:
    """With a gateway that lives, and a worker."""
    server = launch.redis()
    gateway = launch.gateway(server.url)
    launch.worker(server.url, lease_seconds=LEASE)
    with Client(gateway.url) as client, server.client() as direct:
        yield Fleet(server, client, direct)


def of_a_submit(command: Command) -> bool:
    return command[0].upper() not in IDLE


class Submits:
    """Queries under keys of their own, and which run was answered for each."""

    def __init__(self) -> None:
        self.told: dict[str, str] = {}
        self.unanswered: list[str] = []
        self._numbers = count()

    def submit(self, url: str, key: str) -> str | None:
        """None where no answer came, or none that accepts."""
        headers = {"Authorization": f"Bearer {token('alice')}", "Idempotency-Key": key}
        body = {"query": f"query of {key}", "agent": "echo"}
        try:
            reply = httpx.post(f"{url}/api/v1/query", headers=headers, json=body, timeout=15, verify=False)
        except httpx.TransportError:
            return None
        assert reply.status_code in (200, 202, 503), reply.text
        return reply.json()["request_id"] if reply.status_code != 503 else None

    def submit_new(self, url: str) -> bool:
        key = f"key-{next(self._numbers)}"
        request_id = self.submit(url, key)
        if request_id is None:
            self.unanswered.append(key)
        else:
            self.told[key] = request_id
        return request_id is not None

    def submit_until_it_fails(self, gateway: Gateway) -> None:
        while self.submit_new(gateway.url):
            pass

    def repeat(self, url: str, keys: list[str]) -> None:
        for key in keys:
            while (request_id := self.submit(url, key)) is None:
                time.sleep(0.1)
            self.told[key] = request_id


def check_all_end(fleet: Fleet, submits: Submits, chance: random.Random) -> None:
    """Of the submits without an answer every second one is repeated, and heals what is there; the others are left."""
    left = sorted(submits.unanswered)
    chance.shuffle(left)
    submits.repeat(str(fleet.client.base_url), left[::2])
    runs = fleet.all_runs()
    assert set(submits.told.values()) <= set(runs)
    fleet.until_reaped(runs)
    for request_id in runs:
        run, _ = fleet.ended(request_id)
        assert run["status"] == "completed", run
    times = Counter(fleet.field(request_id, "key") for request_id in runs)
    assert set(times.values()) == {1}, "two runs under one key"
    print(f"{len(submits.told)} submits were answered, {len(left)} were not, and {len(runs)} runs have ended")


def test_whenever_a_gateway_is_killed_in_a_submit_every_run_ends(
    fleet: Fleet, launch: Launcher, chance: random.Random
) -> None:
    submits, kills = Submits(), scaled(100)
    with ThreadPoolExecutor(CLIENTS) as pool:
        for _ in range(kills):
            with Proxy(fleet.redis.port) as proxy:
                gateway = launch.gateway(proxy.url)
                nth, before = chance.randint(1, MOST_COMMANDS), chance.random() < 0.5

                def kill(gateway: Gateway = gateway) -> None:
                    gateway.signal(signal.SIGKILL)

                proxy.strike(nth, kill, matches=of_a_submit, before=before)
                for each in [pool.submit(submits.submit_until_it_fails, gateway) for _ in range(CLIENTS)]:
                    each.result()
                assert gateway.wait() == -signal.SIGKILL
    assert len(submits.unanswered) == kills * CLIENTS
    check_all_end(fleet, submits, chance)


LOST: dict[str, Callable[[Command], bool]] = {
    "claim": lambda command: command[0] == b"EVALSHA" and any(part.startswith(b"sb:idem:") for part in command[:4]),
    "index": lambda command: command[0] == b"PEXPIRE",
    "lease": lambda command: command[:2] == [b"ZADD", b"sb:leases"],
    "create": calls("create"),
    "enqueue": lambda command: command[0] == b"EXEC",
}


def test_a_submit_that_loses_its_connection_is_refused_or_accepted_and_can_be_repeated(
    fleet: Fleet, launch: Launcher, chance: random.Random
) -> None:
    """Each of its commands in turn, or the reply; every second time."""
    submits = Submits()
    with Proxy(fleet.redis.port) as proxy:
        gateway = launch.gateway(proxy.url)
        assert submits.submit_new(gateway.url), "from here on the scripts are known"
        for matches in LOST.values():
            for before in (True, False):
                proxy.swallow(matches, every=2, before=before)
                for _ in range(scaled(40)):
                    submits.submit_new(gateway.url)
                assert proxy.swallowed >= scaled(40) / 2 - 1
    assert submits.unanswered
    check_all_end(fleet, submits, chance)


def test_whenever_redis_is_killed_in_a_submit_every_run_ends(
    fleet: Fleet, launch: Launcher, chance: random.Random
) -> None:
    """What it has acknowledged it has after its restart."""
    submits = Submits()
    kills = 10 if LONG else 1
    with Proxy(fleet.redis.port) as proxy, ThreadPoolExecutor(CLIENTS) as pool:
        gateway = launch.gateway(proxy.url)
        for _ in range(kills):
            before = chance.random() < 0.5
            proxy.strike(chance.randint(1, MOST_COMMANDS), fleet.redis.kill, matches=of_a_submit, before=before)
            for each in [pool.submit(submits.submit_until_it_fails, gateway) for _ in range(CLIENTS)]:
                each.result()
            fleet.redis.start()
            wait_for(lambda: httpx.get(f"{gateway.url}/readyz", verify=False).status_code == 200, seconds=20)
    assert len(submits.unanswered) >= kills * CLIENTS
    check_all_end(fleet, submits, chance)
