"""The stream as an HTTP response: its headers, HEAD, one connection for many requests, and what ends its body."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from typing import Any

import pytest

from tests.conformance.conftest import Wire, WireLauncher
from tests.kit import sse
from tests.kit.checker import check_reader, entries_of
from tests.kit.connection import Connection
from tests.kit.http import Client, token
from tests.kit.processes import Gateway, wait_for

TOKENS: dict[str, Any] = {"agent": "tokens", "parameters": {"count": 6, "pause": 0.05}}


def _bearer(subject: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token(subject)}"}


def _stream(request_id: str) -> str:
    return f"/api/v1/runs/{request_id}/stream"


def _submission(query: str, **body: Any) -> bytes:
    return json.dumps({"query": query, **body}).encode("ascii")


@pytest.fixture(params=[0, 1])
def connection(wire: Wire, request: pytest.FixtureRequest) -> Iterator[Connection]:
    """To each gateway: in the fall-back's mode they have different HTTP parsers."""
    with Connection(wire.urls[request.param]) as connection:
        yield connection


@pytest.fixture
def finished(alice: Client) -> str:
    request_id = alice.submit("one two three")
    alice.finished(request_id)
    return request_id


# -- headers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("route", ["get", "post"])
@pytest.mark.parametrize("accept", [None, "text/event-stream", "application/json"])
def test_a_stream_has_the_headers_that_proxies_and_clients_need(
    wire: Wire, alice: Client, subject: str, connection: Connection, route: str, accept: str | None
) -> None:
    """Whatever the client accepts: the route decides. It is never compressed."""
    headers = _bearer(subject) | {"Accept-Encoding": "gzip, deflate, br, zstd"} | ({"Accept": accept} if accept else {})
    if route == "get":
        connection.send(connection.request("GET", _stream(alice.submit("some words")), headers))
    else:
        connection.send(connection.request("POST", "/api/v1/query/stream", headers, _submission("some words")))
    head = connection.head()
    request_id = sse.parse(connection.body(head))[0].json["request_id"]
    assert (head.version, head.status) == ("HTTP/1.1", 200)
    assert {name: value for name, value in head.headers.items() if name != "date"} == {
        "content-type": "text/event-stream; charset=utf-8",
        "cache-control": "no-cache, no-transform",
        "x-accel-buffering": "no",
        "x-request-id": request_id,
        "content-location": _stream(request_id),
        "transfer-encoding": "chunked",
    }


def test_head_gets_the_headers_only(wire: Wire, subject: str, alice: Client, connection: Connection) -> None:
    """Of a run that has ended, and of one that has not; the connection then serves the next request."""
    running = alice.submit("silence", agent="hangs")
    ended = alice.submit("one two")
    alice.finished(ended)
    for request_id in (running, ended, running):
        connection.send(connection.request("HEAD", _stream(request_id), _bearer(subject)))
        head = connection.head()
        assert head.status == 200
        assert head.headers["content-type"] == "text/event-stream; charset=utf-8"
        assert head.headers["content-location"] == _stream(request_id)
        assert "content-length" not in head.headers
    last = str(alice.log(ended)[-1].id)
    connection.send(connection.request("HEAD", _stream(ended), _bearer(subject) | {"Last-Event-ID": last}))
    assert connection.head().status == 204
    connection.send(connection.request("GET", _stream(ended), _bearer(subject)))
    assert len(sse.parse(connection.body(connection.head()))) == 5
    alice.post(f"/api/v1/runs/{running}/cancel")


def test_head_submits_nothing(wire: Wire, alice: Client, subject: str, connection: Connection) -> None:
    connection.send(connection.request("HEAD", "/api/v1/query/stream", _bearer(subject), _submission("never")))
    head = connection.head()
    assert (head.status, head.headers["allow"]) == (405, "POST")
    assert alice.get("/api/v1/runs").json()["runs"] == []


