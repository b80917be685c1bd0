"""Every error is a problem document (RFC 9457) with a stable code, also with Redis away, hanging or full."""

from __future__ import annotations

import http
import json
import re
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import httpx
import pytest

from broker.gateway.requests import MAX_BODY
from broker.runs import keys
from tests.conftest import Launcher, Service
from tests.kit import raw, sse
from tests.kit.http import Client, token
from tests.kit.processes import Gateway, wait_for
from tests.kit.redis_server import RedisServer, free_port

JSON = ("Content-Type", "application/json")
SUBMIT = "/api/v1/query"
SUBMITS = (SUBMIT, "/api/v1/query/stream")
MISSING = "/api/v1/runs/" + "0" * 32


def bearer(subject: str = "alice") -> tuple[str, str]:
    return ("Authorization", f"Bearer {token(subject)}")


def check_problem(reply: raw.Reply, status: int, code: str) -> dict[str, Any]:
    """A whole problem document, and nothing else in it."""
    assert reply.header("content-type") == "application/problem+json", reply
    problem: dict[str, Any] = reply.json
    assert (reply.status, problem["code"]) == (status, code), problem
    assert problem["status"] == status
    assert problem["title"] == http.HTTPStatus(status).phrase
    assert problem["type"] == "about:blank"
    assert problem["detail"] and isinstance(problem["detail"], str)
    assert set(problem) <= {"type", "title", "status", "code", "detail", "errors"}
    assert (reply.header("retry-after") is not None) == (status == 503)
    assert (reply.header("www-authenticate") is not None) == (status == 401)
    return problem


# Paths and methods


@pytest.mark.parametrize(
    "path",
    [
        "/nothing",
        "/api/v1",
        "/api/v1/",
        "/api/v1/runs/",
        "/api/v1/query/",
        "//api/v1/runs",
        "/api/v1/runs/x/y",
        "/api/v1/runs/%2e%2e/stream/x",
        "/API/V1/RUNS",
        "/api/v2/runs",
        "/%00",
        "/%ff%fe",
        "/.env",
        "/docs",
        "/healthz/",
    ],
)
@pytest.mark.parametrize("method", ["GET", "POST", "DELETE", "OPTIONS"])
def test_an_unknown_path_is_a_problem_and_no_redirect(service: Service, path: str, method: str) -> None:
    check_problem(raw.ask(service.gateways[0].url, method, path), 404, "not_found")


@pytest.mark.parametrize(
    ("path", "methods"),
    [
        ("/", "GET HEAD"),
        ("/healthz", "GET HEAD"),
        ("/readyz", "GET HEAD"),
        ("/openapi.json", "GET HEAD"),
        ("/api/v1/query", "POST"),
        ("/api/v1/query/stream", "POST"),
        ("/api/v1/runs", "GET HEAD"),
        (MISSING, "DELETE GET HEAD"),
        (MISSING + "/stream", "GET HEAD"),
        (MISSING + "/events", "GET HEAD"),
        (MISSING + "/cancel", "POST"),
    ],
)
def test_a_wrong_method_is_told_all_that_the_path_takes(service: Service, path: str, methods: str) -> None:
    takes = set(methods.split())
    for method in {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "PROPFIND"} - takes:
        reply = raw.ask(service.gateways[0].url, method, path, bearer())
        if method == "HEAD":
            assert (reply.status, reply.body) == (405, b"")
        else:
            check_problem(reply, 405, "method_not_allowed")
        assert set(re.split(r",\s*", reply.header("allow") or "")) == takes


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/v1", 404, "not_found"),
        ("POST", "/v1/chat/completions", 404, "not_found"),
        ("GET", "/v1/responses", 405, "method_not_allowed"),
    ],
)
def test_below_the_path_of_openai_errors_have_its_shape_where_no_route_is_too(
    service: Service, method: str, path: str, status: int, code: str
) -> None:
    reply = raw.ask(service.gateways[0].url, method, path)
    error = reply.json["error"]
    assert (reply.status, error["code"], error["type"]) == (status, code, "invalid_request_error")
    assert error["message"]
    assert reply.header("content-type") == "application/json"
    assert (reply.header("allow") is not None) == (status == 405)


