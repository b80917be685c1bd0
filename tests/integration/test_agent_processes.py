"""BROKER_AGENT_PROCESSES: agents in processes of their own are agents like others, whatever happens to those."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.conftest import Launcher, Service
from tests.kit.checker import check_log
from tests.kit.command import broker, check_one_line
from tests.kit.fleet import Fleet, attempts, check_resumed, check_steps, reasons, restored
from tests.kit.http import Client
from tests.kit.processes import Worker, wait_for
from tests.kit.scale import LONG

LEASE = 1.5
EVERY = 10


class Stage(Fleet):
    """A worker whose agents run in two processes."""

    worker: Worker

    def processes(self) -> list[psutil.Process]:
        return processes_of(self.worker)


def processes_of(worker: Worker) -> list[psutil.Process]:
    return [child for child in psutil.Process(worker.pid).children() if child.status() != psutil.STATUS_ZOMBIE]


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    launcher = Launcher(tmp_path_factory.mktemp("processes"))
    try:
        server = launcher.redis()
        gateway = launcher.gateway(server.url, heartbeat_seconds=1, lease_seconds=LEASE)
        with Client(gateway.url) as client, server.client() as direct:
            made = Stage(server, client, direct)
            made.worker = launcher.worker(server.url, agent_processes=2, lease_seconds=LEASE)
            yield made
    finally:
        launcher.close()


# -- agents like others --------------------------------------------------------------------------------------

SAID: list[tuple[str, dict[str, Any]]] = [
    ("speaks", {"texts": ["plain", "é ü", "\u2028\u0085", "two\nlines"]}),
    ("speaks", {"text": "an error", "error": True}),
    ("varied", {"count": 100}),
    ("tokens", {"count": 1000}),
    ("burst", {"count": 40, "size": 60_000}),
    ("checkpoints", {"count": 50}),
    ("no_final", {}),
    ("raises", {}),
    ("coroutine", {}),
    ("yields_junk", {}),
    *[("clutters", {"what": what}) for what in ("lambda", "in data", "checkpoint")],
    *[("misbehaves", {"what": what}) for what in ("nan", "too_large", "exits", "task exits", "cancels", "error")],
]


@pytest.mark.parametrize(("agent", "parameters"), SAID, ids=[f"{name}-{n}" for n, (name, _) in enumerate(SAID)])
def test_an_agent_says_in_a_process_exactly_what_it_says_in_the_worker(
    stage: Stage, service: Service, alice: Client, agent: str, parameters: dict[str, Any]
) -> None:
    logs, runs = [], []
    for client in (stage.client, alice):
        request_id = client.submit("the same", agent=agent, parameters=parameters)
        run = client.finished(request_id)
        log = client.log(request_id)
        check_log(log)
        logs.append([(entry.type, entry.data) for entry in log[1:]])
        runs.append({name: run[name] for name in ("status", "answer", "error", "citations", "usage")})
    assert logs[0] == logs[1]
    assert runs[0] == runs[1]


def test_an_agent_knows_its_run(stage: Stage) -> None:
    request_id = stage.client.submit("é\u2028", agent="about", session_id="s", parameters={"a": [1, None]})
    stage.until_ended([request_id])
    [seen] = [event.json for event in stage.client.events(request_id) if event.type == "data"]
    known = seen["value"]
    assert (known["request_id"], known["query"], known["parameters"]) == (request_id, "é\u2028", {"a": [1, None]})
    assert (known["session_id"], known["subject"], known["attempt"]) == ("s", "alice", 1)
    assert abs(known["deadline"] - time.time() - 3600) < 60


def test_an_agent_is_told_the_history_of_its_session(stage: Stage) -> None:
    first = stage.client.submit("the first", agent="echo", session_id="told")
    stage.client.finished(first)
    request_id = stage.client.submit("and then?", agent="recalls", session_id="told")
    turns = [event.json["value"] for event in stage.client.events(request_id) if event.type == "data"]
    assert [(turn["request_id"], turn["query"], turn["answer"]) for turn in turns] == [
        (first, "the first", "the first")
    ]


def test_calls_that_block_do_not_wait_for_one_another(stage: Stage, service: Service, alice: Client) -> None:
    """In the worker and in a process of its own: asyncio's own executor has 32 threads at most."""
    for client in (stage.client, alice):
        run = client.finished(client.submit("q", agent="together", parameters={"count": 60}))
        assert (run["answer"], run["error"]) == ("60 at once", None)


