"""GET /runs/{id}: ETag and 304, a wait that holds until the end and is bounded, and what a run looks like."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import UTC, datetime
from typing import Any

import httpx
import pytest
from starlette.requests import Request

from broker.gateway.requests import MAX_WAIT_SECONDS, wait_seconds
from tests.conftest import Launcher, Service
from tests.kit.http import Client
from tests.kit.processes import wait_for

LONG = {"agent": "slow", "parameters": {"seconds": 60}}


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(20) as pool:
        yield pool


def path(request_id: str) -> str:
    return f"/api/v1/runs/{request_id}"


def begun(client: Client, query: str, **body: Any) -> str:
    """A run that has written its first token."""
    request_id = client.submit(query, **{**LONG, **body})
    wait_for(lambda: client.run(request_id)["answer"] is not None)
    return request_id


# What a run looks like


def test_a_run_in_each_state(alice: Client) -> None:
    before = datetime.now(UTC)
    completed = alice.finished(alice.submit("one two", metadata={"a": [1]}, session_id="s"))
    assert completed == {
        "request_id": completed["request_id"],
        "session_id": "s",
        "status": "completed",
        "agent": "echo",
        "attempt": 1,
        "created_at": completed["created_at"],
        "started_at": completed["started_at"],
        "finished_at": completed["finished_at"],
        "last_event_id": str(alice.log(completed["request_id"])[-1].id),
        "metadata": {"a": [1]},
        "answer": "one two",
        "citations": [],
        "usage": {},
        "error": None,
        "links": {
            "self": path(completed["request_id"]),
            "stream": path(completed["request_id"]) + "/stream",
            "events": path(completed["request_id"]) + "/events",
            "cancel": path(completed["request_id"]) + "/cancel",
        },
    }
    times = [completed[name] for name in ("created_at", "started_at", "finished_at")]
    assert all(text.endswith("Z") for text in times), "RFC 3339, UTC"
    created, started, finished = map(datetime.fromisoformat, times)
    assert created <= started <= finished
    assert abs((created - before).total_seconds()) < 60

    failed = alice.finished(alice.submit("fails", agent="raises"))
    assert (failed["status"], failed["answer"], failed["error"]["code"]) == ("failed", "so far ", "agent_failed")
    assert "secret" not in str(failed)

    running = alice.run(begun(alice, "under way"))
    assert (running["status"], running["answer"], running["finished_at"]) == ("running", "begun ", None)

    cancelled = alice.post(path(running["request_id"]) + "/cancel").json()
    assert (cancelled["status"], cancelled["answer"], cancelled["error"]) == ("cancelled", "begun ", None)
    assert cancelled["finished_at"] is not None
    assert alice.run(cancelled["request_id"]) == cancelled


def test_a_run_that_no_worker_has_taken_is_queued(launch: Launcher) -> None:
    server = launch.redis()
    with Client(launch.gateway(server.url).url) as client:
        run = client.run(client.submit("waiting"))
        assert (run["status"], run["attempt"], run["answer"], run["started_at"]) == ("queued", 0, None, None)
        assert run["last_event_id"] == "0-1"
        began = time.monotonic()
        assert client.run(run["request_id"], wait=0.5) == run
        assert time.monotonic() - began >= 0.45


def test_a_poll_is_not_stored_by_caches_and_names_its_run(alice: Client) -> None:
    request_id = alice.submit("headers")
    response = alice.get(path(request_id))
    assert response.headers["Cache-Control"] == "no-store"
    assert response.headers["X-Request-Id"] == request_id
    head = alice.head(path(request_id))
    assert (head.status_code, head.content) == (200, b"")


# ETag


def test_a_run_that_has_not_changed_is_a_304(alice: Client, alice_elsewhere: Client) -> None:
    request_id = alice.submit("etag")
    alice.finished(request_id)
    first = alice.get(path(request_id))
    etag = first.headers["ETag"]
    assert etag == f'"{first.json()["last_event_id"]}"'
    for match in (etag, f"W/{etag}", f'"x", {etag}', f'{etag},"y"', "*"):
        for client in (alice, alice_elsewhere):
            again = client.get(path(request_id), headers={"If-None-Match": match})
            assert (again.status_code, again.content, again.headers["ETag"]) == (304, b"", etag), match
    for match in ('"x"', etag.strip('"'), "", etag[:-2] + '"'):
        assert alice.get(path(request_id), headers={"If-None-Match": match}).status_code == 200, match


def test_every_event_makes_another_etag(alice: Client) -> None:
    request_id = alice.submit("many etags", agent="tokens", parameters={"count": 20, "pause": 0.03})
    etags: list[str] = []
    match = '"none"'
    while True:
        response = alice.get(path(request_id), headers={"If-None-Match": match})
        if response.status_code == 200:
            match = response.headers["ETag"]
            etags.append(match)
            assert match == f'"{response.json()["last_event_id"]}"'
            if response.json()["finished_at"]:
                break
        else:
            assert response.headers["ETag"] == match
    assert len(etags) == len(set(etags))
    assert len(etags) > 3
    assert etags[-1] == f'"{alice.log(request_id)[-1].id}"'


def test_a_wait_with_an_etag_answers_when_the_run_has_ended(alice: Client) -> None:
    request_id = begun(alice, "etag and wait", parameters={"seconds": 0.5})
    etag = alice.get(path(request_id)).headers["ETag"]
    response = alice.get(path(request_id), params={"wait": 30}, headers={"If-None-Match": etag})
    assert (response.status_code, response.json()["status"]) == (200, "completed")
    response = alice.get(path(request_id), params={"wait": 30}, headers={"If-None-Match": response.headers["ETag"]})
    assert response.status_code == 304


# wait


def ask(client: Client, request_id: str, how: str, seconds: float) -> httpx.Response:
    if how == "Prefer":
        return client.get(path(request_id), headers={"Prefer": f"respond-async, wait={seconds:g}"})
    return client.get(path(request_id), params={"wait": f"{seconds:g}"})


@pytest.mark.parametrize("how", ["Prefer", "?wait"])
def test_a_wait_holds_until_the_run_ends(alice: Client, alice_elsewhere: Client, how: str) -> None:
    request_id = alice.submit(f"held by {how}", agent="sleeper", parameters={"seconds": 0.5})
    for client in (alice, alice_elsewhere):
        response = ask(client, request_id, how, 30)
        assert (response.json()["status"], response.json()["answer"]) == ("completed", "awake")
        assert response.headers.get("Preference-Applied") == ("wait=30" if how == "Prefer" else None)
        assert ("Prefer" in response.headers.get("Vary", "")) is (how == "Prefer")


@pytest.mark.parametrize("how", ["Prefer", "?wait"])
def test_a_wait_that_is_over_answers_with_the_run_as_it_is(alice: Client, how: str) -> None:
    request_id = begun(alice, f"longer than {how}")
    began = time.monotonic()
    response = ask(alice, request_id, how, 1)
    assert time.monotonic() - began >= 0.95
    assert (response.status_code, response.json()["status"], response.json()["answer"]) == (200, "running", "begun ")
    assert response.json()["finished_at"] is None


@pytest.mark.parametrize("how", ["Prefer", "?wait"])
def test_a_wait_for_a_run_that_has_ended_is_none(alice: Client, how: str) -> None:
    request_id = alice.submit("already ended")
    alice.finished(request_id)
    began = time.monotonic()
    for _ in range(20):
        assert ask(alice, request_id, how, 60).json()["status"] == "completed"
    assert time.monotonic() - began < 60, "not one was held"


@pytest.mark.parametrize(
    ("query", "prefer", "expected"),
    [
        (b"wait=5", "", (5, False)),
        (b"wait=0.25", "", (0.25, False)),
        (b"wait=5", "wait=7", (5, False)),
        (b"wait=999999", "", (MAX_WAIT_SECONDS, False)),
        (b"", "wait=7", (7, True)),
        (b"", "respond-async, wait=7", (7, True)),
        (b"", 'WAIT="7"; x=1', (7, True)),
        (b"", "wait=999999", (MAX_WAIT_SECONDS, True)),
        (b"", "await=7", (0, False)),
        (b"", "wait=7x", (0, False)),
        (b"", "", (0, False)),
    ],
)
def test_no_wait_is_longer_than_a_minute(query: bytes, prefer: str, expected: tuple[float, bool]) -> None:
    headers = [(b"prefer", prefer.encode())] if prefer else []
    assert wait_seconds(Request({"type": "http", "query_string": query, "headers": headers})) == expected


@pytest.mark.parametrize("by", ["cancel", "erase"])
def test_a_wait_ends_when_the_run_is_stopped_through_any_gateway(
    alice: Client, alice_elsewhere: Client, pool: ThreadPoolExecutor, by: str
) -> None:
    request_id = begun(alice, f"stopped by {by}")
    held = [pool.submit(ask, client, request_id, "?wait", 55) for client in (alice, alice_elsewhere) for _ in range(5)]
    time.sleep(0.3)
    assert not any(job.done() for job in held)
    if by == "cancel":
        assert alice.post(path(request_id) + "/cancel").status_code == 200
        assert {job.result(8).json()["status"] for job in held} == {"cancelled"}, "not at the next heartbeat: at once"
    else:
        assert alice.delete(path(request_id)).status_code == 204
        assert {job.result(8).status_code for job in held} == {404}


def test_many_waits_and_streams_of_one_run_end_together(
    service: Service, alice: Client, pool: ThreadPoolExecutor
) -> None:
    request_id = alice.submit("together", agent="sleeper", parameters={"seconds": 0.5})
    waits: list[Future[httpx.Response]] = [pool.submit(ask, alice, request_id, "?wait", 30) for _ in range(10)]
    streams = [pool.submit(lambda: list(alice.events(request_id))) for _ in range(10)]
    runs = [job.result(30).json() for job in waits]
    logs = [job.result(30) for job in streams]
    assert all(run == runs[0] for run in runs)
    assert all(log == logs[0] for log in logs)
    assert runs[0]["last_event_id"] == logs[0][-1].id
