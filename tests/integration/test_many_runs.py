"""Many runs over one connection: GET /api/v1/stream, of runs that are listed and of a session."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass

import pytest
import pytest_asyncio

from broker.events import Entry
from broker.gateway.dialects.native.many.cursor import MAX_RUNS, Composite
from broker.ids import EventId, new_request_id
from broker.runs import keys, log
from tests.conftest import Launcher
from tests.kit import raw, sse
from tests.kit.eventsource import Stream
from tests.kit.http import token
from tests.kit.many import by_run, check_cursors, check_runs, path_of, run_of
from tests.kit.processes import Gateway
from tests.kit.redis_server import RedisServer
from tests.kit.scribe import Scribe, Written

ALICE = "alice"
AUTH = {"Authorization": f"Bearer {token(ALICE)}"}
HEARTBEAT = 0.4


@dataclass
class Place:
    """Two gateways without a worker: the logs are written by hand."""

    redis: RedisServer
    gateways: list[Gateway]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    launcher = Launcher(tmp_path_factory.mktemp("many"))
    try:
        server = launcher.redis()
        yield Place(
            server, [launcher.gateway(server.url, lease_seconds=1, heartbeat_seconds=HEARTBEAT) for _ in range(2)]
        )
    finally:
        launcher.close()


@pytest_asyncio.fixture
async def scribe(place: Place) -> AsyncIterator[Scribe]:
    async with Scribe(place.redis.url) as scribe:
        yield scribe


@contextlib.asynccontextmanager
async def streaming(place: Place, path: str, after: str = "", *, gateway: int = 0) -> AsyncIterator[Stream]:
    stream = Stream()
    cursor = {"Last-Event-ID": after} if after else {}
    await stream.open(place.gateways[gateway].url, path, AUTH | cursor)
    try:
        yield stream
    finally:
        await stream.close()


async def read(place: Place, path: str, after: str = "", *, gateway: int = 0) -> Stream:
    """To the end."""
    async with streaming(place, path, after, gateway=gateway) as stream:
        assert await stream.ended() == "finished"
        return stream


async def logs_of(runs: Sequence[Written]) -> dict[str, list[Entry]]:
    return {run.request_id: await run.log() for run in runs}


def ids(runs: Sequence[Written]) -> list[str]:
    return [run.request_id for run in runs]


async def test_runs_come_over_one_connection_each_in_order_until_the_last_one_has_ended(
    place: Place, scribe: Scribe
) -> None:
    runs = [await scribe.running(ALICE, f"together {n}", tokens=n) for n in range(3)]
    async with streaming(place, path_of(*ids(runs))) as stream:
        await stream.until(lambda: len(stream.events) == 3 * 2 + 3)
        for _ in range(5):
            for run in runs:
                await run.tokens(2)
        await runs[0].end()
        await runs[2].tokens(1)
        await runs[2].end()
        await stream.until(lambda: [event.type for event in stream.events].count("final") == 2)
        assert stream.ending is None
        await runs[1].end()
        assert await stream.ended() == "finished"
    check_runs(stream.events, await logs_of(runs))
    check_cursors(stream.events)
    assert (stream.headers["content-type"], stream.headers["x-accel-buffering"]) == (
        "text/event-stream; charset=utf-8",
        "no",
    )


async def test_wherever_a_stream_is_cut_another_gateway_goes_on_exactly(place: Place, scribe: Scribe) -> None:
    """P8: at every byte of the ids and frames around each boundary, and in the middle of each frame."""
    runs = [await scribe.running(ALICE, f"cut {n}", tokens=4 + n) for n in range(3)]
    async with streaming(place, path_of(*ids(runs))) as stream:
        await stream.until(lambda: len(stream.events) == 3 * 6 + 3)
        await runs[1].attempt(EventId(runs[1].epoch, 3))
        for n in range(3):
            await runs[n].tokens(2)
        for run in runs:
            await run.end()
        assert await stream.ended() == "finished"
    logs, body = await logs_of(runs), bytes(stream.body)
    check_runs(stream.events, logs)
    ends = [n + 2 for n in range(len(body)) if body[n : n + 2] == b"\n\n"]
    assert len(ends) == len(stream.events)
    for n, at in enumerate([at + more for at in (0, *ends) for more in (0, 50)]):
        parser = sse.EventStream()
        had = parser.feed(body[:at])
        if parser.last_event_id == stream.events[-1].id:
            async with streaming(place, path_of(*ids(runs)), parser.last_event_id) as done:
                assert (done.status, await done.ended(), done.events) == (204, "finished", [])
            continue
        rest = await read(place, path_of(*ids(runs)), parser.last_event_id, gateway=n % 2)
        check_runs([*had, *rest.events], logs)
        check_cursors(rest.events, parser.last_event_id)


async def test_a_cursor_that_one_log_does_not_know_is_lost_for_that_run_alone(place: Place, scribe: Scribe) -> None:
    runs = [await scribe.running(ALICE, f"lost {n}", tokens=3) for n in range(2)]
    for run in runs:
        await run.end()
    logs = await logs_of(runs)
    lost, whole = ids(runs)
    cursor = Composite({lost: EventId(runs[0].epoch + 1, 1), whole: logs[whole][2].id})
    stream = await read(place, path_of(lost, whole), str(cursor))
    seen = by_run(stream.events)
    assert seen[whole] == logs[whole][3:]
    assert seen[lost][0].type == "attempt"
    assert json.loads(seen[lost][0].data)["reason"] == "cursor_lost"
    assert str(seen[lost][0].id) == "0-0"
    assert seen[lost][1:] == logs[lost]
    check_cursors(stream.events, str(cursor))
    [at] = [n for n, event in enumerate(stream.events) if event.type == "attempt" and "cursor_lost" in event.data]
    again = await read(place, path_of(lost, whole), stream.events[at].id, gateway=1)
    assert by_run(again.events)[lost] == logs[lost], "told once, and the cut behind it is as any other"


async def test_a_run_that_is_erased_under_a_stream_is_gone_and_the_others_go_on(place: Place, scribe: Scribe) -> None:
    runs = [await scribe.running(ALICE, f"erased {n}", tokens=2) for n in range(3)]
    path = path_of(*ids(runs))
    async with streaming(place, path) as stream:
        await stream.until(lambda: len(stream.events) == 3 * 4)
        reply = await asyncio.to_thread(raw.ask, place.gateways[1].url, "DELETE", runs[1].path, *AUTH.items())
        assert reply.status == 204
        await stream.until(lambda: len(stream.events) == 3 * 4 + 1)
        gone = stream.events[-1]
        assert (gone.type, gone.json["code"], run_of(gone)) == ("error", "gone", runs[1].request_id)
        await runs[0].tokens(1)
        await stream.until(lambda: len(stream.events) == 3 * 4 + 2)
    # Whether the client was told, or away while the run was erased: it is told once, and the others are not lost.
    unaware = stream.events[11].id
    for cursor, told, more in ((stream.events[-1].id, 0, 0), (gone.id, 0, 1), (unaware, 1, 2)):
        async with streaming(place, path, cursor, gateway=1) as again:
            await again.until(lambda again=again, more=more: len(again.events) == more)  # type: ignore[misc]
            assert [event.type for event in again.events].count("error") == told
            check_cursors(again.events, cursor)
    for run in (runs[0], runs[2]):
        await run.end()
    rest = await read(place, path, stream.events[-1].id)
    erased = runs[1].request_id
    logs = {**await logs_of([runs[0], runs[2]]), erased: by_run(stream.events)[erased]}
    check_runs([*stream.events, *rest.events], logs)
    async with streaming(place, path, rest.events[-1].id) as done:
        assert done.status == 204


async def test_what_cannot_be_streamed_is_refused_and_a_foreign_run_as_a_missing_one(
    place: Place, scribe: Scribe
) -> None:
    run, theirs = await scribe.running(ALICE, "mine", tokens=1), await scribe.running("bob", "not mine", tokens=1)
    mine, foreign, missing = run.request_id, theirs.request_id, new_request_id()
    many = [new_request_id() for _ in range(MAX_RUNS + 1)]
    cases = [
        ("/api/v1/stream", 400, "bad_request"),
        ("/api/v1/stream?run=", 404, "run_not_found"),
        (path_of(mine, session_id="s"), 400, "bad_request"),
        ("/api/v1/stream?session_id=", 400, "bad_request"),
        (path_of(session_id="x" * 256), 400, "bad_request"),
        (path_of(*many), 400, "bad_request"),
        (path_of(mine, missing), 404, "run_not_found"),
        (path_of(mine, foreign), 404, "run_not_found"),
        (path_of(foreign), 404, "run_not_found"),
        (path_of(mine, "x"), 404, "run_not_found"),
        (path_of(mine, mine.upper()), 404, "run_not_found"),
        (path_of(mine, last_event_id="nonsense"), 400, "bad_cursor"),
        (path_of(mine, last_event_id="1-2"), 400, "bad_cursor"),
        (path_of(mine, lastEventId=f"{missing}/1-2"), 400, "bad_cursor"),
        (path_of(mine, last_event_id=f"{mine}/1-2,7"), 400, "bad_cursor"),
        (path_of(session_id="s", last_event_id=f"{mine}/1-2"), 400, "bad_cursor"),
        (path_of(session_id="s", last_event_id=f"{await scribe.now_ms()}000"), 400, "bad_cursor"),  # microseconds
    ]
    for path, status, code in cases:
        reply = await asyncio.to_thread(raw.ask, place.gateways[0].url, "GET", path, *AUTH.items())
        assert (reply.status, reply.json["code"]) == (status, code), path
        assert foreign not in str(reply)
    # Of a run that a cursor names, a foreign one is as gone as a missing one.
    await run.end()
    answers = [await read(place, path_of(mine, name, last_event_id=f"{name}/1-2")) for name in (foreign, missing)]
    gone = [[event for event in answer.events if event.type == "error"] for answer in answers]
    assert [[run_of(event) for event in events] for events in gone] == [[foreign], [missing]]
    assert by_run(answers[0].events)[mine] == by_run(answers[1].events)[mine] == await run.log()


async def test_the_same_run_twice_is_one_and_50_are_not_too_many(place: Place, scribe: Scribe) -> None:
    runs = [await scribe.running(ALICE, f"fifty {n}", tokens=1) for n in range(MAX_RUNS)]
    async with streaming(place, path_of(*ids(runs), *ids(runs))) as stream:
        await stream.until(lambda: len(stream.events) == 3 * MAX_RUNS)
        for run in runs:
            await run.end()
        assert await stream.ended() == "finished"
    check_runs(stream.events, await logs_of(runs))
    assert max(len(event.id) for event in stream.events) < 4096
    async with streaming(place, path_of(*ids(runs)), stream.events[-1].id) as done:
        assert done.status == 204
    rest = await read(place, path_of(*ids(runs), last_event_id=stream.events[70].id))
    check_runs([*stream.events[:71], *rest.events], await logs_of(runs))


@pytest.mark.parametrize("version", ["1.0", "1.1"])
async def test_large_logs_come_whole_on_the_fast_path_and_on_the_fall_back(
    place: Place, scribe: Scribe, version: str
) -> None:
    """More than the connection takes at once, of each run."""
    runs = [await scribe.running(ALICE, f"large {version} {n}") for n in range(3)]
    for run in runs:
        for _ in range(3):
            await run.append([("token", json.dumps({"text": "x" * 10_000})) for _ in range(40)])
        await run.end()
    request = raw.request("GET", path_of(*ids(runs)), *AUTH.items()).replace(b"HTTP/1.1", f"HTTP/{version}".encode())
    data = await asyncio.to_thread(raw.exchange, place.gateways[0].url, request)
    head, _, body = data.partition(b"\r\n\r\n")
    if b"transfer-encoding: chunked" in head:
        body = b"".join(unchunked(body))
    check_runs(sse.parse(body), await logs_of(runs))
    check_cursors(sse.parse(body))


def unchunked(body: bytes) -> Iterator[bytes]:
    while body:
        size, _, body = body.partition(b"\r\n")
        yield body[: int(size, 16)]
        body = body[int(size, 16) + 2 :]
    assert size == b"0"


# -- a session -----------------------------------------------------------------------------------------------


async def submitted(place: Place, session_id: str, query: str, *, gateway: int = 1, **fields: object) -> str:
    """By a gateway, so that it is in the session's index. Nobody takes it."""
    body = json.dumps({"query": query, "session_id": session_id, **fields}).encode()
    headers = [*AUTH.items(), ("Content-Type", "application/json")]
    url = place.gateways[gateway].url
    reply = await asyncio.to_thread(lambda: raw.ask(url, "POST", "/api/v1/query", *headers, body=body))
    assert reply.status == 202, reply.body
    request_id: str = reply.json["request_id"]
    return request_id


