"""P8, P9, P23: the Python clients, their connections cut at random bytes: what they read is the log, what they say is
the poll's answer, and no query was paid for twice.
"""

from __future__ import annotations

import asyncio
import json
import random
import signal
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from broker.client import AsyncClient, Client, Received, Run
from broker.events import Entry
from tests.conformance.conftest import Wire
from tests.conftest import Launcher
from tests.kit import http
from tests.kit.checker import check_log, check_poll, check_reader, surviving_text
from tests.kit.http import token
from tests.kit.processes import wait_for
from tests.kit.resets import Resets
from tests.kit.scale import scaled

AT_ONCE = 8
HASTE = {"longest_pause": 0.05}


class Read(NamedTuple):
    """What a client had of a run, over all its connections."""

    request_id: str
    seen: list[Received]
    text: str
    answer: str | None
    reconnects: int
    run: Run
    """The poll, by the same client."""


def read(client: Client, query: str, body: dict[str, Any]) -> Read:
    stream = client.ask(query, **body)
    seen = list(stream)
    run = client.result(stream.request_id)
    return Read(stream.request_id, seen, stream.text, stream.answer, stream.reconnects, run)


async def read_async(client: AsyncClient, query: str, body: dict[str, Any]) -> Read:
    stream = await client.ask(query, **body)
    seen = [received async for received in stream]
    run = await client.result(stream.request_id)
    return Read(stream.request_id, seen, stream.text, stream.answer, stream.reconnects, run)


def check(read: Read, alice: http.Client) -> list[Entry]:
    """Returns the log, which is read around the client."""
    log = alice.log(read.request_id)
    check_log(log)
    seen = [Entry(item.id, item.type, json.dumps(item.data, separators=(",", ":"))) for item in read.seen]
    check_reader(seen, log)
    assert read.text == surviving_text(log)
    assert read.answer == read.run.answer
    check_poll(alice.run(read.request_id), log)
    return log


class Readers:
    """Half of the runs are read by one Client in threads, the others by one AsyncClient; all at once, or so many."""

    def __init__(self, url: str, subject: str, at_once: int = AT_ONCE) -> None:
        self._client = Client(url, token(subject), **HASTE)
        self._pool = ThreadPoolExecutor(at_once + 1)
        self._url, self._token, self._at_once = url, token(subject), at_once

    def start(self, jobs: list[tuple[str, dict[str, Any]]]) -> Callable[[], list[Read]]:
        """Returns what waits for all of them."""
        later = self._pool.submit(lambda: asyncio.run(self._async(jobs[::2])))
        reads: list[Future[Read]] = [self._pool.submit(read, self._client, *job) for job in jobs[1::2]]
        return lambda: [*later.result(120), *(future.result(120) for future in reads)]

    async def _async(self, jobs: list[tuple[str, dict[str, Any]]]) -> list[Read]:
        slots = asyncio.Semaphore(self._at_once)

        async def one(client: AsyncClient, job: tuple[str, dict[str, Any]]) -> Read:
            async with slots:
                return await read_async(client, *job)

        async with AsyncClient(self._url, self._token, **HASTE) as client:
            return list(await asyncio.gather(*(one(client, job) for job in jobs)))

    def close(self) -> None:
        self._pool.shutdown()
        self._client.close()


def test_a_thousand_runs_whose_connections_are_cut_at_random_bytes(
    wire: Wire, alice: http.Client, subject: str
) -> None:
    """Of every answer, those to submits and polls too, heads too: then nobody knows whether it was received."""
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    chance, lock = random.Random(seed), threading.Lock()

    def budget() -> int:
        with lock:
            return chance.randrange(3000 if chance.random() < 0.9 else 30_000)

    count = scaled(500)  # in each of the two modes
    jobs = [
        (
            f"cut {wire.mode} {n}",
            {"agent": "varied", "parameters": {"count": chance.randrange(5, 60), "pause": 0.01, "every": 7}},
        )
        for n in range(count)
    ]
    with Resets(wire.urls, budget, heads=True) as proxy:
        readers = Readers(proxy.url, subject)
        try:
            reads = readers.start(jobs)()
        finally:
            readers.close()
        assert proxy.broken > count, "hardly any connection was broken"
    for one in reads:
        check(one, alice)
    assert sum(one.reconnects for one in reads) > count / 4
    with Client(wire.urls[0], token(subject)) as client:
        assert sorted(run.request_id for run in client.runs()) == sorted(one.request_id for one in reads)


def all_running(url: str, subject: str, count: int) -> bool:
    with http.Client(url, subject) as alice:
        return len(alice.get("/api/v1/runs?status=running").json()["runs"]) == count


def test_kills_and_drains_of_the_gateway_are_ridden_out(launch: Launcher, tmp_path: Path) -> None:
    """The same port again: what a client sees of a crash, and of a redeployment."""
    until, subject = tmp_path / "enough", "killed"
    redis = launch.redis()
    gateway = launch.gateway(redis.url)
    launch.worker(redis.url)
    body = {"agent": "chatter", "parameters": {"count": 40, "pause": 0.02, "until": str(until)}}
    readers = Readers(gateway.url, subject)
    try:
        reads = readers.start([(f"through kills {n}", body) for n in range(8)])
        for n in range(scaled(20)):
            wait_for(partial(all_running, gateway.url, subject, 8))
            gateway.signal(signal.SIGTERM if n % 2 else signal.SIGKILL)
            gateway.wait()
            gateway = launch.gateway(redis.url, port=gateway.port)
        until.touch()
        found = reads()
    finally:
        until.touch()
        readers.close()
    with http.Client(gateway.url, subject) as alice:
        for one in found:
            check(one, alice)
            assert one.reconnects >= 1
        assert len(alice.get("/api/v1/runs").json()["runs"]) == len(found)


def test_a_rewind_after_a_workers_death_is_told_and_folded(launch: Launcher) -> None:
    """Agents that begin again, and agents that go on from a checkpoint."""
    subject, redis = "rewound", launch.redis()
    gateway = launch.gateway(redis.url)
    worker = launch.worker(redis.url, lease_seconds=1)
    ways = ({"count": 60, "pause": 0.03}, {"count": 60, "pause": 0.03, "every": 7})
    jobs = [(f"rewound {n}", {"agent": "steps", "parameters": ways[n // 2 % 2]}) for n in range(8)]
    readers = Readers(gateway.url, subject)
    try:
        reads = readers.start(jobs)
        with http.Client(gateway.url, subject) as alice:

            def under_way() -> bool:
                runs = alice.get("/api/v1/runs?status=running").json()["runs"]
                return len(runs) == len(jobs) and all(int(run["last_event_id"].partition("-")[2]) > 15 for run in runs)

            wait_for(under_way, seconds=20)
            worker.signal(signal.SIGKILL)
            worker.wait()
            launch.worker(redis.url, lease_seconds=1)
            found = reads()
            for one in found:
                log = check(one, alice)
                assert [entry.type for entry in log].count("attempt") == 2
                assert one.run.attempt == 2
            void = [sum(item.type == "token" for item in one.seen) - len(one.text.split()) for one in found]
            assert sum(count >= 10 for count in void) >= len(jobs) / 2, "hardly anything was taken back"
    finally:
        readers.close()