@pytest.mark.parametrize("method", ["HEAD", "GET"])
def test_every_reply_names_its_request(service: Service, method: str) -> None:
    seen = {
        raw.ask(service.gateways[0].url, method, path, bearer()).header("x-request-id")
        for path in ("/", "/healthz", "/nothing", MISSING, SUBMIT, "/api/v1/runs?limit=x")
    }
    assert len(seen) == 6
    assert all(name and re.fullmatch("[0-9a-f]{32}", name) for name in seen)


# Bodies


BAD_BODIES: list[tuple[bytes, int, str]] = [
    (b"", 400, "bad_request"),
    (b" ", 400, "bad_request"),
    (b"{", 400, "bad_request"),
    (b'{"query": "x"', 400, "bad_request"),
    (b'{"query": "x"} {}', 400, "bad_request"),
    (b"{'query': 'x'}", 400, "bad_request"),
    (b'{"query": "x",}', 400, "bad_request"),
    (b'{"query": "\x01"}', 400, "bad_request"),
    (b'{"query": "x", "parameters": {"n": NaN}}', 400, "bad_request"),
    (b'{"query": "x", "parameters": {"n": Infinity}}', 400, "bad_request"),
    (b'{"query": "x", "parameters": {"n": -Infinity}}', 400, "bad_request"),
    (b'{"query": "x", "parameters": {"n": 1e999}}', 400, "bad_request"),
    (b'{"query": "x", "metadata": {"n": -1e999}}', 400, "bad_request"),
    (b'{"query": "x", "parameters": {"n": ' + b"9" * 5000 + b"}}", 400, "bad_request"),
    (b'{"query": "\xff\xfe"}', 400, "bad_request"),
    (b'{"query": "\xed\xa0\x80"}', 400, "bad_request"),
    ('{"query": "x"}'.encode("utf-16"), 400, "bad_request"),
    (b'\xef\xbb\xbf{"query": "x"}', 400, "bad_request"),
    (b"[" * 200_000, 400, "bad_request"),
    (b'{"a":' * 40_000, 400, "bad_request"),
    (b'{"query": "x", "parameters": {"a": ' + b"[" * 50_000 + b"]" * 50_000 + b"}}", 400, "bad_request"),
    (b"null", 422, "invalid"),
    (b"true", 422, "invalid"),
    (b"1", 422, "invalid"),
    (b'"query"', 422, "invalid"),
    (b"[]", 422, "invalid"),
    (b"{}", 422, "invalid"),
]


@pytest.mark.parametrize(("body", "status", "code"), BAD_BODIES, ids=[repr(row[0][:40]) for row in BAD_BODIES])
def test_a_body_that_is_no_json_object_is_a_problem(service: Service, body: bytes, status: int, code: str) -> None:
    for path in SUBMITS:
        reply = raw.ask(service.gateways[0].url, "POST", path, bearer(), JSON, body=body)
        problem = check_problem(reply, status, code)
        assert "pydantic" not in problem["detail"].lower()
        assert "traceback" not in problem["detail"].lower()


@pytest.mark.parametrize("depth", [50, 200, 400, 600, 800, 900, 950, 980, 1000, 1500, 5000])
def test_a_body_is_nested_too_deeply_or_it_is_a_run(service: Service, alice: Client, depth: int) -> None:
    """Wherever the limit is, it is one of the parser: nothing that was accepted fails later."""
    nested = "[" * depth + "]" * depth
    reply = alice.post(SUBMIT, content=f'{{"query":"{depth}","parameters":{{"a":{nested}}}}}', headers=dict([JSON]))
    assert reply.status_code == 202 if depth <= 50 else reply.status_code in (202, 400), reply.text
    if reply.status_code == 202:
        assert alice.finished(reply.json()["request_id"])["status"] == "completed"


