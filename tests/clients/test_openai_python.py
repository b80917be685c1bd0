"""The dialect `openai` with the `openai` package of Python, unmodified, in two major versions."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.clients.conftest import Deployment, kill
from tests.conftest import Launcher
from tests.kit import openai_stream
from tests.kit.http import Client
from tests.kit.node import Call, Refused
from tests.kit.openai_sdk import Sdk, User, is_delta
from tests.kit.openai_stream import output_text
from tests.kit.processes import wait_for

MAJORS = ("3", "2")
Event = dict[str, Any]


@pytest.fixture(scope="module", params=MAJORS)
def sdk(request: pytest.FixtureRequest, folder: Path) -> Iterator[Sdk]:
    with Sdk(folder, request.param) as sdk:
        assert sdk.call("version").split(".")[0] == request.param
        yield sdk


@pytest.fixture
def user(sdk: Sdk, deployment: Deployment, bearer: str) -> User:
    """Of the first gateway, which tests kill."""
    return User(sdk, deployment.urls[0], bearer)


@pytest.fixture
def elsewhere(user: User, deployment: Deployment) -> User:
    return user.at(deployment.urls[1])


def asking(agent: str, query: str = "one two three", **parameters: Any) -> dict[str, Any]:
    """The body of a request; what OpenAI has not goes the way that its SDKs have for it."""
    return {"model": agent, "input": query, "extra_body": {"parameters": parameters}}


def background(agent: str, **parameters: Any) -> dict[str, Any]:
    return {**asking(agent, **parameters), "background": True}


def run_of(response_id: str) -> str:
    return response_id.removeprefix("resp_")


def test_a_stream_is_read_to_its_end(user: User, alice: Client) -> None:
    events, _ = user.seen("stream", body=asking("tokens", count=5))
    checker = openai_stream.check(events)
    assert checker.ended and checker.response is not None
    run = alice.run(run_of(checker.response["id"]))
    assert output_text(checker.response) == run["answer"] == "0 1 2 3 4 "
    assert (checker.response["status"], checker.response["model"]) == ("completed", "tokens")


def test_the_helper_puts_the_response_together(user: User) -> None:
    events, response = user.seen("help", body=asking("tokens", count=5))
    assert response["output_text"] == "0 1 2 3 4 "
    assert response["status"] == "completed"
    assert [event["snapshot"] for event in events if is_delta(event)][-1] == "0 1 2 3 4 "


def test_a_response_is_there_when_its_run_has_ended(user: User, alice: Client) -> None:
    response = user.call("create", body={**asking("tokens", count=3, pause=0.2), "metadata": {"a": "b"}})
    assert (response["status"], response["output_text"], response["metadata"]) == ("completed", "0 1 2 ", {"a": "b"})
    assert user.call("retrieve", response=response["id"]) == response
    assert alice.run(run_of(response["id"]))["metadata"] == {"a": "b"}


def test_a_response_in_the_background_is_polled_to_its_end(user: User, elsewhere: User) -> None:
    response = user.call("create", body=background("tokens", count=10, pause=0.1))
    assert response["status"] in ("queued", "in_progress")
    assert response["background"] is True
    statuses, ended = elsewhere.seen("poll", response=response["id"])
    assert "in_progress" in statuses
    assert (ended["status"], ended["output_text"]) == ("completed", "".join(f"{n} " for n in range(10)))


def cut_by(stop: Callable[[], object], call: Call, condition: Callable[[Event], bool]) -> list[Event]:
    """What the client had seen when its gateway went in the middle."""
    call.until(condition)
    stop()
    with pytest.raises(Refused) as refused:
        call.result()
    assert refused.value.kind in ("APIConnectionError", "RemoteProtocolError", "ReadError")
    return call.seen


@pytest.mark.parametrize("how", ["kill", "drain"])
def test_a_stream_whose_gateway_goes_is_resumed_on_another(
    user: User, elsewhere: User, deployment: Deployment, alice: Client, how: str
) -> None:
    gateway = deployment.gateways[0]
    stops = {"kill": lambda: kill(gateway), "drain": lambda: gateway.signal(signal.SIGTERM)}
    call = user.start("stream", body=asking("tokens", count=40, pause=0.05))
    seen = cut_by(stops[how], call, lambda event: is_delta(event) and event["delta"] == "9 ")
    assert not openai_stream.check(seen).ended, "a drain ended the stream as if the run had"
    response = seen[0]["response"]["id"]
    rest, _ = elsewhere.seen("resume", response=response, after=seen[-1]["sequence_number"])
    checker = openai_stream.check([*seen, *rest])
    assert checker.ended and checker.response is not None
    assert output_text(checker.response) == alice.run(run_of(response))["answer"] == "".join(f"{n} " for n in range(40))
    assert elsewhere.seen("resume", response=response, after=None)[0] == [*seen, *rest]


def test_a_request_that_waits_at_a_gateway_that_drains_is_asked_again(
    user: User, elsewhere: User, deployment: Deployment, alice: Client
) -> None:
    body = asking("tokens", count=20, pause=0.1)
    call = user.start("create", body=body, options={"max_retries": 0})
    wait_for(lambda: bool(alice.get("/api/v1/runs").json()["runs"]))
    deployment.gateways[0].signal(signal.SIGTERM)
    with pytest.raises(Refused) as refused:
        call.result()
    assert (refused.value.kind, refused.value["status"]) == ("InternalServerError", 503)
    assert elsewhere.call("create", body=body)["output_text"] == "".join(f"{n} " for n in range(20))
    assert len(alice.get("/api/v1/runs").json()["runs"]) == 1


def test_the_helper_resumes_a_response_after_a_kill(user: User, elsewhere: User, deployment: Deployment) -> None:
    call = user.start("help", body=asking("tokens", count=20, pause=0.1))
    seen = cut_by(lambda: kill(deployment.gateways[0]), call, lambda event: is_delta(event) and event["delta"] == "5 ")
    after = seen[-1]["sequence_number"]
    response = seen[0]["response"]["id"]
    rest, value = elsewhere.seen("help", body={"response_id": response, "starting_after": after})
    assert [event["sequence_number"] for event in rest] == list(range(after + 1, after + 1 + len(rest)))
    assert value["output_text"] == "".join(f"{n} " for n in range(20))


def test_at_or_past_the_end_there_is_nothing_more(user: User) -> None:
    events, _ = user.seen("stream", body=asking("tokens", count=1))
    response, last = events[0]["response"]["id"], events[-1]["sequence_number"]
    for after in (last, last + 1, 10**9):
        assert user.seen("resume", response=response, after=after)[0] == []
    assert user.seen("resume", response=response, after=last - 1)[0] == events[-1:]


def test_a_response_is_cancelled_and_again(user: User, elsewhere: User, alice: Client) -> None:
    response = user.call("create", body=background("hangs"))["id"]
    watching = elsewhere.start("help", body={"response_id": response})
    watching.until(is_delta)
    cancelled = user.call("cancel", response=response)
    assert (cancelled["status"], cancelled["output_text"]) == ("cancelled", "waiting ")
    assert watching.result()["status"] == "cancelled"
    assert openai_stream.check(alice_events(alice, response)).ended
    assert user.call("cancel", response=response) == elsewhere.call("retrieve", response=response) == cancelled
    assert alice.run(run_of(response))["status"] == "cancelled"


def alice_events(alice: Client, response: str) -> list[Event]:
    return openai_stream.parse(alice.get(f"/v1/responses/{response}", params={"stream": "true"}).content)


@pytest.mark.parametrize("lost", [1, 2])
@pytest.mark.parametrize("call", ["create", "stream"])
def test_the_retries_of_a_request_are_one_run(user: User, alice: Client, call: str, lost: int) -> None:
    """Their answers are lost on the way; the run may have ended when the client asks again."""
    user.call(call, body=asking("tokens", f"{call} {lost}", count=2), lose=lost)
    assert len(alice.get("/api/v1/runs").json()["runs"]) == 1


MISSING = {"response": f"resp_{'0' * 32}"}
WRONG: list[tuple[str, dict[str, Any], str, int, str | None, str]] = [
    ("retrieve", MISSING, "NotFoundError", 404, None, "run_not_found"),
    ("resume", {**MISSING, "after": 1}, "NotFoundError", 404, None, "run_not_found"),
    ("cancel", MISSING, "NotFoundError", 404, None, "run_not_found"),
    ("delete", MISSING, "NotFoundError", 404, None, "run_not_found"),
    ("create", {"body": asking("gpt")}, "NotFoundError", 404, None, "model_not_found"),
    ("create", {"body": {"model": "echo", "input": []}}, "BadRequestError", 400, "input", "invalid"),
    ("stream", {"body": {**asking("echo"), "top_p": 3}}, "BadRequestError", 400, "top_p", "invalid"),
    ("create", {"body": asking("echo", "x" * 2**18 + "x")}, "APIStatusError", 413, None, "too_large"),
    ("create", {"body": asking("echo", "x" * 2**20)}, "APIStatusError", 413, None, "too_large"),
    (
        "create",
        {"body": {**asking("echo"), "previous_response_id": MISSING["response"]}},
        "BadRequestError",
        400,
        "previous_response_id",
        "previous_response_not_found",
    ),
]


@pytest.mark.parametrize(("call", "arguments", "kind", "status", "param", "code"), WRONG)
def test_what_is_wrong_is_an_exception_of_the_sdk(
    user: User, call: str, arguments: dict[str, Any], kind: str, status: int, param: str | None, code: str
) -> None:
    with pytest.raises(Refused) as refused:
        user.call(call, **arguments)
    error = refused.value
    assert (error.kind, error["status"], error["param"], error["code"]) == (kind, status, param, code)


def test_a_wrong_token_is_an_authentication_error(user: User) -> None:
    for call, arguments in (("models", {}), ("stream", {"body": asking("echo")}), ("resume", {**MISSING, "after": 1})):
        with pytest.raises(Refused) as refused:
            user.at(user.url, "wrong").call(call, **arguments)
        assert (refused.value.kind, refused.value["code"]) == ("AuthenticationError", "invalid_api_key")


def test_without_redis_every_call_is_a_server_error_that_the_sdk_tries_again(
    sdk: Sdk, launch: Launcher, bearer: str
) -> None:
    redis = launch.redis()
    user = User(sdk, launch.gateway(redis.url).url, bearer)
    redis.close()
    calls: list[tuple[str, dict[str, Any]]] = [
        ("create", {"body": asking("echo")}),
        ("stream", {"body": asking("echo")}),
        ("retrieve", MISSING),
        ("resume", {**MISSING, "after": 1}),
        ("cancel", MISSING),
    ]
    for call, arguments in calls:
        with pytest.raises(Refused) as refused:
            user.call(call, **arguments, options={"max_retries": 0})
        error = refused.value
        assert (error.kind, error["status"], error["code"]) == ("InternalServerError", 503, "unavailable"), call


def test_a_failed_run_is_a_failed_response(user: User) -> None:
    response = user.call("create", body=asking("misbehaves", what="error"))
    assert (response["status"], response["output_text"]) == ("failed", "before ")
    assert response["error"] == {"code": "no_quota", "message": "Come back tomorrow."}
    events, _ = user.seen("stream", body=asking("misbehaves", "again", what="error"))
    assert events[-1]["type"] == "response.failed"
    openai_stream.check(events)


def test_a_worker_that_is_killed_begins_again_and_the_text_is_right(
    user: User, deployment: Deployment, alice: Client
) -> None:
    """Without checkpoints: everything is said again, and the helper builds a response of what survives."""
    call = user.start("help", body=asking("tokens", count=20, pause=0.1))
    call.until(lambda event: is_delta(event) and event["delta"] == "5 ")
    deployment.replace_worker()
    response = call.result(60)
    assert response["output_text"] == "".join(f"{n} " for n in range(20))
    closed = [event["item"] for event in call.seen if event["type"] == "response.output_item.done"]
    assert [item["status"] for item in closed] == ["incomplete", "completed"]
    assert [item["id"] for item in response["output"]] == [closed[1]["id"]]
    assert alice.run(run_of(response["id"]))["answer"] == response["output_text"]
    check_again(alice, response["id"])


def test_a_worker_that_is_killed_goes_on_from_a_checkpoint(user: User, deployment: Deployment, alice: Client) -> None:
    """In the middle of a text: what survives of it begins another item."""
    call = user.start("help", body=asking("checkpoints", count=20, pause=0.1))
    call.until(lambda event: is_delta(event) and event["delta"] == "5 ")
    deployment.replace_worker()
    response = call.result(60)
    assert response["output_text"] == "".join(f"{n} " for n in range(20))
    assert alice.run(run_of(response["id"]))["answer"] == response["output_text"]
    check_again(alice, response["id"])


def check_again(alice: Client, response: str) -> None:
    events = alice_events(alice, response)
    assert openai_stream.check(events).ended
    assert any(event["sequence_number"] >= 2_000_000 for event in events)


def test_heartbeats_are_no_events(user: User, alice: Client) -> None:
    """P13: with ids in the stream, too, which change how some of its readers take a line without an event."""
    call = user.start("stream", body=asking("quiet", pause=1.3))
    response = call.until(lambda event: True)["response"]["id"]
    body = alice.get(f"/v1/responses/{response}", params={"stream": "true"}).content
    call.result()
    assert body.count(b"\n: heartbeat ") >= 2 and b"\nid: " in body
    for events in (call.seen, openai_stream.parse(body)):
        assert [event["sequence_number"] for event in events] == list(range(len(events)))
        assert [event["delta"] for event in events if is_delta(event)] == ["0 ", "1 "]


def test_the_next_response_is_in_the_session_of_the_previous_one(user: User, alice: Client) -> None:
    first = user.call("create", body=asking("echo", "The first question."))
    body = {**asking("recalls", "The second."), "previous_response_id": first["id"]}
    second = user.call("create", body=body)
    assert second["previous_response_id"] == first["id"]
    runs = [alice.run(run_of(response["id"])) for response in (first, second)]
    assert runs[0]["session_id"] == runs[1]["session_id"]
    [turn] = [json.loads(entry.data)["value"] for entry in alice.log(runs[1]["request_id"]) if entry.type == "data"]
    assert (turn["query"], turn["answer"]) == ("The first question.", "The first question.")


def test_a_response_is_deleted(user: User, elsewhere: User) -> None:
    response = user.call("create", body=asking("echo", "Forget me."))["id"]
    [item] = user.call("items", response=response)
    assert (item["role"], item["content"][0]["text"]) == ("user", "Forget me.")
    user.call("delete", response=response)
    with pytest.raises(Refused) as refused:
        elsewhere.call("retrieve", response=response)
    assert refused.value.kind == "NotFoundError"


def test_the_agents_are_the_models(user: User) -> None:
    assert {"research", "chat", "echo"} <= set(user.call("models"))
