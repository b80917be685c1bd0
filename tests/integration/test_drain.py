"""P17: a gateway that is asked to end turns unready, goes on accepting for a while, cuts its streams where clients can
go on elsewhere, and exits 0."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import signal
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import httpx
import pytest

from tests.conftest import Launcher
from tests.kit import nginx, raw, sse
from tests.kit.checker import check_log, check_reader, entries_of
from tests.kit.eventsource import EventSource, Stream
from tests.kit.http import Client, token
from tests.kit.processes import Gateway, wait_for
from tests.kit.scribe import Scribe, Written

AUTH = {"Authorization": f"Bearer {token('alice', ttl=7200)}"}
JSON = {"Content-Type": "application/json"}


def check_cut(stream: Stream) -> None:
    """On an event's boundary, with `retry:` as the last words, and without the last chunk."""
    assert stream.ending == "cut"
    body = bytes(stream.body)
    last = re.search(rb"(?:^|\n)retry: (\d+)\n$", body)
    assert last, body[-200:]
    assert 1000 <= int(last[1]) <= 3000
    whole = body[: last.start(1) - len(b"retry: ")]
    frames = [line for line in whole.split(b"\n") if not line.startswith((b":", b"retry:"))]
    assert b"\n".join(frames).endswith(b"\n\n") or not b"".join(frames)
    assert len(stream.events) == whole.count(b"\n\n")


async def opened(gateway: Gateway, run: Written, count: int = 1) -> list[Stream]:
    streams = [Stream() for _ in range(count)]
    await asyncio.gather(*(stream.open(gateway.url, f"{run.path}/stream", AUTH) for stream in streams))
    return streams


def status(url: str, path: str = "/readyz") -> int:
    return httpx.get(url + path, verify=False).status_code


async def test_a_gateway_that_drains_is_unready_at_once_and_goes_on_accepting_until_it_cuts(launch: Launcher) -> None:
    server = launch.redis()
    gateway = launch.gateway(server.url, drain_delay_seconds=2)
    async with Scribe(server.url) as scribe:
        run = await scribe.running("alice", "draining", tokens=3)
        [before] = await opened(gateway, run)
        gateway.signal(signal.SIGTERM)
        wait_for(lambda: status(gateway.url) == 503, seconds=1.5)
        reply = raw.ask(gateway.url, "GET", "/readyz")
        assert (reply.json["code"], reply.header("retry-after")) == ("draining", "1")
        assert status(gateway.url, "/healthz") == 200
        with Client(gateway.url, "alice") as client:
            assert client.post("/api/v1/query", json={"query": "still taken"}).status_code == 202
            assert client.get(run.path).status_code == 200
        [during] = await opened(gateway, run)
        await run.tokens(2)
        for stream in (before, during):
            await stream.until(lambda s=stream: len(s.events) == 7)  # type: ignore[misc]
            assert stream.ending is None
        for stream in (before, during):
            await stream.ended()
            check_cut(stream)
        assert gateway.wait(10) == 0
        check_reader(entries_of(before.events), await run.log())


async def test_streams_in_every_state_are_cut_between_events(launch: Launcher) -> None:
    """Queued, in the middle of a burst, waiting for repair, and with long ids."""
    server = launch.redis()
    gateway = launch.gateway(server.url, drain_delay_seconds=0.1)
    async with Scribe(server.url) as scribe:
        queued, busy = await scribe.create("alice", "queued"), await scribe.running("alice", "busy", tokens=3)
        streams = [*await opened(gateway, queued, 3), *await opened(gateway, busy, 10)]
        future = Stream()
        await future.open(gateway.url, f"{busy.path}/stream", {**AUTH, "Last-Event-ID": "999999-1"})
        long_ids = Stream()
        cursor = {"Last-Event-ID": f"{busy.request_id}/0-1"}
        body = json.dumps(busy.body).encode()
        await long_ids.open(gateway.url, "/api/v1/query/stream", AUTH | JSON | cursor, method="POST", body=body)
        writing = asyncio.create_task(write(busy))
        await asyncio.sleep(0.2)
        gateway.signal(signal.SIGTERM)
        for stream in (*streams, future, long_ids):
            await stream.ended()
            check_cut(stream)
        writing.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await writing
        log = await busy.log()
        for stream in streams[3:]:
            check_reader(entries_of(stream.events), log[: len(stream.events)])
        check_reader(entries_of(long_ids.events), log[1 : 1 + len(long_ids.events)])
        assert await asyncio.to_thread(gateway.wait, 10) == 0


async def write(run: Written) -> None:
    while True:
        await run.tokens(20)
        await asyncio.sleep(0)


