"""The AI SDK dialect over real gateways and workers: what `useChat` sends, and what it gets."""

from __future__ import annotations

import asyncio
import json
import random
import signal
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import pytest

from broker.events import Final, Reasoning, Token, ToolCall, ToolResult
from broker.ids import EventId
from broker.runs.record import Submission
from tests.conftest import Launcher, Service
from tests.kit import raw
from tests.kit.eventsource import Stream
from tests.kit.fleet import Fleet
from tests.kit.http import Client, token
from tests.kit.processes import Gateway
from tests.kit.resets import Resets
from tests.kit.scribe import Scribe, Written
from tests.kit.ui_chat import Chat, Workflow, chunks_of, is_done, message_of, user_message, whole

AUTH = {"Authorization": f"Bearer {token('alice', ttl=7200)}"}


class Pair:
    """Two gateways, and a Redis on which tests write the logs themselves."""

    def __init__(self, redis_url: str, one: Gateway, two: Gateway) -> None:
        self.redis_url, self.one, self.two = redis_url, one.url, two.url


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    launcher = Launcher(tmp_path_factory.mktemp("aisdk"))
    try:
        server = launcher.redis()
        one, two = (launcher.gateway(server.url, heartbeat_seconds=0.5) for _ in range(2))
        yield Pair(server.url, one, two)
    finally:
        launcher.close()