def test_odd_but_legal_text_is_accepted_and_comes_back_as_it_was(alice: Client) -> None:
    text = "\ud800 \x00 \u2028 \u0085 \ufeff \U0001f600 \\u0000 </script>"
    body = {"query": text, "session_id": text, "metadata": {text: text}, "parameters": {text: [text, 10**300]}}
    content = json.dumps(body)
    reply = alice.post(SUBMIT, content=content, headers=dict([JSON]))
    assert reply.status_code == 202
    assert reply.json()["session_id"] == text
    run = alice.finished(reply.json()["request_id"])
    assert (run["answer"], run["session_id"], run["metadata"]) == (text, text, {text: text})


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"query": None}, "query"),
        ({"query": ""}, "query"),
        ({"query": 1}, "query"),
        ({"query": True}, "query"),
        ({"query": ["x"]}, "query"),
        ({"agent": 1}, "agent"),
        ({"agent": ""}, "agent"),
        ({"agent": "nobody"}, "agent"),
        ({"agent": "ECHO"}, "agent"),
        ({"session_id": ""}, "session_id"),
        ({"session_id": "x" * 256}, "session_id"),
        ({"session_id": 7}, "session_id"),
        ({"parameters": None}, "parameters"),
        ({"parameters": []}, "parameters"),
        ({"parameters": "x"}, "parameters"),
        ({"metadata": None}, "metadata"),
        ({"metadata": [1]}, "metadata"),
        ({"cancel_if_unwatched": "soon"}, "cancel_if_unwatched"),
        ({"cancel_if_unwatched": -1}, "cancel_if_unwatched"),
        ({"Query": "x"}, "Query"),
        ({"sesion_id": "x"}, "sesion_id"),
        ({"stream": True}, "stream"),
        ({"": 1}, ""),
        ({"stra\u00dfe": 1}, "stra\u00dfe"),
        ({"a.b": 1}, "a.b"),
    ],
    ids=repr,
)
def test_a_field_that_is_wrong_or_unknown_is_named(service: Service, change: dict[str, Any], field: str) -> None:
    body = json.dumps({"query": "x"} | change).encode()
    for path in SUBMITS:
        problem = check_problem(
            raw.ask(service.gateways[0].url, "POST", path, bearer(), JSON, body=body), 422, "invalid"
        )
        assert [error["field"] for error in problem["errors"]] == [field]
        assert all(error["message"] for error in problem["errors"])


def test_every_wrong_field_is_named_at_once(alice: Client) -> None:
    reply = alice.post(SUBMIT, json={"querry": "x", "agent": 1, "metadata": []})
    assert {error["field"] for error in reply.json()["errors"]} == {"query", "querry", "agent", "metadata"}


@pytest.mark.parametrize(
    "content_type",
    [
        None,
        "",
        "text/plain",
        "text/json",
        "application/x-www-form-urlencoded",
        "multipart/form-data; boundary=x",
        "application/xml",
        "application/json-patch+json",
        "application/jsonx",
        "application",
        "json",
    ],
)
def test_a_body_of_another_type_is_refused(service: Service, content_type: str | None) -> None:
    headers = [("Content-Type", content_type)] if content_type is not None else []
    for path in SUBMITS:
        reply = raw.ask(service.gateways[0].url, "POST", path, bearer(), *headers, body=b'{"query":"x"}')
        check_problem(reply, 415, "unsupported_media_type")


@pytest.mark.parametrize("content_type", ["application/json", "Application/JSON", "application/json;charset=UTF-8"])
def test_json_may_be_named_in_any_legal_form(service: Service, content_type: str) -> None:
    header = ("Content-Type", content_type)
    reply = raw.ask(service.gateways[0].url, "POST", SUBMIT, bearer(), header, body=b'{"query":"x"}')
    assert reply.status in (200, 202)


def padded(size: int) -> bytes:
    """A submit of exactly `size` bytes."""
    head, tail = b'{"query":"' + secrets.token_hex(8).encode(), b'"}'
    return head + b"x" * (size - len(head) - len(tail)) + tail


def chunked(body: bytes, size: int = 16_000) -> bytes:
    parts = [body[at : at + size] for at in range(0, len(body), size)]
    return b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"


def test_a_body_may_have_its_limit_and_not_one_byte_more(service: Service) -> None:
    url = service.gateways[0].url
    assert raw.ask(url, "POST", SUBMIT, bearer(), JSON, body=padded(MAX_BODY)).status == 202
    for path in SUBMITS:
        check_problem(raw.ask(url, "POST", path, bearer(), JSON, body=padded(MAX_BODY + 1)), 413, "too_large")


