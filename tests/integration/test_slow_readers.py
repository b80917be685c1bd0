"""P15: readers that do not read hurt only themselves, on the fast path and on the fall-back (HTTP/1.0)."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from urllib.parse import urlsplit

import psutil
import pytest

from tests.conftest import Launcher
from tests.kit.checker import check_log, check_reader, entries_of
from tests.kit.eventsource import Stream
from tests.kit.http import Client, token
from tests.kit.processes import Gateway, wait_for
from tests.kit.redis_server import RedisServer
from tests.kit.scale import LONG
from tests.kit.sse import parse

SEND_TIMEOUT = 1.0
MEGABYTE = 1024 * 1024


@dataclass
class Stage:
    redis: RedisServer
    gateway: Gateway
    client: Client

    @property
    def process(self) -> psutil.Process:
        return psutil.Process(self.gateway.pid)

    @property
    def memory(self) -> int:
        rss: int = self.process.memory_info().rss
        return rss

    @property
    def descriptors(self) -> int:
        count: int = self.process.num_fds()
        return count


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    launcher = Launcher(tmp_path_factory.mktemp("slow"))
    try:
        server = launcher.redis()
        gateway = launcher.gateway(server.url, send_timeout_seconds=SEND_TIMEOUT)
        launcher.worker(server.url)
        with Client(gateway.url) as client:
            client.finished(client.submit("warm"))
            yield Stage(server, gateway, client)
    finally:
        launcher.close()


class NonReader:
    """Asks for a stream and never reads, with as little room as a socket can have."""

    def __init__(self, url: str, request_id: str, *, version: str = "1.1", after: str = "") -> None:
        parts = urlsplit(url)
        self.socket = socket.socket()
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        self.socket.connect((parts.hostname, parts.port))
        cursor = f"Last-Event-ID: {after}\r\n" if after else ""
        self.socket.sendall(
            f"GET /api/v1/runs/{request_id}/stream HTTP/{version}\r\nHost: {parts.netloc}\r\n"
            f"Authorization: Bearer {token('alice')}\r\n{cursor}\r\n".encode("ascii")
        )

    def rest(self) -> bytes:
        """What had come before the end."""
        self.socket.settimeout(10)
        data = b""
        with contextlib.suppress(ConnectionResetError):
            while more := self.socket.recv(65536):
                data += more
        self.socket.close()
        return data


@contextlib.contextmanager
def non_readers(stage: Stage, count: int, request_id: str, *, version: str = "1.1") -> Iterator[list[NonReader]]:
    made = [NonReader(stage.gateway.url, request_id, version=version) for _ in range(count)]
    try:
        yield made
    finally:
        for each in made:
            each.socket.close()


async def read(stage: Stage, request_id: str) -> Stream:
    authorization = {"Authorization": f"Bearer {token('alice')}"}
    return await Stream().open(stage.gateway.url, f"/api/v1/runs/{request_id}/stream", authorization)


@pytest.mark.parametrize("version", ["1.1", "1.0"])
async def test_beside_readers_that_never_read_the_others_get_everything_and_those_are_cut(
    stage: Stage, version: str
) -> None:
    idle, before = stage.descriptors, stage.memory
    # 2.5 MB over more than two seconds: more than what the kernel and the gateway keep for one connection.
    body = {"agent": "burst", "parameters": {"count": 250, "size": 10_000, "pause": 0.008}}
    request_id = await asyncio.to_thread(stage.client.submit, f"steady {version}", **body)
    readers = [await read(stage, request_id) for _ in range(50)]
    highest = 0
    with non_readers(stage, 50, request_id, version=version) as stuck:
        await readers[0].until(lambda: stage.descriptors >= idle + 100, 20)
        while any(reader.ending is None for reader in readers):
            highest = max(highest, stage.memory)
            await asyncio.sleep(0.05)
        run = await asyncio.to_thread(stage.client.finished, request_id)
        assert run["status"] == "completed"
        log = await asyncio.to_thread(stage.client.log, request_id)
        check_log(log)
        for reader in readers:
            assert await reader.ended() == "finished"
            check_reader(entries_of(reader.events), log)
            await reader.close()
        await readers[0].until(lambda: stage.descriptors <= idle + 8, 20)
        for each in stuck:
            data = await asyncio.to_thread(each.rest)
            assert b"event: final" not in data
            assert not data.endswith(b"0\r\n\r\n"), "a cut that looks like an end"
    # For each of the 50: 64 KiB at which the transport says stop, and one slice beyond them; and room to move.
    assert highest - before < 50 * 128 * 1024 + 16 * MEGABYTE


async def test_a_reader_that_pauses_for_less_than_the_timeout_is_not_cut(stage: Stage) -> None:
    body = {"agent": "burst", "parameters": {"count": 60, "size": 20_000}}
    request_id = await asyncio.to_thread(stage.client.submit, "pauses", **body)
    await asyncio.to_thread(stage.client.finished, request_id)
    log = await asyncio.to_thread(stage.client.log, request_id)

    def hesitate() -> bytes:
        reader = NonReader(stage.gateway.url, request_id, version="1.0")
        data = b""
        reader.socket.settimeout(10)
        while more := reader.socket.recv(500_000):
            data += more
            if len(data) // 400_000 > (len(data) - len(more)) // 400_000:
                time.sleep(SEND_TIMEOUT / 2)
        reader.socket.close()
        return data

    data = await asyncio.to_thread(hesitate)
    check_reader(entries_of(parse(data.partition(b"\r\n\r\n")[2])), log)


@pytest.mark.parametrize("version", ["1.1", "1.0"] if LONG else ["1.1"])
def test_readers_that_stall_all_over_a_large_log_do_not_make_the_gateway_hold_it(
    stage: Stage, launch: Launcher, version: str
) -> None:
    """Memory is bounded by connections, never by backlog: each holds a piece of the log, not the log."""
    fresh = launch.gateway(
        stage.redis.url, send_timeout_seconds=SEND_TIMEOUT
    )  # what others have used is not given back
    stage = replace(stage, gateway=fresh)
    parameters = {"count": 400, "size": 50_000}
    request_id = stage.client.submit(f"large {version}", agent="burst", parameters=parameters)
    run = stage.client.finished(request_id)
    assert run["status"] == "completed"
    epoch = run["last_event_id"].partition("-")[0]
    idle, before = stage.descriptors, stage.memory
    stuck = [
        NonReader(stage.gateway.url, request_id, version=version, after=f"{epoch}-{seq}") for seq in range(2, 122, 3)
    ]
    highest = 0
    try:
        wait_for(lambda: stage.descriptors >= idle + len(stuck))
        began = time.monotonic()
        while time.monotonic() - began < SEND_TIMEOUT * 1.5:
            highest = max(highest, stage.memory)
            time.sleep(0.02)
        wait_for(lambda: stage.descriptors <= idle + 8, seconds=20)
    finally:
        for each in stuck:
            each.socket.close()
    # For each of them: a page of four slices, as they are and as chunks, what is in its connection, and room to move.
    assert highest - before < len(stuck) * 1.5 * MEGABYTE + 24 * MEGABYTE
