"""deploy/compose.yaml: what it would start, started as processes with its commands, variables and nginx.conf."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from broker.gateway.requests import MAX_BODY
from tests.kit import deploy, nginx, raw, sse
from tests.kit.checker import check_log, check_poll, check_reader, entries_of
from tests.kit.connection import Connection
from tests.kit.containers import Composed, Container, nginx_command
from tests.kit.eventsource import EventSource
from tests.kit.http import Client, token
from tests.kit.processes import SECRET, wait_for
from tests.kit.stub import Stub

pytestmark = pytest.mark.skipif(nginx.find() is None, reason="no nginx here")

ALICE = {"Authorization": f"Bearer {token('alice', ttl=7200)}"}
QUESTION = "How does a client resume a stream?"


def paced(pace: float) -> dict[str, Any]:
    """A run of the agent that is there without any setting, at so many tokens a second."""
    return {"parameters": {"pace": pace}}


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Composed]:
    composed = Composed(tmp_path_factory.mktemp("compose"), SECRET, heartbeat_seconds=0.3, grace_seconds=5)
    try:
        yield composed
    finally:
        composed.close()


@pytest.fixture
def stack(started: Composed) -> Composed:
    """Everything runs, and is healthy: what a test stopped is started again."""
    started.up()
    return started


@pytest.fixture
def alice(stack: Composed, subject: str) -> Iterator[Client]:
    """A client of nginx."""
    with Client(stack.url("nginx"), subject) as client:
        yield client


# -- the whole path ------------------------------------------------------------------------------------------


def test_a_run_is_streamed_while_it_goes_on(alice: Client) -> None:
    events: list[sse.Event] = []
    with alice.stream("POST", "/api/v1/query/stream", json={"query": QUESTION, **paced(60)}) as response:
        assert response.status_code == 200
        for event in sse.read(response.iter_raw()):
            events.append(event)
            if len(events) == 1:
                run = alice.run(event.json["request_id"])
                assert run["finished_at"] is None, "the first event came when the run had ended"
    log = alice.log(events[0].json["request_id"])
    check_log(log)
    check_reader(entries_of(events), log)
    assert sum(event.type == "token" for event in events) > 20, "the documents were found"
    check_poll(alice.run(events[0].json["request_id"]), log)


def test_heartbeats_come_through_nginx(alice: Client) -> None:
    """In the second before each token."""
    request_id = alice.submit(QUESTION, **paced(1))
    stream = sse.EventStream()
    with alice.stream("GET", f"/api/v1/runs/{request_id}/stream") as response:
        for data in response.iter_raw():
            stream.feed(data)
            if sum(comment.startswith("heartbeat") for comment in stream.comments) >= 3:
                break
    assert alice.run(request_id)["finished_at"] is None
    alice.post(f"/api/v1/runs/{request_id}/cancel")


def test_a_stream_of_one_gateway_is_resumed_at_the_other(stack: Composed, alice: Client, subject: str) -> None:
    request_id = alice.submit(QUESTION, **paced(40))
    seen: list[sse.Event] = []
    for name in ("gateway-1", "gateway-2"):
        with Client(stack.url(name), subject) as client:
            for event in client.events(request_id, after=seen[-1].id if seen else None):
                seen.append(event)
                if len(seen) == 15 and name == "gateway-1":
                    break
    log = alice.log(request_id)
    check_log(log)
    check_reader(entries_of(seen), log)


async def test_gateways_are_updated_one_after_the_other_and_nobody_misses_anything(stack: Composed) -> None:
    stop = asyncio.Event()
    short: list[str] = []

    async def submit_and_poll(client: httpx.AsyncClient) -> None:
        """Only a gateway that drains may refuse, and only with its own document."""
        while not stop.is_set():
            reply = await client.post("/api/v1/query", json={"query": f"short {len(short)}"})
            if reply.status_code == 503:
                assert (reply.json()["code"], reply.headers["Retry-After"]) == ("draining", "1")
                continue
            assert reply.status_code == 202, reply.text
            short.append(reply.json()["request_id"])
            reply = await client.get(f"/api/v1/runs/{short[-1]}", params={"wait": 5})
            assert reply.status_code == 200, reply.text
            await asyncio.sleep(0.05)

    async with httpx.AsyncClient(base_url=stack.url("nginx"), headers=ALICE, timeout=30, verify=False) as client:
        runs = [
            (await client.post("/api/v1/query", json={"query": QUESTION, "session_id": f"{n}", **paced(12)})).json()
            for n in range(2)
        ]
        sources = [
            EventSource(stack.url("nginx"), run["links"]["stream"], ALICE, hurry=5) for run in runs for _ in range(4)
        ]
        tasks = [asyncio.create_task(source.run()) for source in sources]
        busy = asyncio.create_task(submit_and_poll(client))
        try:
            async with asyncio.timeout(90):
                while not all(source.events for source in sources):
                    await asyncio.sleep(0.02)
                for name in ("gateway-1", "gateway-2"):
                    await asyncio.to_thread(cancel_a_run, stack.url(name))
                    assert await asyncio.to_thread(stack.stop, name) == 0
                    await asyncio.to_thread(stack.up)
                stop.set()
                await busy
                await asyncio.gather(*tasks)
        finally:
            for task in (busy, *tasks):
                task.cancel()
    with Client(stack.url("nginx"), "alice") as reader:
        for n, source in enumerate(sources):
            log = reader.log(runs[n // 4]["request_id"])
            check_log(log)
            check_reader(entries_of(source.events), log)
            assert source.closed == "204", "closed for good"
        assert max(len(source.streams) for source in sources) > 2, "it was cut"
        for request_id in short:
            assert reader.finished(request_id)["status"] == "completed"
    assert len(short) > 5


def cancel_a_run(url: str) -> None:
    """A gateway keeps what it has closed for a while (PROTOCOL 5.2), but does not outlive its grace for it."""
    with Client(url, "alice") as client:
        request_id = client.submit(f"cancelled at {url}", **paced(1))
        assert client.post(f"/api/v1/runs/{request_id}/cancel").status_code == 200


async def test_while_no_gateway_is_there_clients_are_told_to_come_again(stack: Composed, subject: str) -> None:
    with Client(stack.url("nginx"), subject) as client:
        request_id = client.submit(QUESTION, **paced(6))
        source = EventSource(
            stack.url("nginx"), f"/api/v1/runs/{request_id}/stream", {**ALICE, **auth(client)}, hurry=10
        )
        watching = asyncio.create_task(source.run())
        while len(source.events) < 12:
            await asyncio.sleep(0.02)
        for name in ("gateway-1", "gateway-2"):
            stack.containers[name].signal(signal.SIGTERM)
        for name in ("gateway-1", "gateway-2"):
            assert await asyncio.to_thread(stack.containers[name].wait) == 0
        for method, path in (("POST", "/api/v1/query"), ("GET", f"/api/v1/runs/{request_id}"), ("GET", "/readyz")):
            reply = client.request(method, path, json={"query": "x"} if method == "POST" else None)
            assert (reply.status_code, reply.json()["code"], reply.headers["Retry-After"]) == (503, "unavailable", "1")
        for path in ("/chat", "/api/v1/agent/stream"):
            assert raw.ask(stack.url("nginx"), "POST", path, body=b"{}").status == 503
        run = f"/api/v1/runs/{request_id}/stream"
        for path in (run, "/api/v1/stream?session_id=s", f"/api/v1/agent/stream/{request_id}", "/chat?prompt=x"):
            answer = raw.ask(stack.url("nginx"), "GET", path)
            assert (answer.status, answer.header("content-type")) == (200, "text/event-stream")
            parsed = sse.EventStream()
            assert parsed.feed(answer.body) == []
            assert parsed.retry_ms == 3000
        connections = len(source.streams)
        while len(source.streams) == connections:
            await asyncio.sleep(0.02)
        await asyncio.to_thread(stack.up)
        async with asyncio.timeout(60):
            await watching
        assert source.closed == "204"
        check_reader(entries_of(source.events), client.log(request_id))


def auth(client: Client) -> dict[str, str]:
    return {"Authorization": client.headers["Authorization"]}


def test_workers_that_are_stopped_lose_no_run_and_end_within_their_grace(stack: Composed, alice: Client) -> None:
    submitted = [alice.submit(QUESTION, session_id=f"{n}", **paced(10)) for n in range(6)]
    wait_for(lambda: all(alice.run(request_id)["status"] == "running" for request_id in submitted))
    for name in ("worker-1", "worker-2"):
        assert stack.stop(name) == 0
        stack.up()
    for request_id in submitted:
        run = alice.finished(request_id)
        assert run["status"] == "completed"
        log = alice.log(request_id)
        check_log(log)
        check_poll(run, log)


def test_what_was_run_survives_a_restart_of_redis(stack: Composed, alice: Client) -> None:
    request_id = alice.submit(QUESTION)
    before, log = alice.finished(request_id), alice.log(request_id)
    assert stack.stop("redis") == 0
    assert not stack.healthy("gateway-1")
    assert stack.healthy("nginx"), "it sends nobody away: the gateways answer"
    assert alice.get("/readyz").status_code == 503
    stack.start("redis")
    for name in ("redis", "gateway-1", "gateway-2"):
        stack.until_healthy(name)
    wait_for(lambda: alice.get(f"/api/v1/runs/{request_id}").status_code == 200)
    assert alice.run(request_id) == before
    assert alice.log(request_id) == log
    with Client(stack.url("nginx"), "alice") as client:
        assert client.finished(client.submit("and it goes on"))["status"] == "completed"


def test_a_health_check_fails_where_it_should(stack: Composed) -> None:
    stack.containers["gateway-1"].signal(signal.SIGTERM)
    wait_for(lambda: httpx.get(stack.url("gateway-1") + "/readyz", verify=False).status_code == 503, every=0.01)
    assert not stack.healthy("gateway-1")
    assert stack.containers["gateway-1"].wait() == 0
    stack.containers["gateway-2"].signal(signal.SIGTERM)
    assert stack.containers["gateway-2"].wait() == 0
    assert not stack.healthy("nginx")


# -- nginx.conf ----------------------------------------------------------------------------------------------


def test_nginx_finds_no_fault_with_its_configuration(tmp_path: Path) -> None:
    conf = tmp_path / "nginx.conf"
    conf.write_text(deploy.nginx_conf(tmp_path, "127.0.0.1", lambda server: "127.0.0.1:1"))
    binary = nginx.find()
    assert binary is not None
    done = subprocess.run([binary, "-t", "-c", str(conf), "-e", "stderr"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_bodies_that_are_too_large_get_a_problem_document_from_whom_they_reach(alice: Client) -> None:
    for size, by_gateway in ((MAX_BODY + 1000, True), (2 * 1024 * 1024, False)):
        reply = alice.post("/api/v1/query", json={"query": "x" * size})
        assert (reply.status_code, reply.json()["code"]) == (413, "too_large")
        assert reply.json()["detail"] == f"The body is larger than {MAX_BODY} bytes."
        assert ("X-Request-Id" in reply.headers) == by_gateway
    assert alice.finished(alice.submit("x" * 200_000, session_id="large"))["status"] == "completed"


def test_connections_to_the_gateways_are_kept(stack: Composed, alice: Client) -> None:
    def accepted() -> set[tuple[str, int]]:
        """nginx's ends of them."""
        return {
            (name, connection.raddr.port)
            for name in ("gateway-1", "gateway-2")
            for connection in psutil.Process(stack.containers[name].pid).net_connections("tcp")
            if connection.status == "ESTABLISHED" and connection.laddr.port == 8000
        }

    for _ in range(6):
        assert alice.get("/openapi.json").status_code == 200
    before = accepted()
    assert before
    for _ in range(30):
        assert alice.get("/openapi.json").status_code == 200
    assert len(accepted() - before) <= 2, "a new connection for each request"


