"""The dialect `openai` over plain HTTP: what holds whatever client asks."""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
import signal
from typing import Any

import httpx
import pytest

from tests.conformance.test_lossless_text import ALL, NASTY
from tests.conftest import Launcher, Service
from tests.kit import openai_stream, sse
from tests.kit.http import Client, token
from tests.kit.openai_stream import output_text
from tests.kit.redis_server import RedisServer
from tests.kit.scribe import Scribe

ROUTE = "/v1/responses"
METADATA = {"".join(NASTY[n::16]): "".join(NASTY[n::16]) for n in range(16)}
HEADERS = {"date", "content-type", "content-length", "cache-control", "x-request-id"}


def ask(client: Client, agent: str = "echo", query: str = "one two", **body: Any) -> dict[str, Any]:
    answer = client.post(ROUTE, json={"model": agent, "input": query, **body})
    assert answer.status_code == 200, answer.text
    response: dict[str, Any] = answer.json()
    return response


def stream(client: Client, response: str, **params: Any) -> bytes:
    answer = client.get(f"{ROUTE}/{response}", params={"stream": "true", **params})
    assert answer.status_code == 200, answer.text
    return answer.content.partition(b"\n")[2]  # without `retry:`


def test_two_gateways_and_two_replays_give_the_same_bytes(alice: Client, alice_elsewhere: Client) -> None:
    body = {"model": "varied", "input": "x", "stream": True, "parameters": {"count": 60, "every": 7, "pause": 0.01}}
    live = alice.post(ROUTE, json=body)
    events = openai_stream.parse(live.content)
    response = events[0]["response"]["id"]
    assert openai_stream.check(events).ended
    assert live.content.partition(b"\n")[2] == stream(alice, response) == stream(alice_elsewhere, response)
    assert live.headers["x-request-id"] == response.removeprefix("resp_")


def test_either_form_of_an_id_names_the_response(alice: Client) -> None:
    response = ask(alice)["id"]
    for name in (response, response.removeprefix("resp_")):
        assert alice.get(f"{ROUTE}/{name}").json()["id"] == response


def test_last_event_id_goes_on_behind_the_event(alice: Client) -> None:
    """For clients that know nothing of sequence numbers. Who has an event that the log has not is told so."""
    response = ask(alice, "tokens", parameters={"count": 5})["id"]
    whole = stream(alice, response)
    events = sse.parse(whole)
    for last in {event.id for event in events if event.id}:
        rest = alice.get(f"{ROUTE}/{response}?stream=true&starting_after=0", headers={"Last-Event-ID": last}).content
        seen = next(n for n, event in enumerate(events) if event.id == last)
        assert [event.data for event in sse.parse(rest)] == [event.data for event in events[seen + 1 :]]
    assert stream(alice, response, last_event_id="0-0") == whole
    [lost] = sse.parse(stream(alice, response, last_event_id="999-1"))
    assert (lost.type, json.loads(lost.data)["error"]["code"]) == ("error", "cursor_lost")
    refused = alice.get(f"{ROUTE}/{response}?stream=true", headers={"Last-Event-ID": "nonsense"})
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "bad_cursor")


def test_a_previous_response_of_somebody_else_is_none(service: Service, alice: Client, subject: str) -> None:
    with service.client(f"not-{subject}") as bob:
        foreign = ask(bob)["id"]
    missing = f"resp_{'0' * 32}"
    answers = [
        alice.post(ROUTE, json={"model": "echo", "input": given, "previous_response_id": previous})
        for previous in (foreign, missing, "nonsense")
        for given in ("x", [{"type": "function_call_output", "call_id": "x", "output": "y"}])
    ]
    assert {answer.status_code for answer in answers} == {400}
    assert len({answer.content for answer in answers if b"previous_response_not_found" in answer.content}) == 1
    assert not any(foreign in answer.text for answer in answers)
    assert len(alice.get("/api/v1/runs").json()["runs"]) == 0


