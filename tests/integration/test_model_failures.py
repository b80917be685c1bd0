"""Every way in which a model server fails, by both APIs, through the real SDK: retried before the first token, told
after it.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import socket
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing
from typing import Any

import pytest
import pytest_asyncio

from tests.kit.model_answers import KEY, Models, ask
from tests.kit.model_stub import ModelStub
from tests.kit.pieces import calls, end, text, thoughts
from tests.kit.redis_server import free_port
from tests.kit.stub import Stub, chunked
from worker.models import provider
from worker.models.model import Message, Options, ToolSpec

WEATHER = ToolSpec(name="weather", description="Tells it.", parameters={"type": "object", "properties": {}})
_names = itertools.count(1)
pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest.fixture(scope="module")
def stub() -> Iterator[ModelStub]:
    with ModelStub() as server:
        yield server


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def models() -> AsyncIterator[Models]:
    made = Models()
    yield made
    await made.close()


@pytest.fixture(params=["completions", "responses"])
def api(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def name() -> str:
    """So that each test finds its own requests in the journal."""
    return f"test-{next(_names)}."


async def test_an_answer_with_reasoning_and_usage(models: Models, stub: ModelStub, api: str, name: str) -> None:
    answered = await ask(models.at(stub, api=api), f"{name} [[say=Hello you]] [[reasoning=hm hm]] [[cached=3]]")
    assert answered.error is None
    assert (thoughts(answered.pieces), text(answered.pieces)) == ("hm hm", "Hello you")
    usage = end(answered.pieces).usage
    assert usage is not None
    assert (usage.completion, usage.cached, usage.reasoning) == (4, 3, 2)
    assert usage.prompt > usage.cached
    [entry] = stub.journal(name)
    assert entry["path"] == {"completions": "/v1/chat/completions", "responses": "/v1/responses"}[api]
    assert entry["key"] == KEY


async def test_the_other_kind_of_reasoning(models: Models, stub: ModelStub, api: str, name: str) -> None:
    answered = await ask(models.at(stub, api=api), f"{name} [[say=Hello]] [[thinking=hm hm]]")
    assert (thoughts(answered.pieces), text(answered.pieces)) == ("hm hm", "Hello")


async def test_several_tool_calls_and_the_next_round(models: Models, stub: ModelStub, api: str, name: str) -> None:
    query = f'{name} [[tool=weather {{"city":"Bern"}}]] [[tool=weather {{"city":"Basel"}}]]'
    first = await ask(models.at(stub, api=api), query, tools=[WEATHER])
    assert [arguments for _, _, arguments in calls(first.pieces)] == ['{"city":"Bern"}', '{"city":"Basel"}']
    assert end(first.pieces).reason == "tool_calls"
    made = [
        {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}
        for id, name, arguments in calls(first.pieces)
    ]
    results = [{"role": "tool", "tool_call_id": call["id"], "content": "12 degrees"} for call in made]
    messages: list[Message] = [{"role": "user", "content": query}]
    messages.append({"role": "assistant", "content": None, "tool_calls": made})
    second = await ask(models.at(stub, api=api), [*messages, *results], tools=[WEATHER])
    assert "12 degrees" in text(second.pieces)
    assert stub.journal(name)[-1]["messages"] == [*messages, *results]


async def test_parameters_arrive(models: Models, stub: ModelStub, api: str, name: str) -> None:
    model = models.at(stub, api=api)
    answered = await ask(model, f"{name} [[tokens=50]]", temperature=0.5, max_tokens=7, reasoning_effort="low")
    assert end(answered.pieces).reason == "length"
    assert text(answered.pieces) == "w1 w2 w3 w4 w5 w6 w7"
    [entry] = stub.journal(name)
    assert entry["parameters"]["temperature"] == 0.5
    assert "low" in str(entry["parameters"])


HOPELESS = [
    ("401", "model_unauthorized"),
    ("403", "model_unauthorized"),
    ("404", "model_not_found"),
    ("quota", "model_rate_limited"),
    ("context", "model_context_too_long"),
    ("blocked", "model_content_filter"),
    ("422", "model_refused_request"),
    ("filter", "model_content_filter"),
    ("refusal", "model_content_filter"),
]


@pytest.mark.parametrize(("kind", "code"), HOPELESS)
async def test_what_is_hopeless_fails_at_once(
    models: Models, stub: ModelStub, api: str, name: str, kind: str, code: str
) -> None:
    answered = await ask(models.at(stub, api=api), f"{name} [[fail={kind}]]")
    assert answered.code == code
    assert answered.pieces == []
    assert len(stub.journal(name)) == 1
    assert KEY not in str(answered.error)


PASSING = ["429", "429 retry_after=0.2", "429 retry_after=date+1", "500", "502", "503", "408"]
PASSING += ["break", "malformed", "error", "end", "empty"]


@pytest.mark.parametrize("kind", PASSING)
async def test_what_passes_is_retried_before_the_first_token(
    models: Models, stub: ModelStub, api: str, name: str, kind: str
) -> None:
    answered = await ask(models.at(stub, api=api), f"{name} [[say=Hello you]] [[fail={kind} times=2]]")
    assert answered.error is None
    assert text(answered.pieces) == "Hello you"
    assert len(stub.journal(name)) == 3


LASTING = [
    ("429", "model_rate_limited"),
    ("503", "model_unavailable"),
    ("break", "model_broken"),
    ("malformed", "model_broken"),
    ("error", "model_broken"),
    ("end", "model_broken"),
]


@pytest.mark.parametrize(("kind", "code"), LASTING)
async def test_what_lasts_fails_before_the_deadline(
    models: Models, stub: ModelStub, api: str, name: str, kind: str, code: str
) -> None:
    answered = await ask(models.at(stub, api=api, retry_seconds=1000), f"{name} [[fail={kind}]]", seconds=0.5)
    assert answered.code == code
    assert len(stub.journal(name)) > 1


async def test_an_empty_answer_is_not_asked_for_for_ever(models: Models, stub: ModelStub, api: str, name: str) -> None:
    answered = await ask(models.at(stub, api=api), f"{name} [[fail=empty]]")
    assert answered.code == "model_empty"
    assert len(stub.journal(name)) == 3


async def test_the_server_says_when_to_come_back(models: Models, stub: ModelStub, api: str, name: str) -> None:
    await ask(models.at(stub, api=api), f"{name} [[fail=429 retry_after=1 times=1]]")
    first, second = stub.journal(name)
    assert second["time"] - first["time"] >= 1


async def test_a_wish_beyond_the_deadline_fails_at_once(models: Models, stub: ModelStub, api: str, name: str) -> None:
    answered = await ask(models.at(stub, api=api), f"{name} [[fail=429 retry_after=100]]")
    assert answered.code == "model_rate_limited"
    assert len(stub.journal(name)) == 1


BROKEN = [
    ("break", "model_broken"),
    ("malformed", "model_broken"),
    ("error", "model_broken"),
    ("end", "model_broken"),
    ("filter", "model_content_filter"),
]


@pytest.mark.parametrize(("kind", "code"), BROKEN)
async def test_after_the_first_token_it_is_told_and_what_came_stays(
    models: Models, stub: ModelStub, api: str, name: str, kind: str, code: str
) -> None:
    answered = await ask(models.at(stub, api=api), f"{name} [[tokens=50]] [[fail={kind} after=5]]")
    assert answered.code == code
    assert text(answered.pieces) == "w1 w2 w3 w4 w5"
    assert len(stub.journal(name)) == 1


async def test_reasoning_counts_as_the_first_token(models: Models, stub: ModelStub, api: str, name: str) -> None:
    answered = await ask(models.at(stub, api=api), f"{name} [[reasoning=a b c]] [[fail=break after=2]]")
    assert answered.code == "model_broken"
    assert thoughts(answered.pieces) == "a b"
    assert len(stub.journal(name)) == 1


async def test_calls_that_break_off_are_asked_for_again(models: Models, stub: ModelStub, api: str, name: str) -> None:
    query = f'{name} [[tool=weather {{"city":"Bern"}}]] [[fail=break after=2 times=1]]'
    answered = await ask(models.at(stub, api=api), query, tools=[WEATHER])
    assert [arguments for _, _, arguments in calls(answered.pieces)] == ['{"city":"Bern"}']
    assert len(stub.journal(name)) == 2


@pytest.mark.parametrize("kind", ["silent", "stall"])
async def test_a_stall_before_the_first_token_is_retried(
    models: Models, stub: ModelStub, api: str, name: str, kind: str
) -> None:
    model = models.at(stub, api=api, stall_seconds=0.5)
    answered = await ask(model, f"{name} [[say=Hello]] [[fail={kind} times=1]]")
    assert text(answered.pieces) == "Hello"
    first, second = stub.journal(name)
    assert first["ended"] == "disconnected"
    assert second["time"] - first["time"] >= 0.5


async def test_a_stall_after_the_first_token_is_told(models: Models, stub: ModelStub, api: str, name: str) -> None:
    model = models.at(stub, api=api, stall_seconds=0.5)
    answered = await ask(model, f"{name} [[tokens=50]] [[fail=stall after=5]]")
    assert answered.code == "model_stalled"
    assert text(answered.pieces) == "w1 w2 w3 w4 w5"
    stub.until_ended("disconnected", name)


async def test_a_server_that_is_slow_but_not_silent_has_not_stalled(
    models: Models, stub: ModelStub, api: str, name: str
) -> None:
    model = models.at(stub, api=api, stall_seconds=0.5)
    answered = await ask(model, f"{name} [[tokens=10]] [[pace=10]]")
    assert answered.error is None
    assert text(answered.pieces).endswith("w10")


async def test_a_refused_connection_is_retried_until_the_server_is_there(models: Models, api: str) -> None:
    port = free_port()
    asking = asyncio.create_task(ask(models.at(f"http://127.0.0.1:{port}/v1", api=api), "[[say=Hello]]"))
    await asyncio.sleep(0.3)
    with await asyncio.to_thread(ModelStub, "--port", str(port)) as late:
        assert text((await asking).pieces) == "Hello"
        assert len(late.journal()) == 1


async def test_a_refused_connection_fails_with_its_code(models: Models, api: str) -> None:
    model = models.at(f"http://127.0.0.1:{free_port()}/v1", api=api, retry_seconds=0.5)
    answered = await ask(model, "hi")
    assert answered.code == "model_unavailable"


async def test_closing_the_answer_stops_the_server(models: Models, stub: ModelStub, api: str, name: str) -> None:
    model = models.at(stub, api=api)
    options = Options(model="m", deadline=time.time() + 60)
    query = {"role": "user", "content": f"{name} [[tokens=10000]] [[pace=20]]"}
    async with aclosing(model.stream([query], [], options)) as pieces:
        async for _ in pieces:
            break
    await asyncio.to_thread(stub.until_ended, "disconnected", name, seconds=5)


async def test_a_cancelled_task_stops_the_server_before_it_has_answered(
    models: Models, stub: ModelStub, api: str, name: str
) -> None:
    asking = asyncio.create_task(ask(models.at(stub, api=api, stall_seconds=60), f"{name} [[fail=silent]]"))
    while not stub.journal(name):
        await asyncio.sleep(0.02)
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)
    await asyncio.to_thread(stub.until_ended, "disconnected", name, seconds=5)


async def test_the_key_is_in_no_message_and_in_no_log(
    models: Models, stub: ModelStub, api: str, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    said = f'{{"error": {{"message": "what key is {KEY}?"}}}}'.encode()
    head = f"HTTP/1.1 400 Bad\r\nContent-Type: application/json\r\nContent-Length: {len(said)}\r\n\r\n".encode()
    with caplog.at_level(logging.DEBUG), Stub([head + said]) as server:
        answered = await ask(models.at(server.url + "v1", api=api), "hi")
    assert answered.code == "model_refused_request"
    assert "what key is" in str(answered.error)
    assert KEY not in str(answered.error)
    assert KEY not in "".join(str(vars(record)) for record in caplog.records)


async def test_a_key_that_is_a_mere_word_garbles_no_message(models: Models) -> None:
    with Stub([b"HTTP/1.1 404 No\r\nContent-Length: 0\r\n\r\n"]) as server:
        answered = await ask(models.at(server.url + "v1", key="model"), "hi")
    assert "The model server refused" in str(answered.error)


async def test_a_server_without_responses_is_asked_by_chat_completions_from_then_on(models: Models, name: str) -> None:
    with ModelStub("--no-responses") as older:
        model = models.at(older, api="auto")
        for n in range(2):
            assert text((await ask(model, f"{name} [[say=Hello {n}]]")).pieces) == f"Hello {n}"
        paths = [entry["path"] for entry in older.journal(name)]
        assert paths == ["/v1/responses", "/v1/chat/completions", "/v1/chat/completions"]


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (b"HTTP/1.1 405 No\r\nContent-Length: 0\r\n\r\n", {"status": 405, "content_type": ""}),
        (chunked(b"<html></html>", content_type="text/html"), {"status": 200, "content_type": "text/html"}),
    ],
)
async def test_an_operator_is_warned_that_responses_are_given_up(
    models: Models, answer: Any, told: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    hello = chunked(b'data: {"choices": [{"delta": {"content": "Hello"}, "finish_reason": "stop"}]}\n\n')
    with Stub([answer], [hello]) as server:
        assert text((await ask(models.at(server.url + "v1", api="auto"), "hi")).pieces) == "Hello"
    [warned] = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert "Responses" in warned.message and "until" in warned.message
    assert {name: vars(warned)[name] for name in told} == told


async def test_a_server_with_responses_is_asked_by_them(models: Models, stub: ModelStub, name: str) -> None:
    model = models.at(stub, api="auto")
    await ask(model, name)
    assert (await ask(model, f"{name} [[fail=404]]")).code == "model_not_found", "which is not a missing API"
    await ask(model, name)
    assert [entry["path"] for entry in stub.journal(name)] == ["/v1/responses"] * 3


async def test_a_parameter_that_responses_lack_is_sent_by_chat_completions(
    models: Models, stub: ModelStub, name: str
) -> None:
    await ask(models.at(stub, api="auto"), name, seed=7)
    [entry] = stub.journal(name)
    assert (entry["path"], entry["parameters"]["seed"]) == ("/v1/chat/completions", 7)


async def test_responses_that_must_be_there_and_are_not(models: Models) -> None:
    with ModelStub("--no-responses") as older:
        answered = await ask(models.at(older, api="responses"), "hi")
        assert answered.code == "model_refused_request"
        assert "OPENAI_BASE_URL" in str(answered.error)


async def test_a_server_that_does_not_stream_is_told_so(models: Models) -> None:
    with Stub([chunked(b"<html>hello</html>", content_type="text/html")]) as server:
        answered = await ask(models.at(server.url + "v1"), "hi")
    assert answered.code == "model_refused_request"


@pytest.mark.parametrize(
    "chunk",
    [
        b"[]",
        b'"text"',
        b"{",
        b'{"choices": 5}',
        b'{"choices": [5]}',
        b'{"choices": [{"delta": {"content": 5}}]}',
        b'{"choices": [{"delta": {"tool_calls": [{"function": []}]}}]}',
        b'{"choices": [{"delta": {"content": "\xff"}}]}',
        b'{"choices": [{"delta": {"content": "a"}, "finish_reason": ["stop"]}]}',
        b'{"choices": [{"delta": {"tool_calls": [{"id": "a", "function": {"name": 5}}]}, "finish_reason": "stop"}]}',
        b'{"error": {"code": "\xc2\xb2\xc2\xb2"}}',
        b"[" * 200_000,
    ],
)
async def test_whatever_a_chunk_is_it_is_an_answer_that_broke(models: Models, chunk: bytes) -> None:
    with Stub([chunked(b"data: " + chunk + b"\n\n")]) as server:
        answered = await ask(models.at(server.url + "v1", retry_seconds=0), "hi")
    assert answered.code == "model_broken"


_ITEM = b'{"type": "response.output_item.done", "output_index": %s, "item": {"type": "function_call", %s}}'


@pytest.mark.parametrize(
    "events",
    [
        [b'{"type": "response.output_text.delta", "delta": 5}'],
        [b'{"type": "response.reasoning_text.delta", "delta": ["a"]}'],
        [_ITEM % (b"0", b'"call_id": "a"')],
        [_ITEM % (b"0", b'"name": 5')],
        [_ITEM % (b"0", b'"name": "f", "arguments": {"x": 1}')],
        [_ITEM % (b"0", b'"name": "f"'), _ITEM % (b"null", b'"name": "f"')],
        [b'{"type": "response.completed", "response": {"output": [], "incomplete_details": "x"}}'],
        [b'{"type": "response.completed", "response": null}'],
    ],
)
async def test_whatever_an_event_of_responses_is_it_is_an_answer_that_broke(
    models: Models, events: list[bytes]
) -> None:
    ended = b'{"type": "response.completed", "response": {"status": "completed", "output": []}}'
    last = [] if b"response.completed" in events[-1] else [ended]
    body = b"".join(b"data: " + event + b"\n\n" for event in [*events, *last])
    with Stub([chunked(body)]) as server:
        answered = await ask(models.at(server.url + "v1", api="responses", retry_seconds=0), "hi")
    assert answered.code == "model_broken"


async def test_a_stream_that_goes_on_after_the_answer_is_left(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its comments are signs of life, so it never stalls."""
    monkeypatch.setattr(provider, "LAST_SECONDS", 0.3)
    closed = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        said = b'data: {"choices": [{"delta": {"content": "Hello"}, "finish_reason": "stop"}]}\n\n'
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n" + said)
        with contextlib.suppress(ConnectionError):
            while not reader.at_eof():
                writer.write(b": still here\n\n")
                await writer.drain()
                await asyncio.sleep(0.02)
        writer.close()
        closed.set()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server, asyncio.timeout(10):
        port = server.sockets[0].getsockname()[1]
        answered = await ask(models.at(f"http://127.0.0.1:{port}/v1"), "hi", seconds=60)
        await closed.wait()
    assert (text(answered.pieces), end(answered.pieces).reason) == ("Hello", "stop")