def test_no_log_of_nginx_has_a_query_string(stack: Composed, alice: Client) -> None:
    """A ticket may be in it. Also where a gateway fails, which nginx logs with the whole request."""
    request_id = alice.submit(QUESTION, **paced(30))
    path = f"/api/v1/runs/{request_id}/stream?secret=a-secret-ticket"
    with alice.stream("GET", path) as response:
        received = response.iter_raw()
        assert next(received)
        for name in ("gateway-1", "gateway-2"):
            stack.containers[name].signal(signal.SIGKILL)
            stack.containers[name].wait()
        with pytest.raises(httpx.RemoteProtocolError):
            list(received)
    assert alice.get(f"/api/v1/runs/{request_id}?secret=a-secret-ticket").status_code == 503
    log = stack.containers["nginx"]
    wait_for(lambda: bool(access(log, request_id, 503)))
    [line] = access(log, request_id, 200)
    assert line["method"] == "GET"
    assert line["path"] == f"/api/v1/runs/{request_id}/stream"
    assert line["gateway"].partition(":")[0] in {stack.network.address(f"gateway-{n}") for n in (1, 2)}
    assert "a-secret-ticket" not in log.log_text()


def access(log: Container, request_id: str, status: int) -> list[dict[str, Any]]:
    """The access log's lines of a run that a ticket was sent for."""
    lines = [json.loads(line) for line in log.log_text().splitlines() if line.startswith("{")]
    return [line for line in lines if request_id in line["path"] and line["status"] == status and "T" in line["time"]]


