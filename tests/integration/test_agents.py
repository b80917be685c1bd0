"""The contract of an agent, through a real gateway and a real worker: what it gets, what it may do, how it ends."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Launcher
from tests.kit.agents import VARIETY
from tests.kit.checker import check_log, check_reader, entries_of, surviving_text
from tests.kit.http import Client, token
from tests.kit.processes import Gateway, Worker, wait_for
from tests.kit.redis_server import RedisServer

CORPUS = Path(__file__).parents[1] / "corpus"


@dataclass
class Stage:
    redis: RedisServer
    gateway: Gateway
    worker: Worker
    client: Client


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    """A worker with a folder of documents."""
    launcher = Launcher(tmp_path_factory.mktemp("agents"))
    try:
        server = launcher.redis()
        gateway, worker = launcher.gateway(server.url), launcher.worker(server.url, docs=CORPUS)
        with Client(gateway.url) as client:
            yield Stage(server, gateway, worker, client)
    finally:
        launcher.close()


def ended(stage: Stage, agent: str, query: str = "", **body: Any) -> dict[str, Any]:
    """The run when it has ended. Whatever it was, its log is whole and polling equals streaming (P3, P23)."""
    request_id = stage.client.submit(query or f"{agent} {time.monotonic_ns()}", agent=agent, **body)
    run = stage.client.finished(request_id)
    log = stage.client.log(request_id)
    check_log(log)
    check_reader(entries_of(list(stage.client.events(request_id))), log)
    if run["status"] != "completed":
        assert run["answer"] == (surviving_text(log) or None)
    return run


def test_an_agent_knows_its_run(stage: Stage) -> None:
    before = time.time()
    run = ended(stage, "about", "who am I?", session_id="my-session", parameters={"a": [1, None], "b": "é"})
    [value] = [entry.data for entry in stage.client.log(run["request_id"]) if entry.type == "data"]
    about = _json(value)["value"]
    deadline, created_at = about.pop("deadline"), about.pop("created_at")
    assert about == {
        "request_id": run["request_id"],
        "query": "who am I?",
        "parameters": {"a": [1, None], "b": "é"},
        "session_id": "my-session",
        "tenant": "alice",
        "subject": "alice",
        "attempt": 1,
        "restored": None,
    }
    assert before - 1 < created_at < time.time() + 1
    assert before + 3000 < deadline < time.time() + 4000, "an hour, by default"


def test_a_tenant_is_told_where_the_token_has_one(stage: Stage) -> None:
    with Client(stage.gateway.url, headers={"Authorization": f"Bearer {token('bob', tenant='acme')}"}) as bob:
        request_id = bob.submit("about", agent="about")
        bob.finished(request_id)
        [value] = [entry.data for entry in bob.log(request_id) if entry.type == "data"]
    assert (_json(value)["value"]["tenant"], _json(value)["value"]["subject"]) == ("acme", "bob")


def _json(text: str) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(text)
    return value


@pytest.mark.parametrize("text", VARIETY)
def test_echo_gives_back_what_it_was_asked(stage: Stage, text: str) -> None:
    body = json.dumps({"query": text, "agent": "echo"})  # ASCII: a lone surrogate has no UTF-8
    posted = stage.client.post("/api/v1/query", content=body, headers={"Content-Type": "application/json"})
    run = stage.client.finished(posted.json()["request_id"])
    assert (run["status"], run["answer"]) == ("completed", text)


def test_without_a_final_the_answer_is_the_tokens(stage: Stage) -> None:
    run = ended(stage, "no_final")
    assert (run["status"], run["answer"], run["error"]) == ("completed", "only tokens", None)


def test_a_long_answer_is_whole_though_no_event_may_hold_it(stage: Stage) -> None:
    run = ended(stage, "burst", parameters={"count": 300, "size": 1000})
    assert run["status"] == "completed"
    assert run["answer"] == "x" * 300_000


@pytest.mark.parametrize(
    ("agent", "parameters", "code", "partial"),
    [
        ("raises", {}, "agent_failed", "so far "),
        ("misbehaves", {"what": "exits"}, "agent_failed", "before "),
        ("misbehaves", {"what": "cancels"}, "agent_failed", "before "),
        ("yields_junk", {}, "invalid_event", "before "),
        ("misbehaves", {"what": "nan"}, "invalid_event", "before "),
        ("misbehaves", {"what": "too_large"}, "event_too_large", "before "),
        ("misbehaves", {"what": "error"}, "no_quota", "before "),
        ("misbehaves", {}, "agent_failed", "before "),
        ("coroutine", {}, "invalid_agent", None),
        ("tokens", {"count": "many"}, "agent_failed", None),
    ],
)
def test_an_agent_that_misbehaves_ends_its_run_with_a_stable_code_and_a_safe_message(
    stage: Stage, agent: str, parameters: dict[str, Any], code: str, partial: str | None
) -> None:
    run = ended(stage, agent, parameters=parameters)
    assert (run["status"], run["error"]["code"], run["answer"]) == ("failed", code, partial)
    assert "secret" not in run["error"]["message"]
    assert "Error" not in run["error"]["message"], "no class of an exception either"
    wait_for(lambda: bool(stage.worker.logged("run ended", request_id=run["request_id"], outcome="error")))
    if code == "agent_failed":
        [line] = stage.worker.logged("an agent failed", request_id=run["request_id"])
        assert "Traceback" in line["exc_info"]
    assert ended(stage, "echo", "the worker lives")["status"] == "completed"


def test_a_log_that_is_full_ends_with_log_full_and_stays_readable(stage: Stage) -> None:
    run = stage.client.finished(stage.client.submit("full", agent="misbehaves", parameters={"what": "full"}))
    assert (run["status"], run["error"]["code"]) == ("failed", "log_full")
    with stage.redis.client() as redis:
        assert 49_000 < redis.xlen(f"sb:{{{run['request_id']}}}:log") <= 50_000
    epoch, _, seq = run["last_event_id"].partition("-")
    tail = list(stage.client.events(run["request_id"], after=f"{epoch}-{int(seq) - 10}"))
    assert [event.type for event in tail] == ["token"] * 9 + ["error"]


def test_a_run_that_takes_too_long_ends_with_timeout(launch: Launcher, stage: Stage, tmp_path: Path) -> None:
    server = launch.redis()
    gateway = launch.gateway(server.url)
    launch.worker(server.url, max_run_seconds=0.5)
    mark = tmp_path / "mark"
    with Client(gateway.url) as client:
        late = client.submit("late", agent="slow", parameters={"mark": str(mark)})
        in_time = client.submit("in time")
        run = client.finished(late)
        assert (run["status"], run["error"]["code"], run["answer"]) == ("failed", "timeout", "begun ")
        assert mark.read_text() == "closed"
        check_log(client.log(late))
        assert client.finished(in_time)["status"] == "completed"


def test_a_worker_that_does_not_have_the_agent_says_so(launch: Launcher, stage: Stage) -> None:
    server = launch.redis()
    gateway = launch.gateway(server.url)
    launch.worker(server.url, agents="other=tests.kit.agents:echo", default_agent="other")
    with Client(gateway.url) as client:
        run = client.finished(client.submit("who?", agent="echo"))
        assert (run["status"], run["error"]["code"]) == ("failed", "unknown_agent")


def test_a_checkpoint_is_stored_while_the_run_goes_on(stage: Stage) -> None:
    request_id = stage.client.submit("c", agent="checkpoints", parameters={"count": 40, "pause": 0.02})
    with stage.redis.client() as redis:

        def stored() -> int:
            state = redis.hget(f"sb:{{{request_id}}}:run", "checkpoint")
            assert state is None or isinstance(state, bytes)
            return int(_json(state.decode())["done"]) if state else 0

        wait_for(lambda: 2 <= stored() < 40)
        wait_for(lambda: stored() == 40)
    assert surviving_text(stage.client.log(request_id)) == "".join(f"{n} " for n in range(40))
    stage.client.finished(request_id)


@pytest.mark.parametrize("parameters", [{"pace": 0}, {"pace": "fast"}, {"max_sources": 0}, {"max_sources": "all"}])
def test_a_wrong_parameter_of_research_fails_its_run_and_says_which(stage: Stage, parameters: dict[str, Any]) -> None:
    run = ended(stage, "research", "How do coral reefs grow?", parameters=parameters)
    assert (run["status"], run["error"]["code"]) == ("failed", "invalid_parameter")
    [name] = parameters
    assert name in run["error"]["message"]


def test_research_answers_from_the_documents_with_citations(stage: Stage) -> None:
    run = ended(stage, "research", "How do coral reefs grow?")
    assert run["status"] == "completed"
    assert run["citations"]
    for citation in run["citations"]:
        assert citation["sentence"] in run["answer"]
        assert (CORPUS / citation["path"]).exists()
