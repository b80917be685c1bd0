"""The dialect `openai` in front of the agent `chat`, with the package of Python: instructions, models, functions."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Launcher
from tests.kit import openai_stream
from tests.kit.http import token
from tests.kit.model_stub import ModelStub
from tests.kit.node import Refused
from tests.kit.openai_sdk import Sdk, User

FUNCTION = {
    "type": "function",
    "name": "open_door",
    "description": "Opens a door.",
    "parameters": {"type": "object", "properties": {"n": {"type": "integer"}}},
}


@pytest.fixture(scope="module")
def stub() -> Iterator[ModelStub]:
    with ModelStub() as stub:
        yield stub


@pytest.fixture(scope="module")
def url(stub: ModelStub, folder: Path) -> Iterator[str]:
    launcher = Launcher(folder)
    try:
        with pytest.MonkeyPatch.context() as patched:
            for name, value in stub.environment.items():
                patched.setenv(name, value)
            redis = launcher.redis()
            settings: dict[str, Any] = {"model": "stub", "models": "other", "tools": "tests.kit.tools"}
            launcher.worker(redis.url, **settings)
            yield launcher.gateway(redis.url, **settings).url
    finally:
        launcher.close()


@pytest.fixture(scope="module")
def sdk(folder: Path) -> Iterator[Sdk]:
    with Sdk(folder, "3") as sdk:
        yield sdk


@pytest.fixture
def user(sdk: Sdk, url: str, subject: str) -> User:
    return User(sdk, url, token(subject))


def output(call: dict[str, Any], text: str) -> dict[str, Any]:
    return {"type": "function_call_output", "call_id": call["call_id"], "output": text}


def calls_of(response: dict[str, Any]) -> list[dict[str, Any]]:
    return [item for item in response["output"] if item["type"] == "function_call"]


def messages(stub: ModelStub, containing: str) -> list[dict[str, Any]]:
    """What the model was sent the last time that the text stood in it."""
    sent: list[dict[str, Any]] = stub.journal(containing)[-1]["messages"]
    return sent


def test_what_a_request_says_of_the_model_reaches_it(user: User, stub: ModelStub, subject: str) -> None:
    query = f"[[say=Bonjour]] {subject}"
    body = {
        "model": "other",
        "instructions": "In French.",
        "input": [
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": "Hello?"},
            {"role": "assistant", "content": [{"type": "output_text", "text": "Yes?"}]},
            {"role": "user", "content": [{"type": "input_text", "text": query}]},
        ],
        "temperature": 0.5,
        "max_output_tokens": 100,
    }
    response = user.call("create", body=body)
    assert response["output_text"] == "Bonjour"
    assert (response["model"], response["instructions"]) == ("other", "In French.\n\nBe brief.")
    [asked] = stub.journal(subject)
    assert asked["model"] == "other"
    assert asked["messages"] == [
        {"role": "system", "content": "In French.\n\nBe brief."},
        {"role": "user", "content": "Hello?"},
        {"role": "assistant", "content": "Yes?"},
        {"role": "user", "content": query},
    ]
    assert (response["temperature"], response["max_output_tokens"]) == (0.5, 100)
    assert response["usage"]["total_tokens"] > 0


def test_only_the_models_that_are_configured_are_there(user: User) -> None:
    assert {"chat", "stub", "other"} <= set(user.call("models"))
    for body in ({"model": "gpt"}, {"model": "gpt", "extra_body": {"agent": "chat"}}):
        with pytest.raises(Refused) as refused:
            user.call("create", body={**body, "input": "x"})
        assert (refused.value.kind, refused.value["code"]) == ("NotFoundError", "model_not_found")


def test_a_function_of_the_clients_is_called_by_it_and_the_next_request_goes_on(
    user: User, stub: ModelStub, subject: str
) -> None:
    query = f'{subject} [[tool=open_door {{"n":1}}]][[tool2=open_door {{"n":2}}]]'
    events, first = user.seen("help", body={"model": "stub", "input": query, "tools": [FUNCTION]})
    openai_stream.check(events[:-1])  # the last one is the helper's own
    [one] = calls_of(first)
    assert (one["name"], json.loads(one["arguments"]), first["status"]) == ("open_door", {"n": 1}, "completed")
    body = {"model": "stub", "tools": [FUNCTION]}
    second = user.call("create", body={**body, "previous_response_id": first["id"], "input": [output(one, "open 1")]})
    [two] = calls_of(second)
    assert json.loads(two["arguments"]) == {"n": 2}
    third = user.call("create", body={**body, "previous_response_id": second["id"], "input": [output(two, "open 2")]})
    assert calls_of(third) == []
    assert "open 1" in third["output_text"] and "open 2" in third["output_text"]
    sent = messages(stub, subject)
    assert [message["role"] for message in sent] == ["user", "assistant", "tool", "assistant", "tool"]
    assert [message["content"] for message in sent if message["role"] == "tool"] == ["open 1", "open 2"]
    assert sent[0]["content"] == query
    body = {"model": "stub", "previous_response_id": third["id"], "input": f"And now? {subject}"}
    user.call("create", body=body)
    assert [message["content"] for message in messages(stub, "And now?")] == [
        query, third["output_text"], f"And now? {subject}"
    ]  # fmt: skip


def test_an_output_and_a_new_message_may_come_together(user: User, stub: ModelStub, subject: str) -> None:
    query = f"{subject} [[tool=open_door {{}}]]"
    first = user.call("create", body={"model": "stub", "input": query, "tools": [FUNCTION]})
    [call] = calls_of(first)
    then = {"role": "user", "content": f"And the other? {subject}"}
    body = {"model": "stub", "previous_response_id": first["id"], "tools": [FUNCTION]}
    user.call("create", body={**body, "input": [output(call, "open 1"), then]})
    sent = messages(stub, "And the other?")
    assert [message["role"] for message in sent] == ["user", "assistant", "tool", "user"]
    assert [sent[0]["content"], *(message["content"] for message in sent[2:])] == [query, "open 1", then["content"]]
    with pytest.raises(Refused) as refused:
        user.call("create", body={"model": "stub", "input": [output(call, "open 1"), then]})
    assert (refused.value.kind, refused.value["param"]) == ("BadRequestError", "input")


def test_a_client_may_send_the_whole_conversation_again(user: User, stub: ModelStub, subject: str) -> None:
    asked = {"role": "user", "content": f"{subject} [[tool=open_door {{}}]]"}
    body = {"model": "stub", "tools": [FUNCTION], "store": False}
    first = user.call("create", body={**body, "input": [asked]})
    [call] = calls_of(first)
    second = user.call("create", body={**body, "input": [asked, *first["output"], output(call, "open")]})
    assert "open" in second["output_text"]
    assert [message["role"] for message in messages(stub, subject)] == ["user", "assistant", "tool"]


def test_the_services_tools_and_the_clients_functions_go_together(user: User, stub: ModelStub, subject: str) -> None:
    query = f'{subject} [[tool=weather {{"city":"Oslo"}}]][[tool=open_door {{}}]]'
    first = user.call("create", body={"model": "stub", "input": query, "tools": [FUNCTION]})
    kinds = [item["type"] for item in first["output"]]
    assert kinds == ["function_call", "function_call", "function_call_output"]
    own, clients = first["output"][:2]
    assert (own["name"], clients["name"], first["output"][2]["call_id"]) == ("weather", "open_door", own["call_id"])
    body = {"model": "stub", "previous_response_id": first["id"], "tools": [FUNCTION]}
    second = user.call("create", body={**body, "input": [output(clients, "open")]})
    assert "clear" in second["output_text"] and "open" in second["output_text"]
    assert [message["role"] for message in messages(stub, subject)] == ["user", "assistant", "tool", "tool"]


def test_each_call_needs_its_output(user: User, subject: str) -> None:
    query = f"{subject} [[tool=open_door {{}}]]"
    first = user.call("create", body={"model": "stub", "input": query, "tools": [FUNCTION]})
    unknown = output({"call_id": "call_unknown"}, "x")
    [call] = calls_of(first)
    wrong = (
        [unknown],
        [output(call, "x"), unknown],
        [{"role": "user", "content": "Never mind."}, output(call, "x")],
    )
    for given in wrong:
        body = {"model": "stub", "previous_response_id": first["id"], "input": given, "tools": [FUNCTION]}
        with pytest.raises(Refused) as refused:
            user.call("create", body=body)
        assert (refused.value.kind, refused.value["param"]) == ("BadRequestError", "input"), given


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [{"type": "function", "name": ""}]}, "tools[0].name"),
        ({"tools": [{"type": "function", "name": "a b!"}]}, "tools[0].name"),
        ({"tools": [FUNCTION, FUNCTION]}, "tools[1].name"),
        ({"model": "research", "tools": [FUNCTION]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"text": {"format": {"type": "json_schema", "name": "x", "schema": {}}}}, "text.format"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"prompt": {"id": "p"}}, "prompt"),
        ({"reasoning": {"effort": 1}}, "reasoning.effort"),
        ({"metadata": {"openai": "x"}}, "metadata.openai"),
        ({"metadata": {str(n): "x" for n in range(17)}}, "metadata"),
        ({"extra_body": {"agent": "nobody"}}, "agent"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
            "input[0].content[0].type",
        ),
        ({"input": [{"role": "robot", "content": "x"}]}, "input[0].role"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type"),
        ({"input": [{"type": "function_call_output", "call_id": "x", "output": "y"}]}, "input"),
        ({"input": ""}, "input"),
    ],
)
def test_what_is_not_supported_is_refused_by_its_name(user: User, body: dict[str, Any], param: str) -> None:
    with pytest.raises(Refused) as refused:
        user.call("create", body={"model": "stub", "input": "x", **body})
    assert (refused.value.kind, refused.value["param"]) == ("BadRequestError", param)
    assert str(refused.value)


def test_without_functions_where_the_client_wants_none(user: User, stub: ModelStub, subject: str) -> None:
    query = f"{subject} [[tool=open_door {{}}]]"
    body = {"model": "stub", "input": query, "tools": [FUNCTION], "tool_choice": "none"}
    assert calls_of(user.call("create", body=body)) == []
    assert stub.journal(subject)[-1]["tools"] == []


def test_an_answer_that_was_cut_is_incomplete(user: User, subject: str) -> None:
    body = {"model": "stub", "input": f"[[tokens=50]] {subject}", "max_output_tokens": 5}
    response = user.call("create", body=body)
    assert (response["status"], response["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