async def test_a_stream_whose_run_has_ended_is_ended_properly_while_the_gateway_drains(launch: Launcher) -> None:
    """A cut after the terminal event would make a failure of a finished run, for many clients."""
    server = launch.redis()
    gateway = launch.gateway(server.url, drain_delay_seconds=0.5)
    async with Scribe(server.url) as scribe:
        run = await scribe.running("alice", "ends while draining")
        await run.append([("token", json.dumps({"text": "x" * 1000}))] * 300)
        streams = await opened(gateway, run, 5)
        with silent_client(gateway, run) as sock:
            gateway.signal(signal.SIGTERM)
            wait_for(lambda: status(gateway.url) == 503)
            await run.end()
            log = await run.log()
            for stream in streams:
                assert await stream.ended() == "finished"
                check_reader(entries_of(stream.events), log)
            received = b""
            while not received.endswith(b"0\r\n\r\n"):
                part = await asyncio.to_thread(sock.recv, 65536)
                assert part, "cut after its terminal event"
                received += part
            assert b"event: final" in received
        assert await asyncio.to_thread(gateway.wait, 10) == 0


async def test_who_comes_between_the_cut_and_the_end_is_told_to_come_again(launch: Launcher) -> None:
    """An EventSource by 200, `retry:` and a cut, as a 503 would close it for good; a submit by 503."""
    server = launch.redis()
    gateway = launch.gateway(server.url, drain_delay_seconds=0.3)
    told: list[Stream] = []
    refused: list[httpx.Response] = []

    async def watch(run: Written) -> None:
        with contextlib.suppress(ConnectionRefusedError):
            while True:
                stream = Stream()
                with contextlib.suppress(EOFError, ConnectionResetError):
                    await stream.open(gateway.url, f"{run.path}/stream", AUTH)
                    assert stream.status == 200, bytes(stream.body)
                    await stream.until(lambda s=stream: bool(s.events or s.ending))  # type: ignore[misc]
                    if not stream.events:
                        told.append(stream)
                await stream.close()

    async def submit(client: httpx.AsyncClient) -> None:
        with contextlib.suppress(httpx.TransportError):
            while True:
                reply = await client.post(f"{gateway.url}/api/v1/query", json={"query": "late"})
                assert reply.status_code in (200, 202, 503)
                if reply.status_code == 503:
                    refused.append(reply)

    async with Scribe(server.url) as scribe, httpx.AsyncClient(headers=AUTH, verify=False) as client:
        run = await scribe.running("alice", "late", tokens=1)
        gateway.signal(signal.SIGTERM)
        await asyncio.gather(watch(run), watch(run), submit(client), submit(client))
    assert gateway.wait(10) == 0
    assert told
    for stream in told:
        check_cut(stream)
    assert refused
    for reply in refused:
        assert (reply.json()["code"], reply.headers["Retry-After"]) == ("draining", "1")


@contextlib.contextmanager
def client_socket(gateway: Gateway, data: bytes) -> Iterator[socket.socket]:
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.settimeout(15)
        sock.connect(("127.0.0.1", gateway.port))
        sock.sendall(data)
        yield sock


def silent_client(gateway: Gateway, run: Written) -> contextlib.AbstractContextManager[socket.socket]:
    """One that asks for a stream and reads nothing."""
    return client_socket(gateway, raw.request("GET", f"{run.path}/stream", *AUTH.items()))