def test_a_204_has_no_body_and_the_connection_goes_on(
    wire: Wire, alice: Client, subject: str, finished: str, connection: Connection
) -> None:
    last = str(alice.log(finished)[-1].id)
    for _ in range(2):
        connection.send(connection.request("GET", f"{_stream(finished)}?last_event_id={last}", _bearer(subject)))
        head = connection.head()
        assert head.status == 204
        assert "transfer-encoding" not in head.headers
    connection.send(connection.request("GET", "/healthz", {}))
    assert json.loads(connection.body(connection.head())) == {"status": "ok"}


# -- one connection, many requests -----------------------------------------------------------------------------


def test_a_connection_serves_on_after_a_stream(
    wire: Wire, alice: Client, subject: str, finished: str, connection: Connection
) -> None:
    """A replay, a poll, a live stream, a submit with its stream, and a replay again."""
    for turn in range(3):
        connection.send(connection.request("GET", _stream(finished), _bearer(subject)))
        check_reader(entries_of(sse.parse(connection.body(connection.head()))), alice.log(finished))
        connection.send(connection.request("GET", f"/api/v1/runs/{finished}", _bearer(subject)))
        assert json.loads(connection.body(connection.head()))["status"] == "completed"
        body = _submission(f"live {turn}", **TOKENS)
        connection.send(connection.request("POST", "/api/v1/query/stream", _bearer(subject), body))
        events = sse.parse(connection.body(connection.head()))
        check_reader(entries_of(events), alice.log(events[0].json["request_id"]))


def test_pipelined_requests_are_answered_in_their_order(
    wire: Wire, alice: Client, subject: str, finished: str, connection: Connection
) -> None:
    """Also when the first is a stream that lasts: what comes behind it waits for its end."""
    live = alice.submit("pipelined", **TOKENS)
    paths = [_stream(live), f"/api/v1/runs/{live}", _stream(finished), "/healthz", _stream(live)]
    connection.send(b"".join(connection.request("GET", path, _bearer(subject)) for path in paths))
    check_reader(entries_of(sse.parse(connection.body(connection.head()))), alice.log(live))
    assert json.loads(connection.body(connection.head()))["status"] == "completed"
    check_reader(entries_of(sse.parse(connection.body(connection.head()))), alice.log(finished))
    assert json.loads(connection.body(connection.head())) == {"status": "ok"}
    check_reader(entries_of(sse.parse(connection.body(connection.head()))), alice.log(live))


def test_pipelined_submits_are_two_streams(wire: Wire, alice: Client, subject: str, connection: Connection) -> None:
    both = [
        connection.request("POST", "/api/v1/query/stream", _bearer(subject), _submission(query, **TOKENS))
        for query in ("first", "second")
    ]
    connection.send(b"".join(both))
    seen = [sse.parse(connection.body(connection.head())) for _ in both]
    assert seen[0][0].json["request_id"] != seen[1][0].json["request_id"]
    for events in seen:
        check_reader(entries_of(events), alice.log(events[0].json["request_id"]))


def test_a_client_that_asks_for_it_gets_its_connection_closed(
    wire: Wire, alice: Client, subject: str, finished: str, connection: Connection
) -> None:
    connection.send(connection.request("GET", _stream(finished), _bearer(subject) | {"Connection": "close"}))
    head = connection.head()
    assert head.headers["connection"] == "close"
    check_reader(entries_of(sse.parse(connection.body(head))), alice.log(finished))
    assert connection.rest() == b""


def test_a_request_body_may_come_in_chunks_and_late(
    wire: Wire, alice: Client, subject: str, connection: Connection
) -> None:
    body = _submission("in chunks", **TOKENS)
    headers = _bearer(subject) | {"Transfer-Encoding": "chunked", "Content-Type": "application/json"}
    connection.send(connection.request("POST", "/api/v1/query/stream", headers | {"Expect": "100-continue"}))
    assert connection.head().status == 100
    for at in range(0, len(body), 7):
        piece = body[at : at + 7]
        connection.send(b"%x\r\n%b\r\n" % (len(piece), piece))
    connection.send(b"0\r\n\r\n")
    events = sse.parse(connection.body(connection.head()))
    check_reader(entries_of(events), alice.log(events[0].json["request_id"]))


