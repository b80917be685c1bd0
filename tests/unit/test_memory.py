"""A server whose memory is full, or that deletes keys when it is, is named in the log of who uses it."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Iterator
from itertools import pairwise
from pathlib import Path

import pytest
from redis.asyncio import Redis

from broker.runs.connections import connect, is_away, is_out_of_memory
from broker.runs.memory import Memory, memory_of, report
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
        ({"maxmemory": 10, "maxmemory_policy": "noeviction", "used_memory": 5}, Memory()),
        ({"maxmemory": 10, "maxmemory_policy": "noeviction", "used_memory": 11}, Memory(full=True)),
        (
            {
                "maxmemory": 10,
                "maxmemory_policy": "noeviction",
                "used_memory": 15,
                "mem_not_counted_for_evict": 6,
            },
            Memory(),
        ),
        ({"maxmemory": 10, "maxmemory_policy": "allkeys-lru", "used_memory": 11}, Memory(evicts="allkeys-lru")),
        ({"maxmemory": 10, "maxmemory_policy": "volatile-ttl", "used_memory": 1}, Memory(evicts="volatile-ttl")),
    ],
)
def test_what_info_says_of_memory(info: dict[str, object], memory: Memory) -> None:
    assert memory_of(info) == memory


def test_each_change_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    states = [Memory(), Memory(full=True), Memory(full=True), Memory(), Memory(evicts="allkeys-lru")]
    states += [Memory(evicts="allkeys-lru"), Memory(evicts="volatile-lru"), Memory()]
    for before, now in pairwise(states):
        report(before, now, "")
    told = [(record.levelname, record.message[:24]) for record in caplog.records]
    assert told == [
        ("ERROR", "Redis is out of memory ("),
        ("INFO", "Redis has memory again"),
        ("ERROR", "Redis is to delete keys "),
        ("ERROR", "Redis is to delete keys "),
    ]


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


async def test_primaries_say_when_memory_is_full_and_when_it_is_not_any_more(
    client: Redis, server: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="broker.runs.memory")
    primaries = Primaries(client, client)
    for full in (False, True, True, False):
        (server.fill_memory if full else server.free_memory)()
        await primaries.look()
    assert [record.levelname for record in caplog.records] == ["ERROR", "INFO"]
    assert "out of memory" in caplog.records[0].message


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
