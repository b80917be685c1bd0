"""Subscriptions on a Cluster: each on the primary of its slot, wherever that goes."""

from __future__ import annotations

import asyncio
import contextlib
import random
import secrets
from collections.abc import AsyncIterator, Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from broker.gateway import hub as hub_module
from broker.gateway.hub import Hub
from broker.runs import keys
from broker.runs.cluster import Cluster as Client
from broker.runs.connections import connect
from broker.runs.shards import publish_verb, shards
from broker.runs.subscriber import Subscriber
from broker.settings import Settings
from tests.kit.cluster import Cluster, slot_of
from tests.kit.redis_server import RedisServer, redis_6_2
from tests.kit.scale import scaled
from tests.kit.waiting import until

RUNS = [f"{n:032x}" for n in range(12)]
CHANNELS = [keys.channel(run) for run in RUNS]


@dataclass
class Heard:
    messages: list[tuple[str, bytes]] = field(default_factory=list)
    resets: list[set[str]] = field(default_factory=list)

    def message(self, channel: str, payload: bytes) -> None:
        self.messages.append((channel, payload))

    def reset(self, channels: Collection[str]) -> None:
        self.resets.append(set(channels))

    @property
    def reset_channels(self) -> set[str]:
        return set().union(*self.resets)


@pytest.fixture(scope="module")
def shared_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path_factory.mktemp("cluster"), "--enable-debug-command", "yes")
    try:
        yield cluster.start()
    finally:
        cluster.close()


@pytest.fixture
async def cluster(shared_cluster: Cluster) -> Cluster:
    """Whole; slots may have moved."""
    await shared_cluster.until_whole()
    return shared_cluster


@pytest.fixture
async def redis(cluster: Cluster) -> AsyncIterator[Client]:
    made = connect(cluster.url, connections=2)
    assert isinstance(made, Client)
    yield made
    await made.aclose()


@pytest.fixture
def heard() -> Heard:
    return Heard()


@pytest.fixture
async def subscriber(redis: Client, heard: Heard) -> AsyncIterator[Subscriber]:
    """Connected to all shards."""
    made = Subscriber(redis, on_message=heard.message, on_reset=heard.reset)
    made.start()
    await until(lambda: len(heard.resets) == 3)
    heard.resets.clear()
    yield made
    await made.close()


def listening(server: RedisServer) -> set[str]:
    return {name.decode() for name in server.ask("PUBSUB", "SHARDCHANNELS")}


def publish(cluster: Cluster, channel: str, payload: bytes) -> None:
    """Where its runs' scripts are executed."""
    cluster.owner_of(channel).ask("SPUBLISH", channel, payload.decode())


async def subscribe(
    cluster: Cluster, subscriber: Subscriber, heard: Heard, channels: Collection[str] = CHANNELS
) -> None:
    """Also where a slot has moved so lately that not every node knows: then it is subscribed a moment later."""
    await asyncio.gather(*(subscriber.subscribe(channel) for channel in channels), return_exceptions=True)
    await until(lambda: all(channel in listening(cluster.owner_of(channel)) for channel in channels))
    heard.resets.clear()


async def check_all_heard(cluster: Cluster, heard: Heard, channels: Collection[str] = CHANNELS) -> None:
    """One message for each channel, once."""
    heard.messages.clear()
    for channel in channels:
        publish(cluster, channel, channel.encode())
    expected = sorted((channel, channel.encode()) for channel in channels)
    await until(lambda: len(heard.messages) >= len(expected))
    assert sorted(heard.messages) == expected


async def test_each_channel_is_subscribed_on_its_own_shard(
    cluster: Cluster, subscriber: Subscriber, heard: Heard
) -> None:
    await subscribe(cluster, subscriber, heard)
    for server in cluster.primaries:
        assert listening(server) == {channel for channel in CHANNELS if cluster.owner_of(channel) is server}
    await check_all_heard(cluster, heard)
    for channel in CHANNELS[:6]:
        subscriber.unsubscribe(channel)
    await until(lambda: set().union(*map(listening, cluster.primaries)) == set(CHANNELS[6:]))