def test_an_http_1_0_client_reads_until_the_end(wire: Wire, alice: Client, subject: str) -> None:
    """Without chunks, which it does not know; the end of the connection is the end."""
    url = wire.urls[1]  # in the fall-back's mode this is h11; uvicorn's httptools sends chunks to everybody
    request_id = alice.submit("the old way", **TOKENS)
    for path in (_stream(request_id), f"/api/v1/runs/{request_id}"):
        with Connection(url) as connection:
            connection.send(connection.request("GET", path, _bearer(subject), version="1.0"))
            head = connection.head()
            assert head.status == 200
            assert "transfer-encoding" not in head.headers
            assert head.headers["connection"] == "close"
            body = connection.rest()
        if path == _stream(request_id):
            check_reader(entries_of(sse.parse(body)), alice.log(request_id))
        else:
            assert json.loads(body)["status"] == "completed"
    with Connection(url) as connection:
        connection.send(connection.request("HEAD", path, _bearer(subject), version="1.0"))
        assert connection.head().status == 200
        assert connection.rest() == b""


def test_an_unforeseen_failure_is_a_problem_that_tells_nothing(wire: Wire, alice: Client, finished: str) -> None:
    """The log of the gateway has it under the answer's X-Request-Id."""
    key = f"sb:{{{finished}}}:run"
    with wire.redis.client() as redis:
        metadata = redis.hget(key, "metadata")
        redis.hset(key, "metadata", "{a secret")
        answer = alice.get(f"/api/v1/runs/{finished}")
        redis.hset(key, "metadata", metadata)
    assert (answer.status_code, answer.json()["code"]) == (500, "internal")
    assert "secret" not in answer.text
    wait_for(lambda: bool(wire.gateways[0].logged("unexpected error", request_id=answer.headers["x-request-id"])))


# -- what ends a body ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("agent", ["echo", "raises", "no_final"])
def test_a_terminal_event_ends_the_body_with_the_last_chunk(
    wire: Wire, alice: Client, subject: str, connection: Connection, agent: str
) -> None:
    body = _submission("to the end", agent=agent)
    connection.send(connection.request("POST", "/api/v1/query/stream", _bearer(subject), body))
    assert connection.head().status == 200
    received, ended = connection.chunked()
    assert ended
    assert received.endswith(b"\n\n")
    assert sse.parse(received)[-1].type == ("error" if agent == "raises" else "final")


def test_a_cancel_ends_the_body_with_the_last_chunk(
    wire: Wire, alice: Client, alice_elsewhere: Client, subject: str, connection: Connection
) -> None:
    request_id = alice.submit("stop me", agent="slow")
    connection.send(connection.request("GET", _stream(request_id), _bearer(subject)))
    connection.head()
    received = b""
    while b"begun" not in received:
        received += connection.chunk() or b""
    alice_elsewhere.post(f"/api/v1/runs/{request_id}/cancel")
    rest, ended = connection.chunked()
    assert ended
    assert [event.type for event in sse.parse(received + rest)] == ["start", "attempt", "token", "attempt", "cancelled"]


def test_a_client_that_has_it_all_gets_an_empty_stream_with_a_proper_end_on_a_post(
    wire: Wire, alice: Client, subject: str, finished: str, connection: Connection
) -> None:
    cursor = f"{finished}/{alice.log(finished)[-1].id}"
    headers = _bearer(subject) | {"Last-Event-ID": cursor}
    connection.send(connection.request("POST", "/api/v1/query/stream", headers, _submission("one two three")))
    assert connection.head().status == 200
    received, ended = connection.chunked()
    assert ended
    assert sse.parse(received) == []


@pytest.fixture
def own_gateway(wire: Wire, launch_wire: WireLauncher) -> Gateway:
    return launch_wire.wire_gateway(wire.redis.url, wire.mode, drain_delay_seconds=0.7)


