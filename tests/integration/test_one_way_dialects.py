"""The dialects `chat`, `session_chat`, `agent` and `prompt`, over real gateways and workers, by clients of theirs."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import httpx
import pytest

from broker.events import Event, Final, Progress, Reasoning, Token, ToolCall, ToolResult
from tests.conftest import Launcher
from tests.kit import one_way
from tests.kit.http import Client
from tests.kit.one_way import ALICE, NAMES, Got, Name, Site, answered, asking, got, got_from, runs_of, script, whole
from tests.kit.processes import wait_for

SCRIPT: tuple[Event, ...] = (
    Reasoning(text="hm"),
    Progress(percent=50, message="half"),
    ToolCall(id="c1", tool="weather", args={"city": "Bern"}),
    ToolResult(id="c1", tool="weather", result=["sun"]),
    Token(text="It "),
    Token(text="shines\n\ndata: x\n\n"),
    Token(text="\u2028😀\ud800."),
    Final(citations=[{"title": "t"}]),
)
TEXT = "It shines\n\ndata: x\n\n\u2028😀\ud800."


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    launcher = Launcher(tmp_path_factory.mktemp("one-way"))
    try:
        yield Site(launcher)
    finally:
        launcher.close()


@pytest.fixture
def alice(site: Site) -> Iterator[Client]:
    with Client(site.url) as client:
        yield client


# -- sending, and reading to the end ---------------------------------------------------------------------------

WAYS: list[tuple[Name, Callable[[Iterable[bytes]], Iterator[Any]]]] = [
    ("chat", one_way.by_lines),
    ("chat", one_way.by_blocks),
    ("session_chat", one_way.by_lines),
    ("session_chat", one_way.by_blocks),
    ("agent", one_way.by_fields),
    ("agent", one_way.by_eventsource),
    ("prompt", one_way.by_lines),
    ("prompt", one_way.by_fields),
    ("prompt", one_way.by_eventsource),
]


@pytest.mark.parametrize(("name", "read"), WAYS, ids=lambda value: getattr(value, "__name__", value))
def test_a_client_sends_a_message_and_reads_the_answer_to_its_end(
    site: Site, name: Name, read: Callable[[Iterable[bytes]], Iterator[Any]]
) -> None:
    """P18: what is in the text comes out of it, and makes no event of its own."""
    asked = asking(name, f"whole {name} {read.__name__}", agent="plays", script=script(SCRIPT))
    with answered(site.url, asked) as response:
        assert response.status_code == 200
        assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
        assert response.headers["cache-control"] == "no-cache, no-transform"
        assert response.headers["x-accel-buffering"] == "no"
        request_id = response.headers["x-request-id"]
        values = list(read(response.iter_raw()))
    events = [value if isinstance(value, tuple) else ("message", value) for value in values]
    seen = got(name, events)
    assert seen.text == TEXT
    with Client(site.url) as alice:
        assert alice.run(request_id)["answer"] == TEXT
        session_id = alice.run(request_id)["session_id"]
    match name:
        case "chat":
            assert [value["type"] for _, value in events] == [
                "reasoning", "progress", "tool_call", "tool_result", "token", "token", "token", "done"
            ]  # fmt: skip
            assert seen.end["content"] == TEXT
            assert (seen.end["request_id"], seen.end["session_id"]) == (request_id, session_id)
        case "session_chat":
            assert [value["type"] for _, value in events] == [
                "progress", "tool_start", "tool_result", "text_delta", "text_delta", "text_delta", "done"
            ]  # fmt: skip
            assert seen.end == {"type": "done", "finalMessage": TEXT}
            assert session_id == "a-session"
        case "agent":
            end = {"content": TEXT, "session_id": session_id, "total_tokens": 3, "status": "complete"}
            assert seen == Got(TEXT, end, [])
        case "prompt":
            tool = {"id": "c1", "tool": "weather"}
            assert seen.beside == [
                {"tool_call": {**tool, "args": {"city": "Bern"}}},
                {"tools_called": [{**tool, "result": ["sun"]}]},
            ]
            assert seen.end == {"lifecycle": "done"}


@pytest.mark.parametrize("name", NAMES)
def test_an_answer_without_tokens_an_error_and_a_cancel_reach_every_client(
    site: Site, alice: Client, name: Name
) -> None:
    no_tokens = asking(name, f"no tokens {name}", agent="plays", script=[["final", {"answer": "42"}]])
    seen = got_from(name, whole(site.url, no_tokens))
    assert seen.text == "42"
    body = whole(site.url, asking(name, f"an error {name}", agent="misbehaves", what="error"))
    seen = got_from(name, body)
    assert (seen.text, seen.end["code"]) == ("before ", "no_quota")
    assert "Come back tomorrow." in seen.end.values()
    with answered(site.url, asking(name, f"a cancel {name}", agent="slow")) as response:
        chunks = response.iter_raw()
        body = next(chunks)
        while b"begun" not in body:
            body += next(chunks)
        cancelled = alice.post(f"/api/v1/runs/{response.headers['x-request-id']}/cancel")
        assert cancelled.json()["status"] == "cancelled"
        seen = got_from(name, body + b"".join(chunks))
    assert seen.text == "begun "
    assert "cancelled" in (seen.end.get("code"), seen.end.get("status"))


@pytest.mark.parametrize("name", NAMES)
def test_the_same_message_joins_the_run_that_is_under_way(site: Site, alice: Client, name: Name) -> None:
    asked = asking(name, f"twice {name}", agent="quiet", pause=0.5)
    with answered(site.gateways[0].url, asked) as one, answered(site.gateways[1].url, asked) as two:
        assert one.headers["x-request-id"] == two.headers["x-request-id"]
        bodies = [b"".join(response.iter_raw()) for response in (one, two)]
    texts = [b"\n".join(line for line in body.split(b"\n") if line and line[:1] in b"die") for body in bodies]
    assert texts[0] == texts[1], "two gateways give the same frames"
    assert got_from(name, bodies[0]).text == "0 1 "


# -- one answer for a message ----------------------------------------------------------------------------------


@pytest.mark.parametrize("body", [{}, {"stream": False}, {"stream": None}], ids=["absent", "false", "null"])
def test_without_stream_chat_answers_with_one_object(site: Site, alice: Client, body: dict[str, Any]) -> None:
    parameters = {"script": [*script(SCRIPT[:-1]), ["pause", 0.3], *script(SCRIPT[-1:])]}
    asked = {"message": f"one answer {body}", "agent": "plays", "parameters": parameters, **body}
    reply = alice.post("/chat", content=json.dumps(asked), headers={"Content-Type": "application/json"})
    assert reply.status_code == 200
    answer = reply.json()
    run = alice.run(answer["request_id"])
    assert answer == {
        "content": TEXT,
        "citations": [{"title": "t"}],
        "usage": {},
        "request_id": run["request_id"],
        "session_id": run["session_id"],
    }
    assert reply.headers["x-request-id"] == run["request_id"]


def test_without_stream_a_run_that_came_to_nothing_is_an_error(site: Site, alice: Client) -> None:
    reply = alice.post("/chat", json={"message": "fails", "agent": "misbehaves", "parameters": {"what": "error"}})
    assert (reply.status_code, reply.json()["code"], reply.json()["detail"]) == (500, "no_quota", "Come back tomorrow.")
    [reply] = asked_meanwhile(site.url, alice, lambda request_id: alice.post(f"/api/v1/runs/{request_id}/cancel"))
    assert (reply.status_code, reply.json()["code"]) == (409, "cancelled")


def test_without_stream_a_gateway_that_drains_sends_who_waits_to_another_one(site: Site, alice: Client) -> None:
    """P17: nothing is lost by it, as the same message joins the run."""
    gateway = site.gateway()
    asked: list[str] = []

    def drain(request_id: str) -> None:
        asked.append(request_id)
        gateway.ask()

    [reply] = asked_meanwhile(gateway.url, alice, drain)
    assert (reply.status_code, reply.json()["code"], reply.headers["retry-after"]) == (503, "unavailable", "1")

    def cancel(request_id: str) -> None:
        asked.append(request_id)
        alice.post(f"/api/v1/runs/{request_id}/cancel")

    [again] = asked_meanwhile(site.url, alice, cancel)
    assert again.status_code == 409
    assert asked[0] == asked[1], "it is the same run"


def asked_meanwhile(url: str, alice: Client, act: Callable[[str], Any]) -> list[httpx.Response]:
    """POST /chat for a run that does not end by itself, and what is done once it runs."""
    replies: list[httpx.Response] = []

    def ask() -> None:
        with httpx.Client(base_url=url, headers=ALICE, timeout=30, verify=False) as client:
            replies.append(client.post("/chat", json={"message": "hangs", "agent": "hangs"}))

    def running() -> list[str]:
        return [run["request_id"] for run in runs_of(alice) if (run["agent"], run["status"]) == ("hangs", "running")]

    asking = threading.Thread(target=ask)
    asking.start()
    wait_for(lambda: len(running()) == 1)
    act(running()[0])
    asking.join(20)
    return replies


# -- what is not acceptable ------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/chat", "/api/chat", "/api/v1/agent/stream"])
def test_a_body_that_is_not_acceptable_is_refused_in_the_words_of_its_dialect(alice: Client, path: str) -> None:
    session = "sessionId" if path == "/api/chat" else "session_id"
    for body, field in [
        ({}, "message"),
        ({"message": ""}, "message"),
        ({"message": 1}, "message"),
        ({"message": "x", "agent": "nobody"}, "agent"),
        ({"message": "x", "parameters": []}, "parameters"),
        ({"message": "x", session: "x" * 256}, session),
        ({"message": "x", "cancel_if_unwatched": 0.5}, "cancel_if_unwatched"),
    ]:
        reply = alice.post(path, json=body)
        assert reply.status_code == 422, body
        assert reply.json()["errors"][0]["field"] == field
    assert alice.post(path, json=["x"]).status_code == 422
    assert alice.post(path, content=b"{", headers={"Content-Type": "application/json"}).status_code == 400
    assert alice.post(path, content=b"{}").status_code == 415
    assert httpx.post(str(alice.base_url) + path, json={"message": "x"}, verify=False).status_code == 401


def test_stream_is_true_or_false(alice: Client) -> None:
    reply = alice.post("/chat", json={"message": "x", "stream": "yes"})
    assert (reply.status_code, reply.json()["errors"][0]["field"]) == (422, "stream")


def test_fields_that_nobody_knows_are_ignored_and_those_of_the_native_api_honoured(site: Site, alice: Client) -> None:
    for name in NAMES:
        asked = asking(name, f"fields {name}", agent="about", session="mine", x=1)
        if asked.body is not None:
            asked = asked._replace(body=json.dumps({**json.loads(asked.body), "temperature": 0.5}).encode())
        with answered(site.url, asked) as response:
            response.read()
            request_id = response.headers["x-request-id"]
        run = alice.run(request_id)
        assert (run["agent"], run["session_id"]) == ("about", "mine")
        [about] = [json.loads(entry.data)["value"] for entry in alice.log(request_id) if entry.type == "data"]
        assert (about["query"], about["parameters"]) == (f"fields {name}", {"x": 1})