async def cancelled(place: Place, request_id: str) -> None:
    path = f"/api/v1/runs/{request_id}/cancel"
    reply = await asyncio.to_thread(lambda: raw.ask(place.gateways[0].url, "POST", path, *AUTH.items()))
    assert reply.status == 200


async def log_of(scribe: Scribe, request_id: str) -> list[Entry]:
    return await log.read_all(scribe.redis, request_id)


async def test_a_session_comes_with_the_runs_that_are_there_and_those_that_are_submitted_later(
    place: Place, scribe: Scribe
) -> None:
    path = path_of(session_id="talk")
    first = await submitted(place, "talk", "first")
    await cancelled(place, first)
    await submitted(place, "another talk", "not of it")
    async with streaming(place, path) as stream:
        await stream.until(lambda: len(stream.events) == 3)
        second = await submitted(place, "talk", "second")
        await stream.until(lambda: len(stream.events) == 4)
        third = await submitted(place, "talk", "third", gateway=0)
        await stream.until(lambda: len(stream.events) == 5)
        await cancelled(place, second)
        await stream.until(lambda: len(stream.events) == 7)
        await cancelled(place, third)
        await stream.until(lambda: len(stream.events) == 9)
        beats = len(stream.comments)
        await stream.until(lambda: len(stream.comments) >= beats + 3)
        assert stream.ending is None, "more may be submitted"
    logs = {name: await log_of(scribe, name) for name in (first, second, third)}
    check_runs(stream.events, logs)
    check_cursors(stream.events)
    for n, event in enumerate(stream.events):
        async with streaming(place, path, event.id, gateway=n % 2) as rest:
            await rest.until(lambda n=n, rest=rest: len(rest.events) >= 8 - n)  # type: ignore[misc]
            beats = len(rest.comments)
            await rest.until(lambda rest=rest, beats=beats: len(rest.comments) > beats)  # type: ignore[misc]
            check_runs([*stream.events[: n + 1], *rest.events], logs)
            check_cursors(rest.events, event.id)