# -- nginx.conf before servers that say what we want ---------------------------------------------------------


class Front:
    """The same nginx.conf before other servers."""

    def __init__(self, folder: Path, *servers: str) -> None:
        """`servers`: host:port, as many as the file has."""
        left = list(servers)
        network = deploy.Network()
        conf = folder / "nginx.conf"
        conf.write_text(deploy.nginx_conf(folder, network.address("nginx"), lambda _: left.pop(0)))
        assert not left
        self.url = f"http://{network.address('nginx')}:{deploy.directive('listen')[0].split()[0]}"
        self._process = Container(nginx_command(["nginx", "-g", "daemon off;"], conf), {}, folder / "nginx.log")

    def __enter__(self) -> Front:
        wait_for(self._listens)
        return self

    def _listens(self) -> bool:
        assert self._process.running, self._process.log_text()
        url = httpx.URL(self.url)
        with contextlib.suppress(OSError), socket.create_connection((url.host, url.port or 80)):
            return True
        return False

    def __exit__(self, *error: object) -> None:
        self._process.stop()


def server(stub: Stub) -> str:
    return httpx.URL(stub.url).netloc.decode()


OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
AWAY = b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 4\r\n\r\naway"
NOBODY = "127.0.0.1:1"


STREAM = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"


@contextlib.contextmanager
def streaming(folder: Path) -> Iterator[tuple[socket.socket, Connection]]:
    """A gateway's end of a stream through nginx, which has no length, and the client's. The head is sent."""
    with (
        socket.create_server(("127.0.0.1", 0)) as gateway,
        Front(folder, f"127.0.0.1:{gateway.getsockname()[1]}", NOBODY) as front,
        Connection(front.url) as client,
    ):
        client.send(client.request("GET", "/api/v1/runs/x/stream", {}))
        accepted, _ = gateway.accept()
        with accepted:
            assert accepted.recv(65536).startswith(b"GET /api/v1/runs/x/stream ")
            accepted.sendall(STREAM)
            yield accepted, client


