"""P8: wherever a stream is cut, what was read of it and the resumed rest are the log."""

from __future__ import annotations

import random
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, NamedTuple

import httpx
import pytest

from broker.events import Entry
from tests.conformance.conftest import Wire
from tests.kit import sse
from tests.kit.checker import check_log, check_reader, entries_of
from tests.kit.http import Client
from tests.kit.readers import READERS, Cut, Reader, Target, follow
from tests.kit.resets import Resets
from tests.kit.scale import LONG, scaled
from tests.kit.sse import Event, EventSource

COUNT = 190
BODY: dict[str, Any] = {"agent": "varied", "parameters": {"count": COUNT, "pause": 0.4, "every": 60}}
"""With pauses that are longer than the heartbeat, so that some cuts are inside of heartbeats."""


def _seeded() -> random.Random:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    return random.Random(seed)


class Recording(NamedTuple):
    body: bytes
    log: list[Entry]
    target: Target
    start: str
    """The cursor that means the beginning, on this route."""

    def target_at(self, old: str, new: str) -> Target:
        return replace(self.target, url=self.target.url.replace(old, new))


@pytest.fixture(scope="module", params=["get", "post"])
def recording(wire: Wire, request: pytest.FixtureRequest) -> Recording:
    """From one of the two routes: short ids, or long ones."""
    route, subject = request.param, f"recorded-{uuid.uuid4()}"
    with wire.client(subject) as client:
        return _record(wire, client, subject, route)


def _record(wire: Wire, alice: Client, subject: str, route: str) -> Recording:
    query = f"recorded from {route}, {wire.mode}"
    if route == "get":
        target = wire.get(subject, alice.submit(query, **BODY))
    else:
        target = wire.post(subject, query, **BODY)
    with httpx.stream(
        target.method, target.url, headers=target.headers, json=target.body, timeout=30, verify=False
    ) as response:
        body = b"".join(response.iter_raw())
    request_id = sse.parse(body)[0].json["request_id"]
    log = alice.log(request_id)
    check_log(log)
    assert len(log) == COUNT + 3
    return Recording(body, log, target, "0-0" if route == "get" else f"{request_id}/0-0")


def test_a_stream_cut_at_any_byte_resumes_exactly(wire: Wire, recording: Recording) -> None:
    rng = _seeded()
    assert recording.body.isascii()
    assert recording.body.count(b"\n: heartbeat ") >= 3, "no heartbeat to cut"
    with httpx.Client(timeout=30, verify=False) as client:
        rest_after = _resumer(client, wire, recording)
        for reader in READERS:
            checked = -1
            for seen in _cut_at_every_byte(reader, recording.body, rng):
                rest = rest_after(seen[-1].id if seen else recording.start)
                if len(seen) != checked:
                    check_reader(entries_of([*seen, *rest]), recording.log)
                    checked = len(seen)
            assert checked == len(recording.log), f"{reader.name} read {checked} events of the whole body"


def _cut_at_every_byte(reader: Reader, body: bytes, rng: random.Random) -> Iterator[list[Event]]:
    """What the reader had dispatched when the connection broke: after 0 bytes, 1 byte, …

    One pass is enough, as a reader that is asked for its n-th byte has dispatched all that n - 1 bytes hold. In the
    short form the libraries take a tenth of the cuts, at random places; the WHATWG model always takes every one.
    """
    step = 1 if LONG or reader.name == "whatwg" else 10
    seen: list[Event] = []
    asked: list[int] = []

    def connection() -> Iterator[bytes]:
        at = 0
        while at < len(body):
            asked.append(len(seen))
            size = rng.randint(1, 2 * step - 1)
            yield body[at : at + size]
            at += size
        asked.append(len(seen))
        raise Cut

    with pytest.raises(Cut):
        for event in reader.replay(connection()):
            seen.append(event)
    for count in asked:
        yield seen[:count]


def _resumer(client: httpx.Client, wire: Wire, recording: Recording) -> Callable[[str], list[Event]]:
    """The rest after an id, from a real gateway; each is asked for once, at the two gateways in turn."""
    known: dict[str, list[Event]] = {}

    def rest_after(event_id: str) -> list[Event]:
        if event_id not in known:
            target = recording.target_at(wire.urls[0], wire.urls[len(known) % 2])
            headers = target.request_headers(event_id)
            answer = client.request(target.method, target.url, headers=headers, json=target.body)
            has_all = event_id == str(recording.log[-1].id)
            assert answer.status_code == (204 if has_all else 200)
            known[event_id] = sse.parse(answer.content)
        return known[event_id]

    return rest_after


def test_a_connection_that_is_broken_at_a_random_byte_resumes_exactly(wire: Wire, recording: Recording) -> None:
    """The same through real sockets: the first connection ends after so many bytes, with a reset or a FIN."""
    rng = _seeded()
    frames = sum(len(line) + 1 for line in recording.body.split(b"\n") if not line.startswith(b":"))
    budget: list[int | None] = []
    with Resets(wire.urls, lambda: budget.pop() if budget else None) as proxy:
        target = recording.target_at(wire.urls[0], proxy.url)
        for _ in range(scaled(200)):
            reader = rng.choice(READERS)
            budget.append(rng.randrange(frames))
            seen = []
            with pytest.raises(Cut):
                for event in reader.read(target, recording.start):
                    seen.append(event)
            rest = follow(reader, target, after=seen[-1].id if seen else recording.start)
            check_reader(entries_of([*seen, *rest]), recording.log)
        assert proxy.broken == scaled(200)


def test_random_resets_of_live_streams_lose_and_double_nothing(wire: Wire, alice: Client, subject: str) -> None:
    """All readers at once on one run under way, over both gateways; each connection breaks after some bytes."""
    rng = _seeded()
    body: dict[str, Any] = {"agent": "varied", "parameters": {"count": 10 * scaled(600), "pause": 0.04, "every": 20}}
    with (
        Resets(wire.urls, lambda: rng.randrange(12_000)) as proxy,
        ThreadPoolExecutor(3 * len(READERS)) as pool,
    ):
        post = wire.post(subject, "live", url=proxy.url, key="live", **body)
        submitted = alice.post("/api/v1/query", json=post.body, headers={"Idempotency-Key": "live"})
        request_id = submitted.json()["request_id"]
        get = wire.get(subject, request_id, url=proxy.url)
        jobs = [pool.submit(follow, reader, target, cuts=400) for reader in READERS for target in (get, post)]
        sources = [
            EventSource(target.url, headers=target.headers, body=target.body, haste=100) for target in (get, post)
        ]
        jobs += [pool.submit(_read_to_end, source) for source in sources]
        seen = [job.result() for job in jobs]
    log = alice.log(request_id)
    check_log(log)
    for events in seen:
        check_reader(entries_of(events), log)
    assert proxy.broken > len(seen), "hardly any connection was broken"
    assert len(alice.get("/api/v1/runs").json()["runs"]) == 1, "a resume started a run"


def _read_to_end(source: EventSource) -> list[Event]:
    """On a POST the end is the end of the terminal's body: there is no 204 to wait for."""
    seen = []
    for event in source:
        seen.append(event)
        if event.type == "final":
            source.close()
    return seen
