"""The stand-in provider as a process, asked by the openai SDK's own helpers."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator

import httpx
import pytest
from openai import BadRequestError, NotFoundError, OpenAI

from tests.kit.model_stub import ModelStub


@pytest.fixture(scope="module")
def stub() -> Iterator[ModelStub]:
    with ModelStub() as server:
        yield server


@pytest.fixture(scope="module")
def client(stub: ModelStub) -> Iterator[OpenAI]:
    with OpenAI(base_url=stub.url, api_key="any", max_retries=0) as openai:
        yield openai


def test_its_models_can_be_listed(client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["stub"]


def test_completions_of_the_sdk(client: OpenAI) -> None:
    whole = client.chat.completions.create(model="m", messages=[{"role": "user", "content": "[[say=Hello you]]"}])
    assert whole.choices[0].message.content == "Hello you"
    with client.chat.completions.stream(
        model="m", messages=[{"role": "user", "content": "[[say=Hello you]]"}]
    ) as stream:
        assert "".join(event.delta for event in stream if event.type == "content.delta") == "Hello you"
        assert stream.get_final_completion().choices[0].message.content == "Hello you"


@pytest.mark.parametrize("query", ["[[say=Hello you]]", "[[say=Hello you]] [[reasoning=hm]]", '[[tool=f {"a": 1}]]'])
def test_the_helper_of_responses_accepts_the_whole_sequence(client: OpenAI, query: str) -> None:
    tool = {"type": "function", "name": "f", "parameters": {"type": "object"}, "strict": False}
    with client.responses.stream(model="m", input=query, tools=[tool]) as stream:  # type: ignore[list-item]
        for _ in stream:
            pass
        final = stream.get_final_response()
    whole = client.responses.create(model="m", input=query, tools=[tool])  # type: ignore[list-item]
    assert final.output_text == whole.output_text
    assert [item.type for item in final.output] == [item.type for item in whole.output]


def test_errors_are_those_of_the_sdk(client: OpenAI) -> None:
    with pytest.raises(NotFoundError) as missing:
        client.responses.create(model="m", input="[[fail=404]]")
    assert missing.value.code == "model_not_found"
    with pytest.raises(BadRequestError) as long:
        client.responses.create(model="m", input="[[fail=context]]")
    assert long.value.code == "context_length_exceeded"


def test_a_failure_that_has_happened_often_enough_is_over(client: OpenAI) -> None:
    query = "[[fail=404 times=2]] [[say=Hello]]"
    for _ in range(2):
        with pytest.raises(NotFoundError):
            client.responses.create(model="m", input=query)
    assert client.responses.create(model="m", input=query).output_text == "Hello"


def test_a_pace_is_kept(client: OpenAI) -> None:
    started = time.monotonic()
    stream = client.responses.create(model="m", input="[[tokens=11]] [[pace=20]]", stream=True)
    assert sum(event.type == "response.output_text.delta" for event in stream) == 11
    assert time.monotonic() - started >= 0.5


def test_what_is_not_understood_is_refused(stub: ModelStub) -> None:
    for body in (b"{", b"[]", b'{"messages": 5}', b'{"messages": [{"role": "user", "content": "[[fail=x]]"}]}'):
        answer = httpx.post(stub.url + "/chat/completions", content=body)
        assert answer.status_code == 400, body
        assert answer.json()["error"]["type"] == "invalid_request_error"


def test_a_server_without_responses_answers_as_older_ones_do() -> None:
    with ModelStub("--no-responses") as older:
        answer = httpx.post(older.url + "/responses", json={"input": "hi"})
        assert (answer.status_code, answer.json()) == (404, {"detail": "Not Found"})


def test_a_port_that_is_taken_is_one_line(stub: ModelStub) -> None:
    port = stub.url.removesuffix("/v1").rpartition(":")[2]
    command = [sys.executable, "-m", "broker.model_stub", "--port", port]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert f"cannot listen on 127.0.0.1:{port}" in done.stderr


def test_it_ends_while_it_streams() -> None:
    with ModelStub() as server, httpx.Client() as http:
        body = {"stream": True, "messages": [{"role": "user", "content": "[[fail=stall after=1]]"}]}
        with http.stream("POST", server.url + "/chat/completions", json=body):
            started = time.monotonic()
            server.close()
            assert time.monotonic() - started < 8