def test_a_drain_cuts_a_stream_after_a_whole_event_with_a_retry_and_no_last_chunk(
    wire: Wire, alice: Client, subject: str, own_gateway: Gateway
) -> None:
    """Who connects to it meanwhile is served, and then cut too; a stream that ends before the cut ends properly."""
    ended = alice.submit("long ago")
    request_id = alice.submit("through a drain", agent="tokens", parameters={"count": 80, "pause": 0.02})
    alice.finished(ended)
    with Connection(own_gateway.url) as early, Connection(own_gateway.url) as late, Connection(own_gateway.url) as done:
        early.send(early.request("GET", _stream(request_id), _bearer(subject)))
        assert early.head().status == 200
        received = early.chunk() or b""
        own_gateway.signal(signal.SIGTERM)
        wait_for(lambda: bool(own_gateway.logged("draining")))
        late.send(late.request("GET", _stream(request_id), _bearer(subject)))
        done.send(done.request("GET", _stream(ended), _bearer(subject)))
        check_reader(entries_of(sse.parse(done.body(done.head()))), alice.log(ended))
        assert late.head().status == 200
        rest, last_chunk = early.chunked()
        bodies = [received + rest]
        assert not last_chunk, "a client would take this for the end of the run"
        rest, last_chunk = late.chunked()
        bodies.append(rest)
        assert not last_chunk
    assert own_gateway.wait() == 0
    for body in bodies:
        *_, frame_end, retry, nothing = body.split(b"\n")
        assert (frame_end, nothing) == (b"", b""), "cut inside of an event"
        assert retry.startswith(b"retry: ")
        assert 1000 <= int(retry[7:]) <= 3000
        seen = sse.parse(body)
        assert seen[-1].type == "token"
        rest_of_it = list(alice.events(request_id, after=seen[-1].id))
        check_reader(entries_of([*seen, *rest_of_it]), alice.log(request_id))


def test_a_stream_that_may_not_last_longer_is_cut_in_the_same_way(
    wire: Wire, launch_wire: WireLauncher, alice: Client, subject: str
) -> None:
    """Also with a request pipelined behind it, which has to be sent again: nothing of it stays behind."""
    gateway = launch_wire.wire_gateway(wire.redis.url, wire.mode, max_stream_seconds=0.4, heartbeat_seconds=0.4)
    request_id = alice.submit("longer than allowed", agent="quiet", parameters={"count": 3, "pause": 0.3})
    stream = _stream(request_id)
    with Connection(gateway.url) as plain, Connection(gateway.url) as pipelined:
        request = plain.request("GET", stream, _bearer(subject))
        plain.send(request)
        pipelined.send(request + request)
        for connection in (plain, pipelined):
            assert connection.head().status == 200
            body, last_chunk = connection.chunked()
            assert not last_chunk
            assert b"retry: " in body.splitlines()[-1]
            seen = sse.parse(body)
            rest = list(alice.events(request_id, after=seen[-1].id))
            check_reader(entries_of([*seen, *rest]), alice.log(request_id))
        wait_for(lambda: len(gateway.logged("access", path=stream)) >= 2)
    assert gateway.stop() == 0


def test_a_client_that_goes_with_requests_pipelined_leaves_nothing_behind(
    wire: Wire, launch_wire: WireLauncher, alice: Client, subject: str
) -> None:
    gateway = launch_wire.wire_gateway(wire.redis.url, wire.mode, heartbeat_seconds=0.4)
    # The fall-back learns of it only at the end of the run: uvicorn tells the newest request, which has not begun.
    seconds = 30 if wire.mode == "direct" else 2
    request_id = alice.submit("nobody reads to the end", agent="sleeper", parameters={"seconds": seconds})
    with Connection(gateway.url) as connection:
        connection.send(2 * connection.request("GET", _stream(request_id), _bearer(subject)))
        connection.head()
        connection.chunk()
    wait_for(lambda: bool(gateway.logged("access", path=_stream(request_id))))
    assert gateway.stop() == 0
    alice.post(f"/api/v1/runs/{request_id}/cancel")
