"""The pub/sub connection of a process: what it hears, and what it does when it is cut."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Collection, Iterator
from dataclasses import dataclass, field

import pytest
from redis.asyncio import Redis

from broker.runs import link
from broker.runs.connections import connect
from broker.runs.subscriber import Subscriber
from tests.kit.proxy import Proxy
from tests.kit.redis_server import RedisServer
from tests.kit.waiting import until


@dataclass
class Heard:
    messages: list[tuple[str, bytes]] = field(default_factory=list)
    batches: list[int] = field(default_factory=list)
    """How many messages there were when each batch ended."""
    resets: int = 0
    at_reset: Callable[[], object] = lambda: None

    def message(self, channel: str, payload: bytes) -> None:
        self.messages.append((channel, payload))

    def batch(self) -> None:
        self.batches.append(len(self.messages))

    def reset(self, channels: Collection[str]) -> None:
        self.resets += 1
        self.at_reset()


@pytest.fixture
def proxy(redis_server: RedisServer) -> Iterator[Proxy]:
    with Proxy(redis_server.port) as proxy:
        yield proxy


@pytest.fixture
def heard() -> Heard:
    return Heard()


@pytest.fixture
async def subscriber(proxy: Proxy, heard: Heard) -> AsyncIterator[Subscriber]:
    client = connect(proxy.url, connections=1)
    made = Subscriber(client, on_message=heard.message, on_batch=heard.batch, on_reset=heard.reset)
    made.start()
    await until(lambda: heard.resets == 1)
    yield made
    await made.close()
    await client.aclose(close_connection_pool=True)


async def channels_of(redis: Redis) -> set[str]:
    return {name.decode() for name in await redis.pubsub_channels()}


async def cut_pubsub(redis: Redis) -> None:
    await redis.client_kill_filter(_type="pubsub")


async def test_what_is_published_after_the_confirmation_is_heard_in_order(
    redis: Redis, subscriber: Subscriber, heard: Heard
) -> None:
    await subscriber.subscribe("a")
    await subscriber.subscribe("b")
    sent = []
    for n in range(200):
        sent.append(("ab"[n % 2], b"%d\n\x00\xff" % n))
        await redis.publish(*sent[-1])
    await until(lambda: len(heard.messages) == 200)
    assert heard.messages == sent


async def test_what_one_read_brings_is_one_batch(redis: Redis, subscriber: Subscriber, heard: Heard) -> None:
    await subscriber.subscribe("a")
    heard.batches.clear()
    async with redis.pipeline(transaction=True) as pipe:
        for n in range(50):
            pipe.publish("a", b"%d" % n)
        await pipe.execute()
    await until(lambda: len(heard.messages) == 50)
    await until(lambda: bool(heard.batches) and heard.batches[-1] == 50)
    assert len(heard.batches) < 10


async def test_an_unsubscribed_channel_is_not_heard_and_redis_forgets_it(
    redis: Redis, subscriber: Subscriber, heard: Heard
) -> None:
    await subscriber.subscribe("a")
    await subscriber.subscribe("b")
    subscriber.unsubscribe("a")
    await subscriber.subscribe("c")
    assert await channels_of(redis) == {"b", "c"}
    await redis.publish("a", b"1")
    await redis.publish("b", b"2")
    await until(lambda: heard.messages == [("b", b"2")])


async def test_a_channel_that_is_left_and_taken_again_at_once_is_heard(
    redis: Redis, subscriber: Subscriber, heard: Heard
) -> None:
    await subscriber.subscribe("a")
    for _ in range(20):
        subscriber.unsubscribe("a")
        await subscriber.subscribe("a")
    await redis.publish("a", b"1")
    await until(lambda: heard.messages == [("a", b"1")])


async def test_a_subscription_that_was_given_up_does_not_confirm_a_later_one(
    redis: Redis, proxy: Proxy, subscriber: Subscriber, heard: Heard
) -> None:
    await subscriber.subscribe("warm")  # from here on the proxy passes it through, and can hold it
    proxy.pause()
    given_up = asyncio.create_task(subscriber.subscribe("a"))
    await asyncio.sleep(0)
    given_up.cancel()
    await asyncio.gather(given_up, return_exceptions=True)
    wanted = asyncio.create_task(subscriber.subscribe("a"))
    await asyncio.sleep(0.05)
    assert not wanted.done()
    proxy.resume()
    await wanted
    await redis.publish("a", b"1")
    await until(lambda: heard.messages == [("a", b"1")])


async def test_after_a_cut_everything_is_subscribed_again_before_the_reset_is_told(
    redis: Redis, redis_server: RedisServer, proxy: Proxy, subscriber: Subscriber, heard: Heard
) -> None:
    names = {f"channel-{n}" for n in range(300)}
    await asyncio.gather(*(subscriber.subscribe(name) for name in names))
    at_reset: list[set[str]] = []
    proxy.delay(0.1)
    with redis_server.client() as blocking:
        heard.at_reset = lambda: at_reset.append({name.decode() for name in blocking.pubsub_channels()})
        for round_ in range(1, 4):
            await cut_pubsub(redis)
            await until(lambda n=round_: len(at_reset) == n)  # type: ignore[misc]
    assert at_reset == [names] * 3
    await redis.publish("channel-7", b"after")
    await until(lambda: heard.messages == [("channel-7", b"after")])


async def test_a_subscription_that_waits_while_the_connection_is_lost_fails(
    redis: Redis, proxy: Proxy, subscriber: Subscriber, heard: Heard
) -> None:
    await subscriber.subscribe("warm")
    proxy.pause()
    waiting = asyncio.create_task(subscriber.subscribe("a"))
    await asyncio.sleep(0.05)
    proxy.refuse()
    proxy.resume()
    with pytest.raises(ConnectionError):
        await waiting
    assert not subscriber.connected
    with pytest.raises(ConnectionError):
        await subscriber.subscribe("b")
    proxy.accept()
    await until(lambda: heard.resets == 2)
    assert await channels_of(redis) == {"warm", "a", "b"}, "what was asked for meanwhile is subscribed"


async def test_what_was_unsubscribed_while_the_connection_was_lost_stays_so(
    redis: Redis, proxy: Proxy, subscriber: Subscriber, heard: Heard
) -> None:
    await subscriber.subscribe("a")
    await subscriber.subscribe("b")
    proxy.refuse()
    await until(lambda: not subscriber.connected)
    subscriber.unsubscribe("a")
    proxy.accept()
    await until(lambda: heard.resets == 2)
    assert await channels_of(redis) == {"b"}


@pytest.mark.parametrize("turns", range(4))
async def test_what_is_unsubscribed_in_the_moment_of_the_reconnect_stays_so(
    redis: Redis, subscriber: Subscriber, heard: Heard, turns: int
) -> None:
    for _ in range(5):
        await subscriber.subscribe("a")
        await cut_pubsub(redis)
        while subscriber.connected:
            await asyncio.sleep(0)
        while not subscriber.connected:
            await asyncio.sleep(0)
        for _ in range(turns):
            await asyncio.sleep(0)
        subscriber.unsubscribe("a")
        await subscriber.subscribe("b")  # what was sent before is done
        assert await channels_of(redis) == {"b"}


async def test_a_connection_on_which_nothing_comes_back_is_given_up(
    monkeypatch: pytest.MonkeyPatch, redis: Redis, proxy: Proxy, subscriber: Subscriber, heard: Heard
) -> None:
    """A black hole: no reset ever comes, only silence."""
    monkeypatch.setattr(link, "PING_SECONDS", 0.1)
    await subscriber.subscribe("a")
    await cut_pubsub(redis)  # the shortened interval counts from the next connection on
    await until(lambda: heard.resets == 2)
    proxy.pause()
    await until(lambda: not subscriber.connected)
    proxy.resume()
    await until(lambda: heard.resets >= 3)
    assert await channels_of(redis) == {"a"}


async def test_a_quiet_connection_whose_pings_are_answered_is_kept(
    monkeypatch: pytest.MonkeyPatch, redis: Redis, subscriber: Subscriber, heard: Heard
) -> None:
    monkeypatch.setattr(link, "PING_SECONDS", 0.1)
    await subscriber.subscribe("a")
    await cut_pubsub(redis)
    await until(lambda: heard.resets == 2)
    await asyncio.sleep(0.6)
    assert heard.resets == 2
    await redis.publish("a", b"still here")
    await until(lambda: heard.messages == [("a", b"still here")])


async def test_it_starts_while_redis_is_away_and_connects_when_it_is_back(
    redis: Redis, redis_server: RedisServer, heard: Heard
) -> None:
    with Proxy(redis_server.port) as proxy:
        proxy.refuse()
        client = connect(proxy.url, connections=1)
        subscriber = Subscriber(client, on_message=heard.message, on_reset=heard.reset, channels=["a"])
        subscriber.start()
        await asyncio.sleep(0.3)
        assert not subscriber.connected
        assert heard.resets == 0
        proxy.accept()
        await until(lambda: heard.resets == 1)
        assert await channels_of(redis) == {"a"}
        await subscriber.close()
        await client.aclose(close_connection_pool=True)


async def test_closing_leaves_no_connection_and_no_subscription(redis: Redis, redis_server: RedisServer) -> None:
    before = len(await redis.client_list())
    client = connect(redis_server.url, connections=1)
    heard = Heard()
    subscriber = Subscriber(client, on_message=heard.message, on_reset=heard.reset)
    subscriber.start()
    await until(lambda: heard.resets == 1)
    await subscriber.subscribe("a")
    await subscriber.close()
    await client.aclose(close_connection_pool=True)
    async with asyncio.timeout(10):
        while len(await redis.client_list()) != before or await channels_of(redis):
            await asyncio.sleep(0.01)


async def test_without_a_socket_it_uses_the_clients_own_pubsub() -> None:
    """fakeredis, the demo's last resort."""
    client = connect("fakeredis://test-subscriber", connections=1)
    heard = Heard()
    subscriber = Subscriber(client, on_message=heard.message, on_batch=heard.batch, on_reset=heard.reset)
    subscriber.start()
    await until(lambda: heard.resets == 1)
    await subscriber.subscribe("a")
    await client.publish("a", b"1")
    await until(lambda: heard.messages == [("a", b"1")])
    subscriber.unsubscribe("a")
    await subscriber.close()
    await client.aclose(close_connection_pool=True)
