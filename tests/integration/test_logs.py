"""Logs: one JSON object a line; a run can be followed by its request_id; no token and no text of a user in any."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

import httpx
import pytest

from tests.conftest import Launcher
from tests.kit import raw
from tests.kit.http import Client, token
from tests.kit.processes import SECRET, Gateway, Process, Worker, wait_for
from tests.kit.redis_server import RedisServer

PASSWORD = "a-password-of-redis"
JSON = ("Content-Type", "application/json")


@dataclass
class Scene:
    """What was done to a service, and the words that must not be in its logs."""

    redis: RedisServer
    gateway: Gateway
    worker: Worker
    words: dict[str, str] = field(default_factory=dict)
    runs: dict[str, str] = field(default_factory=dict)
    failure_id: str = ""

    def word(self, where: str) -> str:
        return self.words.setdefault(where, f"w{secrets.token_hex(8)}")

    @property
    def processes(self) -> list[Process]:
        return [self.gateway, self.worker]

    def lines(self) -> list[dict[str, Any]]:
        return [line for process in self.processes for line in process.log_lines()]


def play(scene: Scene) -> None:
    """Everything that a user does and gets wrong, with a word of its own in each place."""
    bearer = token("alice")
    scene.words |= {"token": bearer, "signature": bearer.rpartition(".")[2], "payload": bearer.split(".")[1]}
    with Client(scene.gateway.url, None, headers={"Authorization": f"Bearer {bearer}"}) as client:
        body = {
            "session_id": scene.word("session"),
            "metadata": {scene.word("metadata key"): scene.word("metadata")},
        }
        spoken = {"texts": [scene.word("what an agent says")], scene.word("parameter"): scene.word("parameter value")}
        events = client.submit_and_read(scene.word("query"), agent="speaks", parameters=spoken, **body)
        scene.runs["completed"] = events[0].json["request_id"]
        scene.runs["failed"] = client.submit(scene.word("query of a failure"), agent="raises", **body)
        client.finished(scene.runs["failed"])
        scene.runs["junk"] = client.submit(scene.word("query of junk"), agent="yields_junk", **body)
        client.finished(scene.runs["junk"])
        scene.runs["cancelled"] = client.submit(scene.word("query of a cancel"), agent="slow", **body)
        next(client.events(scene.runs["cancelled"], after="0-1"))
        client.post(f"/api/v1/runs/{scene.runs['cancelled']}/cancel")
        run = f"/api/v1/runs/{scene.runs['completed']}"
        client.get(run, params={"wait": 1})
        client.get(run, params={"wait": scene.word("a bad wait")})
        client.get(f"{run}/events", params={"cursor": scene.word("a bad cursor")})
        client.get(f"{run}/stream", params={"last_event_id": scene.word("a bad event id")})
        client.get("/api/v1/runs", params={"session_id": scene.word("a session to list")})
        client.get("/healthz", params={"access_token": bearer})
        key = {"Idempotency-Key": scene.word("idempotency-key")}
        client.post("/api/v1/query", json={"query": "x"}, headers=key)
        client.post("/api/v1/query", json={"query": scene.word("another under the key")}, headers=key)
        client.post("/api/v1/query", json={"query": "x", scene.word("unknown field"): scene.word("its value")})
        client.post("/api/v1/query", json={"query": "x", "agent": scene.word("unknown agent")})
        client.post("/api/v1/query", json={"query": [scene.word("wrong type")]})
    url = scene.gateway.url
    auth = ("Authorization", f"Bearer {bearer}")
    raw.ask(url, "POST", "/api/v1/query", auth, JSON, body=f'{{"query": "{scene.word("broken json")}'.encode())
    raw.ask(url, "POST", "/api/v1/query", auth, ("Content-Type", scene.word("type")), body=scene.word("text").encode())
    for name, made in {
        "expired": token("alice", ttl=-600),
        "foreign": token("alice", secret="another secret of at least thirty-two bytes"),
        "garbage": f"{scene.word('garbage')}.x.y",
        "long": "a." * 10_000,
    }.items():
        scene.words[f"{name} token"] = made
        raw.ask(url, "GET", "/api/v1/runs", ("Authorization", f"Bearer {made}"))
    raw.ask(
        url, "GET", "/api/v1/runs", ("Authorization", f"Basic {scene.word('basic')}"), ("Cookie", scene.word("cookie"))
    )
    raw.exchange(url, f"GET / HTTP/1.1\r\n{scene.word('broken header')}\r\n\r\n".encode())
    # What nobody foresaw: a record that somebody has damaged.
    with scene.redis.client() as redis:
        redis.hset(f"sb:{{{scene.runs['junk']}}}:run", "metadata", f'{{"{scene.word("damaged record")}')
    reply = raw.ask(url, "GET", f"/api/v1/runs/{scene.runs['junk']}", auth)
    assert reply.status == 500
    scene.failure_id = reply.header("x-request-id") or ""
    # Redis goes away and comes back.
    scene.redis.kill()
    raw.ask(url, "POST", "/api/v1/query", auth, JSON, body=f'{{"query": "{scene.word("while away")}"}}'.encode())
    scene.redis.start()
    wait_for(lambda: httpx.get(f"{url}/readyz", verify=False).status_code == 200, seconds=20)
    assert scene.gateway.stop() == 0
    assert scene.worker.stop() == 0


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    launcher = Launcher(tmp_path_factory.mktemp("logs"))
    try:
        server = launcher.redis()
        with server.client() as redis:
            redis.config_set("requirepass", PASSWORD)
        server.url = server.url.replace("redis://", f"redis://:{PASSWORD}@")
        server._options = ("--requirepass", PASSWORD)
        made = Scene(server, launcher.gateway(server.url), launcher.worker(server.url))
        play(made)
        yield made
    finally:
        launcher.close()


def test_every_line_is_a_json_object_with_its_time_level_logger_and_message(scene: Scene) -> None:
    for line in scene.lines():
        assert {"time", "level", "logger", "message"} <= set(line)
        assert line["level"] in ("INFO", "WARNING", "ERROR"), line
        assert abs(datetime.fromisoformat(line["time"].replace(",", ".")) - datetime.now()) < timedelta(days=1)
        assert "\n" not in line["message"]


def test_the_logs_are_ascii(scene: Scene) -> None:
    """Whoever reads them line by line is not misled by what a user sent."""
    for process in scene.processes:
        process.log_path.read_bytes().decode("ascii")


def test_no_token_and_no_text_of_a_user_is_in_any_log(scene: Scene) -> None:
    assert len(scene.words) > 25
    for process in scene.processes:
        text = process.log_text()
        for where, word in scene.words.items():
            assert word not in text, where
        assert SECRET not in text
        assert PASSWORD not in text
        assert not re.search(r"eyJ[\w-]+\.[\w-]+\.", text), "something that looks like a JWT"


def test_each_request_has_one_access_line_without_its_query_string(scene: Scene) -> None:
    lines = scene.gateway.logged("access")
    assert len(lines) > 25
    for line in lines:
        assert line["logger"] == "broker.access"
        assert re.fullmatch("[0-9a-f]{32}", line["request_id"])
        assert line["method"] in ("GET", "POST", "DELETE", "HEAD")
        assert "?" not in line["path"]
        assert line["status"] >= 200
        assert 0 <= line["seconds"] < 60
    statuses = {line["status"] for line in lines}
    assert statuses >= {200, 202, 400, 401, 415, 422, 500, 503}


def test_there_is_no_access_log_of_the_server_itself(scene: Scene) -> None:
    loggers = {line["logger"] for line in scene.lines()}
    assert "uvicorn.access" not in loggers
    assert not [line for line in scene.lines() if "HTTP/1.1" in line["message"]]


def test_a_run_is_followed_by_its_id_from_its_submit_to_its_end(scene: Scene) -> None:
    for name, outcome in (("completed", "final"), ("failed", "error"), ("junk", "error"), ("cancelled", "cancelled")):
        request_id = scene.runs[name]
        submitted = scene.gateway.logged("access", request_id=request_id, method="POST")
        assert submitted, name
        [started] = scene.worker.logged("run started", request_id=request_id)
        assert (started["attempt"], started["agent"]) == (1, started["agent"])
        [ended] = scene.worker.logged("run ended", request_id=request_id)
        assert (ended["outcome"], ended["attempt"]) == (outcome, 1), name
        assert ended["events"] >= 1
    [line] = scene.worker.logged("an agent failed", request_id=scene.runs["failed"])
    assert "RuntimeError" in line["exc_info"]


def test_an_unexpected_error_is_found_by_the_id_that_its_reply_had(scene: Scene) -> None:
    [line] = scene.gateway.logged("unexpected error", request_id=scene.failure_id)
    assert line["level"] == "ERROR"
    assert "Traceback" in line["exc_info"]
    [access] = scene.gateway.logged("access", request_id=scene.failure_id)
    assert access["status"] == 500


def test_the_first_line_is_the_settings_without_what_is_secret(scene: Scene) -> None:
    for process, role in ((scene.gateway, "gateway"), (scene.worker, "worker")):
        first = process.log_lines()[0]
        assert (first["message"], first["role"]) == ("settings", role)
        assert first["settings"]["redis_url"] == f"redis://:***@127.0.0.1:{scene.redis.port}"
        assert set(first["settings"]["jwt_secret"]) == {"*"}


def test_start_stop_and_the_loss_of_redis_are_told_once_each(scene: Scene) -> None:
    assert len(scene.gateway.logged("listening")) == 1
    assert len(scene.gateway.logged("draining", signal="SIGTERM")) == 1
    assert len(scene.worker.logged("worker started")) == 1
    assert len(scene.worker.logged("worker stopped")) == 1
    lost = scene.gateway.logged("pub/sub connection lost") + scene.gateway.logged("pub/sub connection failed")
    assert 1 <= len(lost) <= 3
    assert len(scene.gateway.logged("pub/sub connection restored")) == 1


def test_nothing_is_logged_as_an_error_but_what_is_one(scene: Scene) -> None:
    """No task that failed, no exception that nobody retrieved, and no noise of a library."""
    expected = {"unexpected error", "an agent failed"}
    errors = [line for line in scene.lines() if line["level"] == "ERROR" and line["message"] not in expected]
    assert errors == [], json.dumps(errors, indent=1)