def test_a_body_without_a_length_has_the_same_limit(service: Service) -> None:
    url = service.gateways[0].url
    head = raw.request("POST", SUBMIT, bearer(), JSON, ("Transfer-Encoding", "chunked"))
    assert raw.parse(raw.exchange(url, head + chunked(padded(MAX_BODY)))).status == 202
    check_problem(raw.parse(raw.exchange(url, head + chunked(padded(MAX_BODY + 1)))), 413, "too_large")


@pytest.mark.parametrize("length", [MAX_BODY + 1, 10**12])
def test_a_body_that_says_that_it_will_be_too_large_is_refused_before_it_comes(service: Service, length: int) -> None:
    head = raw.request("POST", SUBMIT, bearer(), JSON, ("Content-Length", str(length)))
    check_problem(raw.parse(raw.exchange(service.gateways[0].url, head)), 413, "too_large")


def test_an_endless_body_is_refused_while_it_comes(service: Service) -> None:
    url = httpx.URL(service.gateways[0].url)
    with socket.create_connection((url.host, url.port), timeout=15) as sock:
        sock.sendall(raw.request("POST", SUBMIT, bearer(), JSON, ("Transfer-Encoding", "chunked")))
        sock.sendall(b"1\r\n{\r\n")
        stop = threading.Event()

        def send() -> None:
            try:
                while not stop.is_set():
                    sock.sendall(b"4000\r\n" + b" " * 0x4000 + b"\r\n")
            except OSError:
                pass

        sender = threading.Thread(target=send)
        sender.start()
        try:
            received = b""
            while b"too_large" not in received:
                part = sock.recv(65536)
                assert part, received
                received += part
        finally:
            stop.set()
            sock.close()
            sender.join()
    assert received.startswith(b"HTTP/1.1 413 ")


def test_an_error_comes_before_the_body_where_the_token_is_wrong(service: Service) -> None:
    """Nobody reads what a stranger sends."""
    head = raw.request("POST", SUBMIT, JSON, ("Content-Length", "1000"))
    check_problem(raw.parse(raw.exchange(service.gateways[0].url, head)), 401, "unauthorized")


# Parameters


@pytest.mark.parametrize(
    ("path", "names"),
    [
        ("/api/v1/runs?limit={}", ["0", "501", "-1", "1.5", "x", "", "+1", "1e2", "%D9%A3", "01", "9" * 400]),
        ("/api/v1/runs?cursor={}", ["x", "%00", "====", "%C3%BC", "MTI", "OjA", "eDp4", "LTE6", "9" * 4000]),
        ("{run}?wait={}", ["-1", "x", "nan", "inf", "1e9", "", "1.", "%D9%A3", "9" * 400]),
        ("{run}/events?limit={}", ["0", "501", "x"]),
        ("{run}/events?cursor={}", ["x", "1", "1-", "-1", "01-1", "1-1-1", "%00"]),
        ("{run}/stream?last_event_id={}", ["x", "1"]),
    ],
)
def test_a_parameter_that_is_none_is_refused(alice: Client, path: str, names: list[str]) -> None:
    run = alice.submit("parameters")
    for text in names:
        asked = path.replace("{run}", f"/api/v1/runs/{run}").replace("{}", text)
        reply = alice.get(asked)
        assert reply.status_code == 400, asked
        assert reply.json()["code"] in ("bad_request", "bad_cursor")
        assert len(reply.text) < 500, "no echo of what was sent"


@pytest.mark.parametrize("prefer", ["", "wait", "wait=", "wait=x", "wait=-1", "respond-async", "wait=1e9", "x=1; y"])
def test_a_preference_that_is_not_understood_is_ignored(alice: Client, prefer: str) -> None:
    reply = alice.get(f"/api/v1/runs/{alice.submit('preferences')}", headers={"Prefer": prefer})
    assert reply.status_code == 200
    assert "Preference-Applied" not in reply.headers


# What is not HTTP