def test_a_question_that_cannot_be_asked_is_the_agents_failure(stage: Stage) -> None:
    stage.client.finished(stage.client.submit("before", agent="echo", session_id="asked"))
    request_id = stage.client.submit("q", agent="recalls", session_id="asked", parameters={"tokens": "many"})
    assert stage.client.finished(request_id)["error"]["code"] == "agent_failed"
    wait_for(lambda: bool(stage.worker.logged("a call of an agent failed", request_id=request_id)))


def test_the_traceback_of_an_agent_that_fails_is_in_the_log_and_not_in_the_answer(stage: Stage) -> None:
    request_id = stage.client.submit("r", agent="raises")
    run = stage.client.finished(request_id)
    assert run["error"]["code"] == "agent_failed"
    assert "secret" not in run["error"]["message"]
    [line] = stage.worker.logged("an agent failed", request_id=request_id)
    assert "RuntimeError: a secret detail of the agent" in line["exc_info"]


def test_runs_are_spread_over_the_processes(stage: Stage, tmp_path: Path) -> None:
    marks = [tmp_path / f"{n}" for n in range(6)]
    runs = [stage.submit("where", mark=str(mark), seconds=1) for mark in marks]
    stage.until_ended(runs)
    counts = [[mark.read_text() for mark in marks].count(str(child.pid)) for child in stage.processes()]
    assert counts == [3, 3]


def test_a_cancel_closes_the_agent_and_its_finally_runs(stage: Stage, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    request_id = stage.submit("slow", mark=str(mark))
    stage.until_running([request_id])
    stage.client.post(f"/api/v1/runs/{request_id}/cancel").raise_for_status()
    wait_for(mark.exists)
    wait_for(lambda: bool(stage.worker.logged("run ended", request_id=request_id, outcome="cancelled")))
    assert not stage.worker.logged("a cancelled agent does not end; it is left behind and can write nothing")


# -- computing -----------------------------------------------------------------------------------------------


def test_tokens_flow_while_an_agent_beside_them_computes(stage: Stage) -> None:
    """By the machine's clock: what was made while the other one computed has arrived while it did."""
    streaming = stage.submit("clock", count=150, pause=0.02)
    stage.until_running([streaming])
    computing = stage.submit("computes", seconds=1.5)
    arrived = [
        (float(event.json["text"]), time.monotonic())
        for event in stage.client.events(streaming)
        if event.type == "token"
    ]
    begun, over = (float(text) for text in str(stage.client.finished(computing)["answer"]).split())
    made = [(at, seen) for at, seen in arrived if begun < at < over]
    assert len(made) > 10
    assert sum(seen < over for _, seen in made) > len(made) / 2
    wait_for(lambda: bool(stage.worker.logged("the event loop is blocked", request_id=computing)))
    [told] = stage.worker.logged("the event loop is blocked", request_id=computing)
    assert (told["agent"], told["attempt"]) == ("computes", 1)
    wait_for(lambda: bool(stage.worker.logged("the event loop turns again", request_id=computing)))


def test_what_an_agent_has_said_before_it_blocks_is_read_at_once(stage: Stage, tmp_path: Path) -> None:
    """It says it again only when that has been read."""
    until, release = tmp_path / "until", tmp_path / "release"
    until.touch()
    request_id = stage.submit("blocks", until=str(until), release=str(release))
    seen = []
    for event in stage.client.events(request_id):
        seen.append(event.type)
        if event.type == "token":
            release.touch()
    assert seen == ["start", "attempt", "token", "token", "final"]


# -- a process that dies -------------------------------------------------------------------------------------


def test_the_runs_of_a_process_that_is_killed_go_on_at_their_checkpoints(stage: Stage) -> None:
    runs = [stage.submit("steps", count=100, pause=0.02, every=EVERY) for _ in range(4)]
    stage.until_running(runs, events=20)
    before = stage.processes()
    before[0].kill()
    stage.until_ended(runs)
    lost = [request_id for request_id in runs if stage.field(request_id, "fails") == "1"]
    assert len(lost) == 2, "the other process' runs went on"
    for request_id in runs:
        run, log = stage.ended(request_id)
        assert run["status"] == "completed"
        assert reasons(log) == ["started", "worker_lost"][: 2 if request_id in lost else 1]
        check_steps(log, 100)
        if request_id in lost:
            check_resumed(log, EVERY)
            assert list(restored(log).values())[-1] is not None
    [told] = stage.worker.logged("an agent process ended", pid=before[0].pid)
    assert (told["code"], set(told["runs"])) == (-signal.SIGKILL, set(lost))
    wait_for(lambda: len(stage.processes()) == 2)


@pytest.mark.parametrize("how", ["exit", "segfault", "fork", "stop"] if LONG else ["segfault", "stop", "fork"])
def test_a_run_that_ends_its_process_goes_on_in_another(stage: Stage, tmp_path: Path, how: str) -> None:
    release = tmp_path / "release"
    request_id = stage.submit("dies", how=how, release=str(release))
    try:
        stage.until_ended([request_id], seconds=30)
    finally:
        release.touch()
    run, log = stage.ended(request_id)
    assert (run["status"], run["answer"]) == ("completed", "saved restored saved")
    assert reasons(log) == ["started", "worker_lost"]
    assert [told for told in stage.worker.logged("an agent process ended") if told["runs"] == [request_id]]


def test_a_run_that_kills_every_process_ends_when_its_attempts_are_used_up(stage: Stage) -> None:
    """PROTOCOL 4.4, as if it had killed its workers."""
    request_id = stage.submit("kills")
    stage.until_ended([request_id])
    run, log = stage.ended(request_id)
    assert (run["status"], run["error"]["code"], run["attempt"]) == ("failed", "worker_lost", 3)
    assert reasons(log) == ["started", "worker_lost", "worker_lost", "worker_lost"]
    assert stage.worker.popen.poll() is None
    wait_for(lambda: len(stage.processes()) == 2, seconds=20)
    assert stage.client.finished(stage.submit("echo"))["status"] == "completed"


# -- the end of the worker -----------------------------------------------------------------------------------


def test_a_worker_that_is_killed_leaves_no_process_behind(fleet: Fleet, launch: Launcher) -> None:
    worker = launch.worker(fleet.redis.url, agent_processes=2, lease_seconds=LEASE)
    children = processes_of(worker)
    assert len(children) == 2
    blocks, waits = fleet.submit("computes", seconds=300), fleet.submit("hangs")
    fleet.until_running([blocks, waits])
    worker.signal(signal.SIGKILL)
    worker.wait()
    _, alive = psutil.wait_procs(children, timeout=10)
    assert alive == []
    fleet.direct.flushall()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT] if LONG else [signal.SIGINT])