async def test_who_comes_between_the_cut_and_the_end_is_told_503(launch: Launcher) -> None:
    """Also who wants a stream: its clients try a 503 again, and take the proper end of an empty stream for its end."""
    redis = launch.redis()
    gateway = launch.gateway(redis.url, drain_delay_seconds=0.3)
    told: list[tuple[str, httpx.Response]] = []

    async def ask_on(client: httpx.AsyncClient, method: str, path: str, body: dict[str, Any] | None) -> None:
        with contextlib.suppress(httpx.ConnectError, httpx.ReadError):
            while True:
                with contextlib.suppress(httpx.RemoteProtocolError):  # a stream that was cut
                    reply = await client.request(method, f"{gateway.url}{path}", json=body)
                    assert reply.status_code == 503, reply.text
                    told.append((method, reply))

    headers = {"Authorization": f"Bearer {token('alice')}"}
    async with Scribe(redis.url) as scribe, httpx.AsyncClient(headers=headers, verify=False) as client:
        run = await scribe.running("alice", "late", tokens=1)
        gateway.signal(signal.SIGTERM)
        body = {"model": "echo", "input": "late", "stream": True}
        path = f"{ROUTE}/{run.request_id}?stream=true"
        await asyncio.gather(
            *[ask_on(client, *how) for how in (("POST", ROUTE, body), ("GET", path, None)) for _ in range(2)]
        )
    assert gateway.wait(10) == 0
    assert {method for method, _ in told} == {"GET", "POST"}
    for _, reply in told:
        assert (reply.json()["error"]["code"], reply.headers["Retry-After"]) == ("draining", "1")


async def test_an_answer_is_held_as_long_as_a_stream_may_last(launch: Launcher) -> None:
    """By the limit of streams, and by the token's end: in `chat` as in `openai`."""
    redis = launch.redis()
    short = launch.gateway(redis.url, max_stream_seconds=0.5)
    strict = launch.gateway(redis.url, jwt_leeway_seconds=0)
    bodies = {ROUTE: {"model": "echo", "input": "held"}, "/chat": {"agent": "echo", "message": "held"}}

    async def held(client: httpx.AsyncClient, url: str, ttl: float, path: str) -> httpx.Response:
        headers = {"Authorization": f"Bearer {token('alice', ttl=ttl)}"}
        return await client.post(f"{url}{path}", json=bodies[path], headers=headers)

    async with httpx.AsyncClient(verify=False, timeout=20) as client:
        replies = await asyncio.gather(
            *[held(client, url, ttl, path) for url, ttl in ((short.url, 3600), (strict.url, 3)) for path in bodies]
        )
    for reply in replies:
        problem = reply.json().get("error", reply.json())
        assert (reply.status_code, problem["code"]) == (503, "unavailable"), reply.text
        assert reply.headers["Retry-After"] == "1"
        assert "Send the same again" in reply.text


@pytest.mark.parametrize("path", [ROUTE, "/chat"])
async def test_what_is_erased_while_its_answer_is_held_is_not_asked_again(alice: Client, path: str) -> None:
    """A 503 would be tried again, and the erased question be run once more."""
    query = f"erased {secrets.token_hex(4)}"
    body = {"model": "echo", "agent": "echo", "input": query, "message": query, "parameters": {"pause": 20}}
    held = asyncio.create_task(asyncio.to_thread(alice.post, path, json=body))
    while not (mine := [run for run in alice.get("/api/v1/runs").json()["runs"] if run["status"] == "running"]):
        await asyncio.sleep(0.05)
    assert alice.delete(f"/api/v1/runs/{mine[0]['request_id']}").status_code == 204
    reply = await held
    problem = reply.json().get("error", reply.json())
    assert (reply.status_code, problem["code"]) == (404, "run_not_found"), reply.text


async def test_a_number_that_is_not_there_yet_is_no_loss(alice: Client) -> None:
    """Nor when the run ends below it: then the stream is as empty as that of a run that has ended before."""
    response = ask(alice, background=True, parameters={"pause": 20})["id"]
    early = asyncio.create_task(asyncio.to_thread(stream, alice, response, starting_after=50))
    await asyncio.sleep(0.5)
    assert alice.post(f"{ROUTE}/{response}/cancel").status_code == 200
    late = stream(alice, response, starting_after=50)
    assert sse.parse(await early) == sse.parse(late) == []


def test_a_session_may_be_named_but_not_two(alice: Client) -> None:
    first = ask(alice, session_id="a-session")
    assert alice.run(first["id"].removeprefix("resp_"))["session_id"] == "a-session"
    body = {"model": "echo", "input": "more", "previous_response_id": first["id"]}
    assert alice.post(ROUTE, json={**body, "session_id": "a-session"}).status_code == 200
    refused = alice.post(ROUTE, json={**body, "session_id": "another"})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "session_id")


