"""P12: an outage of Redis loses no run, and streams keep their heartbeat. Killed and restarted, stopped, or behind a
wire on which everything vanishes: all three at the same time, each with a service of its own."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import httpx
import psutil
import pytest

from tests.conftest import Launcher
from tests.kit.checker import Violation
from tests.kit.eventsource import Stream
from tests.kit.http import token
from tests.kit.load import Evidence, Load, Plan
from tests.kit.netns import FAR, needs_root
from tests.kit.processes import Gateway, Worker
from tests.kit.redis_server import RedisServer
from tests.kit.scale import LONG
from worker.publisher import BUFFER_ENTRIES

OUTAGE = 30.0 if LONG else 8.0
HEARTBEAT = 2.0
SETTINGS: dict[str, Any] = {"heartbeat_seconds": HEARTBEAT, "lease_seconds": 3, "grace_seconds": 1}
PLAN = Plan(
    runs=6, readers=2, count=int(OUTAGE + 6) * 20, pause=0.05, spread=0.5, late=0, torn=0, silence=60, limit=OUTAGE + 60
)
AUTHORIZATION = {"Authorization": f"Bearer {token('alice')}"}


class Site:
    """A gateway and two workers, and a Redis that goes away and comes back."""

    def __init__(self, launch: Launcher, kind: str) -> None:
        self.kind = kind
        self.folder = launch.folder / kind
        self.folder.mkdir()
        network = launch.network() if kind == "silent" else None
        self.server: RedisServer = launch.redis(namespace=network.far if network else None)
        url = f"redis://{FAR}:{self.server.port}" if network else self.server.url
        near = network.near if network else None
        self.gateway: Gateway = launch.gateway(url, namespace=near, **SETTINGS)
        self.workers: list[Worker] = [launch.worker(url, namespace=near, **SETTINGS) for _ in range(2)]
        self.begin: Callable[[], object] = network.drop if network else self.server.kill
        self.end: Callable[[], object] = network.heal if network else self.server.start
        if kind == "stopped":
            self.begin, self.end = self.server.pause, self.server.resume

    @property
    def memory(self) -> int:
        """Bytes of all its processes."""
        return sum(psutil.Process(process.pid).memory_info().rss for process in (self.gateway, *self.workers))


class Answer(NamedTuple):
    reply: httpx.Response
    seconds: float
    at: float
    """By the machine's clock."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """What was seen of one outage. Times are in seconds."""

    site: Site
    evidence: Evidence
    violations: list[Violation]
    idle: Stream
    """Of a run that says nothing: all that it gets is heartbeats."""
    silence: float
    """The longest time for which that got nothing."""
    answers: list[Answer]
    """To what was asked meanwhile and needs Redis: submits, a poll, readiness."""
    ended_at: float
    """When Redis began to come back, by the machine's clock."""
    opened: Stream
    """A stream that was asked for meanwhile."""
    healthy: httpx.Response
    made: int
    """Events that a fast agent made meanwhile."""
    waited: float
    """The longest time between two of them."""
    grown: int
    """Bytes of memory that all processes together took more than before."""
    recovery: dict[str, float]
    """When, after Redis was back."""

    def __str__(self) -> str:
        recovery = ", ".join(f"{what} after {seconds:.2f} s" for what, seconds in self.recovery.items())
        return (
            f"{self.site.kind} for {OUTAGE:.0f} s: {self.evidence}; {len(self.violations)} violations\n"
            f"  {recovery}; longest silence of an idle stream {self.silence:.1f} s; answers after "
            f"{', '.join(f'{answer.seconds:.1f} s' for answer in self.answers)}; an agent made {self.made} events and "
            f"waited {self.waited:.1f} s; memory grew by {self.grown / 2**20:.1f} MiB"
        )


