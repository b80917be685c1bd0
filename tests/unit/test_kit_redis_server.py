"""The kit's own redis-server: that its faults are what they say."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from tests.kit.processes import wait_for
from tests.kit.redis_server import RedisServer, redis_6_2, redis_binary

BINARIES = [redis_binary(), *([old] if (old := redis_6_2()) and old != redis_binary() else [])]


@pytest.fixture(params=BINARIES, ids=["current", "6.2"][: len(BINARIES)])
def binary(request: pytest.FixtureRequest) -> str:
    path: str = request.param
    return path


@pytest.fixture
def server(tmp_path: Path, binary: str) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path, binary=binary)
    try:
        yield server.start()
    finally:
        server.close()


@pytest.fixture
def other(tmp_path: Path, binary: str) -> Iterator[RedisServer]:
    folder = tmp_path / "other"
    folder.mkdir()
    server = RedisServer(folder, binary=binary)
    try:
        yield server.start()
    finally:
        server.close()


def fill(server: RedisServer, count: int) -> None:
    """By a script, as ours are written."""
    with server.client() as client:
        for n in range(count):
            client.eval("redis.call('XADD', KEYS[1], '1-' .. ARGV[1], 'n', ARGV[1])", 1, "log", str(n + 1))
        # While it waits for the disk, a server holds back what it has confirmed, for up to two seconds.
        wait_for(lambda: client.info("persistence")["aof_buffer_length"] == 0)


def length(server: RedisServer) -> int:
    count: int = server.ask("XLEN", "log")
    return count


def test_a_killed_server_comes_back_on_its_port_with_all_that_it_had(server: RedisServer) -> None:
    fill(server, 50)
    port = server.port
    server.kill()
    with pytest.raises(redis.exceptions.ConnectionError):
        server.ask("PING")
    server.start()
    assert (server.port, length(server)) == (port, 50)


def test_a_cut_takes_the_last_writes_and_no_others(server: RedisServer) -> None:
    fill(server, 50)
    server.restart(cut=1)
    assert length(server) == 49
    server.ask("XADD", "log", "1-50", "n", 50)
    server.restart()
    assert length(server) == 50


def test_a_cut_at_any_byte_leaves_a_server_that_starts(server: RedisServer) -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    fill(server, 200)
    had = 200
    for _ in range(4):
        server.kill()
        cut = server.cut_aof_somewhere(chance, within=2_000)
        server.start()
        left = length(server)
        assert had - 1 - cut / 40 <= left < had
        had = left


def test_a_living_server_is_not_cut(server: RedisServer) -> None:
    with pytest.raises(AssertionError):
        server.cut_aof(1)


def test_a_paused_server_answers_when_it_goes_on(server: RedisServer) -> None:
    server.pause()
    with (
        redis.Redis.from_url(server.url, socket_timeout=0.2) as client,
        pytest.raises(redis.exceptions.TimeoutError),
    ):
        client.ping()
    server.resume()
    server.ask("PING")


def test_a_full_server_refuses_writes_until_it_is_freed(server: RedisServer) -> None:
    fill(server, 1)
    server.fill_memory()
    with pytest.raises(redis.exceptions.OutOfMemoryError):
        server.ask("XADD", "log", "*", "n", 2)
    assert length(server) == 1
    server.free_memory()
    server.ask("XADD", "log", "*", "n", 2)


def test_its_clients_can_be_dropped(server: RedisServer) -> None:
    with server.client() as client, client.pubsub() as pubsub:
        pubsub.subscribe("channel")
        pubsub.get_message(timeout=5)
        assert server.drop_clients() == 0
        assert server.drop_clients("pubsub") == 1
        client.ping()
        assert server.drop_clients() == 1


def test_a_replica_follows_also_after_a_restart_and_keeps_its_data_when_it_is_promoted(
    server: RedisServer, other: RedisServer
) -> None:
    fill(server, 10)
    replid = other.info("replication")["master_replid"]
    other.replicate(server.port)
    wait_for(lambda: other.synchronised and other.offset == server.offset)
    with pytest.raises(redis.exceptions.ReadOnlyError):
        other.ask("SET", "a", 1)
    other.restart()
    wait_for(lambda: other.synchronised)
    other.promote()
    assert length(other) == 10
    other.ask("SET", "a", 1)
    assert other.info("replication")["master_replid"] != replid
    other.restart()
    assert other.ask("GET", "a") == b"1"