@pytest.fixture(scope="module")
def special(pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """A gateway with settings of its own, on the same Redis."""
    launcher = Launcher(tmp_path_factory.mktemp("special"))
    try:
        yield launcher.gateway(pair.redis_url, aisdk_reset_step=True, cors_origins="https://app.example.com")
    finally:
        launcher.close()


@pytest.fixture
async def scribe(pair: Pair) -> AsyncIterator[Scribe]:
    async with Scribe(pair.redis_url) as scribe:
        yield scribe


@pytest.fixture
def chat(pair: Pair, subject: str) -> Chat:
    return Chat(pair.one, subject, f"chat of {subject}")


async def under_way(scribe: Scribe, chat: Chat, text: str = "the question", tokens: int = 3) -> Written:
    """The run of a message that the chat has sent; its worker is the test."""
    stream = await chat.send(text)
    run = Written(scribe, stream.headers["x-workflow-run-id"], Submission(query=text, agent="echo"))
    await stream.close()
    await run.attempt()
    await run.tokens(tokens)
    return run


END = ("final", Final().json_data())
"""What the tokens said is the answer."""


async def until_shown(stream: Stream, count: int) -> None:
    """Until so many chunks are there."""
    await stream.until(lambda: len(stream.events) >= count)


# -- DefaultChatTransport --------------------------------------------------------------------------------------


async def test_a_message_is_answered_by_a_run_in_the_session_of_the_chat(service: Service, subject: str) -> None:
    chat = Chat(service.gateways[0].url, subject, "the chat")
    stream = await chat.send("Hello world")
    assert stream.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert stream.headers["x-vercel-ai-ui-message-stream"] == "v1"
    message = await whole(stream)
    with service.client(subject) as client:
        run = client.run(str(message.id))
    assert message.id == stream.headers["x-workflow-run-id"] == stream.headers["x-request-id"]
    assert (run["session_id"], run["answer"]) == ("the chat", message.text.strip())


async def test_only_the_last_message_is_the_query_and_the_session_is_its_history(
    service: Service, subject: str
) -> None:
    chat = Chat(service.gateways[0].url, subject, "a conversation")
    chat.answered(await whole(await chat.send("first")))
    chat.messages[0]["parts"][0]["text"] = "what the page says was asked"
    message = await whole(await chat.send("second", agent="recalls"))
    assert message.text == "second"
    assert [each["data"]["query"] for each in message.transient if each["type"] == "data-turn"] == ["first"]


async def test_what_a_submit_may_say_of_a_run_may_a_message_too(service: Service, subject: str) -> None:
    chat = Chat(service.gateways[0].url, subject, "a chat")
    about: dict[str, Any] = {
        "agent": "burst",
        "parameters": {"count": 3, "size": 2},
        "metadata": {"a": 1},
        "session_id": "other",
    }
    message = await whole(await chat.send("x", **about))
    assert message.text == "xxxxxx"
    with service.client(subject) as client:
        run = client.run(str(message.id))
    assert (run["agent"], run["metadata"], run["session_id"]) == ("burst", {"a": 1}, "other")


async def test_every_kind_of_event_is_shown(service: Service, subject: str) -> None:
    chat = Chat(service.gateways[0].url, subject, "a chat")
    hostile = 'data: x\n\nid: 9-9\r\n\u2028"}\ud800'
    message = await whole(await chat.send("x", agent="speaks", parameters={"texts": ["plain", hostile]}))
    kinds = [part.kind for part in message.parts]
    assert kinds == ["reasoning", "tool-plain", "text", "reasoning", f"tool-{hostile}", "text"]
    assert message.all_of("text") == ["plain", hostile]
    assert message.all_of(f"tool-{hostile}") == [{"id": hostile, "input": {hostile: [hostile]}, "output": hostile}]
    told = ["data-message", "data-progress", "data-sources"]
    told = [*told, "data-plain", *told, f"data-{hostile}", "data-final"]
    assert [each["type"] for each in message.transient] == told


async def test_a_page_that_is_loaded_again_gets_the_answer_from_its_beginning(
    pair: Pair, scribe: Scribe, chat: Chat, subject: str
) -> None:
    """On any gateway, with the same message id, so that the page replaces what it has."""
    run = await under_way(scribe, chat)
    before, after = await chat.resume(), await chat.resume(url=pair.two)
    for stream in (before, after):
        await until_shown(stream, 6)
    await run.tokens(2)
    await run.end()
    one, two = await whole(before), await whole(after)
    assert bytes(before.body).split(b"\n", 1)[1] == bytes(after.body).split(b"\n", 1)[1], "but for `retry:`"
    assert one.id == two.id == run.request_id
    assert one.text == "the end"


async def test_the_same_message_sent_again_joins_its_run(pair: Pair, scribe: Scribe, chat: Chat, subject: str) -> None:
    run = await under_way(scribe, chat)
    streams = [await chat.post("submit-message"), await chat.post("submit-message", url=pair.two)]
    await run.end()
    assert [(await whole(stream)).id for stream in streams] == [run.request_id] * 2


async def test_a_chat_in_which_nothing_runs_is_a_204(scribe: Scribe, chat: Chat, subject: str) -> None:
    assert (await chat.resume()).status == 204
    run = await under_way(scribe, chat)
    await run.end()
    assert (await chat.resume()).status == 204


async def test_a_chat_waits_for_its_newest_run_that_is_under_way(scribe: Scribe, chat: Chat) -> None:
    """Two tabs of one chat have a question each, and the later one is answered first."""
    old = await under_way(scribe, chat, "old")
    new = await under_way(scribe, chat, "new")
    for run in (new, old):
        stream = await chat.resume()
        await until_shown(stream, 1)
        assert message_of(stream).id == run.request_id
        await run.end()
        await whole(stream)
    assert (await chat.resume()).status == 204


async def test_stop_stops_every_run_of_a_chat_and_no_other(
    pair: Pair, scribe: Scribe, chat: Chat, subject: str
) -> None:
    runs = [await under_way(scribe, chat, text) for text in ("one", "two", "three")]
    other = await under_way(scribe, Chat(pair.one, subject, "another chat"))
    await runs[-1].end()
    assert await chat.stop(url=pair.two) == 204
    with Client(chat.url, subject) as client:
        statuses = [client.run(run.request_id)["status"] for run in (*runs, other)]
    assert statuses == ["cancelled", "cancelled", "completed", "running"]
    assert (await chat.resume()).status == 204


async def test_stop_by_a_run_stops_that_run_alone(pair: Pair, scribe: Scribe, chat: Chat, subject: str) -> None:
    older, newer = [await under_way(scribe, chat, text) for text in ("older", "newer")]
    assert await Chat(pair.one, subject, older.request_id).stop() == 204
    with Client(chat.url, subject) as client:
        assert [client.run(run.request_id)["status"] for run in (older, newer)] == ["cancelled", "running"]


async def test_stop_leaves_no_ghost(pair: Pair, service: Service, subject: str) -> None:
    """The stream ends with an abort; a resume finds nothing; the same message sent again is a new run."""
    chat = Chat(service.gateways[0].url, subject, "a chat")
    stream = await chat.send("a long story", agent="slow")
    await until_shown(stream, 4)
    elsewhere = service.gateways[1].url
    assert await chat.stop(url=elsewhere) == 204
    message = await whole(stream)
    assert (message.aborted, message.text) == (True, "begun ")
    assert (await chat.resume()).status == (await chat.resume(url=elsewhere)).status == 204
    again = await chat.post("submit-message", agent="slow")
    await until_shown(again, 3)
    assert message_of(again).id not in (None, message.id)
    assert await chat.stop() == 204
    await whole(again)


async def test_stop_where_nothing_runs_is_the_same(chat: Chat) -> None:
    assert await chat.stop() == 204


async def test_regenerate_starts_a_new_run_though_the_old_one_is_under_way(service: Service, subject: str) -> None:
    chat = Chat(service.gateways[0].url, subject, "a chat")
    old = await chat.send("a long story", agent="slow")
    await until_shown(old, 4)
    new = await chat.regenerate(agent="slow", url=service.gateways[1].url)
    await until_shown(new, 4)
    assert (await whole(old)).aborted
    assert message_of(new).id != message_of(old).id
    resumed = await chat.resume()
    await until_shown(resumed, 1)
    assert message_of(resumed).id == message_of(new).id
    await chat.stop()
    await whole(new)


async def test_regenerate_after_the_end_starts_a_new_run(service: Service, subject: str) -> None:
    chat = Chat(service.gateways[0].url, subject, "a chat")
    first = await whole(await chat.send("again"))
    second = await whole(await chat.regenerate())
    assert first.id != second.id
    assert first.text == second.text


async def test_regenerate_sent_again_with_its_key_joins_its_run(pair: Pair, scribe: Scribe, chat: Chat) -> None:
    """As after an answer that was lost."""
    await under_way(scribe, chat)
    key = {"Idempotency-Key": "the-key"}
    first = await chat.regenerate(headers=key)
    run = Written(scribe, first.headers["x-workflow-run-id"], Submission(query="the question", agent="echo"))
    await run.attempt()
    again = await chat.regenerate(url=pair.two, headers=key)
    await run.end()
    assert [(each.id, each.aborted) for each in (await whole(first), await whole(again))] == [
        (run.request_id, False)
    ] * 2


async def test_a_failed_run_tells_why(service: Service, subject: str) -> None:
    chat = Chat(service.gateways[0].url, subject, "a chat")
    message = await whole(await chat.send("x", agent="misbehaves", parameters={"what": "error"}))
    assert message.error == "Come back tomorrow."
    assert message.text == "before "


async def test_an_erased_run_ends_its_streams_with_an_error(scribe: Scribe, chat: Chat, subject: str) -> None:
    run = await under_way(scribe, chat)
    stream = await chat.resume()
    await until_shown(stream, 6)
    with Client(chat.url, subject) as client:
        assert client.delete(run.path).status_code == 204
    assert await stream.ended() == "finished"
    assert [chunk["type"] for chunk in chunks_of(stream)[-3:]] == ["text-end", "error", "finish"]
    assert is_done(stream)
    assert (await chat.resume()).status == 204


async def test_a_gateway_that_is_killed_leaves_a_chat_that_resumes_elsewhere(launch: Launcher, subject: str) -> None:
    server = launch.redis()
    one, two = launch.gateway(server.url), launch.gateway(server.url)
    async with Scribe(server.url) as scribe:
        chat = Chat(one.url, subject, "a chat")
        run = await under_way(scribe, chat)
        stream = await chat.post("submit-message")
        await until_shown(stream, 6)
        one.signal(signal.SIGKILL)
        assert await stream.ended() == "cut"
        resumed = await chat.resume(url=two.url)
        await run.tokens(2)
        await run.append([END])
        assert (await whole(resumed)).parts == [("text", "0 1 2 3 4 ")]


async def test_heartbeats_are_no_chunks(scribe: Scribe, chat: Chat, subject: str) -> None:
    run = await under_way(scribe, chat)
    stream = await chat.resume()
    for _ in range(3):
        beats = len(stream.comments) + 1
        await stream.until(lambda beats=beats: len(stream.comments) >= beats)  # type: ignore[misc]
        await run.tokens(1)
    await run.end()
    await whole(stream)
    assert len(stream.comments) >= 3
    assert b"\n: heartbeat" in stream.body
    assert all(chunk["type"] for chunk in chunks_of(stream))


# -- rewinds ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("agent", ["chatter", "stepper", "steps"])
async def test_the_message_has_the_answer_of_the_poll_though_a_worker_was_killed(
    fleet: Fleet, launch: Launcher, agent: str
) -> None:
    """An agent that says the same again, one that goes on from a checkpoint, and one that says something else."""
    victim = launch.worker(fleet.redis.url, lease_seconds=1.5)
    chat = Chat(str(fleet.client.base_url), "alice", f"a chat with {agent}")
    stream = await chat.send("go", agent=agent, parameters={"count": 40, "pause": 0.03})
    await until_shown(stream, 15)
    victim.signal(signal.SIGKILL)
    launch.worker(fleet.redis.url, lease_seconds=1.5)
    message = await whole(stream, seconds=60)
    run = fleet.client.run(str(message.id))
    assert run["attempt"] == 2
    assert message.text == run["answer"]
    kinds = [part.kind for part in message.parts]
    assert kinds == (["text", "data-rewind", "text"] if agent == "steps" else ["text"])


async def test_with_reset_step_the_client_is_told_to_drop_what_was_taken_back(
    pair: Pair, special: Gateway, scribe: Scribe, chat: Chat, subject: str
) -> None:
    run = await under_way(scribe, chat, tokens=0)
    call, result = ToolCall(id="c", tool="f", args={}), ToolResult(id="c", tool="f", result=1)
    events = [Reasoning(text="hm"), call, result, Token(text="one "), Token(text="two")]
    await run.append([(event.type, event.json_data()) for event in events])
    await run.attempt(resume_from=EventId(run.epoch, 5))
    await run.append([("token", Token(text="or three").json_data()), END])
    for url, resets in ((special.url, 1), (pair.one, 0)):
        found = Workflow([url], subject)
        found.run_id = run.request_id
        message = await found.follow()
        assert found.chunks.count({"type": "reset-step"}) == resets
        assert message.text == "one or three"
        if resets:
            kept = ("tool-f", {"id": "c", "input": {}, "output": 1})
            assert message.parts == [("reasoning", "hm"), kept, ("text", "one or three")]


# -- WorkflowChatTransport -------------------------------------------------------------------------------------


async def test_a_workflow_chat_goes_on_where_it_was_cut_on_two_gateways(
    service: Service, subject: str, chance: random.Random
) -> None:
    """Cut at any byte; its count of chunks is its cursor."""
    urls = [gateway.url for gateway in service.gateways]
    parameters = {"count": 60, "pause": 0.02, "every": 5}
    with Resets(urls, lambda: chance.choice([0, chance.randrange(1500), None]) or chance.randrange(1500)) as resets:
        broken = Workflow([resets.url], subject)
        message = await patient(broken, [user_message("count")], agent="tokens", parameters=parameters)
    assert resets.broken
    undisturbed = Workflow(urls, subject)
    undisturbed.run_id = broken.run_id
    await undisturbed.follow()
    assert broken.chunks == undisturbed.chunks
    with service.client(subject) as client:
        assert message.text.strip() == client.run(broken.run_id)["answer"].strip()


async def patient(found: Workflow, messages: list[dict[str, Any]], **body: Any) -> Any:
    """Some of its connections are broken before there is a reply, which it could not bear."""
    while True:
        try:
            return await (found.follow() if found.run_id else found.send(messages, **body))
        except (AssertionError, OSError, EOFError) as error:
            if isinstance(error, AssertionError) and "three connections" not in str(error):
                raise


async def test_a_run_that_has_ended_is_told_from_where_its_client_was(
    pair: Pair, scribe: Scribe, chat: Chat, subject: str
) -> None:
    run = await under_way(scribe, chat)
    await run.end()
    found = Workflow([pair.one, pair.two], subject)
    found.run_id = run.request_id
    message = await found.follow()
    assert message.text == "the end"
    for start_index in range(len(found.chunks)):
        stream = await found.get(start_index)
        assert await stream.ended() == "finished"
        assert chunks_of(stream) == found.chunks[start_index:]
        assert is_done(stream)


async def test_a_negative_start_index_counts_from_the_end(pair: Pair, scribe: Scribe, chat: Chat, subject: str) -> None:
    run = await under_way(scribe, chat)
    found = Workflow([pair.one, pair.two], subject)
    found.run_id = run.request_id
    live = await found.get(-2)
    assert live.headers["x-workflow-stream-tail-index"] == "5"
    await until_shown(live, 2)
    assert [chunk["delta"] for chunk in chunks_of(live)] == ["1 ", "2 "]
    beyond = await found.get(-100)
    await until_shown(beyond, 1)
    assert chunks_of(beyond)[0]["type"] == "start"
    await run.append([END])
    assert await live.ended() == "finished"
    ended = await found.get(-3)
    assert ended.headers["x-workflow-stream-tail-index"] == "8"
    assert await ended.ended() == "finished"
    assert [chunk["type"] for chunk in chunks_of(ended)] == ["text-end", "finish-step", "finish"]


@pytest.mark.parametrize("start_index", [0, 5, -3])
async def test_where_nothing_runs_a_workflow_chat_gets_an_end(pair: Pair, subject: str, start_index: int) -> None:
    """It takes a 204 and a 404 for errors, and asks for ever where there is no `finish`."""
    found = Workflow([pair.one], subject)
    for name in ("no-such-chat", "0" * 32):
        found.run_id = name
        stream = await found.get(start_index)
        assert (await stream.ended(), stream.status) == ("finished", 200)
        assert chunks_of(stream) == [{"type": "finish"}]
        assert is_done(stream)


async def test_a_client_that_has_all_of_a_run_gets_an_end(pair: Pair, scribe: Scribe, chat: Chat, subject: str) -> None:
    run = await under_way(scribe, chat)
    await run.end()
    found = Workflow([pair.one], subject)
    found.run_id = run.request_id
    await found.follow()
    for start_index in (len(found.chunks), len(found.chunks) + 1000):
        stream = await found.get(start_index)
        assert await stream.ended() == "finished"
        assert chunks_of(stream) == [{"type": "finish"}]


async def test_a_workflow_chat_that_is_loaded_again_finds_the_run_of_its_session(
    pair: Pair, scribe: Scribe, chat: Chat, subject: str
) -> None:
    """By the chat's name, from the chunk 0."""
    run = await under_way(scribe, chat)
    found = Workflow([pair.one], subject)
    found.run_id = chat.chat_id.replace(" ", "%20")
    stream = await found.get(0)
    await until_shown(stream, 3)
    assert message_of(stream).id == run.request_id
    await run.end()
    await whole(stream)
    assert chunks_of(await ended(await found.get(0))) == [{"type": "finish"}], "by its chat it is no longer waited for"


async def ended(stream: Stream) -> Stream:
    await stream.ended()
    return stream


async def test_a_workflow_chat_has_the_history_of_the_answer_before(service: Service, subject: str) -> None:
    """It names no chat; the id of its last answer names the run, and so the session."""
    urls = [gateway.url for gateway in service.gateways]
    first = Workflow(urls, subject)
    question = user_message("my name is Bo")
    answer = await first.send([question])
    messages = [question, {"id": answer.id, "role": "assistant", "parts": []}, user_message("who am I?")]
    second = await Workflow(urls, subject).send(messages, agent="recalls")
    assert [each["data"]["query"] for each in second.transient] == ["my name is Bo"]
    stranger = await Workflow(urls, f"not-{subject}").send(messages, agent="recalls")
    assert not stranger.transient
    with service.client(f"not-{subject}") as client:
        assert client.run(str(stranger.id))["session_id"] == f"s-{stranger.id}", "not even the session's name is told"


# -- drain -----------------------------------------------------------------------------------------------------


async def test_streams_are_cut_at_a_drain_and_go_on_elsewhere(launch: Launcher, subject: str) -> None:
    """Cut, not ended: a clean end in mid-run is the end for DefaultChatTransport."""
    server = launch.redis()
    gateway, other = launch.gateway(server.url), launch.gateway(server.url)
    async with Scribe(server.url) as scribe:
        chat = Chat(gateway.url, subject, "a chat")
        run = await under_way(scribe, chat)
        stream = await chat.resume()
        await until_shown(stream, 6)
        counting = Workflow([gateway.url, other.url], subject)
        counting.run_id = run.request_id
        following = asyncio.create_task(counting.follow())
        while not counting.requests:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.2)
        gateway.signal(signal.SIGTERM)
        assert await stream.ended() == "cut"
        assert not is_done(stream)
        assert message_of(stream).text == "0 1 2 "
        assert gateway.wait(10) == 0
        resumed = await chat.resume(url=other.url)
        await run.tokens(2)
        await run.append([END])
        assert (await whole(resumed)).text == (await following).text == "0 1 2 3 4 "
        assert counting.requests == [0, 6]