async def test_a_session_from_now_on_is_its_floor_alone(place: Place, scribe: Scribe) -> None:
    await submitted(place, "news", "old")
    now_ms = await scribe.now_ms()
    await asyncio.sleep(0.01)
    async with streaming(place, path_of(session_id="news", last_event_id=str(now_ms))) as stream:
        await stream.until(lambda: bool(stream.comments))
        new = await submitted(place, "news", "new")
        await stream.until(lambda: bool(stream.events))
    assert [run_of(event) for event in stream.events] == [new]


async def test_a_floor_of_a_fast_clock_hides_nothing_that_is_submitted_from_now_on(
    place: Place, scribe: Scribe
) -> None:
    await submitted(place, "fast clock", "old")
    await asyncio.sleep(0.01)
    ahead_ms = await scribe.now_ms() + 20_000
    async with streaming(place, path_of(session_id="fast clock", last_event_id=str(ahead_ms))) as stream:
        await stream.until(lambda: bool(stream.comments))
        await asyncio.sleep(0.01)
        new = await submitted(place, "fast clock", "new")
        await stream.until(lambda: bool(stream.events))
    assert [run_of(event) for event in stream.events] == [new]
    assert (Composite.parse(stream.events[0].id).floor or 0) < ahead_ms


async def test_a_session_beats_while_redis_is_away_and_goes_on_when_it_is_back(place: Place, scribe: Scribe) -> None:
    first = await submitted(place, "outage", "first")
    async with (
        streaming(place, path_of(session_id="outage")) as stream,
        streaming(place, path_of(session_id="outage of nothing")) as silent,
    ):
        await stream.until(lambda: len(stream.events) == 1)
        place.redis.pause()
        try:
            beats = len(stream.comments), len(silent.comments)
            await stream.until(lambda: len(stream.comments) > beats[0] + 3 and len(silent.comments) > beats[1] + 1)
        finally:
            place.redis.resume()
        second = await submitted(place, "outage", "second")
        await stream.until(lambda: len(stream.events) == 2)
        assert [run_of(event) for event in stream.events] == [first, second]
        assert stream.ending is silent.ending is None


