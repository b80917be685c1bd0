"""Runs and readers for chaos tests: all that happens to them is recorded, and judged in the end."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from broker.events import Entry
from broker.ids import EventId
from broker.runs import log
from broker.runs.connections import connect
from tests.kit.agents import numbered
from tests.kit.checker import NOTHING, Allowed, Violation, check
from tests.kit.eventsource import Stream
from tests.kit.history import History
from tests.kit.http import token
from tests.kit.load_reader import NO_ANSWER as NO_ANSWER
from tests.kit.load_reader import Reader

Answer = tuple[int, Any]
"""(status, JSON)"""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is started, and how readers behave. Shares are of the readers."""

    name: str = ""
    """Begins the names of its queries, keys and files: two loads on one service have one each."""
    runs: int = 10
    readers: int = 3
    """Of each run: EventSources. The first of every second run also submits it, with a POST that it repeats."""
    agents: Sequence[str] = ("chatter", "stepper")
    """They take turns."""
    body: Callable[[int], Mapping[str, Any]] | None = None
    """Of the n-th run's submit, where it is not one of these agents. What its tokens must say, the test knows."""
    count: int = 100
    """Tokens of each run."""
    until: Path | None = None
    """They go on at least until this file is there."""
    pause: float = 0.02
    """Seconds between them."""
    spread: float = 1.0
    """Seconds over which the runs are submitted."""
    late: float = 0.3
    """Join at a random time of the run; every second one of them with the cursor of a reader that is further."""
    slow: float = 0.2
    """Read a little at a time."""
    torn: float = 0.3
    """Leave at random bytes, and come again."""
    hurry: float = 10
    """`retry:` is honoured this many times as fast."""
    silence: float = 20
    """A reader that gets no byte for so many seconds comes again."""
    polls: float = 0.3
    """Seconds between two polls of a random run."""
    limit: float = 60
    """Seconds for everything."""


@dataclass
class Evidence:
    """What a load leaves for the checker."""

    history: History
    logs: dict[str, list[Entry]] = field(default_factory=dict)
    """As they are in Redis."""
    polls: dict[str, dict[str, Any] | None] = field(default_factory=dict)
    pages: dict[str, list[tuple[Entry, bool]]] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)
    """What the tokens of the runs that were completed must say."""

    def violations(self, allowed: Allowed = NOTHING) -> list[Violation]:
        return check(self.history, self.logs, self.polls, allowed=allowed, pages=self.pages, texts=self.texts)

    def __str__(self) -> str:
        faults = Counter(fault.kind for fault in self.history.faults)
        readings = self.history.readings.values()
        connections = [connection for reading in readings for connection in reading.connections]
        return (
            f"{sum(faults.values())} faults {dict(faults)}, {len(self.logs)} runs with {self.rewinds} rewinds, "
            f"{len(readings)} readers over {len(connections)} connections, "
            f"{sum(len(connection.frames) for connection in connections)} events read, {len(self.history.polls)} polls"
        )

    @property
    def rewinds(self) -> int:
        """Attempts after the first, and closings by others."""
        attempts = sum(entry.type == "attempt" for entries in self.logs.values() for entry in entries)
        return attempts - sum(len(entries) > 1 for entries in self.logs.values())