# -- what is refused -------------------------------------------------------------------------------------------

QUESTION = {"role": "user", "parts": [{"type": "text", "text": "x"}]}


@pytest.mark.parametrize(
    ("body", "status", "told"),
    [
        ([], 422, "The body must be a JSON object with at least a `messages`."),
        ({}, 422, "messages: Field required"),
        ({"messages": []}, 422, "messages: "),
        ({"messages": ["x"]}, 422, "messages.0: "),
        ({"messages": [{"role": "assistant", "parts": []}]}, 422, "messages.0: The last message must be the user's"),
        ({"messages": [{"role": "user", "content": "x"}]}, 422, "messages.0.parts: Missing."),
        ({"messages": [{"role": "user", "parts": []}]}, 422, "messages.0.parts: There is no text in them."),
        ({"messages": [{"role": "user", "parts": ["x"]}]}, 422, "messages.0.parts.0: A part is an object with a type."),
        ({"messages": [{"role": "user", "parts": [{"type": "text"}]}]}, 422, "messages.0.parts.0: A part of the type"),
        (
            {"messages": [{"role": "user", "parts": [{"type": "file", "mediaType": "image/png", "url": "data:,"}]}]},
            422,
            "messages.0.parts.0: A part of the type file (image/png) is not supported: agents here take text.",
        ),
        ({"messages": [QUESTION], "trigger": "resume"}, 422, "trigger: "),
        ({"messages": [QUESTION], "id": ""}, 422, "id: "),
        *(
            ({"messages": [QUESTION], "id": chat_id}, 422, "id: A chat's id stands as it is in the path of its stream")
            for chat_id in (".", "..", "a/b", "a\\b", "a?b", "a#b", "a%2Fb", "a%41", "a\n", "a\ud800")
        ),
        ({"messages": [QUESTION], "agent": "nobody"}, 422, "agent: Unknown agent; this service has: "),
        ({"messages": [QUESTION], "parameters": []}, 422, "parameters: "),
        ({"messages": [QUESTION], "cancel_if_unwatched": 0}, 422, "cancel_if_unwatched: At least "),
        ({"messages": [{"role": "user", "parts": [{"type": "text", "text": "x" * 300_000}]}]}, 413, "The last message"),
        ({"messages": [QUESTION], "more": "x" * 1_100_000}, 413, "The body is larger than 1048576 bytes."),
    ],
)
def test_what_is_wrong_with_a_message_is_told_in_words(pair: Pair, body: Any, status: int, told: str) -> None:
    """A chat shows the body of an error as it is."""
    reply = raw.ask(
        pair.one,
        "POST",
        "/ai/chat",
        *AUTH.items(),
        ("Content-Type", "application/json"),
        body=json.dumps(body).encode("ascii"),
    )
    assert (reply.status, reply.header("content-type")) == (status, "text/plain; charset=utf-8")
    assert reply.body.decode().startswith(told), reply.body


