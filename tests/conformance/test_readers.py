"""Every reader reads a run to its end, and goes on where it was cut: all of them see the log."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from threading import Semaphore
from typing import Any

import pytest

from tests.conformance.conftest import Wire
from tests.kit.checker import check_log, check_reader, entries_of
from tests.kit.http import Client
from tests.kit.processes import wait_for
from tests.kit.readers import READERS, Reader, Target, follow
from tests.kit.sse import Event, EventSource

LIVE: dict[str, Any] = {"agent": "varied", "parameters": {"count": 24, "pause": 0.03, "every": 6}}
every_reader = pytest.mark.parametrize("reader", READERS, ids=[reader.name for reader in READERS])


@every_reader
def test_a_reader_of_a_runs_stream_sees_the_log(wire: Wire, alice: Client, subject: str, reader: Reader) -> None:
    request_id = alice.submit("read it", **LIVE)
    live = follow(reader, wire.get(subject, request_id))
    log = alice.log(request_id)
    check_log(log)
    check_reader(entries_of(live), log)
    assert follow(reader, wire.get(subject, request_id, gateway=1)) == live
    assert all("/" not in event.id for event in live)


@every_reader
def test_a_reader_that_submits_sees_the_log(wire: Wire, alice: Client, subject: str, reader: Reader) -> None:
    live = follow(reader, wire.post(subject, f"submit and read by {reader.name}", **LIVE))
    request_id = live[0].json["request_id"]
    log = alice.log(request_id)
    check_log(log)
    check_reader(entries_of(live), log)
    assert [event.id for event in live] == [f"{request_id}/{entry.id}" for entry in log]


@every_reader
def test_a_reader_that_went_away_goes_on_at_the_other_gateway(
    wire: Wire, alice: Client, subject: str, reader: Reader
) -> None:
    query = f"leave and come back, {reader.name}"
    seen = _some(reader, wire, subject, query, 11)
    request_id = seen[0].json["request_id"]
    rest = follow(reader, wire.post(subject, query, gateway=1, **LIVE), after=seen[-1].id)
    check_reader(entries_of([*seen, *rest]), alice.log(request_id))
    short = seen[-1].id.partition("/")[2]
    rest = follow(reader, wire.get(subject, request_id, gateway=1), after=short)
    check_reader(entries_of([*seen, *rest]), alice.log(request_id))
    assert len(alice.get("/api/v1/runs").json()["runs"]) == 1, "a resume started a run"


def _some(reader: Reader, wire: Wire, subject: str, query: str, count: int) -> list[Event]:
    seen = []
    events = reader.read(wire.post(subject, query, **LIVE), "")
    for event in events:
        seen.append(event)
        if len(seen) == count:
            break
    events.close()  # type: ignore[attr-defined]
    return seen


@every_reader
def test_a_reader_that_has_it_all_gets_nothing_more(wire: Wire, alice: Client, subject: str, reader: Reader) -> None:
    """A 204 on the run's own stream; on a POST an empty stream with a proper end."""
    query = f"twice by {reader.name}"
    seen = follow(reader, wire.post(subject, query))
    request_id, _, last = seen[-1].id.partition("/")
    assert list(reader.read(wire.get(subject, request_id), last)) == []
    assert list(reader.read(wire.post(subject, query), seen[-1].id)) == []
    assert len(alice.get("/api/v1/runs").json()["runs"]) == 1


def test_an_event_source_reads_a_run_and_is_stopped_by_a_204(wire: Wire, alice: Client, subject: str) -> None:
    request_id = alice.submit("by EventSource", **LIVE)
    target = wire.get(subject, request_id)
    source = EventSource(target.url, headers=target.headers, haste=20)
    check_reader(entries_of(list(source)), alice.log(request_id))
    assert [connection.status for connection in source.connections] == [200, 204]
    assert 1 <= source.connections[1].waited <= 3, "the gateway's own `retry:` spreads reconnects"


def test_an_erased_run_ends_for_every_reader_with_an_error_that_moves_no_cursor(
    wire: Wire, alice: Client, alice_elsewhere: Client, subject: str
) -> None:
    """The frame has no id: it is not an event of the log. The body ends properly, so nobody comes again for it."""
    request_id = alice.submit("to be erased", agent="slow")
    wait_for(lambda: len(alice.log(request_id)) == 3)
    last = str(alice.log(request_id)[-1].id)
    targets = [wire.get(subject, request_id, gateway) for gateway in (0, 1)]
    there = Semaphore(0)
    with ThreadPoolExecutor(2 * len(READERS)) as pool:
        jobs = [pool.submit(_read, reader, target, there) for reader in READERS for target in targets]
        for _ in jobs:
            assert there.acquire(timeout=20)
        assert alice_elsewhere.delete(f"/api/v1/runs/{request_id}").status_code == 204
        for job in jobs:
            *events, gone = job.result()
            assert [event.type for event in events] == ["start", "attempt", "token"]
            assert (gone.id, gone.type, gone.json["code"]) == (last, "error", "gone")
    assert alice.get(f"/api/v1/runs/{request_id}").status_code == 404


def _read(reader: Reader, target: Target, there: Semaphore) -> list[Event]:
    """One connection to its proper end. Says when it has read what there is."""
    seen = []
    for event in reader.read(target, ""):
        seen.append(event)
        if len(seen) == 3:
            there.release()
    return seen
