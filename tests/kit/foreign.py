"""Agents of other libraries between a gateway and the stand-in for a model server."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from broker.events import Entry
from broker.fold import fold
from tests.conftest import Launcher
from tests.kit.checker import check_log, check_poll, check_reader, entries_of
from tests.kit.http import Client
from tests.kit.model_stub import ModelStub
from tests.kit.processes import Worker, wait_for
from tests.kit.redis_server import RedisServer

ROUNDS = 4


@dataclass
class Ended:
    run: dict[str, Any]
    log: list[Entry]

    def data(self, *types: str) -> list[dict[str, Any]]:
        """Of what survives."""
        return [json.loads(entry.data) for entry in fold(self.log) if entry.type in types]

    @property
    def types(self) -> list[str]:
        """Of what survives after `start`, text of several pieces once."""
        kinds = [entry.type for entry in fold(self.log)[1:]]
        return [kind for n, kind in enumerate(kinds) if n == 0 or kind != kinds[n - 1] or kind.startswith("tool")]

    @property
    def text(self) -> str:
        return "".join(data["text"] for data in self.data("token"))

    @property
    def tools(self) -> list[tuple[str, Any, Any]]:
        """(tool, arguments, result) of each call; each has one result, by its id."""
        results = {data["id"]: data for data in self.data("tool_result")}
        calls = self.data("tool_call")
        assert len(results) == len(self.data("tool_result")) == len(calls)
        assert all(results[call["id"]]["tool"] == call["tool"] for call in calls)
        return [(call["tool"], call["args"], results[call["id"]]["result"]) for call in calls]


@dataclass
class Stage:
    launcher: Launcher
    redis: RedisServer
    stub: ModelStub
    client: Client
    settings: dict[str, Any]
    worker: Worker

    def submit(self, agent: str, query: str, **body: Any) -> str:
        return self.client.submit(query, agent=agent, **body)

    def ended(self, request_id: str, status: str = "completed") -> Ended:
        """The run when it has ended. Its log is whole, a reader sees it, and polling equals streaming."""
        run = self.client.finished(request_id)
        log = self.client.log(request_id)
        check_log(log)
        check_poll(run, log)
        check_reader(entries_of(list(self.client.events(request_id))), log)
        assert run["status"] == status, run
        return Ended(run, log)

    def run(self, agent: str, query: str, status: str = "completed", **body: Any) -> Ended:
        return self.ended(self.submit(agent, query, **body), status)

    def until(self, request_id: str, kind: str) -> None:
        wait_for(lambda: any(entry.type == kind for entry in self.client.log(request_id)))

    def cancelled_at_once(self, agent: str, mark: Path) -> None:
        """Two runs of `agent` are cancelled, one in its tool `waits`, the other in its model: both are closed there."""
        waiting = self.submit(agent, f'w [[tool=waits {{"mark": "{mark}"}}]]')
        wait_for(mark.exists)
        speaking = self.submit(agent, "cancelled [[tokens=10000]] [[pace=50]]")
        self.until(speaking, "token")
        for request_id in (waiting, speaking):
            self.client.post(f"/api/v1/runs/{request_id}/cancel").raise_for_status()
        wait_for(lambda: mark.read_text() == "called closed ")
        self.stub.until_ended("disconnected", "cancelled [[")
        for request_id in (waiting, speaking):
            self.ended(request_id, "cancelled")
        assert not self.worker.logged("a cancelled agent does not end; it is left behind and can write nothing")

    def another_worker(self) -> None:
        """Instead of the one there is, which is killed."""
        self.worker.kill()
        self.worker = self.launcher.worker(self.redis.url, **self.settings)


@contextmanager
def staged(folder: Path, agents: dict[str, str], **settings: Any) -> Iterator[Stage]:
    launcher = Launcher(folder)
    given = {
        "agents": ",".join(f"{name}={target}" for name, target in agents.items()),
        "default_agent": next(iter(agents)),
        "max_rounds": ROUNDS,
        "lease_seconds": 1.5,
        **settings,
    }
    try:
        with ModelStub() as stub, pytest.MonkeyPatch.context() as patched:
            for name, value in stub.environment.items():
                patched.setenv(name, value)
            redis = launcher.redis()
            gateway, worker = launcher.gateway(redis.url, **given), launcher.worker(redis.url, **given)
            with Client(gateway.url) as client:
                yield Stage(launcher, redis, stub, client, given, worker)
    finally:
        launcher.close()