async def suffer(site: Site, seed: int) -> Report:
    """One outage, from before it until all runs have ended."""
    url = site.gateway.url
    load = Load([url], site.server.url, PLAN, chance=random.Random(seed), folder=site.folder)
    async with load, httpx.AsyncClient(base_url=url, headers=AUTHORIZATION, timeout=30) as client:
        idle = await stream(url, await submit(client, "sleeper", seconds=OUTAGE + 8))
        fast_run = await submit(client, "clock", count=int(OUTAGE + 2) * 300, pause=0.001)
        fast = await stream(url, fast_run)
        await idle.until(lambda: len(idle.events) == 2)
        await fast.until(lambda: len(fast.events) > 100)
        async with asyncio.timeout(20):
            while sum(bool(reading.frames) for reading in load.history.readings.values()) < PLAN.runs * PLAN.readers:
                await asyncio.sleep(0.02)

        memory = site.memory
        load.history.fault(site.kind)
        await asyncio.to_thread(site.begin)
        began = time.monotonic()
        beating = asyncio.create_task(longest_silence(idle, began + OUTAGE))
        asking = [timed(client.post("/api/v1/query", json={"query": f"meanwhile {n}"})) for n in range(3)]
        asking += [timed(client.get(path)) for path in (f"/api/v1/runs/{fast_run}", "/readyz")]
        answering = asyncio.gather(*asking)
        opening = asyncio.create_task(stream(url, fast_run))
        await asyncio.sleep(1)
        healthy = await client.get("/healthz")
        opened = await opening
        await opened.ended(10)
        await asyncio.sleep(max(began + OUTAGE - time.monotonic(), 0))
        grown, ended_at = site.memory - memory, time.monotonic()
        await asyncio.to_thread(site.end)

        back = time.monotonic()
        recovery = {what: seconds - back for what, seconds in (await recover(client, fast, load)).items()}
        evidence = await load.finish()
        for reading in (fast, idle):
            await reading.ended(60)
    times = [float(event.json["text"]) for event in fast.events if event.type == "token"]
    return Report(
        site=site,
        evidence=evidence,
        violations=evidence.violations(),
        idle=idle,
        silence=await beating,
        answers=await answering,
        ended_at=ended_at,
        opened=opened,
        healthy=healthy,
        made=sum(began < at < back for at in times),
        waited=max(later - earlier for earlier, later in pairwise(times)),
        grown=grown,
        recovery=recovery,
    )


async def submit(client: httpx.AsyncClient, agent: str, **parameters: Any) -> str:
    reply = await client.post("/api/v1/query", json={"query": "q", "agent": agent, "parameters": parameters})
    assert reply.status_code == 202, reply.text
    request_id: str = reply.json()["request_id"]
    return request_id


async def timed(asking: Awaitable[httpx.Response]) -> Answer:
    began = time.monotonic()
    reply = await asking
    return Answer(reply, time.monotonic() - began, time.monotonic())


async def stream(url: str, request_id: str) -> Stream:
    return await Stream().open(url, f"/api/v1/runs/{request_id}/stream", AUTHORIZATION)


async def longest_silence(idle: Stream, until: float) -> float:
    longest = 0.0
    while time.monotonic() < until:
        longest = max(longest, asyncio.get_running_loop().time() - idle.fed_at)
        await asyncio.sleep(0.02)
    return longest


async def recover(client: httpx.AsyncClient, fast: Stream, load: Load) -> dict[str, float]:
    """When what is back, by the machine's clock."""
    at: dict[str, float] = {}
    events, frames = len(fast.events), sum(len(r.frames) for r in load.history.readings.values())
    accepted = asyncio.create_task(until_accepted(client))
    async with asyncio.timeout(60):
        while len(at) < 4:
            if len(fast.events) > events:
                at.setdefault("a stream", time.monotonic())
            seen = {r.request_id for r in load.history.readings.values() if len(r.frames) > 0}
            if sum(len(r.frames) for r in load.history.readings.values()) > frames + len(seen):
                at.setdefault("all streams", time.monotonic())
            if accepted.done():
                at.setdefault("a submit", time.monotonic())
                reply = await client.get(f"/api/v1/runs/{accepted.result()}")
                if reply.status_code == 200 and reply.json()["status"] == "completed":
                    at.setdefault("a new run's end", time.monotonic())
            await asyncio.sleep(0.02)
    return at