async def test_the_end_may_be_missing_once_the_answer_has_ended(models: Models) -> None:
    said = b'data: {"choices": [{"delta": {"content": "Hello"}, "finish_reason": "stop"}]}\n\n'
    with Stub([chunked(said, end=False), "reset"]) as server:
        answered = await ask(models.at(server.url + "v1"), "hi")
    assert answered.error is None
    assert text(answered.pieces) == "Hello"


async def test_what_cannot_be_sent_is_told(models: Models, stub: ModelStub, api: str) -> None:
    assert (await ask(models.at(stub, api=api), "\ud800")).code == "model_refused_request"


async def test_text_arrives_as_the_server_means_it(models: Models) -> None:
    """Also where a server cuts a character in two."""
    parts = [rb"\ud83d", rb"\ude00", "\u2028 é".encode()]
    frames = [b'data: {"choices": [{"delta": {"content": "%b"}}]}\r\n\r\n' % part for part in parts]
    frames.append(b': a comment\n\ndata: {"choices": [{"delta": {}, "finish_reason": "stop"}]}\n\ndata: [DONE]\n\n')
    with Stub([chunked(*(bytes([byte]) for byte in b"".join(frames)))]) as server:
        answered = await ask(models.at(server.url + "v1"), "hi")
    assert text(answered.pieces) == "\ud83d\ude00\u2028 é"