def test_other_errors_are_told_in_words_too(pair: Pair) -> None:
    json_body = ("Content-Type", "application/json")
    for reply, status, told in (
        (raw.ask(pair.one, "POST", "/ai/chat", json_body, body=b"{}"), 401, "Send a token"),
        (raw.ask(pair.one, "POST", "/ai/chat", *AUTH.items(), json_body, body=b"{"), 400, "The body is not JSON"),
        (raw.ask(pair.one, "POST", "/ai/chat", *AUTH.items(), body=b"{}"), 415, "Send the body as JSON"),
        (raw.ask(pair.one, "GET", "/ai/chat/x/stream"), 401, "Send a token"),
        (raw.ask(pair.one, "GET", "/ai/chat/x/stream?startIndex=1e3", *AUTH.items()), 400, "`startIndex`"),
        (raw.ask(pair.one, "POST", "/ai/chat/x/stop"), 401, "Send a token"),
    ):
        assert (reply.status, reply.header("content-type")) == (status, "text/plain; charset=utf-8")
        assert reply.body.decode().startswith(told)
        assert (reply.header("www-authenticate") is not None) == (status == 401)


@pytest.mark.parametrize("chat_id", ["...", "50%", "%zz", "a b", ".a", "ü:;,@&=+$"])
async def test_a_chat_of_any_other_id_is_found_where_the_id_stands_in_the_path_as_it_is(
    pair: Pair, subject: str, chat_id: str
) -> None:
    chat = Chat(pair.one, subject, chat_id)
    stream = await chat.send("x")
    with Client(pair.one, subject) as client:
        assert client.post(f"/ai/chat/{chat_id}/stop").status_code == 204
    assert (await whole(stream)).aborted