class Load:
    """Inside `async with` the runs and readers go on beside the test; `finish` waits for their end.

    `gateways` are URLs, and may be changed at any time; each request goes to a random one.
    """

    def __init__(
        self, gateways: Sequence[str], redis_url: str, plan: Plan, *, chance: random.Random, folder: Path
    ) -> None:
        self.gateways = list(gateways)
        self.plan = plan
        self.chance = chance
        self.history = History(folder / f"{plan.name}history.jsonl")
        self.runs: dict[str, str] = {}
        """The request_ids so far, by their Idempotency-Key."""
        self._redis_url = redis_url
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Load:
        self._tasks = [asyncio.create_task(self._group(n)) for n in range(self.plan.runs)]
        self._poller = asyncio.create_task(self._poll_now_and_then())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stop(*self._tasks, self._poller)
        self.history.close()

    async def _stop(self, *tasks: asyncio.Task[None]) -> None:
        """Raises what one of them has raised."""
        for task in tasks:
            task.cancel()
        for result in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(result, Exception):
                raise result

    @property
    def done(self) -> bool:
        """Whether all readers have read all there is."""
        return all(task.done() for task in self._tasks)

    async def finish(self) -> Evidence:
        """When all readers have come to the end of their runs, or at the plan's limit: polls all, reads all logs."""
        await asyncio.wait(self._tasks, timeout=max(self.plan.limit - self.history.now, 0))
        await self._stop(*self._tasks, self._poller)
        return await self._evidence()

    # -- runs ------------------------------------------------------------------------------------------------

    async def _group(self, n: int) -> None:
        """A run and its readers."""
        plan, key = self.plan, f"{self.plan.name}key-{n}"
        await asyncio.sleep(self.chance.random() * plan.spread)
        body = json.dumps(plan.body(n) if plan.body else self._counting(n)).encode("ascii")
        names = [f"{n}.{k}" for k in range(plan.readers)]
        async with asyncio.TaskGroup() as group:
            if n % 2:
                group.create_task(self._submit(key, body))
                group.create_task(self._submit(key, body))
            else:
                group.create_task(Reader(self, names.pop(0)).submit_and_read(key, body))
            for name in names:
                group.create_task(self._join(key, name))

    def _counting(self, n: int) -> dict[str, Any]:
        plan = self.plan
        parameters = {"count": plan.count, "pause": plan.pause, "until": str(plan.until) if plan.until else None}
        agent = plan.agents[n // 2 % len(plan.agents)]
        return {"query": f"{plan.name}run {n}", "agent": agent, "parameters": parameters}

    async def _submit(self, key: str, body: bytes) -> None:
        """Until it is accepted; a repeat is harmless (P1)."""
        headers = {"Idempotency-Key": key, "Content-Type": "application/json"}
        while True:
            with contextlib.suppress(*NO_ANSWER):
                status, answer = await self.ask("POST", "/api/v1/query", headers, body)
                if status in (200, 202):
                    self.accepted(key, answer["request_id"])
                    return
                assert status == 503, (status, answer)
            await asyncio.sleep(0.1)

    def accepted(self, key: str, request_id: str) -> None:
        self.history.submitted(key, request_id)
        self.runs[key] = request_id

    async def _join(self, key: str, name: str) -> None:
        """Reads the run, at once or some time later, from its beginning or from where another reader is."""
        while key not in self.runs:
            await asyncio.sleep(0.02)
        request_id, cursor = self.runs[key], ""
        if self.chance.random() < self.plan.late:
            await asyncio.sleep(self.chance.random() * self.plan.count * self.plan.pause)
            others = [r.frames for r in self.history.readings.values() if r.request_id == request_id and r.frames]
            if others and self.chance.random() < 0.5:
                cursor = self.chance.choice(others)[-1].id.rpartition("/")[2]
        await Reader(self, name).read(request_id, cursor)

    # -- polls -----------------------------------------------------------------------------------------------

    async def _poll_now_and_then(self) -> None:
        while True:
            await asyncio.sleep(self.plan.polls)
            if self.runs:
                request_id = self.chance.choice(list(self.runs.values()))
                with contextlib.suppress(*NO_ANSWER):
                    self._polled(request_id, await self.ask("GET", f"/api/v1/runs/{request_id}"))

    def _polled(self, request_id: str, answer: Answer) -> bool:
        """False where the gateway could not say."""
        status, run = answer
        if status == 503:
            return False
        assert status in (200, 404), answer
        self.history.polled(request_id, run if status == 200 else None)
        return True

    async def _evidence(self) -> Evidence:
        evidence = Evidence(self.history)
        redis = connect(self._redis_url, connections=2)
        try:
            for request_id in {submit.request_id for submit in self.history.submits}:
                path = f"/api/v1/runs/{request_id}"
                while not self._polled(request_id, await self._insist(path)):
                    await asyncio.sleep(0.2)
                run = evidence.polls[request_id] = self.history.polls[-1].run
                entries = evidence.logs[request_id] = await log.read_all(redis, request_id)
                self.history.note(run=request_id, log=[[str(entry.id), entry.type, entry.data] for entry in entries])
                evidence.pages[request_id] = [row async for row in self._pages(path)] if run else []
                if run and run["status"] == "completed" and self.plan.body is None:
                    count = run["usage"].get("tokens", self.plan.count)
                    evidence.texts[request_id] = "".join(numbered(request_id, n) for n in range(count))
        finally:
            await redis.aclose(close_connection_pool=True)
        return evidence

    async def _pages(self, path: str) -> AsyncIterator[tuple[Entry, bool]]:
        cursor = ""
        while True:
            status, page = await self._insist(f"{path}/events?limit=500{cursor}")
            assert status == 200, page
            for row in page["events"]:
                yield Entry(EventId.parse(row["id"]), row["type"], json.dumps(row["data"])), row["void"]
            if page["next"] is None:
                return
            cursor = f"&cursor={page['next']}"

    # -- requests --------------------------------------------------------------------------------------------

    def gateway(self) -> str:
        return self.chance.choice(self.gateways)

    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {token('alice')}"}

    async def ask(
        self, method: str, path: str, headers: Mapping[str, str] | None = None, body: bytes | None = None
    ) -> Answer:
        """One request to one gateway. Raises one of NO_ANSWER where none comes."""
        stream = Stream()
        try:
            async with asyncio.timeout(10):
                await stream.open(self.gateway(), path, {**self.headers(), **(headers or {})}, method=method, body=body)
                await stream.ends(within=10)
        finally:
            await stream.close()
        if stream.ending != "finished":
            raise EOFError
        return stream.status, json.loads(bytes(stream.body) or b"null")

    async def _insist(self, path: str) -> Answer:
        """Until it is answered: by now the test has healed everything."""
        async with asyncio.timeout(30):
            while True:
                with contextlib.suppress(*NO_ANSWER):
                    return await self.ask("GET", path)
                await asyncio.sleep(0.1)
