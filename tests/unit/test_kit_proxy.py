"""The kit's own proxy: that its faults are what they say."""

from __future__ import annotations

import contextlib
import random
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from tests.kit.proxy import Proxy
from tests.kit.redis_server import RedisServer


@pytest.fixture
def proxy(redis_server: RedisServer) -> Iterator[Proxy]:
    with redis_server.client() as client:
        client.flushall()
    with Proxy(redis_server.port) as proxy:
        yield proxy


def client_of(proxy: Proxy) -> redis.Redis:
    return redis.Redis.from_url(proxy.url, socket_timeout=5)


def test_a_proxy_passes_commands_and_replies(proxy: Proxy) -> None:
    with client_of(proxy) as client:
        assert client.incr("n") == 1
        assert client.pipeline().incr("n").lrange("nothing", 0, -1).execute() == [2, []]


def test_a_paused_proxy_is_silent_and_tells_nothing_of_the_other_end(proxy: Proxy, tmp_path: Path) -> None:
    server = RedisServer(tmp_path)
    with contextlib.closing(server):
        server.start()
        with Proxy(server.port) as proxy, redis.Redis.from_url(proxy.url, socket_timeout=0.5) as client:
            client.ping()
            proxy.pause()
            server.kill()
            for _ in range(2):  # on the connection that was open, and on a new one
                with pytest.raises(redis.exceptions.TimeoutError):
                    client.ping()
            server.start()
            proxy.resume()
            client.ping()


def test_a_proxy_leads_to_another_server_when_it_is_told_to(proxy: Proxy, tmp_path: Path) -> None:
    server = RedisServer(tmp_path)
    with contextlib.closing(server), client_of(proxy) as client:
        server.start()
        client.set("where", "one")
        proxy.point_to(server.port)
        assert client.get("where") is None
        server.ask("SET", "where", "two")
        assert client.get("where") == b"two"


@pytest.mark.parametrize("before", [False, True])
def test_every_third_reply_is_lost_after_the_command_was_executed_or_before(proxy: Proxy, before: bool) -> None:
    proxy.swallow(lambda command: command[0] == b"INCRBY", every=3, before=before)
    lost = 0
    with client_of(proxy) as client:
        for _ in range(12):
            try:
                client.incr("n")
            except redis.exceptions.ConnectionError:
                lost += 1
        assert (lost, proxy.swallowed) == (4, 4)
        assert client.get("n") == (b"8" if before else b"12")


def test_random_resets_lose_commands_and_replies(proxy: Proxy) -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    proxy.reset_at_random(random.Random(seed), 0.1)
    done = 0
    with client_of(proxy) as client:
        for _ in range(500):
            with contextlib.suppress(redis.exceptions.ConnectionError):
                client.incr("n")
                done += 1
        torn = proxy.torn
        assert torn == 500 - done and 15 < torn < 120
        proxy.heal()
        executed = int(client.get("n") or 0)
    assert done < executed < 500


def test_random_resets_hit_subscribers_too(proxy: Proxy, redis_server: RedisServer) -> None:
    with client_of(proxy) as client, client.pubsub() as pubsub:
        pubsub.subscribe("channel")
        pubsub.get_message(timeout=5)
        proxy.reset_at_random(random.Random(0), 1)
        redis_server.ask("PUBLISH", "channel", "news")
        with pytest.raises(redis.exceptions.ConnectionError):
            pubsub.get_message(timeout=5)


def serve_once(listener: socket.socket, reply: bytes) -> None:
    sock, _ = listener.accept()
    with sock:
        while sock.recv(65536):
            pass
        sock.sendall(reply)


def test_a_raw_proxy_passes_any_bytes_and_both_ends_of_them() -> None:
    """A client that closes its half, and a server that answers then and closes: nothing is cut off."""
    reply = bytes(range(256)) * 4_000
    with socket.create_server(("127.0.0.1", 0)) as listener, Proxy(listener.getsockname()[1], raw=True) as proxy:
        thread = threading.Thread(target=serve_once, args=[listener, reply])
        thread.start()
        with socket.create_connection(("127.0.0.1", proxy.port), timeout=10) as sock:
            sock.sendall(b"\x00\r\nnot RESP")
            sock.shutdown(socket.SHUT_WR)
            got = b""
            while part := sock.recv(65536):
                got += part
        thread.join(10)
    assert got == reply


@pytest.mark.parametrize("before", [False, True])
def test_a_strike_hits_the_nth_command_that_matches_and_no_other(proxy: Proxy, before: bool) -> None:
    struck = list[str]()
    proxy.strike(3, lambda: struck.append("now"), matches=lambda command: command[0] == b"INCRBY", before=before)
    with client_of(proxy) as client:
        for _ in range(2):
            client.get("n")
            client.incr("n")
        assert not struck
        with pytest.raises(redis.exceptions.ConnectionError):
            client.incr("n")
        assert struck == ["now"]
        assert client.get("n") == (b"2" if before else b"3")
        client.incr("n")
        assert struck == ["now"]