def test_what_is_no_route_below_the_path_is_told_in_words_too(pair: Pair) -> None:
    for method, path, status, told in (
        ("GET", "/ai/chat/a/b/stream", 404, "There is nothing at this path."),
        ("POST", "/ai/chat/", 404, "There is nothing at this path."),
        ("GET", "/ai/chat", 405, "This path does not take this method"),
        ("DELETE", "/ai/chat/x/stop", 405, "This path does not take this method"),
    ):
        reply = raw.ask(pair.one, method, path, *AUTH.items())
        assert (reply.status, reply.header("content-type")) == (status, "text/plain; charset=utf-8")
        assert reply.body.decode().startswith(told)
        assert (reply.header("allow") == "POST") == (status == 405)


def test_parts_of_earlier_messages_and_unknown_fields_are_not_looked_at(service: Service, subject: str) -> None:
    messages = [{"role": "user", "parts": [{"type": "file"}]}, {"id": 7}, QUESTION]
    with service.client(subject) as client:
        reply = client.post("/ai/chat", json={"messages": messages, "more": 1, "messageId": None})
    assert reply.status_code == 200


async def test_with_redis_away_a_chat_that_resumes_shall_come_again(launch: Launcher, subject: str) -> None:
    """To a 503 both transports give up."""
    server = launch.redis()
    gateway = launch.gateway(server.url)
    server.kill()
    chat = Chat(gateway.url, subject, "a chat")
    found = Workflow([gateway.url], subject)
    found.run_id = "0" * 32
    for stream in (await chat.resume(), await found.get(3)):
        assert (stream.status, await stream.ended()) == (200, "cut")
    refused = await chat.send("x")
    assert refused.status == 503
    await refused.ended()
    assert bytes(refused.body).startswith(b"Redis cannot be reached")


def test_a_page_of_another_origin_may_send_what_transports_send_and_read_the_headers_of_a_stream(
    special: Gateway,
) -> None:
    asked = {
        "Origin": "https://app.example.com",
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,content-type,user-agent",
    }
    assert httpx.options(f"{special.url}/ai/chat", headers=asked).status_code == 200
    reply = httpx.get(f"{special.url}/ai/chat/x/stream", headers={**AUTH, "Origin": "https://app.example.com"})
    exposed = {name.strip().lower() for name in reply.headers["access-control-expose-headers"].split(",")}
    assert {"x-workflow-run-id", "x-workflow-stream-tail-index", "x-vercel-ai-ui-message-stream"} <= exposed
