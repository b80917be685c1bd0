"""The dialects `chat`, `session_chat`, `agent` and `prompt` where something breaks: cuts, kills, rewinds, drains."""

from __future__ import annotations

import asyncio
import re
import signal
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path

import pytest

from broker.events import Error, Event, Final, Token, ToolCall, ToolResult
from broker.ids import EventId
from tests.conftest import Launcher
from tests.kit import sse
from tests.kit.eventsource import EventSource, Stream
from tests.kit.http import Client
from tests.kit.one_way import ALICE, NAMES, Asking, Name, Site, asking, got_from, opened, runs_of, script, whole
from tests.kit.readers import READERS, Reader
from tests.kit.scribe import Scribe, Written

NUMBERED: tuple[Name, ...] = ("agent", "prompt")
SESSION = "a-session"


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


@pytest.fixture
async def scribe(site: Site) -> AsyncIterator[Scribe]:
    async with Scribe(site.redis.url) as scribe:
        yield scribe


async def writing(scribe: Scribe, query: str, *events: Event) -> Written:
    """A run that all four dialects join by this message."""
    run = await scribe.running("alice", query, session_id=SESSION, joinable=True)
    await say(run, *events)
    return run


async def say(run: Written, *events: Event) -> None:
    if events:
        await run.append([(event.type, event.json_data()) for event in events])


def words(*texts: str) -> list[Event]:
    return [Token(text=text) for text in texts]


async def watching(site: Site, run: Written, text: str) -> dict[Name, Stream]:
    """A client of each dialect, once it has this text."""
    query = run.submission.query
    streams = {name: await opened(site.url, asking(name, query, agent="echo", session=SESSION)) for name in NAMES}
    for name, stream in streams.items():
        assert stream.headers["x-request-id"] == run.request_id
        await stream.until(lambda n=name, s=stream: got_from(n, bytes(s.body)).text == text)  # type: ignore[misc]
    return streams


# -- rewinds ---------------------------------------------------------------------------------------------------


async def test_an_attempt_that_repeats_what_was_shown_is_not_seen(site: Site, scribe: Scribe, alice: Client) -> None:
    run = await writing(scribe, "repeats", *words("one ", "two ", "three "))
    streams = await watching(site, run, "one two three ")
    await run.attempt()
    await say(run, *words("one two ", "three four "), *words("five"), Final())
    for name, stream in streams.items():
        assert await stream.ended() == "finished"
        seen = got_from(name, bytes(stream.body))
        assert (seen.text, seen.end.get("code")) == ("one two three four five", None)
    assert alice.run(run.request_id)["answer"] == "one two three four five"
    ids = [event.id for event in streams["agent"].events]
    assert ids == ["1", "2", "3", "2000001", "2000002", "2000003"]


async def test_an_attempt_that_answers_otherwise_ends_the_stream_and_the_poll_is_right(
    site: Site, scribe: Scribe, alice: Client
) -> None:
    run = await writing(scribe, "differs", *words("one ", "two "))
    streams = await watching(site, run, "one two ")
    await run.attempt()
    await say(run, *words("one ", "2 "))
    for name, stream in streams.items():
        assert await stream.ended() == "finished", "nothing follows, though the run goes on"
        seen = got_from(name, bytes(stream.body))
        assert (seen.text, seen.end["code"]) == ("one two ", "restarted")
    again = {name: await opened(site.url, asked_again(name, run)) for name in NAMES if name not in NUMBERED}
    for name in NUMBERED:
        last = streams[name].events[-1].id
        assert await status(site, name, run, last) == 204, "an EventSource would come again and again"
    await say(run, *words("three"), Final())
    assert alice.run(run.request_id)["answer"] == "one 2 three"
    for name, stream in again.items():
        assert await stream.ended() == "finished"
        assert stream.headers["x-request-id"] == run.request_id
        seen = got_from(name, bytes(stream.body))
        assert (seen.text, seen.end.get("code")) == ("one 2 three", None), "who asks again has seen nothing else"
    for name in NUMBERED:
        assert await status(site, name, run, streams[name].events[-1].id) == 204


def asked_again(name: Name, run: Written) -> Asking:
    return asking(name, run.submission.query, agent="echo", session=SESSION)


