"""P14: nothing leaks, of a gateway or of a worker, while connections, workers and Redis come and go."""

from __future__ import annotations

import asyncio
import random
import signal
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from broker.runs import keys
from tests.conftest import Launcher
from tests.kit.fleet import Fleet
from tests.kit.http import Client
from tests.kit.observed import Census, ObservedGateway, ObservedWorker, look_into, observed
from tests.kit.pair import Pair
from tests.kit.processes import Worker, environment, wait_for
from tests.kit.rude import come_and_be_killed
from tests.kit.scale import LONG, scaled

LEASE = 1.0
LIMIT = 3 + LEASE
SETTINGS: dict[str, Any] = {"lease_seconds": LEASE, "heartbeat_seconds": 0.5, "grace_seconds": 0, "max_attempts": 100}
EMPTY = {
    "worker": ("Runner._stops", "Runner._publishers", "Runner._ended", "Closings._kept", "Jobs._running"),
    "gateway": ("Hub._channels", "Hub._dirty", "Pages._of_run", "Closings._kept", "Runs._met"),
}
"""What holds something of each run that is under way, or that ended a moment ago."""
ALIVE = {
    "worker": {"Run": 0, "Driver": 0, "Publisher": 0},
    "gateway": {"Protocol": 1, "Channel": 0, "View": 0, "Reader": 0, "TransportSink": 0, "SendSink": 0},
}
"""How many there are, at most, of what stands for an attempt, a connection or a stream: the test's own client has one.
A count that is only compared with an earlier one would not tell how long they stay."""
REST_SECONDS = 40
"""Less than what a connection is kept alive for (75 s): what waits for a timer of its connection is not at rest."""
TAKES_TIME = {"Reaper._ended", "Reaper._watches", "Reaper.counts", "_Primary.marks"}
"""Forgotten after minutes (tests/unit/test_reaper.py), or bounded by their kind."""
OF_ONE = {"Tail.entries", "Lease.record", "Protocol.scope"}
"""How much one of these holds tells nothing; how many there are is counted."""
MEGABYTE = 1024 * 1024


@dataclass
class House:
    """A gateway and a worker that are looked into; other workers come and go beside them."""

    launch: Launcher
    chance: random.Random
    pair: Pair
    gateway: ObservedGateway
    worker: ObservedWorker
    client: Client

    def census(self) -> dict[str, Census]:
        folder = self.launch.folder
        return {
            "worker": look_into(self.worker, folder, "worker"),
            "gateway": look_into(self.gateway, folder, "gateway"),
        }

    def at_rest(self, like: dict[str, Census] | None = None) -> dict[str, Census]:
        """When nothing is under way any more, and there is nothing beyond what is in `like`."""
        deadline = time.monotonic() + REST_SECONDS
        while True:
            found = self.census()
            more = {who: left(who, census, like) for who, census in found.items()}
            if not any(more.values()):
                return found
            assert time.monotonic() < deadline, more
            time.sleep(0.5)

    def clients(self) -> int:
        """Connections that the primary has, its replica's and this test's own left out."""
        with self.pair.primary.client() as client:
            return sum("S" not in row["flags"] for row in client.client_list()) - 1


@pytest.fixture
def house(launch: Launcher) -> Iterator[House]:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    pair = launch.pair()
    env = environment(pair.url, **SETTINGS)
    gateway = ObservedGateway(observed(env, launch.folder, "gateway"), launch.folder)
    worker = ObservedWorker(observed(env, launch.folder, "worker"), launch.folder)
    try:
        gateway.until_ready()
        worker.until_ready()
        with Client(gateway.url) as client:
            yield House(launch, random.Random(seed), pair, gateway, worker, client)
    finally:
        for process in (gateway, worker):
            process.kill()


