"""P13: bytes at least every heartbeat, the first one at once, and no client takes a heartbeat for anything."""

from __future__ import annotations

import re
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.conformance.conftest import HEARTBEAT, MODES, Wire, WireLauncher
from tests.kit import sse
from tests.kit.checker import check_reader, entries_of
from tests.kit.http import Client
from tests.kit.processes import wait_for
from tests.kit.readers import READERS, follow
from tests.kit.redis_server import RedisServer
from tests.kit.sse import Event, EventSource
from tests.kit.watch import Watch, observe

PATIENCE = 1.5
"""Seconds without a byte that fail a test. A heartbeat is due every HEARTBEAT; the machine may be busy."""
BEAT = re.compile(rb"heartbeat (\d+-\d+) (lease=\d+\.\ds|lease=expired|lease=unknown|queued|running)")


def _check_beats(watch: Watch, at_least: int) -> None:
    """One line each, never a line of its own after it, and the id is the last one that the stream has brought."""
    assert watch.first_byte < PATIENCE, f"the first byte came after {watch.first_byte:.2f} s"
    assert watch.longest_gap < PATIENCE, f"nothing came for {watch.longest_gap:.2f} s"
    assert len(watch.comments()) >= at_least, watch.comments()
    end = b"0-0"
    for previous, line in zip([b"", *watch.body.split(b"\n")], watch.body.split(b"\n"), strict=False):
        if line.startswith(b"id: "):
            end = line[4:].rpartition(b"/")[2]
        elif line.startswith(b":"):
            beat = BEAT.fullmatch(line[2:])
            assert beat is not None, line
            assert beat[1] == end, f"{line!r} after the event {end!r}"
        assert not (line == b"" and previous.startswith((b":", b"retry:"))), "a heartbeat with a blank line"


def test_an_idle_stream_gets_bytes_within_every_heartbeat(wire: Wire, alice: Client, subject: str) -> None:
    body: dict[str, Any] = {"agent": "sleeper", "parameters": {"seconds": 1.7}}
    request_id = alice.submit("idle", **body)
    with ThreadPoolExecutor(2) as pool:
        watches = list(pool.map(observe, (wire.get(subject, request_id), wire.post(subject, "idle", **body))))
    for watch in watches:
        _check_beats(watch, at_least=3)
        assert watch.body.startswith(b"retry: "), "the first bytes do not wait for an event"
        assert [event.type for event in sse.parse(watch.body)] == ["start", "attempt", "final"]
        assert any(b"lease=" in comment for comment in watch.comments())


def test_heartbeats_are_invisible_to_every_reader(wire: Wire, alice: Client, subject: str) -> None:
    """All readers on one run that is silent between its events: no event more, no id that the log has not."""
    body: dict[str, Any] = {"agent": "quiet", "parameters": {"count": 2, "pause": 0.75}}
    request_id = alice.submit("quiet", **body)
    get, post = wire.get(subject, request_id), wire.post(subject, "quiet", **body)
    with ThreadPoolExecutor(2 * len(READERS) + 2) as pool:
        jobs = [pool.submit(follow, reader, target) for reader in READERS for target in (get, post)]
        source = EventSource(get.url, headers=get.headers, haste=20)
        watched = pool.submit(observe, get)
        sourced = pool.submit(list, source)
        seen = [job.result() for job in jobs]
    log = alice.log(request_id)
    for events in (*seen, sourced.result()):
        check_reader(entries_of(events), log)
    assert [entry.type for entry in log] == ["start", "attempt", "token", "token", "final"]
    _check_beats(watched.result(), at_least=5)
    assert len([comment for comment in source.comments if comment.startswith("heartbeat")]) >= 5
    assert len(alice.get("/api/v1/runs").json()["runs"]) == 1


@pytest.fixture(params=MODES)
def without_worker(request: pytest.FixtureRequest, launch_wire: WireLauncher) -> Wire:
    redis: RedisServer = launch_wire.redis()
    return Wire(request.param, redis, [launch_wire.wire_gateway(redis.url, request.param, heartbeat_seconds=HEARTBEAT)])


def test_heartbeats_come_while_the_run_is_queued(without_worker: Wire) -> None:
    """Nobody takes the run. In the end it is cancelled, so that the readers come to their end."""
    with without_worker.client("queued") as client, ThreadPoolExecutor(2 * len(READERS) + 1) as pool:
        request_id = client.submit("wait for a worker")
        get = without_worker.get("queued", request_id)
        post = without_worker.post("queued", "wait for a worker")
        watched = pool.submit(observe, get)
        jobs = [pool.submit(follow, reader, target) for reader in READERS for target in (get, post)]
        time.sleep(1.2)
        assert client.run(request_id)["status"] == "queued"
        client.post(f"/api/v1/runs/{request_id}/cancel")
        seen: list[list[Event]] = [job.result() for job in jobs]
        log = client.log(request_id)
        assert [entry.type for entry in log] == ["start", "attempt", "cancelled"]
        for events in seen:
            check_reader(entries_of(events), log)
        watch = watched.result()
        _check_beats(watch, at_least=3)
        assert watch.comments()[0] == b"heartbeat 0-1 queued"


def test_a_stream_that_resumes_at_the_end_of_a_silent_run_gets_its_first_byte_at_once(
    wire: Wire, alice: Client, subject: str
) -> None:
    request_id = alice.submit("nothing new", agent="slow", parameters={"seconds": 1.0})
    wait_for(lambda: len(alice.log(request_id)) == 3)
    last = str(alice.log(request_id)[-1].id)
    watch = observe(wire.get(subject, request_id), last)
    assert watch.body.startswith(b"retry: ")
    assert watch.first_byte < PATIENCE
    assert watch.longest_gap < PATIENCE
    assert [event.type for event in sse.parse(watch.body)] == ["token", "final"]
