"""AI SDK's chat with its default transport, in its three newest major versions, on /ai/chat."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.clients.conftest import Deployment, NodeOf
from tests.clients.talks import Talk, check_answer, counted, in_halves, new_id, runs, texts, until_text
from tests.conftest import Launcher
from tests.kit.http import Client, token
from tests.kit.node import Call

PACKAGES = ("ai5", "ai6", "ai7")
SHORT: dict[str, Any] = {"count": 20, "pause": 0.02}
LONG: dict[str, Any] = {"count": 40, "pause": 0.05}
NewTalk = Callable[..., Talk]


@pytest.fixture
def each(node_of: NodeOf, deployment: Deployment, bearer: str) -> list[NewTalk]:
    """A function for each version, which opens a chat of the owner at a gateway: all of them where something dies."""

    def opening(package: str) -> NewTalk:
        node = node_of("aisdk.mjs", package)
        return lambda gateway=0, bearer=bearer, **how: Talk(node, deployment.urls[gateway], bearer, **how)

    return [opening(package) for package in PACKAGES]


@pytest.fixture(params=PACKAGES)
def talk(each: list[NewTalk], request: pytest.FixtureRequest) -> NewTalk:
    """Of one of the versions."""
    return each[PACKAGES.index(request.param)]


def began(each: Sequence[NewTalk], agent: str, length: int = 10, **parameters: Any) -> list[tuple[Talk, Call]]:
    """A chat in each version, whose answer has so many characters."""
    begun = [(chat, chat.send(f"for {chat.chat}", agent, **parameters)) for chat in (talk() for talk in each)]
    for _, call in begun:
        until_text(call, length)
    return begun


# -- to the end ------------------------------------------------------------------------------------------------


def test_a_message_is_sent_and_its_answer_read_to_the_end(talk: NewTalk, alice: Client) -> None:
    chat = talk()
    report = chat.send("count", "tokens", **SHORT).result()
    check_answer(report, counted(SHORT["count"]))
    assert report["finishes"] == [{"isAbort": False, "isDisconnect": False, "isError": False}]
    [run] = runs(alice)
    assert (run["session_id"], run["answer"]) == (chat.chat, counted(SHORT["count"]))


@pytest.mark.parametrize("package", PACKAGES)
def test_the_stream_alone_makes_the_same_message(
    node_of: NodeOf, deployment: Deployment, bearer: str, package: str
) -> None:
    node = node_of("aisdk.mjs", package)
    body = {"agent": "tokens", "parameters": SHORT}
    call = node.start("read", chat=new_id(), url=deployment.urls[0], token=bearer, text="count", body=body)
    message = call.result()
    assert message["role"] == "assistant"
    assert texts(message) == [counted(SHORT["count"])]


def test_a_chat_goes_on_with_what_was_said_before(talk: NewTalk, alice: Client) -> None:
    chat = talk()
    chat.send("one", "echo").result()
    report = chat.send("two", "recalls").result()
    check_answer(report, "two", roles=["user", "assistant", "user", "assistant"])
    newest = runs(alice)[0]
    turns = [json.loads(entry.data)["value"] for entry in alice.log(newest["request_id"]) if entry.type == "data"]
    assert [(turn["query"], turn["answer"]) for turn in turns] == [("one", "one")]


def test_everything_that_an_agent_says_is_in_its_part(talk: NewTalk) -> None:
    script = [
        ["message", {"text": "I begin."}],
        ["progress", {"percent": 50, "message": "half of it"}],
        ["reasoning", {"text": "I have to "}],
        ["reasoning", {"text": "look it up."}],
        ["tool_call", {"id": "call-1", "tool": "look_up", "args": {"what": "rivers"}}],
        ["tool_result", {"id": "call-1", "tool": "look_up", "result": {"name": "Elbe"}}],
        ["sources", {"stage": "analyzed", "count": 1, "items": [{"title": "A", "url": "https://example.com/a"}]}],
        ["data", {"name": "cost", "value": 3}],
        ["token", {"text": "It is "}],
        ["token", {"text": "the Elbe."}],
        ["final", {"citations": [{"title": "Rivers", "url": "https://example.com/rivers"}]}],
    ]
    report = talk().send("everything", "plays", script=script).result()
    parts = check_answer(report, "It is the Elbe.")["parts"]
    assert [part["text"] for part in parts if part["type"] == "reasoning"] == ["I have to look it up."]
    [tool] = [part for part in parts if part.get("toolCallId")]
    assert tool["type"] == "tool-look_up" or (tool["type"], tool["toolName"]) == ("dynamic-tool", "look_up")
    assert (tool["state"], tool["input"], tool["output"]) == ("output-available", {"what": "rivers"}, {"name": "Elbe"})
    links = [part["url"] for part in parts if part["type"] == "source-url"]
    assert links == ["https://example.com/a", "https://example.com/rivers"]
    assert "cost" in json.dumps(report["data"]) and "half of it" in json.dumps(report["data"])
    assert not [part for part in parts if part["type"].startswith("data-")], "they are transient"


def test_an_answer_that_is_not_what_the_tokens_said_is_the_last_text(talk: NewTalk) -> None:
    script = [["token", {"text": "Perhaps."}], ["final", {"answer": "Certainly."}]]
    report = talk().send("Is it?", "plays", script=script).result()
    assert (report["status"], texts(report["messages"][-1])) == ("ready", ["Perhaps.", "Certainly."])


def test_a_run_that_fails_is_an_error_that_can_be_shown(talk: NewTalk, alice: Client) -> None:
    report = talk().send("fail", "raises").result()
    assert report["status"] == "error"
    assert report["errors"] == [runs(alice)[0]["error"]["message"]]
    assert texts(report["messages"][-1]) == ["so far "]


def test_what_is_refused_is_an_error_that_can_be_shown(talk: NewTalk, alice: Client) -> None:
    report = talk().send("hello", "nobody").result()
    assert report["status"] == "error"
    [error] = report["errors"]
    assert "Unknown agent" in error and "{" not in error and "<" not in error
    assert runs(alice) == []


def test_without_a_token_the_error_can_be_shown(talk: NewTalk) -> None:
    report = talk(bearer="no token").send("hello").result()
    assert report["status"] == "error"
    [error] = report["errors"]
    assert "token" in error and "{" not in error


# -- cuts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", [1, 2], ids=["the question is kept", "half an answer is kept"])
def test_after_a_reload_in_the_middle_the_answer_goes_on_at_another_gateway(
    each: list[NewTalk], alice: Client, gate: Path, kept: int
) -> None:
    resumed = []
    for talk, (chat, _) in zip(each, began(each, "plays", **in_halves(gate)), strict=True):
        messages = chat.leave()["messages"]
        assert len(messages) == 2
        resumed.append((messages[1]["id"], talk(1, chat=chat.chat, messages=messages[:kept]).resume()))
    for _, call in resumed:
        until_text(call, 10)
    gate.touch()
    for name, call in resumed:
        assert check_answer(call.result(), counted(10))["id"] == name
    assert [run["status"] for run in runs(alice)] == ["completed"] * len(each)


def test_a_second_page_shows_the_same_answer(talk: NewTalk, alice: Client, gate: Path) -> None:
    [(chat, call)] = began([talk], "plays", **in_halves(gate))
    other = talk(1, chat=chat.chat).resume()
    until_text(other, 10)
    gate.touch()
    check_answer(other.result(), counted(10), roles=["assistant"])
    check_answer(call.result(), counted(10))
    assert len(runs(alice)) == 1


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=["killed", "drained"])
def test_a_cut_stream_is_an_error_and_goes_on_at_another_gateway(
    each: list[NewTalk], deployment: Deployment, alice: Client, gate: Path, number: signal.Signals
) -> None:
    begun = began(each, "plays", **in_halves(gate))
    deployment.gateways[0].signal(number)
    resumed = []
    for chat, call in begun:
        assert call.result()["status"] == "error"
        chat.move(deployment.urls[1])
        resumed.append(chat.resume())
        until_text(resumed[-1], 10)
    gate.touch()
    for report in (call.result() for call in resumed):
        assert [message["role"] for message in report["messages"]] == ["user", "assistant"]
        assert (report["status"], texts(report["messages"][-1])) == ("ready", [counted(10)])
    assert len(runs(alice)) == len(each)
    deployment.gateways[0].wait()


def test_where_nothing_runs_there_is_nothing_to_resume(talk: NewTalk) -> None:
    chat = talk()
    before = chat.send("hello", "echo").result()["messages"]
    report = talk(1, chat=chat.chat, messages=before).resume().result()
    assert (report["status"], report["errors"], report["messages"]) == ("ready", [], before)
    report = talk(1).resume().result()
    assert (report["status"], report["errors"], report["messages"]) == ("ready", [], [])


@pytest.mark.parametrize("every", [None, 5], ids=["from the beginning", "from a checkpoint"])
def test_a_run_that_begins_again_when_its_worker_is_killed_ends_with_the_right_text(
    each: list[NewTalk], deployment: Deployment, alice: Client, every: int | None
) -> None:
    begun = began(each, "steps", 50, **LONG, every=every)
    deployment.replace_worker()
    ended = {chat.chat: call.result(60) for chat, call in begun}
    for run in runs(alice):
        report = ended.pop(run["session_id"])
        assert (run["attempt"], len(run["answer"].split())) == (2, LONG["count"])
        assert (report["status"], texts(report["messages"][-1])[-1]) == ("ready", run["answer"])
        assert len(report["messages"]) == 2
    assert ended == {}


def test_a_newest_client_may_be_shown_only_what_survives(
    node_of: NodeOf, deployment: Deployment, launch: Launcher, bearer: str
) -> None:
    gateway = launch.gateway(deployment.redis_url, aisdk_reset_step=True)
    chats = [Talk(node_of("aisdk.mjs", "ai7"), gateway.url, bearer, transport=one) for one in ("default", "workflow")]
    calls = [chat.send(f"for {chat.chat}", "steps", **LONG) for chat in chats]
    for call in calls:
        until_text(call, 50)
    deployment.replace_worker()
    for call in calls:
        check_answer(call.result(60), "".join(f"2:{n} " for n in range(LONG["count"])))


# -- stop, and once more -----------------------------------------------------------------------------------------


def test_what_was_stopped_does_not_come_back(talk: NewTalk, alice: Client) -> None:
    [(chat, call)] = began([talk], "tokens", **LONG)
    stopped = chat.stop()["messages"]
    assert call.result()["status"] == "ready"
    assert [run["status"] for run in runs(alice)] == ["cancelled"]
    for again in (chat, talk(1, chat=chat.chat, messages=stopped)):
        report = again.resume().result()
        assert (report["status"], report["errors"], report["messages"]) == ("ready", [], stopped)
    report = chat.send("and now", "tokens", **SHORT).result()
    check_answer(report, counted(SHORT["count"]), roles=["user", "assistant", "user", "assistant"])
    assert [run["status"] for run in runs(alice)] == ["completed", "cancelled"]


def test_an_answer_is_made_again(talk: NewTalk, alice: Client) -> None:
    chat = talk()
    first = check_answer(chat.send("again", "tokens", **SHORT).result(), counted(SHORT["count"]))
    second = check_answer(chat.regenerate("tokens", **SHORT).result(), counted(SHORT["count"]))
    assert first["id"] != second["id"]
    assert len(runs(alice)) == 2


def test_an_answer_that_is_still_being_made_is_made_again(talk: NewTalk, alice: Client) -> None:
    [(chat, _)] = began([talk], "tokens", **LONG)
    chat.leave()
    check_answer(chat.regenerate("tokens", **LONG).result(), counted(LONG["count"]))
    assert [run["status"] for run in runs(alice)] == ["completed", "cancelled"]


def test_the_chat_of_another_owner_is_not_there(talk: NewTalk) -> None:
    [(chat, call)] = began([talk], "tokens", **SHORT)
    other = talk(1, chat=chat.chat, bearer=token("a stranger"))
    assert other.resume().result()["messages"] == []
    check_answer(other.send("mine", "tokens", count=3).result(), counted(3))
    check_answer(call.result(), counted(SHORT["count"]))
