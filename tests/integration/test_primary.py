"""Commands and subscriptions of a gateway follow the same primary (PROTOCOL 8.2)."""

from __future__ import annotations

import asyncio

import pytest

from broker.gateway import hub as hub_module
from broker.gateway.hub import Hub
from broker.runs.connections import connect
from broker.settings import Settings
from tests.conftest import Launcher
from tests.kit.redis_server import RedisServer
from tests.kit.waiting import until


def connections(server: RedisServer) -> set[str]:
    with server.client() as client:
        return {row["id"] for row in client.client_list() if row["name"] == "stream-broker"}


@pytest.mark.parametrize("same", [True, False])
async def test_what_is_on_two_primaries_is_connected_anew(
    launch: Launcher, monkeypatch: pytest.MonkeyPatch, same: bool
) -> None:
    monkeypatch.setattr(hub_module, "_PRIMARY_SECONDS", 0.1)
    one = launch.redis()
    other = one if same else launch.redis()
    commands, subscriptions = connect(one.url, connections=2), connect(other.url, connections=1)
    hub = Hub(commands, subscriptions, Settings(auth="none"))
    hub.start()
    try:

        async def connected() -> bool:
            return hub.connected

        await until(connected)
        await commands.ping()
        before = connections(one) | connections(other)

        async def reconnected() -> bool:
            return hub.connected and not before & connections(other)

        if same:
            await asyncio.sleep(1)
            assert connections(one) == before
        else:
            await until(reconnected)
    finally:
        await hub.close()
        for client in (commands, subscriptions):
            await client.aclose(close_connection_pool=True)