def test_a_signal_to_all_processes_lets_the_runs_end(fleet: Fleet, launch: Launcher, number: signal.Signals) -> None:
    """As a service manager sends it, and Ctrl-C in a terminal."""
    worker = launch.worker(fleet.redis.url, agent_processes=2, grace_seconds=20)
    children = processes_of(worker)
    runs = [fleet.submit("slow", seconds=1) for _ in range(4)]
    fleet.until_running(runs)
    for child in children:
        child.send_signal(number)
    worker.signal(number)
    assert worker.wait() == 0
    for request_id in runs:
        run, log = fleet.ended(request_id)
        assert (run["status"], run["answer"], reasons(log)) == ("completed", "begun done", ["started"])
    _, alive = psutil.wait_procs(children, timeout=10)
    assert alive == []
    assert not worker.logged("an agent process ended")


def test_a_drain_hands_over_at_the_checkpoints_what_does_not_end(
    fleet: Fleet, launch: Launcher, tmp_path: Path
) -> None:
    mark = tmp_path / "mark"
    worker = launch.worker(fleet.redis.url, agent_processes=2, grace_seconds=0.3, lease_seconds=600)
    request_id = fleet.submit("steps", count=100, pause=0.02, every=EVERY, mark=str(mark))
    fleet.until_running([request_id], events=30)
    assert worker.stop() == 0
    assert Path(f"{mark}.1").read_text() == "closed"
    launch.worker(fleet.redis.url, agent_processes=1)
    fleet.until_ended([request_id])
    run, log = fleet.ended(request_id)
    assert (run["status"], reasons(log)) == ("completed", ["started", "handed_over"])
    check_steps(log, 100)
    assert attempts(log)[1].resume_from != "0-1"
    assert fleet.field(request_id, "fails") == ""


def test_a_worker_whose_processes_cannot_load_the_agents_does_not_start(stage: Stage) -> None:
    agents = {"agents": "mine=no_such_module:agent", "default_agent": "mine"}
    done = broker("worker", redis_url=stage.redis.url, agent_processes=1, **agents)
    assert "BROKER_AGENTS: mine: importing no_such_module failed" in check_one_line(done)