@pytest.mark.parametrize(
    "data",
    [
        b"\r\n\r\n\r\nNONSENSE\r\n\r\n",
        b"GET\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET / HTTQ/1.1\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"x" * 300,
        b"*1\r\n$4\r\nPING\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nBad Header: x\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nX: a\x00b\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nContent-Length: x\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
        b"POST /api/v1/query HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab",
        b"POST /api/v1/query HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"GET /\x00 HTTP/1.1\r\nHost: x\r\n\r\n",
    ],
    ids=repr,
)
def test_what_cannot_be_parsed_is_a_problem_and_the_end_of_the_connection(service: Service, data: bytes) -> None:
    url = service.gateways[0].url
    check_problem(raw.parse(raw.exchange(url, data)), 400, "bad_request")
    assert raw.ask(url, "GET", "/healthz").status == 200


def test_a_body_whose_chunks_are_broken_ends_the_connection_and_starts_no_run(alice: Client, subject: str) -> None:
    head = raw.request("POST", SUBMIT, bearer(subject), JSON, ("Transfer-Encoding", "chunked"))
    for rest in (b"zz\r\n{}\r\n0\r\n\r\n", b"-1\r\n\r\n", b'd\r\n{"query":"x"}XX'):
        received = raw.exchange(str(alice.base_url), head + rest)
        assert received == b"" or b" 400 " in received.split(b"\r\n")[0]
    for body in (b'{"query":', b'{"query":"half"}'):
        head = raw.request("POST", SUBMIT, bearer(subject), JSON, ("Content-Length", str(len(body) + 10)))
        assert b" 20" not in raw.exchange(str(alice.base_url), head + body, half_close=True)[:15]
    assert alice.get("/api/v1/runs").json()["runs"] == []


# What nobody foresaw


async def test_a_failure_inside_is_a_500_that_tells_nothing_and_is_found_in_the_log(
    service: Service, alice: Client
) -> None:
    request_id = alice.submit("to be damaged")
    alice.finished(request_id)
    with service.redis.client() as redis:
        redis.hset(keys.run(request_id), "metadata", "{a secret detail")
    reply = alice.get(f"/api/v1/runs/{request_id}")
    assert (reply.status_code, reply.json()["code"]) == (500, "internal")
    assert "secret" not in reply.text
    name = reply.headers["X-Request-Id"]
    wait_for(lambda: bool(service.gateways[0].logged("access", request_id=name)))
    [line] = service.gateways[0].logged("unexpected error", request_id=name)
    assert "JSONDecodeError" in line["exc_info"]
    assert alice.delete(f"/api/v1/runs/{request_id}").status_code == 204


# Redis


@dataclass
class Place:
    """A gateway, a worker and a run that has ended, on a Redis that the tests may stop."""

    redis: RedisServer
    gateway: Gateway
    finished: str

    def client(self) -> Client:
        return Client(self.gateway.url, "alice")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    launcher = Launcher(tmp_path_factory.mktemp("away"))
    try:
        server = launcher.redis()
        gateway = launcher.gateway(server.url)
        launcher.worker(server.url)
        with Client(gateway.url, "alice") as client:
            finished = client.submit("before")
            client.finished(finished)
        yield Place(server, gateway, finished)
    finally:
        launcher.close()


def event_source(client: Client, path: str) -> bytes:
    """What an EventSource gets before it is cut."""
    body = b""
    with client.stream("GET", path) as response:
        assert response.status_code == 200, "any other status closes an EventSource for good"
        with pytest.raises(httpx.RemoteProtocolError):  # without the last chunk: only a terminal ends the body
            for part in response.iter_raw():
                body += part
    return body