async def test_a_moved_slot_takes_its_channels_with_it_and_no_others(
    cluster: Cluster, subscriber: Subscriber, heard: Heard
) -> None:
    """Both channels of a run are in one slot."""
    control = keys.control(RUNS[0])
    await subscribe(cluster, subscriber, heard, [*CHANNELS, control])
    for _ in range(3):
        heard.resets.clear()
        await cluster.move_slot(slot_of(CHANNELS[0]))
        await until(lambda: heard.reset_channels == {CHANNELS[0], control})
        assert {CHANNELS[0], control} <= listening(cluster.owner_of(control))
        await check_all_heard(cluster, heard, [*CHANNELS, control])


async def test_many_slots_that_move_lose_no_subscription(
    cluster: Cluster, subscriber: Subscriber, heard: Heard
) -> None:
    await subscribe(cluster, subscriber, heard)
    owners = [cluster.owner_of(channel) for channel in CHANNELS]
    for channel in CHANNELS:
        await cluster.move_slot(slot_of(channel))
    assert all(cluster.owner_of(channel) is not old for channel, old in zip(CHANNELS, owners, strict=True))
    await until(lambda: heard.reset_channels == set(CHANNELS))
    await until(lambda: set().union(*map(listening, cluster.primaries)) == set(CHANNELS))
    await check_all_heard(cluster, heard)


async def test_a_subscription_to_a_slot_that_has_moved_unnoticed_follows_it(
    cluster: Cluster, subscriber: Subscriber, heard: Heard
) -> None:
    """The server answers with MOVED, and does not say for which channel."""
    await subscribe(cluster, subscriber, heard, CHANNELS[1:2])
    await cluster.move_slot(slot_of(CHANNELS[0]))
    try:
        await subscriber.subscribe(CHANNELS[0])
    except ConnectionError:
        await until(lambda: CHANNELS[0] in heard.reset_channels)
    await check_all_heard(cluster, heard, CHANNELS[:2])


async def test_unsubscribing_and_subscribing_again_is_no_move(
    cluster: Cluster, subscriber: Subscriber, heard: Heard
) -> None:
    """The server announces both in the same words."""
    await subscribe(cluster, subscriber, heard, CHANNELS[:1])
    for _ in range(20):
        subscriber.unsubscribe(CHANNELS[0])
        await subscriber.subscribe(CHANNELS[0])
    await check_all_heard(cluster, heard, CHANNELS[:1])
    await cluster.move_slot(slot_of(CHANNELS[0]))
    await until(lambda: CHANNELS[0] in heard.reset_channels)
    assert len(heard.resets) == 1
    await check_all_heard(cluster, heard, CHANNELS[:1])


