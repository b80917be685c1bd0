"""OpenAI's library for Node, in its newest major version and the one before, on /v1."""

from __future__ import annotations

import json
import signal
from collections.abc import Sequence
from typing import Any

import pytest

from tests.clients.conftest import Deployment, NodeOf, kill
from tests.kit.http import Client, token
from tests.kit.node import Call, Refused, Seen
from tests.kit.openai_sdk import User, is_delta

PACKAGES = ("openai6", "openai7")
SHORT: dict[str, Any] = {"count": 20, "pause": 0.02}
LONG: dict[str, Any] = {"count": 40, "pause": 0.05}


@pytest.fixture
def urls(deployment: Deployment) -> list[str]:
    return deployment.urls


@pytest.fixture
def users(node_of: NodeOf, urls: list[str], bearer: str) -> list[User]:
    """The owner's clients of the first gateway in both versions, where a test kills something."""
    return [User(node_of("openai.mjs", package), urls[0], bearer) for package in PACKAGES]


@pytest.fixture(params=PACKAGES)
def user(users: list[User], request: pytest.FixtureRequest) -> User:
    """One of the versions."""
    return users[PACKAGES.index(request.param)]


def ask(agent: str, query: str = "a question", **parameters: Any) -> dict[str, Any]:
    return {"model": agent, "input": query, "parameters": parameters}


def began(users: Sequence[User], call: str, agent: str, **parameters: Any) -> list[Call]:
    """A stream for each version, with some text."""
    calls = [user.start(call, body=ask(agent, f"question {n}", **parameters)) for n, user in enumerate(users)]
    for one in calls:
        one.until(is_delta)
    return calls


def text_of(events: Sequence[Seen]) -> str:
    return "".join(event["delta"] for event in events if is_delta(event))


def numbers(events: Sequence[Seen]) -> list[int]:
    return [event["sequence_number"] for event in events]


def response_of(call: Call) -> str:
    """The id, from the first event of a stream that began at the beginning."""
    return str(call.seen[0]["response"]["id"])


def run_of(response: str) -> str:
    return response.removeprefix("resp_")


# -- to the end ------------------------------------------------------------------------------------------------


def test_a_stream_is_read_to_its_end(user: User, alice: Client) -> None:
    call = user.start("stream", body=ask("tokens", **SHORT))
    call.result()
    completed = call.seen[-1]
    assert completed["type"] == "response.completed"
    assert numbers(call.seen) == list(range(len(call.seen)))
    [message] = completed["response"]["output"]
    run = alice.run(run_of(completed["response"]["id"]))
    assert text_of(call.seen) == message["content"][0]["text"] == run["answer"] != ""
    assert run["status"] == "completed"


def test_the_helper_builds_the_response_from_its_events(user: User, alice: Client) -> None:
    call = user.start("help", body=ask("tokens", **SHORT))
    response = call.result()
    assert response["status"] == "completed"
    assert response["output_text"] == text_of(call.seen) == alice.run(run_of(response["id"]))["answer"]


def test_without_a_stream_the_response_is_the_answer(user: User, alice: Client) -> None:
    response = user.call("create", body=ask("tokens", **SHORT))
    assert response["status"] == "completed"
    assert response["output_text"] == alice.run(run_of(response["id"]))["answer"]


def test_a_response_in_the_background_is_polled_until_it_is_there(user: User, urls: list[str]) -> None:
    response = user.call("create", body={**ask("tokens", **SHORT), "background": True})
    assert response["status"] in ("queued", "in_progress")
    turns = 0
    while response["status"] in ("queued", "in_progress"):
        turns += 1
        response = user.at(urls[turns % 3]).call("retrieve", response=response["id"])
    assert response["status"] == "completed"
    assert response["output_text"] == "".join(f"{n} " for n in range(SHORT["count"]))