async def status(site: Site, name: Name, run: Written, cursor: str) -> int:
    """Of a request that resumes there."""
    stream = Stream()
    path = f"/api/v1/agent/stream/{run.request_id}"
    if name == "prompt":
        path = asking(name, run.submission.query, agent="echo", session=SESSION).path
    await stream.open(site.gateways[1].url, path, {**ALICE, "Last-Event-ID": cursor})
    await stream.close()
    return stream.status


async def test_a_worker_that_is_killed_is_seen_only_where_the_next_one_says_something_else(
    site: Site, alice: Client, tmp_path: Path
) -> None:
    """`plays` says the same again; `steps` says which attempt it is."""
    go = str(tmp_path / "go")
    said = [*script(words("one ", "two ")), ["until", go], *script(words("three"))]
    same = {name: await opened(site.url, asking(name, f"same {name}", agent="plays", script=said)) for name in NAMES}
    other = {
        name: await opened(site.url, asking(name, f"other {name}", agent="steps", count=30, pause=0.1))
        for name in NAMES
    }
    for name in NAMES:
        await same[name].until(lambda n=name: got_from(n, bytes(same[n].body)).text == "one two ")  # type: ignore[misc]
        await other[name].until(lambda n=name: "1:3 " in got_from(n, bytes(other[n].body)).text)  # type: ignore[misc]
    site.worker_process.kill()
    Path(go).touch()
    site.worker_process = site.worker()
    for name in NAMES:
        assert await same[name].ended(30) == "finished"
        seen = got_from(name, bytes(same[name].body))
        assert (seen.text, seen.end.get("code")) == ("one two three", None)
        assert await other[name].ended(30) == "finished"
        seen = got_from(name, bytes(other[name].body))
        assert seen.end["code"] == "restarted"
        assert re.fullmatch(r"(1:\d+ )+", seen.text)
    for name in NAMES:
        run = alice.finished(other[name].headers["x-request-id"])
        assert run["answer"] == "".join(f"2:{n} " for n in range(30))


# -- cuts ------------------------------------------------------------------------------------------------------

ENDS: list[Sequence[Event]] = [
    [Final(answer="from the end only")],
    [*words("a", "b"), Error(code="no_quota", message="Later.")],
    [ToolCall(id="1", tool="t"), ToolResult(id="1", tool="t"), *words("a", "b", "c"), Final(answer="other")],
]


@pytest.mark.parametrize("events", ENDS, ids=["answer", "error", "tokens"])
async def test_a_stream_that_is_cut_after_any_frame_goes_on_after_it_on_any_gateway(
    site: Site, scribe: Scribe, events: Sequence[Event]
) -> None:
    """P8, P9."""
    run = await writing(scribe, f"cuts {events[-1]}", *words("before ") if len(events) > 1 else ())
    if len(events) > 1:
        await run.attempt()
        await say(run, *words("before ", "and after "))
    streams = await watching(site, run, "before and after " if len(events) > 1 else "")
    await say(run, *events)
    for name in NUMBERED:
        assert await streams[name].ended() == "finished"
        seen = streams[name].events
        path = f"/api/v1/agent/stream/{run.request_id}"
        if name == "prompt":
            path = asking(name, run.submission.query, agent="echo", session=SESSION).path
        for number, event in enumerate(seen):
            rest = await Stream().open(site.gateways[number % 2].url, path, {**ALICE, "Last-Event-ID": event.id})
            await rest.ended()
            assert rest.events == seen[number + 1 :]
            assert rest.status == (204 if event is seen[-1] else 200)
            assert rest.headers["x-request-id"] == run.request_id


