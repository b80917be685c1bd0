"""The kit's pair of servers: what a failover keeps, and what it loses."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from tests.kit.pair import Pair
from tests.kit.processes import wait_for
from tests.kit.redis_server import redis_6_2, redis_binary

BINARIES = [redis_binary(), *([old] if (old := redis_6_2()) and old != redis_binary() else [])]


@pytest.fixture(params=BINARIES, ids=["current", "6.2"][: len(BINARIES)])
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Pair]:
    pair = Pair(tmp_path / "pair", binary=request.param)
    with contextlib.closing(pair):
        yield pair.start()


def keys(pair: Pair) -> list[bytes]:
    with redis.Redis.from_url(pair.url) as client:
        return sorted(client.keys())


def write(pair: Pair, *names: str) -> None:
    with redis.Redis.from_url(pair.url) as client:
        for name in names:
            client.set(name, 1)


async def test_a_failover_keeps_what_was_replicated(pair: Pair) -> None:
    write(pair, "a", "b")
    pair.until_synchronised()
    await pair.fail_over()
    assert keys(pair) == [b"a", b"b"]
    write(pair, "c")


async def test_a_failover_loses_what_was_written_while_the_link_was_paused(pair: Pair) -> None:
    write(pair, "a")
    pair.until_synchronised()
    pair.link.pause()
    write(pair, "b", "c")
    assert keys(pair) == [b"a", b"b", b"c"]
    await pair.fail_over()
    assert keys(pair) == [b"a"]


async def test_a_link_that_goes_on_delivers_what_it_held_back(pair: Pair) -> None:
    pair.link.pause()
    write(pair, "a")
    pair.link.resume()
    pair.until_synchronised()
    await pair.fail_over()
    assert keys(pair) == [b"a"]


async def test_connections_do_not_survive_a_failover_and_new_ones_reach_the_new_primary(pair: Pair) -> None:
    before = pair.primary.info("replication")["master_replid"]
    with socket.create_connection(("127.0.0.1", pair.address.port), timeout=5) as sock:
        sock.sendall(b"PING\r\n")
        assert sock.recv(100) == b"+PONG\r\n"
        await pair.fail_over()
        with pytest.raises(ConnectionResetError):
            sock.recv(100)
    with redis.Redis.from_url(pair.url) as client:
        after = client.info("replication")
    assert after["role"] == "master" and after["master_replid"] != before


async def test_a_demoted_primary_drops_what_only_it_had(pair: Pair) -> None:
    pair.link.pause()
    write(pair, "lost")
    await pair.fail_over(demote=True)
    write(pair, "kept")
    pair.until_synchronised()
    assert pair.replica.ask("KEYS", "*") == [b"kept"]
    await pair.fail_over(demote=True)
    assert keys(pair) == [b"kept"]


async def test_failovers_may_follow_each_other(pair: Pair) -> None:
    for n in range(3):
        write(pair, f"kept {n}")
        pair.until_synchronised()
        pair.link.pause()
        write(pair, f"lost {n}")
        await pair.fail_over()
        await pair.rejoin()
    assert keys(pair) == [b"kept 0", b"kept 1", b"kept 2"]
    wait_for(lambda: pair.replica.info("replication")["role"] == "slave")