async def test_a_server_that_refuses_to_tell_its_usage_is_not_asked_for_it(models: Models) -> None:
    said = b'{"detail": "Extra inputs are not permitted: stream_options"}'
    head = b"HTTP/1.1 422 No\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(said)
    answer = chunked(b'data: {"choices": [{"delta": {"content": "Hello"}, "finish_reason": "stop"}]}\n\n')
    with Stub([head + said], [answer], [answer]) as server:
        for _ in range(2):
            assert text((await ask(models.at(server.url + "v1"), "hi")).pieces) == "Hello"
        assert len(server.requests) == 3


async def test_without_a_key_there_is_no_model_at_openai(models: Models) -> None:
    answered = await ask(models.at("https://api.openai.com/v1", key=None), "hi")
    assert answered.code == "model_not_configured"
    assert "OPENAI_API_KEY" in str(answered.error)


async def test_a_connection_is_used_again(models: Models) -> None:
    """What listens counts its connections."""
    with socket.create_server(("127.0.0.1", 0)) as front, ModelStub() as server:
        counted, ended = 0, asyncio.Event()

        async def pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            nonlocal counted
            counted += 1
            port = int(server.url.removesuffix("/v1").rpartition(":")[2])
            upstream, down = await asyncio.open_connection("127.0.0.1", port)

            async def pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
                while data := await source.read(65536):
                    sink.write(data)
                sink.close()

            await asyncio.gather(pump(reader, down), pump(upstream, writer))
            ended.set()

        proxy = await asyncio.start_server(pass_on, sock=front.dup())
        model = models.at(f"http://127.0.0.1:{front.getsockname()[1]}/v1")
        options = Options(model="m", deadline=time.time() + 60)
        for _ in range(3):
            async with aclosing(model.stream([{"role": "user", "content": "hi"}], [], options)) as pieces:
                assert [piece async for piece in pieces]
        await model.aclose()
        await ended.wait()
        proxy.close()
        assert counted == 1