async def test_a_session_has_its_owners_runs_only_whatever_the_cursor_names(place: Place, scribe: Scribe) -> None:
    """What is of another session, of another owner or nowhere is as gone, and then out of the cursor."""
    mine, other = await submitted(place, "shared name", "mine"), await submitted(place, "another name", "mine too")
    missing = new_request_id()
    overseer = {"Authorization": f"Bearer {token('bob', tenant=ALICE, scope='broker:tenant')}"}
    now_ms = await scribe.now_ms()
    for who, names in ((AUTH, (other, missing)), (overseer, (mine, other, missing))):
        stream = Stream()
        cursor = ",".join([*(f"{name}/0-0" for name in names), str(now_ms)])
        await stream.open(place.gateways[0].url, path_of(session_id="shared name", last_event_id=cursor), who)
        await stream.until(lambda stream=stream: len(stream.comments) >= 2)  # type: ignore[misc]
        told = [(run_of(event), event.type, event.json["code"]) for event in stream.events]
        assert told == [(name, "error", "gone") for name in names]
        if who is AUTH:
            await asyncio.sleep(0.01)
            new = await submitted(place, "shared name", "new")
            await stream.until(lambda stream=stream, told=told: len(stream.events) > len(told))  # type: ignore[misc]
            assert list(Composite.parse(stream.events[-1].id).places) == [new]
        await stream.close()