def live_through(house: House, runs: int, connections: int, *, failover: bool) -> None:
    """About so many runs, of all fates, under so many clients that are killed."""
    with house.pair.primary.client() as direct:
        fleet = Fleet(house.pair.primary, house.client, direct)
        others: list[Worker] = [house.launch.worker(house.pair.url, **SETTINGS) for _ in range(2)]
        share = max(runs // 6, 1)
        completing = [fleet.submit("tokens", count=30, pause=0.05) for _ in range(share)]
        failing = [fleet.submit("raises") for _ in range(share)]
        moving = [fleet.submit("steps", count=60, pause=0.05, every=5) for _ in range(2 * share)]
        stopped = [fleet.submit("hangs") for _ in range(2 * share)]
        unwatched = [
            house.client.submit(f"{request_id} unwatched", agent="hangs", cancel_if_unwatched=LIMIT)
            for request_id in completing[:3]
        ]
        readable = completing + moving + unwatched
        for n in range(connections):
            come_and_be_killed(house.gateway.url, house.chance.choice(readable), n, house.chance)
            if n == connections // 2:
                for kind in ("normal", "pubsub"):
                    house.pair.primary.drop_clients(kind)
        others[0].signal(signal.SIGTERM)
        others[1].kill()
        others[0].wait()
        for n, request_id in enumerate(stopped):
            path = f"/api/v1/runs/{request_id}"
            answer = house.client.delete(path) if n % 2 else house.client.post(f"{path}/cancel")
            assert answer.status_code in (200, 204)
    if failover:
        house.pair.link.pause()
        time.sleep(0.5)
        asyncio.run(house.pair.fail_over())
        asyncio.run(house.pair.rejoin())
    with house.pair.primary.client() as direct:
        fleet = Fleet(house.pair.primary, house.client, direct)
        fleet.until_ended(completing + failing + moving + unwatched + stopped[::2], seconds=60)
        for n in range(connections // 4):
            # Of some, the whole answer has been sent by then.
            come_and_be_killed(house.gateway.url, house.chance.choice(readable), n, house.chance)
        for request_id in unwatched:
            assert fleet.field(request_id, "status") == "cancelled"
        direct.delete(keys.LEASES)  # what ended stays there for two minutes


def left(who: str, found: Census, like: dict[str, Census] | None) -> dict[str, Any]:
    """What is there and should not be, of this process."""
    held = {name: found.sizes[name] for name in EMPTY[who] if found.sizes.get(name)}
    alive = {name: found.objects[name] for name, most in ALIVE[who].items() if found.objects.get(name, 0) > most}
    if like is None:
        return held | alive
    return held | alive | grown(like[who], found) | (Counter(found.tasks) - Counter(like[who].tasks))


def grown(old: Census, new: Census) -> dict[str, tuple[int, int]]:
    """Less than one for each four runs is no leak, but what happens to be there."""
    pairs = [(old.objects, new.objects), (old.sizes, new.sizes)]
    more = {name: (was.get(name, 0), n) for was, now in pairs for name, n in now.items() if n > was.get(name, 0) + 8}
    return {name: found for name, found in more.items() if name not in TAKES_TIME | OF_ONE}


@pytest.mark.timeout(3600 if LONG else 180)
def test_after_hundreds_of_runs_and_connections_everything_is_as_before(house: House) -> None:
    runs, connections = scaled(300), scaled(1000)
    live_through(house, runs, connections, failover=LONG)
    before = house.at_rest()
    for turn in range(8 if LONG else 1):
        live_through(house, runs, connections, failover=turn % 2 == 0)
    after = house.at_rest(before)
    held = sum(census.pooled + census.loose for census in after.values())
    wait_for(lambda: house.clients() <= held, seconds=20)
    for who in before:
        old, new = before[who], after[who]
        print(
            f"{who}: {old.descriptors} -> {new.descriptors} descriptors, "
            f"{old.memory / MEGABYTE:.1f} -> {new.memory / MEGABYTE:.1f} MiB, tasks {sum(new.tasks.values())}"
        )
        assert new.loose <= old.loose
        assert new.descriptors <= old.descriptors
        assert new.memory <= old.memory * 1.05 + MEGABYTE