async def test_who_comes_and_goes_while_slots_move_leaves_nothing_behind(
    cluster: Cluster, subscriber: Subscriber, heard: Heard
) -> None:
    """A slot may come back while a subscription to it is on its way, and while its answer is."""
    seed = secrets.randbits(32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    both = [[keys.channel(run), keys.control(run)] for run in RUNS[:4]]
    wanted: set[str] = set()

    async def come_and_go(channel: str) -> None:
        while True:
            wanted.add(channel)
            with contextlib.suppress(ConnectionError):
                await subscriber.subscribe(channel)
            await asyncio.sleep(chance.random() / 500)
            if chance.random() < 0.7:
                wanted.discard(channel)
                subscriber.unsubscribe(channel)
            await asyncio.sleep(chance.random() / 500)

    for _ in range(scaled(30)):
        tasks = [asyncio.create_task(come_and_go(channel)) for channels in both for channel in channels]
        for _ in range(20):
            await cluster.move_slot(slot_of(chance.choice(both)[0]))
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await until(lambda: set().union(*map(listening, cluster.primaries)) == wanted)
        await check_all_heard(cluster, heard, wanted)


async def test_a_primary_that_became_a_replica_is_left(
    cluster: Cluster, redis: Client, subscriber: Subscriber, heard: Heard
) -> None:
    await subscribe(cluster, subscriber, heard)
    owner = cluster.owner_of(CHANNELS[0])
    mine = {channel for channel in CHANNELS if cluster.owner_of(channel) is owner}
    names = {shard.name for shard in await shards(redis)}
    old = await cluster.fail_over(slot_of(CHANNELS[0]))
    assert old is owner
    new = cluster.owner_of(CHANNELS[0])
    await until(lambda: listening(new) == mine and not listening(old))
    assert heard.reset_channels == mine
    assert {shard.name for shard in await shards(redis)} == names, "the shard keeps its name"
    await check_all_heard(cluster, heard)


async def test_a_killed_primary_is_followed_by_its_replica(
    cluster: Cluster, subscriber: Subscriber, heard: Heard
) -> None:
    await subscribe(cluster, subscriber, heard)
    mine = {channel for channel in CHANNELS if cluster.owner_of(channel) is cluster.owner_of(CHANNELS[0])}
    old = await cluster.kill_primary(slot_of(CHANNELS[0]))
    assert subscriber.connected, "to the other shards"
    await check_all_heard(cluster, heard, [channel for channel in CHANNELS if channel not in mine])
    heard.resets.clear()
    await cluster.until_failed_over(slot_of(CHANNELS[0]), old)
    await until(lambda: heard.reset_channels == mine)
    await check_all_heard(cluster, heard)
    await cluster.start_again(old)


async def test_commands_and_subscriptions_of_one_shard_are_connected_anew_together(
    cluster: Cluster, redis: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PROTOCOL 8.2: either may find out that the server's data is not what it was."""
    monkeypatch.setattr(hub_module, "_PRIMARY_SECONDS", 0.1)
    hub = Hub(redis, redis, Settings(auth="none"))
    hub.start()
    try:
        await until(lambda: all(connections(server) for server in cluster.primaries))
        for shard in await shards(redis):
            await shard.redis.ping()
        await asyncio.sleep(0.5)
        before = {server: connections(server) for server in cluster.primaries}
        changed = cluster.primaries[0]
        changed.ask("DEBUG", "CHANGE-REPL-ID")
        await until(lambda: not before[changed] & connections(changed) and len(connections(changed)) >= 2)
        for server, ids in before.items():
            if server is not changed:
                assert ids <= connections(server)
    finally:
        await hub.close()


def connections(server: RedisServer) -> set[str]:
    """Those that stay; one that asks for the layout comes and goes."""
    with server.client() as client:
        return {
            row["id"]
            for row in client.client_list()
            if row["name"] == "stream-broker" and not row["cmd"].startswith(("cluster", "client", "NULL"))
        }


async def test_before_7_0_messages_are_published_to_all(tmp_path: Path, heard: Heard) -> None:
    """A slot that moves is no matter then: a message reaches every node."""
    binary = redis_6_2()
    if binary is None:
        pytest.skip("no redis-server 6.2")
    async with Cluster(tmp_path, replicas=0, binary=binary) as cluster:
        redis = connect(cluster.url, connections=2)
        assert publish_verb(redis) == "SPUBLISH", "the scripts know better"
        subscriber = Subscriber(redis, on_message=heard.message, on_reset=heard.reset)
        subscriber.start()
        await until(lambda: len(heard.resets) == 3)
        await asyncio.gather(*(subscriber.subscribe(channel) for channel in CHANNELS))
        for round_ in range(2):
            for channel in CHANNELS:
                cluster.owner_of(channel).ask("PUBLISH", channel, str(round_))
            expected = sorted((channel, b"%d" % round_) for channel in CHANNELS)
            await until(lambda: len(heard.messages) >= len(expected))  # noqa: B023
            assert sorted(heard.messages) == expected
            heard.messages.clear()
            await cluster.move_slot(slot_of(CHANNELS[0]))
        await subscriber.close()
        await redis.aclose(close_connection_pool=True)