def test_each_event_is_passed_on_while_its_gateway_says_nothing_more(tmp_path: Path) -> None:
    """Also without the header by which a gateway asks for it."""
    with streaming(tmp_path) as (gateway, client):
        assert client.head().status == 200
        for n in range(3):
            gateway.sendall(b"data: %d\n\n" % n)
            assert client.chunk() == b"data: %d\n\n" % n


def test_a_client_that_does_not_read_is_left_to_the_gateway_and_not_kept_for_in_nginx(tmp_path: Path) -> None:
    """Who takes nothing is cut by the gateway after its send timeout (P15), which has to notice it for that."""
    accepted = 0
    with streaming(tmp_path) as (gateway, _):
        gateway.settimeout(1)
        with pytest.raises(TimeoutError):
            while accepted < 128 * 1024 * 1024:
                accepted += gateway.send(b"data: 1\n\n" * 10_000)
    print(f"{accepted / 1e6:.1f} MB were taken, by kernels")


@pytest.mark.parametrize("script", [[OK[:0]], [AWAY]], ids=["lost", "503"])
def test_a_post_that_may_have_arrived_is_not_sent_again_but_a_get_is(tmp_path: Path, script: list[bytes]) -> None:
    body = b'{"query":"x"}'
    for method, both in (("POST", False), ("GET", True), ("DELETE", True)):
        with Stub(script, [OK]) as one, Stub(script, [OK]) as two:
            folder = tmp_path / method
            folder.mkdir()
            with Front(folder, server(one), server(two)) as front:
                reply = httpx.request(
                    method, front.url + "/api/v1/query", content=body if method == "POST" else None, verify=False
                )
                assert reply.status_code == 503
            assert len(one.requests) + len(two.requests) == 1 + both, method