async def test_a_run_of_a_session_that_is_erased_is_gone_and_does_not_come_again(place: Place, scribe: Scribe) -> None:
    path = path_of(session_id="tidy")
    first, second = await submitted(place, "tidy", "first"), await submitted(place, "tidy", "second")
    async with streaming(place, path) as stream:
        await stream.until(lambda: len(stream.events) == 2)
        reply = await asyncio.to_thread(
            lambda: raw.ask(place.gateways[1].url, "DELETE", f"/api/v1/runs/{first}", *AUTH.items())
        )
        assert reply.status == 204
        await stream.until(lambda: len(stream.events) == 3)
        assert (run_of(stream.events[2]), stream.events[2].json["code"]) == (first, "gone")
    async with streaming(place, path, stream.events[2].id) as rest:
        await cancelled(place, second)
        await rest.until(lambda: len(rest.events) == 2)
        assert {run_of(event) for event in rest.events} == {second}
    async with streaming(place, path) as fresh:
        await fresh.until(lambda: len(fresh.events) == 3)
        assert {run_of(event) for event in fresh.events} == {second}


async def test_idle_streams_of_a_session_cost_as_many_commands_as_one(place: Place, scribe: Scribe) -> None:
    """By Redis' count of looks; each of the streams has what is submitted, and after the last one nobody looks."""

    async def looks() -> int:
        stats = await scribe.redis.info("commandstats")
        return int(stats.get("cmdstat_zrangebyscore", {"calls": 0})["calls"])

    await submitted(place, "popular", "old")
    floors = ["0", "1", str(await scribe.now_ms())] * 5
    await asyncio.sleep(0.01)
    async with contextlib.AsyncExitStack() as stack:
        streams = [
            await stack.enter_async_context(streaming(place, path_of(session_id="popular", last_event_id=floor)))
            for floor in floors
        ]
        new = await submitted(place, "popular", "new")
        for stream in streams:
            await stream.until(lambda stream=stream: new in map(run_of, stream.events))  # type: ignore[misc]
        before, since = await looks(), await scribe.now_ms()
        await asyncio.sleep(2)
        count, pauses = await looks() - before, (await scribe.now_ms() - since) / (HEARTBEAT / 8 * 1000)
        assert 0 < count <= 1.5 * pauses + 2, f"one stream has {pauses:.0f} at most"
    async with asyncio.timeout(15):
        while True:
            before = await looks()
            await asyncio.sleep(4 * HEARTBEAT / 8)
            if await looks() == before:
                break


async def test_runs_of_a_session_that_wait_for_room_are_watched_at_each_heartbeat(place: Place, scribe: Scribe) -> None:
    """More of them than one look at the session's index brings; but not those that the client does not wait for."""

    async def watched_at(*names: str) -> list[int]:
        async with scribe.redis.pipeline(transaction=False) as pipe:
            for name in names:
                pipe.hget(keys.run(name), "watched_at")
            return [int(at or 0) for at in await pipe.execute()]

    old = await submitted(place, "crowd", "old", cancel_if_unwatched=60)
    floor_ms = await scribe.now_ms()
    await asyncio.sleep(0.01)
    names = [await submitted(place, "crowd", f"{n}", cancel_if_unwatched=60) for n in range(2 * MAX_RUNS + 5)]
    uncounted = await submitted(place, "crowd", "uncounted")
    async with streaming(place, path_of(session_id="crowd", last_event_id=str(floor_ms))) as stream:
        for _ in range(3):
            now_ms = await scribe.now_ms()
            async with asyncio.timeout(15):
                while min(await watched_at(*names)) < now_ms:
                    await asyncio.sleep(0.05)
        assert len({run_of(event) for event in stream.events}) == MAX_RUNS
    assert await watched_at(old, uncounted) == [0, 0]


async def test_a_stream_of_many_ends_when_its_token_does(place: Place, scribe: Scribe) -> None:
    """P21, with a run under way and without one."""
    run = await scribe.running(ALICE, "token", tokens=1)
    for path in (path_of(run.request_id), path_of(session_id="nothing here")):
        stream = Stream()
        short = {"Authorization": f"Bearer {token(ALICE, ttl=-8)}"}  # two seconds of the leeway are left
        await stream.open(place.gateways[0].url, path, short)
        assert await stream.ended() == "cut"
        assert bytes(stream.body).endswith(b"\n") and stream.body.count(b"retry: ") == 2
        await stream.close()
