"""The two services under measurement, each with the Redis, the runs and the append command that it needs."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, Self, cast

import httpx
import redis
from redis.asyncio import Redis

from broker.ids import EventId, Owner
from broker.runs.connections import connect
from broker.runs.record import Submission
from broker.runs.scripts import Batch, Lease, Scripts
from tests.bench.machine import Cores, pinned
from tests.kit.http import token
from tests.kit.processes import Gateway, Worker, environment, wait_for
from tests.kit.redis_server import RedisServer, free_port

SUBJECT = "bench"
CLAIM_TOKEN = "bench"
HOUR_MS = 3_600_000
FIRST_SEQ = 2
"""Of a worker's own events: 1 is the `attempt` that the claim writes."""


class Target(ABC):
    """A service with a Redis of its own. `stream_path` and `append` have the placeholders of the load tools."""

    name: str
    stream_path: str
    other_stream_path: str | None = None
    """The same run in another wire format, where the service has one."""
    submit_path: str
    headers: tuple[str, ...] = ()
    append: list[str]
    other_events: int
    """Events of a run beside its tokens."""

    def __init__(self, folder: Path, cores: Cores, *, aof: bool, heartbeat: int) -> None:
        self.folder = folder
        self.cores = cores
        self.heartbeat = heartbeat
        self.redis = RedisServer(folder, "--appendonly", "yes" if aof else "no")
        self.client: redis.Redis = self.redis.client()
        self.workers: list[subprocess.Popen[bytes]] = []
        self.model_port = free_port()
        """Where workers ask a model; nobody listens there but in scenarios that need one."""
        self._runs = 0

    def __enter__(self) -> Self:
        try:
            with pinned(self.cores.others):
                self.redis.start()
            with pinned(self.cores.server):
                self.serve()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        for process in (*self.workers, self.server):
            if process is not None:
                process.kill()
                process.wait()
        self.client.close()
        self.redis.close()

    @property
    @abstractmethod
    def server(self) -> subprocess.Popen[bytes] | None: ...

    @property
    @abstractmethod
    def url(self) -> str: ...

    @abstractmethod
    def serve(self) -> None:
        """Starts the gateway; returns when it is ready."""

    @abstractmethod
    def work(self) -> None:
        """Starts a worker; returns when it is ready."""

    def make_runs(self, count: int) -> int:
        """Makes runs to which a worker may append, and returns the number of the first.

        Their names are their numbers, as 32 hex digits.
        """
        first, self._runs = self._runs, self._runs + count
        self.prepare(range(first, self._runs))
        return first

    @abstractmethod
    def prepare(self, numbers: range) -> None:
        """Makes the runs with these numbers."""

    @abstractmethod
    def submission(self, query: str) -> dict[str, Any]:
        """The body of a submit."""

    @abstractmethod
    def model_submission(self, query: str) -> dict[str, Any]:
        """The same, of a run that relays what a model says."""

    @property
    def pid(self) -> int:
        assert self.server is not None
        return self.server.pid


class Broker(Target):
    """`broker serve` and `broker worker`, with JWTs and heartbeats, appended to by the worker's own script."""

    name = "broker"
    stream_path = "/api/v1/runs/{x}/stream"
    other_stream_path = "/v1/responses/{x}?stream=true"
    submit_path = "/api/v1/query/stream"
    other_events = 3  # start, attempt, final

    def __init__(self, folder: Path, cores: Cores, *, aof: bool, heartbeat: int) -> None:
        super().__init__(folder, cores, aof=aof, heartbeat=heartbeat)
        self.headers = (f"Authorization: Bearer {token(SUBJECT)}",)
        self._environment = environment(
            self.redis.url,
            agents="words=tests.bench.agents:words,timed_chat=tests.bench.agents:timed_chat",
            default_agent="words",
            heartbeat_seconds=heartbeat,
            model="bench",
            model_api="completions",
        ) | {"OPENAI_BASE_URL": f"http://127.0.0.1:{self.model_port}/v1", "OPENAI_API_KEY": "bench"}
        self._gateway: Gateway | None = None

    @property
    def server(self) -> subprocess.Popen[bytes] | None:
        return self._gateway.popen if self._gateway else None

    @property
    def url(self) -> str:
        assert self._gateway is not None
        return self._gateway.url

    def serve(self) -> None:
        self._gateway = Gateway(self._environment, self.folder)
        self._gateway.until_ready()

    def work(self) -> None:
        with pinned(self.cores.others):
            worker = Worker(self._environment, self.folder)
        self.workers.append(worker.popen)
        worker.until_ready()

    def submission(self, query: str) -> dict[str, Any]:
        return {"query": query, "agent": "words"}

    def model_submission(self, query: str) -> dict[str, Any]:
        return {"query": query, "agent": "timed_chat"}

    def prepare(self, numbers: range) -> None:
        self.append = asyncio.run(self._make_runs(numbers))

    async def _make_runs(self, numbers: range) -> list[str]:
        client = connect(self.redis.url, connections=8, wait=60)
        try:
            scripts = Scripts(client)
            seconds, _ = await client.time()
            for first in range(0, len(numbers), 500):
                some = numbers[first : first + 500]
                leases = await asyncio.gather(*(_make_run(scripts, number, seconds * 1000) for number in some))
            return await _append_command(client, leases[-1])
        finally:
            await client.aclose(close_connection_pool=True)