def test_a_response_goes_on_from_one_that_has_ended(alice: Client) -> None:
    previous = ask(alice, "hangs", background=True)["id"]
    body = {"model": "echo", "input": "more", "previous_response_id": previous}
    refused = alice.post(ROUTE, json=body)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "previous_response_id")
    assert alice.post(f"{ROUTE}/{previous}/cancel").json()["status"] == "cancelled"
    assert alice.post(ROUTE, json=body).json()["previous_response_id"] == previous


def test_the_same_key_is_the_same_response(alice: Client) -> None:
    body = {"model": "echo", "input": "once"}
    answers = [alice.post(ROUTE, json=body, headers={"Idempotency-Key": "k"}).json()["id"] for _ in range(2)]
    assert answers[0] == answers[1] != ask(alice, query="once")["id"]
    refused = alice.post(ROUTE, json={**body, "input": "other"}, headers={"Idempotency-Key": "k"})
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "idempotency_key_reused")


def test_a_run_of_the_native_api_is_a_response_too(alice: Client) -> None:
    request_id = alice.submit("native", agent="echo", metadata={"n": 1}, parameters={"temperature": "hot"})
    alice.finished(request_id)
    response = alice.get(f"{ROUTE}/{request_id}").json()
    assert (response["model"], response["metadata"], response["temperature"]) == ("echo", {"n": "1"}, None)
    assert output_text(response) == "native"


@pytest.mark.parametrize("error", [False, True])
def test_no_text_becomes_an_event_a_line_or_a_header(alice: Client, error: bool) -> None:
    """P18, in every field that an agent, a tool or a user can influence."""
    body = {
        "model": "speaks",
        "input": ALL,
        "instructions": ALL,
        "metadata": METADATA,
        "session_id": ALL[:255],
        "stream": True,
        "parameters": {"texts": [*NASTY], "error": error, "model": ALL},
    }
    headers = {"Content-Type": "application/json"}
    live = alice.post(ROUTE, content=json.dumps(body), headers=headers)
    events = openai_stream.parse(live.content)
    assert openai_stream.check(events).ended
    response = events[-1]["response"]
    if error:
        assert response["error"] == {"code": NASTY[-1], "message": NASTY[-1]}
        assert output_text(response) == "".join(NASTY)
    else:
        assert output_text(response) == NASTY[-1]
    assert (response["model"], response["instructions"]) == (ALL, ALL)
    assert response["metadata"] == METADATA
    calls = [item for item in response["output"] if item["type"] == "function_call"]
    assert [(item["name"], json.loads(item["arguments"])) for item in calls] == [(t, {t: [t]}) for t in NASTY]
    outputs = [item for item in response["output"] if item["type"] == "function_call_output"]
    assert [item["output"] for item in outputs] == list(NASTY)
    route = f"{ROUTE}/{response['id']}"
    polled = alice.get(route)
    assert polled.json() == response
    items = alice.get(f"{route}/input_items")
    assert items.json()["data"][0]["content"] == [{"type": "input_text", "text": ALL}]
    for answer in (polled, items):
        assert answer.content.isascii() and set(answer.headers) <= HEADERS
    assert live.content.isascii() and live.content.count(b"\n") == len(live.content.splitlines())


async def test_a_run_that_has_ended_is_read_once_for_all_who_ask_and_not_for_who_may_not(launch: Launcher) -> None:
    """What the gateway keeps of it is given to nobody else, and to nobody after it was erased."""
    redis = launch.redis()
    gateway = launch.gateway(redis.url)
    async with Scribe(redis.url) as scribe:
        run = await scribe.running("alice", "late", tokens=3)
        await run.end()
    path = f"{ROUTE}/{run.request_id}"
    with Client(gateway.url) as alice, Client(gateway.url, "bob") as bob:
        first = alice.get(path)
        assert first.status_code == 200
        reads = _reads_of_logs(redis)
        assert [alice.get(path).content for _ in range(3)] == [first.content] * 3
        assert bob.get(path).status_code == 404
        assert _reads_of_logs(redis) == reads
        assert alice.delete(f"/api/v1/runs/{run.request_id}").status_code == 204
        assert alice.get(path).status_code == 404


def _reads_of_logs(redis: RedisServer) -> int:
    return int(redis.info("commandstats")["cmdstat_xrange"]["calls"])