def check_away(place: Place) -> None:
    """Every route, all at once, while Redis cannot answer."""
    run = f"/api/v1/runs/{place.finished}"
    calls: list[tuple[str, str, dict[str, Any]]] = [
        ("POST", SUBMIT, {"json": {"query": "x"}}),
        ("POST", SUBMIT, {"json": {"query": "x"}, "headers": {"Idempotency-Key": "k"}}),
        ("POST", "/api/v1/query/stream", {"json": {"query": "x"}}),
        (
            "POST",
            "/api/v1/query/stream",
            {"json": {"query": "before"}, "headers": {"Last-Event-ID": f"{place.finished}/0-1"}},
        ),
        ("GET", "/api/v1/runs", {}),
        ("GET", run, {}),
        ("GET", f"{run}?wait=30", {}),
        ("GET", f"{run}/events", {}),
        ("POST", f"{run}/cancel", {}),
        ("DELETE", run, {}),
        ("GET", "/readyz", {}),
    ]
    with place.client() as client, ThreadPoolExecutor(40) as pool:
        asked = [pool.submit(client.request, method, path, **options) for method, path, options in calls * 2]
        sources = [pool.submit(event_source, client, f"{run}/stream") for _ in range(4)]
        assert client.get("/healthz").status_code == 200
        assert client.get("/openapi.json").status_code == 200
        assert client.get("/api/v1/runs/nonsense").status_code == 404
        for (method, path, _), reply in zip(calls * 2, [job.result(30) for job in asked], strict=True):
            assert (reply.status_code, reply.json()["code"]) == (503, "unavailable"), f"{method} {path}"
            assert reply.headers["Retry-After"].isdecimal()
        for source in sources:
            parser = sse.EventStream()
            assert parser.feed(source.result(30)) == []
            assert parser.retry_ms is not None
            assert 1000 <= parser.retry_ms <= 3000


def check_back(place: Place) -> None:
    with place.client() as client:
        wait_for(lambda: client.get("/readyz").status_code == 200, seconds=20)
        assert client.run(place.finished)["answer"] == "before"
        assert client.get(f"/api/v1/runs/{place.finished}/events").json()["events"]
        events = client.submit_and_read(f"after {secrets.token_hex(4)}")
        assert events[-1].type == "final"
        assert list(client.events(place.finished))[-1].type == "final"


def test_without_redis_every_route_says_so_and_an_eventsource_comes_again(place: Place) -> None:
    place.redis.kill()
    check_away(place)
    place.redis.start()
    check_back(place)


def test_with_a_redis_that_hangs_every_route_says_so_within_seconds(place: Place) -> None:
    place.redis.pause()
    try:
        began = time.monotonic()
        check_away(place)
        assert time.monotonic() - began < 25, "a socket's timeout and a wait for the pool, one after the other"
    finally:
        place.redis.resume()
    check_back(place)


def test_a_gateway_starts_without_redis_and_is_ready_when_it_comes(launch: Launcher) -> None:
    gateway = launch.gateway(f"redis://127.0.0.1:{free_port()}", ready="/healthz")
    check_problem(raw.ask(gateway.url, "GET", "/readyz"), 503, "unavailable")
    check_problem(raw.ask(gateway.url, "POST", SUBMIT, bearer(), JSON, body=b'{"query":"x"}'), 503, "unavailable")
    assert gateway.stop() == 0


def test_a_redis_that_is_full_takes_no_submit_and_is_still_read(place: Place) -> None:
    with place.client() as client, place.redis.client() as redis:
        redis.config_set("maxmemory", 1)
        try:
            reply = client.post(SUBMIT, json={"query": "no room"})
            assert (reply.status_code, reply.json()["code"]) == (503, "unavailable")
            assert client.run(place.finished)["status"] == "completed"
            assert list(client.events(place.finished))[-1].type == "final"
        finally:
            redis.config_set("maxmemory", 0)
    check_back(place)


def test_a_redis_that_has_become_a_replica_takes_no_submit_and_is_still_read(place: Place) -> None:
    with place.client() as client, place.redis.client() as redis:
        redis.replicaof("127.0.0.1", free_port())
        try:
            reply = client.post(SUBMIT, json={"query": "read-only"})
            assert (reply.status_code, reply.json()["code"]) == (503, "unavailable")
            assert client.run(place.finished)["status"] == "completed"
        finally:
            redis.replicaof("NO", "ONE")
    check_back(place)


def test_a_redis_that_has_forgotten_its_scripts_is_told_them_again(place: Place) -> None:
    with place.client() as client, place.redis.client() as redis:
        redis.script_flush()
        assert client.submit_and_read("scripts")[-1].type == "final"
        running = client.submit("to be stopped", agent="slow")
        redis.script_flush()
        assert client.post(f"/api/v1/runs/{running}/cancel").json()["status"] == "cancelled"
