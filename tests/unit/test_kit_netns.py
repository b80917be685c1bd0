"""The kit's black hole: that it is silent."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import redis

from tests.conftest import Launcher
from tests.kit.http import Client
from tests.kit.netns import FAR, NEAR, Namespace, Network, needs_root
from tests.kit.processes import wait_for
from tests.kit.redis_server import RedisServer


@pytest.fixture
def network(launch: Launcher) -> Network:
    return launch.network()


@pytest.fixture
def server(launch: Launcher, network: Network) -> RedisServer:
    return launch.redis(namespace=network.far)


@pytest.fixture
def near(network: Network) -> Iterator[ThreadPoolExecutor]:
    """A thread that lives in the near network."""
    with ThreadPoolExecutor(1, initializer=network.near.enter) as pool:
        yield pool


def ping(sock: socket.socket) -> bytes:
    sock.sendall(b"PING\r\n")
    return sock.recv(100)


def test_a_dropped_wire_is_silent_and_a_healed_one_goes_on(
    network: Network, server: RedisServer, near: ThreadPoolExecutor
) -> None:
    def work() -> None:
        with socket.create_connection((FAR, server.port), timeout=10) as sock:
            assert ping(sock) == b"+PONG\r\n"
            network.drop()
            sock.settimeout(1.5)
            with pytest.raises(TimeoutError):
                ping(sock)
            # Longer than ARP would need to notice that nobody answers: EHOSTUNREACH after three seconds.
            with pytest.raises(TimeoutError):
                socket.create_connection((FAR, server.port), timeout=4)
            network.heal()
            sock.settimeout(20)
            assert sock.recv(100) == b"+PONG\r\n"

    near.submit(work).result(40)


@pytest.mark.parametrize("way", ["outward", "homeward"])
def test_one_way_may_be_dropped(network: Network, server: RedisServer, near: ThreadPoolExecutor, way: str) -> None:
    def work() -> None:
        with redis.Redis(FAR, server.port, socket_timeout=1) as client:
            client.ping()
            network.drop(outward=way == "outward", homeward=way == "homeward")
            with pytest.raises(redis.exceptions.TimeoutError):
                client.incr("n")

    near.submit(work).result(20)
    assert server.ask("GET", "n") == (None if way == "outward" else b"1")


def test_the_test_itself_reaches_both_ends_of_a_dropped_wire(network: Network, server: RedisServer) -> None:
    network.drop()
    assert server.ask("PING")
    server.restart()
    assert server.ask("PING")


def test_a_service_in_the_near_network_works_on_a_redis_in_the_far_one(
    launch: Launcher, network: Network, server: RedisServer
) -> None:
    url = f"redis://{FAR}:{server.port}"
    gateway = launch.gateway(url, namespace=network.near)
    launch.worker(url, namespace=network.near)
    with Client(gateway.url) as client:
        assert client.submit_and_read("one two")[-1].type == "final"


def test_networks_do_not_touch_ours(network: Network) -> None:
    ours = subprocess.run(["ip", "-oneline", "address"], capture_output=True, text=True, check=True).stdout
    assert "wire" not in ours and FAR not in ours and NEAR not in ours


def test_a_namespace_ends_with_the_process_that_made_it(tmp_path: Path) -> None:
    needs_root()
    program = "from tests.kit.netns import Namespace; import time; print(Namespace().pid, flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        os.kill(pid, 0)
        process.send_signal(signal.SIGKILL)

    def is_gone() -> bool:
        with contextlib.suppress(ProcessLookupError, FileNotFoundError):
            return Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z"
        return True

    wait_for(is_gone)


def test_two_networks_do_not_meet(launch: Launcher, network: Network, server: RedisServer) -> None:
    """The same addresses twice: each test has its own."""
    other = launch.network()

    def work() -> None:
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((FAR, server.port), timeout=5)

    with ThreadPoolExecutor(1, initializer=other.near.enter) as pool:
        pool.submit(work).result(10)


def test_a_namespace_is_left_when_it_is_closed() -> None:
    needs_root()
    namespace = Namespace()
    namespace.close()
    assert not Path(f"/proc/{namespace.pid}").exists()