async def test_a_gateway_that_is_killed_costs_no_client_anything(site: Site, alice: Client, tmp_path: Path) -> None:
    """P9: the others are asked for the rest, or for all of it again."""
    gateway, go = site.gateway(), tmp_path / "go"
    asked = {
        name: asking(name, f"killed {name}", agent="chatter", count=1, pause=0.05, until=str(go)) for name in NAMES
    }
    first = {name: await opened(gateway.url, asked[name]) for name in NAMES}
    for name, stream in first.items():
        await stream.until(lambda n=name, s=stream: ":3 " in got_from(n, bytes(s.body)).text)  # type: ignore[misc]
    gateway.kill()
    second: dict[Name, Stream] = {}
    for name, stream in first.items():
        assert await stream.ended() == "cut"
        cursor = {"Last-Event-ID": stream.events[-1].id} if name in NUMBERED else {}
        second[name] = await opened(site.gateways[1].url, asked[name], **cursor)
    go.touch()
    for name, stream in second.items():
        assert await stream.ended() == "finished"
        request_id = first[name].headers["x-request-id"]
        assert stream.headers["x-request-id"] == request_id
        events = [*first[name].events, *stream.events] if name in NUMBERED else stream.events
        assert got_from(name, *[frame(event) for event in events]).text == alice.run(request_id)["answer"]
        if name == "agent":
            assert [event.id for event in events] == [str(n) for n in range(1, len(events) + 1)]
    assert len([run for run in runs_of(alice) if run["agent"] == "chatter"]) == len(NAMES)


def frame(event: sse.Event) -> bytes:
    return f"event: {event.type}\ndata: {event.data}\n\n".encode()


@pytest.mark.parametrize("name", NUMBERED)
async def test_an_eventsource_outlives_its_gateway_and_stops_at_the_end_without_a_second_run(
    site: Site, alice: Client, name: Name
) -> None:
    """It repeats its GET with the id of the last frame, and closes for good at a 204."""
    gateway = site.gateway()
    asked = asking(name, f"eventsource {name}", agent="burst", count=25, pause=0.1)
    if name == "agent":
        body = {"query": asked.path, "agent": "burst", "parameters": {"count": 25, "pause": 0.1}}
        path = f"/api/v1/agent/stream/{alice.post('/api/v1/query', json=body).json()['request_id']}"
    else:
        path = asked.path
    before = len([run for run in runs_of(alice) if run["agent"] == "burst"])
    source = EventSource(gateway.url, path, ALICE, hurry=10)
    running = asyncio.create_task(source.run())
    await wait_until(lambda: len(source.events) > 5)
    gateway.kill()
    again = site.launcher.gateway(site.redis.url, port=gateway.port, **site.settings)
    await asyncio.wait_for(running, 30)
    assert source.closed == "204"
    seen = got_from(name, *[frame(event) for event in source.events])
    assert seen.text == "x" * 250
    assert len(source.events) == 25 + 1 + (name == "prompt"), "nothing came twice"
    assert len([run for run in runs_of(alice) if run["agent"] == "burst"]) == before + (name == "prompt")
    assert len({stream.headers["x-request-id"] for stream in source.streams}) == 1
    again.stop()


async def wait_until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.02)


# -- drains and heartbeats -------------------------------------------------------------------------------------


async def test_a_gateway_that_drains_cuts_between_frames_and_not_as_if_the_run_had_ended(
    site: Site, scribe: Scribe
) -> None:
    """P17."""
    gateway = site.gateway()
    run = await writing(scribe, "drains", *words("one ", "two "))
    asked = {name: asking(name, "drains", agent="echo", session=SESSION) for name in NAMES}
    streams = {name: await opened(gateway.url, asked[name]) for name in NAMES}
    for name, stream in streams.items():
        await stream.until(lambda n=name, s=stream: got_from(n, bytes(s.body)).text == "one two ")  # type: ignore[misc]
    gateway.signal(signal.SIGTERM)
    for name, stream in streams.items():
        assert await stream.ended() == "cut"
        body = bytes(stream.body)
        if name in NUMBERED:
            assert re.search(rb"\nretry: \d{4}\n$", body)
        else:
            assert b"retry" not in body and body.endswith(b"\n\n")
        assert got_from(name, body).end is None
    assert gateway.wait() == 0
    await say(run, Final())


