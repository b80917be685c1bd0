"""Functions of the client's own over /v1, with OpenAI's library for Node; Python's are in test_openai_chat."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.clients.conftest import NodeOf
from tests.conftest import Launcher
from tests.kit.model_stub import ModelStub
from tests.kit.openai_sdk import User

QUERY = 'What is the weather? [[tool=weather {"city": "Bern"}]]'
WEATHER = {
    "type": "function",
    "name": "weather",
    "description": "The weather in a city.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
PACKAGES = ("openai6", "openai7")


@pytest.fixture(scope="module")
def url(folder: Path) -> Iterator[str]:
    """A gateway in front of a model server."""
    launcher = Launcher(folder)
    try:
        with ModelStub() as stub, pytest.MonkeyPatch.context() as patched:
            for name, value in stub.environment.items():
                patched.setenv(name, value)
            server = launcher.redis()
            launcher.worker(server.url, model="stub")
            yield launcher.gateway(server.url, model="stub").url
    finally:
        launcher.close()


@pytest.fixture(params=PACKAGES)
def user(node_of: NodeOf, url: str, bearer: str, request: pytest.FixtureRequest) -> User:
    return User(node_of("openai.mjs", request.param), url, bearer)


def call_of(response: dict[str, Any]) -> dict[str, Any]:
    """The only one; it is the client's to make."""
    calls: list[dict[str, Any]] = [item for item in response["output"] if item["type"] == "function_call"]
    [call] = calls
    assert response["status"] == "completed"
    assert (call["name"], json.loads(call["arguments"])) == ("weather", {"city": "Bern"})
    return call


def output_of(call: dict[str, Any]) -> dict[str, Any]:
    return {"type": "function_call_output", "call_id": call["call_id"], "output": "12 degrees and fog"}


def test_a_function_s_output_continues_the_response_that_called_it(user: User) -> None:
    asked = {"model": "stub", "input": QUERY, "tools": [WEATHER]}
    events, first = user.seen("help", body=asked)
    call = call_of(first)
    deltas = [event["delta"] for event in events if event["type"] == "response.function_call_arguments.delta"]
    assert "".join(deltas) == call["arguments"]
    again = {**asked, "input": [output_of(call)], "previous_response_id": first["id"]}
    assert "12 degrees and fog" in user.call("help", body=again)["output_text"]


def test_a_function_s_output_continues_a_conversation_that_is_sent_whole(user: User) -> None:
    asked = {"model": "stub", "tools": [WEATHER]}
    before = [{"role": "user", "content": QUERY}]
    call = call_of(user.call("create", body={**asked, "input": before}))
    sent = {name: call[name] for name in ("type", "call_id", "name", "arguments")}
    second = user.call("create", body={**asked, "input": [*before, sent, output_of(call)]})
    assert "12 degrees and fog" in second["output_text"]