async def test_open_streams_and_clients_that_do_nothing_do_not_hold_up_the_exit(launch: Launcher) -> None:
    server = launch.redis()
    gateway = launch.gateway(server.url, drain_delay_seconds=0.2)
    async with Scribe(server.url) as scribe, contextlib.AsyncExitStack() as stack:
        run = await scribe.running("alice", "big")
        for _ in range(30):
            await run.append([("token", json.dumps({"text": "x" * 10_000}))] * 20)
        quiet = await scribe.running("alice", "quiet", tokens=1)
        for _ in range(3):
            stack.enter_context(silent_client(gateway, run))
        streams = await opened(gateway, quiet, 200)
        for data in (
            b"",  # connected, and silent
            b"GET /healthz HTTP/1.1\r\nHost: x\r\n",  # half a head
            raw.request("POST", "/api/v1/query", *AUTH.items(), *JSON.items(), ("Content-Length", "100")),  # no body
            b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n",  # kept alive
            raw.request("GET", f"{quiet.path}?wait=60", *AUTH.items()),  # held
        ):
            stack.enter_context(client_socket(gateway, data))
        for stream in streams:
            await stream.until(lambda s=stream: len(s.events) == 3)  # type: ignore[misc]
        began = time.monotonic()
        gateway.signal(signal.SIGTERM)
        assert await asyncio.to_thread(gateway.wait, 10) == 0
        print(f"exit after {time.monotonic() - began:.2f} s")
        for stream in streams:
            await stream.ended()
            check_cut(stream)
    # uvicorn waits five seconds for the body that does not come, and tells of the request that it then gives up.
    errors = [line["message"] for line in gateway.log_lines() if line["level"] == "ERROR"]
    assert errors in (
        [],
        ["Cancel 1 running task(s), timeout graceful shutdown exceeded", "Exception in ASGI application\n"],
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_second_signal_ends_the_gateway_at_once(launch: Launcher, number: signal.Signals) -> None:
    server = launch.redis()
    gateway = launch.gateway(server.url, drain_delay_seconds=100)
    async with Scribe(server.url) as scribe:
        run = await scribe.running("alice", "twice", tokens=1)
        [stream] = await opened(gateway, run)
        gateway.signal(number)
        wait_for(lambda: status(gateway.url) == 503)
        assert stream.ending is None
        gateway.signal(number)
        assert gateway.wait(5) == 0
        assert await stream.ended() == "cut"


async def test_a_poll_that_is_held_is_answered_before_the_gateway_ends(launch: Launcher) -> None:
    server = launch.redis()
    gateway = launch.gateway(server.url, drain_delay_seconds=0.5)
    async with Scribe(server.url) as scribe, httpx.AsyncClient(headers=AUTH, timeout=30, verify=False) as client:
        run = await scribe.running("alice", "held", tokens=1)
        held = [asyncio.create_task(client.get(f"{gateway.url}{run.path}?wait=60")) for _ in range(20)]
        await asyncio.sleep(0.5)
        gateway.signal(signal.SIGTERM)
        for task in held:
            reply = await task
            assert (reply.status_code, reply.json()["status"]) == (200, "running")
    assert gateway.wait(10) == 0


# Rolling restart


@dataclass
class PostReader:
    """A client of fetch-event-source's kind: repeats its POST with the last id until the body ends properly."""

    url: str
    body: bytes
    events: list[sse.Event] = field(default_factory=list)
    connections: int = 0

    async def run(self) -> None:
        while True:
            cursor = {"Last-Event-ID": self.events[-1].id} if self.events else {}
            stream = Stream()
            try:
                await stream.open(self.url, "/api/v1/query/stream", AUTH | JSON | cursor, method="POST", body=self.body)
                self.connections += 1
                assert stream.status == 200, bytes(stream.body)
                while stream.ending is None:
                    await asyncio.sleep(0.02)
                self.events += stream.events
                if stream.ending == "finished":
                    return
            finally:
                await stream.close()
            await asyncio.sleep(0.1)


@pytest.mark.skipif(nginx.find() is None, reason="no nginx here")
async def test_a_rolling_restart_behind_nginx_loses_nothing_and_closes_no_eventsource(launch: Launcher) -> None:
    server = launch.redis()
    gateways = [launch.gateway(server.url, drain_delay_seconds=0.2) for _ in range(3)]
    launch.worker(server.url)
    proxy = nginx.Nginx(launch.folder, [gateway.port for gateway in gateways])
    try:
        await asyncio.to_thread(proxy.until_ready)
        await roll(launch, server.url, gateways, proxy)
    finally:
        proxy.close()
        print(proxy.errors())


async def roll(launch: Launcher, redis_url: str, gateways: list[Gateway], proxy: nginx.Nginx) -> None:
    long = {"agent": "tokens", "parameters": {"count": 1200, "pause": 0.01}}
    seen: list[str] = []
    stop = asyncio.Event()

    async def submit_and_poll(client: httpx.AsyncClient) -> None:
        while not stop.is_set():
            reply = await client.post("/api/v1/query", json={"query": f"short {len(seen)}", "agent": "echo"})
            assert reply.status_code == 202, reply.text
            seen.append(reply.json()["request_id"])
            reply = await client.get(f"/api/v1/runs/{seen[-1]}", params={"wait": 5})
            assert reply.status_code == 200, reply.text
            await asyncio.sleep(0.02)

    async with httpx.AsyncClient(base_url=proxy.url, headers=AUTH, timeout=30, verify=False) as client:
        runs = [(await client.post("/api/v1/query", json={"query": f"long {n}", **long})).json() for n in range(4)]
        sources = [EventSource(proxy.url, run["links"]["stream"], AUTH, hurry=10) for run in runs for _ in range(5)]
        posts = [PostReader(proxy.url, json.dumps({"query": f"long {n}", **long}).encode()) for n in range(4)]
        reading = [asyncio.create_task(source.run()) for source in sources]
        reading += [asyncio.create_task(post.run()) for post in posts]
        busy = asyncio.create_task(submit_and_poll(client))
        await asyncio.sleep(0.3)
        for gateway in gateways:
            gateway.signal(signal.SIGTERM)
            assert await asyncio.to_thread(gateway.wait, 10) == 0
            await asyncio.to_thread(launch.gateway, redis_url, port=gateway.port, drain_delay_seconds=0.2)
        stop.set()
        await busy
        async with asyncio.timeout(60):
            await asyncio.gather(*reading)
        with Client(proxy.url, "alice") as reader:
            logs = {run["request_id"]: reader.log(run["request_id"]) for run in runs}
            for request_id in seen:
                assert reader.finished(request_id)["status"] == "completed"
    for n, source in enumerate(sources):
        assert source.closed == "204", "closed for good"
        assert len(source.streams) > 2, "it was cut"
        log = logs[runs[n // 5]["request_id"]]
        check_log(log)
        check_reader(entries_of(source.events), log)
    for n, post in enumerate(posts):
        assert post.connections > 1
        check_reader(entries_of(post.events), logs[runs[n]["request_id"]])
    assert len(seen) > 20
