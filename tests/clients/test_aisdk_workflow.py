"""AI SDK's transport for workflows, which knows a run by its id and takes every cut up by itself, on /ai/chat."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.clients.conftest import Deployment, NodeOf, kill
from tests.clients.talks import Talk, check_answer, counted, new_id, runs, texts, until_text
from tests.kit.http import Client
from tests.kit.node import Node
from tests.kit.resets import Resets

SHORT: dict[str, Any] = {"count": 20, "pause": 0.02}
LONG: dict[str, Any] = {"count": 40, "pause": 0.05}
NewTalk = Callable[..., Talk]


@pytest.fixture
def node(node_of: NodeOf) -> Node:
    return node_of("aisdk.mjs", "ai7")


@pytest.fixture
def talk(node: Node, deployment: Deployment, bearer: str) -> NewTalk:
    """A chat of the owner."""

    def talk(url: str | None = None, **how: Any) -> Talk:
        return Talk(node, url or deployment.urls[0], bearer, transport="workflow", **how)

    return talk


def the_run(alice: Client) -> dict[str, Any]:
    [run] = runs(alice)
    return run


def test_a_message_is_sent_and_its_answer_read_to_the_end(talk: NewTalk, alice: Client) -> None:
    report = talk().send("count", "tokens", **SHORT).result()
    check_answer(report, counted(SHORT["count"]))
    run = the_run(alice)
    assert (run["request_id"], run["answer"]) == (report["run"], counted(SHORT["count"]))


def test_cuts_in_the_middle_are_not_noticed(talk: NewTalk, deployment: Deployment, alice: Client) -> None:
    """By FIN and by RST in turn, at one gateway and at another."""
    budgets = iter([700, 650, 900])
    with Resets(deployment.urls[:2], lambda: next(budgets, None)) as network:
        report = talk(network.url).send("count", "tokens", **LONG).result()
        assert network.broken == 3
    check_answer(report, counted(LONG["count"]))
    assert the_run(alice)["answer"] == counted(LONG["count"])


def test_a_killed_gateway_is_not_noticed(talk: NewTalk, deployment: Deployment, alice: Client) -> None:
    chat = talk()
    call = chat.send("count", "tokens", **LONG)
    until_text(call, 10)
    chat.move(deployment.urls[1])
    kill(deployment.gateways[0])
    check_answer(call.result(), counted(LONG["count"]))
    assert the_run(alice)["answer"] == counted(LONG["count"])


@pytest.mark.parametrize("every", [None, 5], ids=["from the beginning", "from a checkpoint"])
def test_a_run_that_begins_again_when_its_worker_is_killed_ends_with_the_right_text(
    talk: NewTalk, deployment: Deployment, alice: Client, every: int | None
) -> None:
    call = talk().send("steps", "steps", **LONG, every=every)
    until_text(call, 50)
    deployment.replace_worker()
    report = call.result(60)
    run = the_run(alice)
    assert run["attempt"] == 2
    assert (report["status"], texts(report["messages"][-1])[-1]) == ("ready", run["answer"])


def test_after_a_page_load_in_the_middle_the_answer_is_read_from_the_beginning(
    talk: NewTalk, deployment: Deployment, alice: Client
) -> None:
    chat = talk()
    call = chat.send("count", "tokens", **LONG)
    until_text(call, 10)
    left = chat.leave()
    loaded = talk(deployment.urls[1], chat=left["run"], messages=left["messages"][:1])
    check_answer(loaded.resume().result(), counted(LONG["count"]))
    assert the_run(alice)["status"] == "completed"


def test_a_page_may_begin_at_the_last_pieces(talk: NewTalk, deployment: Deployment) -> None:
    chat = talk()
    report = chat.send("count", "tokens", **SHORT).result()
    loaded = talk(deployment.urls[1], chat=report["run"], messages=report["messages"], initialStartIndex=-3)
    again = loaded.resume().result()
    assert (again["status"], again["errors"], again["messages"][:2]) == ("ready", [], report["messages"])


def test_a_page_load_where_nothing_runs_shows_nothing(talk: NewTalk) -> None:
    for chat in (new_id(), "0" * 32):
        report = talk(chat=chat).resume().result()
        assert (report["status"], report["errors"], report["messages"]) == ("ready", [], [])


def test_what_was_stopped_does_not_come_back(talk: NewTalk, alice: Client) -> None:
    chat = talk()
    call = chat.send("count", "tokens", **LONG)
    until_text(call, 10)
    stopped = chat.stop()
    assert call.result()["status"] == "ready"
    assert the_run(alice)["status"] == "cancelled"
    report = talk(chat=stopped["run"], messages=stopped["messages"][:1]).resume().result()
    assert (report["status"], report["errors"]) == ("ready", [])
    report = chat.send("and now", "tokens", **SHORT).result()
    check_answer(report, counted(SHORT["count"]), roles=["user", "assistant", "user", "assistant"])


def test_a_run_that_fails_is_an_error_that_can_be_shown(talk: NewTalk, alice: Client) -> None:
    report = talk().send("fail", "raises").result()
    assert (report["status"], report["errors"]) == ("error", [the_run(alice)["error"]["message"]])