def test_reasoning_and_function_calls_are_items_of_their_own(user: User) -> None:
    script = [
        ["reasoning", {"text": "I have to look it up."}],
        ["tool_call", {"id": "call-1", "tool": "look_up", "args": {"what": "rivers"}}],
        ["tool_result", {"id": "call-1", "tool": "look_up", "result": "the Elbe"}],
        ["token", {"text": "It is "}],
        ["token", {"text": "the Elbe."}],
    ]
    call = user.start("help", body=ask("plays", script=script))
    response = call.result()
    reasoning, called, answered, _ = response["output"]
    types = [item["type"] for item in response["output"]]
    assert types == ["reasoning", "function_call", "function_call_output", "message"]
    assert reasoning["summary"][0]["text"] == "I have to look it up."
    assert (called["name"], json.loads(called["arguments"])) == ("look_up", {"what": "rivers"})
    assert (answered["call_id"], answered["output"]) == (called["call_id"], "the Elbe")
    assert response["output_text"] == "It is the Elbe."


def test_a_run_that_fails_is_a_response_that_failed(user: User, urls: list[str]) -> None:
    call = user.start("help", body=ask("raises"))
    response = call.result()
    assert response["status"] == "failed"
    assert response["error"]["message"]
    assert response["output_text"] == "so far "
    assert user.at(urls[1]).call("retrieve", response=response["id"])["status"] == "failed"


def test_heartbeats_are_not_seen(users: list[User]) -> None:
    for call in began(users, "stream", "quiet", count=1, pause=1.5):
        call.result()
        assert numbers(call.seen) == list(range(len(call.seen)))
        assert text_of(call.seen) == "0 "


def test_a_conversation_goes_on_from_an_earlier_response(user: User, alice: Client) -> None:
    first = user.call("create", body=ask("echo", "one"))
    second = user.call("create", body={**ask("recalls", "two"), "previous_response_id": first["id"]})
    turns = [json.loads(entry.data)["value"] for entry in alice.log(run_of(second["id"])) if entry.type == "data"]
    assert [(turn["query"], turn["answer"]) for turn in turns] == [("one", "one")]


# -- cuts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=["killed", "drained"])
def test_a_cut_stream_goes_on_at_another_gateway(
    users: list[User], deployment: Deployment, urls: list[str], alice: Client, number: signal.Signals
) -> None:
    calls = began(users, "stream", "tokens", **LONG)
    deployment.gateways[0].signal(number)
    for user, call in zip(users, calls, strict=True):
        with pytest.raises(Refused):
            call.result()
        response = response_of(call)
        rest = user.at(urls[1]).start("resume", response=response, after=numbers(call.seen)[-1])
        rest.result()
        whole = user.at(urls[2]).start("resume", response=response, after=-1)
        whole.result()
        assert call.seen + rest.seen == whole.seen
        assert numbers(whole.seen) == list(range(len(whole.seen)))
        assert text_of(whole.seen) == alice.run(run_of(response))["answer"]
    deployment.gateways[0].wait()


def test_the_helper_takes_a_cut_stream_up_again(
    users: list[User], deployment: Deployment, urls: list[str], alice: Client
) -> None:
    calls = began(users, "stream", "tokens", **LONG)
    kill(deployment.gateways[0])
    for user, call in zip(users, calls, strict=True):
        with pytest.raises(Refused):
            call.result()
        how = {"response_id": response_of(call), "starting_after": numbers(call.seen)[-1]}
        rest = user.at(urls[1]).start("help", body=how)
        answer = rest.result()["output_text"]
        assert answer == text_of(call.seen + rest.seen) == alice.run(run_of(response_of(call)))["answer"]


def test_what_is_over_is_read_again_and_behind_its_end_there_is_nothing(user: User, urls: list[str]) -> None:
    call = user.start("stream", body=ask("tokens", **SHORT))
    call.result()
    response = response_of(call)
    again = user.at(urls[1]).start("resume", response=response, after=-1)
    again.result()
    assert again.seen == call.seen
    nothing = user.at(urls[1]).start("resume", response=response, after=numbers(call.seen)[-1])
    nothing.result()
    assert nothing.seen == []