def test_a_post_goes_to_the_other_gateway_where_one_is_not_there(tmp_path: Path) -> None:
    for n, servers in enumerate([[0, 1], [1, 0]]):
        with Stub([OK]) as stub:
            folder = tmp_path / f"{n}"
            folder.mkdir()
            with Front(folder, *([server(stub), NOBODY][k] for k in servers)) as front:
                assert httpx.post(front.url + "/api/v1/query", content=b"{}", verify=False).text == "ok"


def test_a_gateway_hears_who_asks_and_not_what_that_one_claims_to_be(tmp_path: Path) -> None:
    with Stub([OK]) as stub, Front(tmp_path, server(stub), NOBODY) as front:
        claims = {"X-Forwarded-For": "1.2.3.4", "X-Forwarded-Proto": "https", "Forwarded": "for=1.2.3.4"}
        claims |= {"X-Forwarded-Host": "evil.example.com", "Host": "broker.example.com", "Accept-Encoding": "gzip"}
        reply = httpx.get(front.url + "/api/v1/runs?limit=1", headers={**claims, **ALICE}, verify=False)
        assert reply.text == "ok"
        assert "content-encoding" not in reply.headers
        head = stub.requests[0]
        assert head.startswith("GET /api/v1/runs?limit=1 HTTP/1.1\r\n")
        heard = {name: stub.sent(name)[0] for name in (*claims, "Connection", "Authorization")}
        assert heard["X-Forwarded-For"] == "127.0.0.1"
        assert heard["X-Forwarded-Proto"] == "http"
        assert heard["X-Forwarded-Host"] == heard["Host"] == "broker.example.com"
        assert heard["Forwarded"] is None
        assert heard["Connection"] is None, "kept alive"
        assert heard["Authorization"] == ALICE["Authorization"]


def test_gateways_that_failed_are_asked_again_at_once(tmp_path: Path) -> None:
    """As all of them do while Redis is away. By default nginx would answer in their place for the next ten seconds."""
    with Stub([AWAY], [OK]) as one, Stub([AWAY], [OK]) as two, Front(tmp_path, server(one), server(two)) as front:
        assert httpx.get(front.url + "/readyz", verify=False).text == "away"
        for _ in range(2):
            assert httpx.get(front.url + "/readyz", verify=False).text == "ok"