async def until_accepted(client: httpx.AsyncClient) -> str:
    while True:
        reply = await client.post("/api/v1/query", json={"query": "afterwards"})
        if reply.status_code in (200, 202):
            request_id: str = reply.json()["request_id"]
            return request_id
        await asyncio.sleep(0.05)


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Report]]:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    launch = Launcher(tmp_path_factory.mktemp("outages"))
    try:
        sites = [Site(launch, kind) for kind in kinds()]

        async def suffer_all() -> list[Report]:
            return await asyncio.gather(*(suffer(site, seed + n) for n, site in enumerate(sites)))

        made = asyncio.run(suffer_all())
        for report in made:
            print(report)
        yield {report.site.kind: report for report in made}
    finally:
        launch.close()


def kinds() -> list[str]:
    """Without root there is no wire that could go silent."""
    try:
        needs_root()
    except pytest.skip.Exception:
        return ["killed", "stopped"]
    return ["killed", "stopped", "silent"]


@pytest.fixture(params=["killed", "stopped", "silent"])
def report(request: pytest.FixtureRequest, reports: dict[str, Report]) -> Report:
    if request.param not in reports:
        pytest.skip("making a network needs root")
    return reports[request.param]


def test_no_run_is_lost_and_none_begins_again(report: Report) -> None:
    """Redis being unreachable is not a lost lease (PROTOCOL 4.5), and reapers are patient after it (4.7)."""
    assert not report.violations
    assert {run["status"] for run in report.evidence.polls.values() if run} == {"completed"}
    assert report.evidence.rewinds == 0


def test_streams_stay_open_and_keep_their_heartbeat(report: Report) -> None:
    assert report.silence < 2 * HEARTBEAT
    assert report.idle.ending == "finished"
    assert report.idle.events[-1].type == "final"
    assert any("lease=unknown" in comment for comment in report.idle.comments), "a heartbeat tells the truth"
    readings = report.evidence.history.readings.values()
    assert {connection.ending for reading in readings for connection in reading.connections} == {"finished"}


def test_what_needs_redis_is_answered_with_a_problem_document(report: Report) -> None:
    """What waits for longer than the outage may get what it asked for."""
    refused = [answer.reply for answer in report.answers if answer.at < report.ended_at]
    for reply in refused:
        assert (reply.status_code, reply.json()["code"]) == (503, "unavailable")
        assert reply.headers["content-type"] == "application/problem+json"
        assert int(reply.headers["retry-after"]) >= 1
    assert any(reply.request.method == "POST" for reply in refused)
    assert report.healthy.status_code == 200


def test_a_stream_that_is_asked_for_meanwhile_is_told_to_come_again(report: Report) -> None:
    """An EventSource would take a 503 for the end."""
    assert (report.opened.status, report.opened.ending) == (200, "cut")
    assert report.opened.parser.retry_ms
    assert report.opened.events == []


def test_an_agent_waits_when_what_it_has_said_fills_the_buffer(report: Report) -> None:
    assert report.made <= BUFFER_ENTRIES + 256
    assert report.waited > OUTAGE / 2
    assert report.grown < 64 * 2**20


def test_no_process_ends_and_none_logs_an_error(report: Report) -> None:
    for process in (report.site.gateway, *report.site.workers):
        assert process.popen.poll() is None
        assert [line for line in process.log_lines() if line["level"] in ("ERROR", "CRITICAL")] == []


def test_what_was_away_is_logged(report: Report) -> None:
    assert any(worker.logged("append failed, trying again") for worker in report.site.workers)
    assert any(worker.logged("the queue cannot be reached") for worker in report.site.workers)