@pytest.mark.parametrize("every", [None, 5], ids=["from the beginning", "from a checkpoint"])
def test_a_run_that_begins_again_when_its_worker_is_killed_ends_with_the_right_text(
    users: list[User], deployment: Deployment, urls: list[str], alice: Client, every: int | None
) -> None:
    calls = began(users, "help", "steps", **LONG, every=every)
    for call in calls:
        call.until(lambda seen: is_delta(seen) and "1:11" in seen["delta"])
    deployment.replace_worker()
    for user, call in zip(users, calls, strict=True):
        answer = call.result(60)["output_text"]
        run = alice.run(run_of(response_of(call)))
        assert (run["attempt"], run["answer"]) == (2, answer)
        assert len(answer.split()) == LONG["count"]
        assert ("1:" in answer) == (every is not None)
        again = user.at(urls[1]).start("help", body={"response_id": response_of(call)})
        assert again.result()["output_text"] == answer
        assert again.seen == call.seen


# -- one run ---------------------------------------------------------------------------------------------------


def test_a_post_whose_answers_get_lost_is_one_run(user: User, alice: Client) -> None:
    response = user.call("create", body=ask("echo", "asked three times"), lose=2)
    assert response["output_text"] == "asked three times"
    assert [run["request_id"] for run in alice.get("/api/v1/runs").json()["runs"]] == [run_of(response["id"])]


def test_a_cancelled_response_ends_everywhere(user: User, urls: list[str], alice: Client) -> None:
    call = user.start("help", body={**ask("slow"), "background": True})
    call.until(is_delta)
    response = response_of(call)
    assert user.at(urls[1]).call("cancel", response=response)["status"] == "cancelled"
    assert call.result()["status"] == "cancelled"
    assert user.at(urls[2]).call("cancel", response=response)["status"] == "cancelled"
    assert user.call("retrieve", response=response)["status"] == "cancelled"
    assert alice.run(run_of(response))["status"] == "cancelled"


def test_a_deleted_response_is_gone(user: User, urls: list[str]) -> None:
    response = user.call("create", body=ask("echo"))["id"]
    user.call("delete", response=response)
    with pytest.raises(Refused) as refused:
        user.at(urls[1]).call("retrieve", response=response)
    assert (refused.value.kind, refused.value["status"]) == ("NotFoundError", 404)


# -- errors ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "arguments", "kind", "status", "code", "param"),
    [
        ("create", {"body": ask("nobody")}, "NotFoundError", 404, "model_not_found", ...),
        ("create", {"body": {"model": "echo", "input": 7}}, "BadRequestError", 400, ..., "input"),
        ("create", {"body": {"model": "echo"}}, "BadRequestError", 400, ..., "input"),
        ("stream", {"body": ask("nobody")}, "NotFoundError", 404, "model_not_found", ...),
        ("retrieve", {"response": "resp_" + "0" * 32}, "NotFoundError", 404, ..., ...),
        ("cancel", {"response": "resp_" + "0" * 32}, "NotFoundError", 404, ..., ...),
    ],
    ids=[
        "no such model",
        "bad input",
        "no input",
        "no such model, as a stream",
        "no such response",
        "nothing to cancel",
    ],
)
def test_errors_are_the_library_s_own(
    user: User, call: str, arguments: dict[str, Any], kind: str, status: int, code: Any, param: Any
) -> None:
    with pytest.raises(Refused) as refused:
        user.call(call, **arguments)
    check_error(refused.value, kind, status)
    assert code in (..., refused.value["code"])
    assert param in (..., refused.value["param"])


def check_error(error: Refused, kind: str, status: int) -> None:
    """It is of the library's class, and it has been told what it is."""
    assert (error.kind, error["status"]) == (kind, status)
    assert error["type"]
    assert "status code (no body)" not in error["message"]


def test_without_a_token_there_is_nothing(user: User) -> None:
    for call, arguments in (("retrieve", {"response": "resp_x"}), ("stream", {"body": ask("echo")})):
        with pytest.raises(Refused) as refused:
            user.at(user.url, "no token").call(call, **arguments)
        check_error(refused.value, "AuthenticationError", 401)


def test_the_response_of_another_owner_is_not_there(user: User) -> None:
    response = user.call("create", body=ask("echo"))["id"]
    for call in ("retrieve", "cancel", "delete", "resume"):
        with pytest.raises(Refused) as refused:
            user.at(user.url, token("a stranger")).call(call, response=response, after=0)
        check_error(refused.value, "NotFoundError", 404)
    assert user.call("retrieve", response=response)["output_text"] == "a question"
