"""Many clients of one run, over HTTP: one subscription for all of a gateway, and nothing left when they are gone."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from dataclasses import dataclass

import psutil
import pytest
import redis as sync_redis

from broker.runs import keys
from tests.conftest import Launcher
from tests.kit.checker import check_log, check_reader, entries_of
from tests.kit.eventsource import EventSource, Stream
from tests.kit.http import Client, token
from tests.kit.processes import Gateway, wait_for
from tests.kit.redis_server import RedisServer
from tests.kit.rude import come_and_be_killed
from tests.kit.scale import scaled

AUTHORIZATION = {"Authorization": f"Bearer {token('alice')}"}


@dataclass
class Stage:
    redis: RedisServer
    gateways: list[Gateway]
    client: Client
    direct: sync_redis.Redis

    def subscriptions(self) -> dict[str, int]:
        """By channel; the worker's own are left out."""
        names = [name.decode() for name in self.direct.pubsub_channels("sb:{*}")]  # type: ignore[union-attr]
        counts = self.direct.pubsub_numsub(*names) if names else []
        return {name.decode(): count for name, count in counts}  # type: ignore[union-attr]

    def clients(self) -> int:
        """Connections to Redis."""
        return len(self.direct.client_list())  # type: ignore[arg-type]

    def steady(self, name: str, count: int = 300, pause: float = 0.01) -> str:
        """A run that goes on for some seconds."""
        request_id = self.client.submit(name, agent="tokens", parameters={"count": count, "pause": pause})
        wait_for(lambda: self.client.run(request_id)["status"] == "running")
        return request_id

    async def read(self, request_id: str, gateway: int = 0) -> Stream:
        return await Stream().open(self.gateways[gateway].url, f"/api/v1/runs/{request_id}/stream", AUTHORIZATION)


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    launcher = Launcher(tmp_path_factory.mktemp("fanout"))
    try:
        server = launcher.redis()
        gateways = [launcher.gateway(server.url, heartbeat_seconds=1) for _ in range(2)]
        launcher.worker(server.url)
        with Client(gateways[0].url) as client, server.client() as direct:
            yield Stage(server, gateways, client, direct)
    finally:
        launcher.close()


async def test_all_readers_of_a_gateway_share_one_subscription_in_both_id_forms(stage: Stage) -> None:
    body = {"query": "shared", "agent": "tokens", "parameters": {"count": 100, "pause": 0.01}}
    posting = await Stream().open(
        stage.gateways[0].url,
        "/api/v1/query/stream",
        {**AUTHORIZATION, "Content-Type": "application/json"},
        method="POST",
        body=str(body).replace("'", '"').encode(),
    )
    await posting.until(lambda: bool(posting.events))
    request_id = posting.events[0].json["request_id"]
    readers = [await stage.read(request_id, gateway=n % 2) for n in range(20)]
    for reader in readers:
        await reader.until(lambda reader=reader: bool(reader.events))  # type: ignore[misc]
    assert stage.subscriptions()[keys.channel(request_id)] == 2, "one for each gateway"
    for reader in (posting, *readers):
        assert await reader.ended() == "finished"
    log = await asyncio.to_thread(stage.client.log, request_id)
    check_log(log)
    for reader in (posting, *readers):
        check_reader(entries_of(reader.events), log)
    assert {event.id.count("/") for event in posting.events} == {1}
    assert {event.id.count("/") for reader in readers for event in reader.events} == {0}


async def test_when_the_last_reader_has_gone_the_gateway_lets_go_of_the_run(stage: Stage) -> None:
    request_id = await asyncio.to_thread(stage.steady, "leaving", 1000)
    channel = keys.channel(request_id)
    readers = [await stage.read(request_id) for _ in range(3)]
    for n, reader in enumerate(readers):
        assert stage.subscriptions()[channel] == 1
        await reader.close()
        if n < 2:
            await readers[2].until(lambda: bool(readers[2].events))
    await readers[0].until(lambda: channel not in stage.subscriptions())
    await asyncio.to_thread(stage.client.post, f"/api/v1/runs/{request_id}/cancel")


async def test_when_pubsub_connections_are_killed_under_load_no_stream_loses_anything(stage: Stage) -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    runs = [await asyncio.to_thread(stage.steady, f"killed {n}", scaled(1500)) for n in range(6)]
    readers = [(request_id, await stage.read(request_id, gateway=n % 2)) for request_id in runs for n in range(8)]
    killed = 0
    while killed < scaled(80) and any(reader.ending is None for _, reader in readers):
        killed += stage.direct.client_kill_filter(_type="pubsub")  # type: ignore[operator]
        await asyncio.sleep(0.1 + chance.random() * 0.3)
    assert killed > 3
    for request_id, reader in readers:
        assert await reader.ended(60) == "finished"
        log = await asyncio.to_thread(stage.client.log, request_id)
        check_log(log)
        check_reader(entries_of(reader.events), log)


async def test_event_sources_that_come_and_go_see_each_event_once(stage: Stage) -> None:
    """Each connection is reset after a moment, anywhere; EventSource resumes on the other gateway or on the same."""
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    request_id = await asyncio.to_thread(stage.steady, "come and go", scaled(2000))
    sources = [
        EventSource(stage.gateways[n % 2].url, f"/api/v1/runs/{request_id}/stream", AUTHORIZATION, hurry=40)
        for n in range(20)
    ]
    running = [asyncio.create_task(source.run()) for source in sources]
    while not all(task.done() for task in running):
        await asyncio.sleep(0.05)
        source = chance.choice(sources)
        if source.streams and source.closed is None:
            source.url = chance.choice(stage.gateways).url
            await source.streams[-1].close()
            source.streams[-1].ending = source.streams[-1].ending or "cut"
    log = await asyncio.to_thread(stage.client.log, request_id)
    for source in sources:
        assert source.closed == "204"
        check_reader(entries_of(source.events), log)
    assert sum(len(source.streams) for source in sources) > 40


# -- P14: nothing leaks --------------------------------------------------------------------------------------


def test_thousands_of_connections_that_come_and_are_killed_leave_nothing_behind(stage: Stage) -> None:
    """P14: descriptors, memory, and what Redis holds for the gateway are as before."""
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    process = psutil.Process(stage.gateways[0].pid)
    runs = [
        stage.client.submit(f"leak {n}", agent="tokens", parameters={"count": 5000, "pause": 0.02}) for n in range(5)
    ]
    for request_id in runs:
        wait_for(lambda rid=request_id: stage.client.run(rid)["status"] == "running")  # type: ignore[misc]

    def cycles(count: int) -> None:
        for n in range(count):
            come_and_be_killed(stage.gateways[0].url, runs[n % len(runs)], n, chance)
        wait_for(lambda: process.num_fds() <= idle + 2, seconds=30)
        wait_for(lambda: not any(keys.channel(request_id) in stage.subscriptions() for request_id in runs), seconds=20)

    stage.client.get("/healthz")
    idle = process.num_fds() + 8  # Redis connections that are made when they are needed
    cycles(scaled(2000))
    before, clients = process.memory_info().rss, stage.clients()
    cycles(scaled(2000))
    assert process.memory_info().rss <= before * 1.05 + 1024 * 1024
    assert stage.clients() <= clients + 1
    for request_id in runs:
        stage.client.post(f"/api/v1/runs/{request_id}/cancel").raise_for_status()
    assert stage.client.finished(stage.client.submit("still well"))["status"] == "completed"
