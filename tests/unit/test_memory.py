"""A server whose memory is full, or that deletes keys when it is, is named in the log of who uses it."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from redis.asyncio import Redis
from redis.exceptions import RedisError

from broker.runs import memory as memory_module
from broker.runs.connections import connect, is_away
from broker.runs.memory import Memory, is_out_of_memory, memory_of
from broker.runs.primaries import Primaries
from broker.runs.scripts import Scripts
from tests.kit.redis_server import VERSIONS, RedisServer, server_of
from tests.kit.runs import append, cancel, claim, create, queued, running, words

MIB = 1024 * 1024


@pytest.fixture(params=VERSIONS)
def server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[RedisServer]:
    made = server_of(request.param, tmp_path)
    try:
        yield made.start()
    finally:
        made.close()


@pytest.fixture
async def client(server: RedisServer) -> AsyncIterator[Redis]:
    made = connect(server.url, connections=2)
    yield made
    await made.aclose(close_connection_pool=True)


@pytest.mark.parametrize(
    ("info", "memory"),
    [
        ({}, Memory()),
        ({"maxmemory": 0, "maxmemory_policy": "allkeys-lru", "used_memory": 5}, Memory()),
        ({"maxmemory": 100 * MIB, "maxmemory_policy": "noeviction", "used_memory": 90 * MIB}, Memory()),
        ({"maxmemory": 100 * MIB, "maxmemory_policy": "noeviction", "used_memory": 99 * MIB}, Memory(full=True)),
        ({"maxmemory": 100 * MIB, "maxmemory_policy": "noeviction", "used_memory": 101 * MIB}, Memory(full=True)),
        (
            {
                "maxmemory": 100 * MIB,
                "maxmemory_policy": "noeviction",
                "used_memory": 105 * MIB,
                "mem_not_counted_for_evict": 10 * MIB,
            },
            Memory(),
        ),
        ({"maxmemory": 9, "maxmemory_policy": "allkeys-lru", "used_memory": 11}, Memory(evicts="allkeys-lru")),
        ({"maxmemory": 9, "maxmemory_policy": "volatile-ttl", "used_memory": 1}, Memory(evicts="volatile-ttl")),
    ],
)
def test_what_info_says_of_memory(info: dict[str, object], memory: Memory) -> None:
    assert memory_of(info) == memory


async def test_every_kind_of_write_that_full_memory_refuses_is_an_outage_with_that_name(
    client: Redis, server: RedisServer
) -> None:
    scripts = Scripts(client)
    waiting, lease = await queued(scripts), await running(scripts)
    server.fill_memory()
    calls = {
        "create": create(scripts, "0" * 32),
        "claim": claim(scripts, waiting),
        "append": append(scripts, lease, 2, *words("a")),
        "cancel": cancel(scripts, waiting),
        "a plain write": client.set("a", 1),
    }
    for name, call in calls.items():
        with pytest.raises(Exception) as failure:
            await call
        assert is_away(failure.value) and is_out_of_memory(failure.value), (name, failure.value)
    server.free_memory()
    assert (await append(scripts, lease, 2, *words("a"))).answer == "OK"


async def test_writes_that_are_refused_are_told_of_once_in_a_while(
    client: Redis, server: RedisServer, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO, logger="broker.runs.memory")
    lease = await running(Scripts(client))
    server.fill_memory()
    for told in (1, 1, 1, 2):
        monkeypatch.setattr(memory_module, "TOLD_SECONDS", 60 if told == 1 else 0)
        with pytest.raises(RedisError):
            await append(Scripts(client), lease, 2, *words("a"))
        assert len(caplog.records) == told
    assert {record.levelname for record in caplog.records} == {"ERROR"}
    assert caplog.records[0].message.startswith("Redis is out of memory (maxmemory)")
    assert caplog.records[0].__dict__["redis"] == f"127.0.0.1:{server.port}"


async def test_while_memory_is_full_leases_mean_nothing(client: Redis, server: RedisServer) -> None:
    """Owners cannot renew them (PROTOCOL 4.7)."""
    primaries = Primaries(client, client)
    await primaries.look()
    for full in (False, True, False):
        (server.fill_memory if full else server.free_memory)()
        before = primaries.calm_since("0" * 32)
        await primaries.look()
        assert (primaries.calm_since("0" * 32) > before) == full


@pytest.mark.parametrize("policy", ["allkeys-lru", "volatile-ttl"])
async def test_a_server_that_deletes_keys_is_told_of_at_the_first_look(
    client: Redis, server: RedisServer, caplog: pytest.LogCaptureFixture, policy: str
) -> None:
    caplog.set_level(logging.INFO, logger="broker.runs.memory")
    server.ask("CONFIG", "SET", "maxmemory-policy", policy)
    await Primaries(client, client).look()
    assert caplog.records == [], "without a limit nothing is deleted"
    server.ask("CONFIG", "SET", "maxmemory", 1024 * MIB)
    primaries = Primaries(client, client)
    await primaries.look()
    await primaries.look()
    [record] = caplog.records
    assert record.levelname == "ERROR"
    for part in (policy, "runs that were accepted will vanish", "Set maxmemory-policy to noeviction"):
        assert part in record.message
