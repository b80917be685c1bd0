"""Connections that are lost, on the event loop that the service runs on."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import uvloop

from broker.runs.connections import AWAY, connect
from broker.runs.subscriber import Subscriber
from tests.kit.redis_server import RedisServer


@pytest.mark.parametrize("factory", [asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def test_a_command_on_a_connection_that_has_just_been_lost_says_that_redis_is_away(
    redis_server: RedisServer, factory: Any
) -> None:
    async def use() -> None:
        client = connect(redis_server.url, connections=1)
        connection: Any = await client.connection_pool.get_connection()
        connection.abort()
        await asyncio.sleep(0.01)
        with pytest.raises(AWAY):
            await connection.send_command("PING")
            await connection.read_response()
        await client.connection_pool.release(connection)
        assert await client.ping()
        await client.aclose(close_connection_pool=True)

    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(use())


@pytest.mark.parametrize("factory", [asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def test_a_subscription_on_a_connection_that_has_just_been_lost_says_that_redis_is_away(
    redis_server: RedisServer, factory: Any
) -> None:
    async def use(turns: int) -> None:
        """Subscribes so many turns of the event loop after the loss."""
        client = connect(redis_server.url, connections=1)
        subscriber = Subscriber(client, on_message=lambda *_: None)
        subscriber.start()
        async with asyncio.timeout(10):
            while not subscriber.connected:
                await asyncio.sleep(0.01)
        subscriber.reconnect()
        for _ in range(turns):
            await asyncio.sleep(0)
        with pytest.raises(AWAY):
            await subscriber.subscribe("a")
        subscriber.unsubscribe("a")
        await subscriber.close()
        await client.aclose(close_connection_pool=True)

    with asyncio.Runner(loop_factory=factory) as runner:
        for turns in range(6):
            runner.run(use(turns))