async def _make_run(scripts: Scripts, number: int, now_ms: int) -> Lease:
    request_id = f"{number:032x}"
    fields = Submission(query="bench", agent="words").fields(Owner(SUBJECT, SUBJECT), "bench", "", "")
    # An epoch is at least the run's age: a claim from the future gives every run the same, which is 1.
    await scripts.create(request_id, now_ms + HOUR_MS, '{"request_id":"","session_id":""}', fields)
    lease = await scripts.claim(request_id, 1, CLAIM_TOKEN, HOUR_MS)
    assert isinstance(lease, Lease) and lease.epoch == 1 and lease.resume_from == EventId(0, 1), lease
    return lease


async def _append_command(client: Redis, lease: Lease) -> list[str]:
    """What a worker sends to append one event, as EVALSHA with the publisher's placeholders."""
    recorder = _Recorder(client)
    placeholder = Lease(**{**vars(lease), "request_id": "{x}"})
    seq = cast(int, "{s}")
    batch = Batch(first=seq, entries=[("token", "{p}")], kept_from=seq)
    # As nearly all of a publisher's appends: it renews the lease with one in 50 at 20 events/s.
    await Scripts(cast(Redis, recorder)).append(placeholder, batch, lease_ms=0, retention_ms=HOUR_MS)
    return recorder.command


class _Recorder:
    """In the place of a client: loads the script that `Scripts` registers, and keeps the call instead of making it."""

    def __init__(self, client: Redis) -> None:
        self._client = client
        self._source = ""
        self.command: list[str] = []

    def register_script(self, source: str) -> _Recorder:
        self._source = source
        return self

    async def __call__(self, keys: list[str], args: list[Any]) -> list[bytes]:
        sha = await self._client.script_load(self._source)
        self.command = ["EVALSHA", sha, str(len(keys)), *keys, *map(str, args)]
        return [b"OK", b"0-1", b"running"]


class Naive(Target):
    """tests.bench.naive: what people write by hand."""

    name = "naive"
    stream_path = "/runs/{x}/stream"
    submit_path = "/query/stream"
    other_events = 1  # final
    append: list[str] = ["XADD", "stream:{x}", "*", "t", "token", "d", "{p}"]  # noqa: RUF012

    _server: subprocess.Popen[bytes] | None = None
    _port = 0

    @property
    def server(self) -> subprocess.Popen[bytes] | None:
        return self._server

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def serve(self) -> None:
        self._port = free_port()
        self._server = self._start("serve", "--port", str(self._port))
        wait_for(self._ready, seconds=20)

    def _ready(self) -> bool:
        try:
            return httpx.get(self.url + "/readyz").status_code == 200
        except httpx.TransportError:
            return False

    def work(self) -> None:
        with pinned(self.cores.others):
            self.workers.append(self._start("work"))
        time.sleep(1)

    def _start(self, *arguments: str) -> subprocess.Popen[bytes]:
        env = {**os.environ, "REDIS_URL": self.redis.url, "PING_SECONDS": str(self.heartbeat)}
        env |= {"OPENAI_BASE_URL": f"http://127.0.0.1:{self.model_port}/v1", "OPENAI_API_KEY": "bench"}
        with (self.folder / f"naive-{arguments[0]}.log").open("wb") as log:
            command = [sys.executable, "-m", "tests.bench.naive", *arguments]
            return subprocess.Popen(command, env=env, stdout=log, stderr=log)

    def submission(self, query: str) -> dict[str, Any]:
        return {"query": query}

    def model_submission(self, query: str) -> dict[str, Any]:
        return {"query": query, "relay": True}

    def prepare(self, numbers: range) -> None:
        """A stream is there when something is in it."""


TARGETS: dict[str, type[Target]] = {target.name: target for target in (Broker, Naive)}