async def test_without_redis_an_eventsource_is_told_to_come_again_and_others_that_there_is_nothing(
    launch: Launcher,
) -> None:
    """A 503 would close an EventSource for good."""
    server = launch.redis()
    gateway = launch.gateway(server.url)
    server.kill()
    for name in NAMES:
        asked = asking(name, "nobody is there")
        stream = Stream()
        await stream.open(gateway.url, asked.path, {**ALICE, **asked.headers}, method=asked.method, body=asked.body)
        if name == "prompt":
            assert (stream.status, await stream.ended()) == (200, "cut")
            assert re.fullmatch(rb"retry: \d{4}\n", bytes(stream.body))
        else:
            assert (stream.status, await stream.ended()) == (503, "finished")
    stream = await Stream().open(gateway.url, f"/api/v1/agent/stream/{'0' * 32}", {**ALICE, "Last-Event-ID": "5"})
    assert (stream.status, await stream.ended()) == (200, "cut")


async def test_heartbeats_are_invisible_to_every_reader(site: Site) -> None:
    """P13: recorded once, and read by everything that reads streams."""
    streams = {name: await opened(site.url, asking(name, f"beats {name}", agent="quiet", pause=1.1)) for name in NAMES}
    for name, stream in streams.items():
        assert await stream.ended() == "finished"
        body = bytes(stream.body)
        assert len([text for text in stream.comments if text.startswith("heartbeat")]) >= 4
        seen = [(event.type, event.data) for event in stream.events]
        assert len(seen) == 3 + (name == "prompt")
        for reader in READERS:
            assert read(reader, name, body) == seen, reader.name


def read(reader: Reader, name: Name, body: bytes) -> list[tuple[str, str]]:
    pieces = [body[at : at + 7] for at in range(0, len(body), 7)]
    return [(event.type or "message", event.data) for event in reader.replay(pieces)]


# -- cursors ---------------------------------------------------------------------------------------------------


async def test_who_has_what_the_log_has_not_is_told_so_once(site: Site, scribe: Scribe) -> None:
    """What was shown cannot be taken back, so nothing right can follow (PROTOCOL 6.5)."""
    run = await writing(scribe, "lost", *words("one ", "two "))
    await run.attempt(EventId(run.epoch, 2))
    await say(run, *words("two ", "three"))
    prompt = asking("prompt", "lost", agent="echo", session=SESSION)
    cursors = {"agent": ["3", "1000000", "1999999"], "prompt": [f"{run.request_id}/{run.epoch - 500}-2"]}
    for name in NUMBERED:
        path = prompt.path if name == "prompt" else f"/api/v1/agent/stream/{run.request_id}"
        for cursor in cursors[name]:
            stream = await Stream().open(site.url, path, {**ALICE, "Last-Event-ID": cursor})
            assert await stream.ended() == "finished"
            seen = got_from(name, bytes(stream.body))
            assert (seen.text, seen.end["code"]) == ("", "cursor_lost"), cursor
            assert await status(site, name, run, stream.events[-1].id) == 204, "it would come again and again"
    await say(run, Final())


@pytest.mark.parametrize("cursor", ["x", "-1", "1.5", "12-40", "1" * 16, "١"])
def test_a_cursor_of_agent_is_a_number(alice: Client, cursor: str) -> None:
    for reply in (
        alice.post("/api/v1/agent/stream", json={"message": "x"}, params={"last_event_id": cursor}),
        alice.get(f"/api/v1/agent/stream/{'0' * 32}", params={"lastEventId": cursor}),
    ):
        assert (reply.status_code, reply.json()["code"]) == (400, "bad_cursor")


def test_a_post_of_agent_goes_on_after_as_many_tokens_as_it_says(site: Site, alice: Client) -> None:
    """In the run that it joins, be it one that has just ended; where there is none to join, a new one begins."""
    asked = asking("agent", "post again", agent="tokens", count=5)
    all_of_it = sse.parse(whole(site.url, asked))
    rest = sse.parse(whole(site.url, asked, **{"Last-Event-ID": "3"}))
    assert rest == all_of_it[3:]
    for cursor in ("6", "7", "900"):
        reply = alice.post(asked.path, content=asked.body, headers={**asked.headers, "Last-Event-ID": cursor})
        assert reply.status_code == 204, "it has it all"
    new = asking("agent", "never asked", agent="tokens", count=5)
    assert [event.id for event in sse.parse(whole(site.url, new, **{"Last-Event-ID": "3"}))] == list("123456")
