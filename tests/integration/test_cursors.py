"""P10: no silent gap. Every cursor gets a defined answer (PROTOCOL 6.3-6.5), and an open stream is told what was lost.

The logs here are written by hand, through the broker's own scripts, so that each id is known.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import httpx
import pytest
import pytest_asyncio

from broker.events import Entry
from broker.fold import fold
from broker.ids import EventId
from broker.runs import keys
from broker.runs.scripts import Lease
from tests.conftest import Launcher
from tests.kit import raw, sse
from tests.kit.checker import check_log, check_reader, entries_of
from tests.kit.eventsource import Stream
from tests.kit.http import Client, token
from tests.kit.processes import Gateway
from tests.kit.redis_server import RedisServer
from tests.kit.scribe import Scribe, Written

ALICE = "alice"
REPAIR_SECONDS = 6
"""L + 5 s."""


@dataclass
class Place:
    """Two gateways without a worker: one that looks only when it is told, one whose heartbeats look all the time."""

    redis: RedisServer
    patient: Gateway
    watchful: Gateway

    def auth(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {token(ALICE)}"}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    launcher = Launcher(tmp_path_factory.mktemp("cursors"))
    try:
        server = launcher.redis()
        patient = launcher.gateway(server.url, lease_seconds=1, heartbeat_seconds=60)
        watchful = launcher.gateway(server.url, lease_seconds=1, heartbeat_seconds=0.4)
        yield Place(server, patient, watchful)
    finally:
        launcher.close()


@pytest_asyncio.fixture
async def scribe(place: Place) -> AsyncIterator[Scribe]:
    async with Scribe(place.redis.url) as scribe:
        yield scribe


@contextlib.asynccontextmanager
async def streaming(
    place: Place, run: Written, after: str | EventId | None = None, *, gateway: Gateway | None = None
) -> AsyncIterator[Stream]:
    headers = place.auth() | ({"Last-Event-ID": str(after)} if after is not None else {})
    stream = Stream()
    await stream.open((gateway or place.patient).url, f"{run.path}/stream", headers)
    try:
        yield stream
    finally:
        await stream.close()


def ids(entries: Sequence[Entry]) -> list[str]:
    return [str(entry.id) for entry in entries]


async def two_attempts(scribe: Scribe, query: str, *, finished: bool = False) -> Written:
    """0-1, E-1 to E-4, (E+1000)-1 to (E+1000)-4: the second attempt goes on from E-3. Finished: and a `final`."""
    run = await scribe.running(ALICE, query, tokens=3)
    await run.attempt(EventId(run.epoch, 3))
    await run.tokens(3)
    if finished:
        await run.end()
    check_log(await run.log(), finished=finished)
    return run


# The table. E is the first attempt's epoch, F the second's; F ends at F-4, of a finished run at F-5.

LOST = "the answer that the cursor is lost, then the whole log"
WAIT = "waiting for repair"
HAS_IT_ALL = "204"

CURSORS: list[tuple[str, str | int]] = [
    # cursor, what follows: LOST, WAIT, or how many of the log's first entries the client has
    ("0-0", 0),
    ("0-1", 1),
    ("0-9", 1),  # epoch 0 is in the log: its next entry is E-1
    ("E-1", 2),
    ("E-3", 4),
    ("E-4", 5),
    ("E-900", 5),  # of a tail that a failover lost; what follows it is F-1, which takes it back
    ("F-1", 6),
    ("F-3", 8),
    ("F-4", 9),
    ("1-1", LOST),  # older than every attempt
    ("E+1-1", LOST),  # between two epochs
    ("F-1-7", LOST),
    ("F-6", WAIT),
    ("F-999999", WAIT),
    ("F+1-1", WAIT),
    ("9999999999999999-9999999999999999", WAIT),
]


def resolve(cursor: str, run: Written) -> str:
    second, first = run.epoch, run.epoch - 1000
    named = {"E": first, "E+1": first + 1, "F": second, "F+1": second + 1, "F-1": second - 1}
    epoch, _, seq = cursor.rpartition("-")
    return f"{named.get(epoch, epoch)}-{seq}"


def check_answer(stream_events: Sequence[sse.Event], log: Sequence[Entry], answer: str | int) -> None:
    """What was read is exactly the answer, and the client that folds it has what the log has."""
    events = list(stream_events)
    if isinstance(answer, int):
        check_reader(entries_of(events), log[answer:])
        return
    lost, *rest = entries_of(events)
    assert (str(lost.id), lost.type) == ("0-0", "attempt")
    assert json.loads(lost.data) == {"attempt": 0, "reason": "cursor_lost", "resume_from": "0-0"}
    check_reader(rest, log)
    had = [Entry(EventId(1, 1), "token", '{"text":"of another log"}')]
    assert fold([*had, lost, *rest]) == fold(log)


FORMS = [
    "short in the header",
    "long in the header",
    "short in last_event_id",
    "long in last_event_id",
    "short in lastEventId",
    "long in lastEventId",
    "long in the header of a POST",
    "long in last_event_id of a POST",
    "long in lastEventId of a POST",
]


async def ask(place: Place, run: Written, cursor: str, form: str, gateway: Gateway | None = None) -> Stream:
    """A stream from `cursor`, in one of the forms in which clients send it."""
    text = f"{run.request_id}/{cursor}" if form.startswith("long") else cursor
    headers, post = place.auth(), form.endswith("POST")
    path = "/api/v1/query/stream" if post else f"{run.path}/stream"
    if "header" in form:
        headers["Last-Event-ID"] = text
    else:
        path += f"?{form.split()[2]}={quote(text, safe='')}"
    body = json.dumps(run.body).encode() if post else None
    if post:
        headers["Content-Type"] = "application/json"
    stream = Stream()
    return await stream.open((gateway or place.patient).url, path, headers, method="POST" if post else "GET", body=body)


@pytest.mark.parametrize("form", FORMS)
async def test_each_cursor_into_a_finished_log_gets_its_answer(place: Place, scribe: Scribe, form: str) -> None:
    run = await two_attempts(scribe, f"finished {form}", finished=True)
    log = await run.log()
    for cursor, answer in [*CURSORS, ("F-5", HAS_IT_ALL)]:
        stream = await ask(place, run, resolve(cursor, run), form)
        assert await stream.ended() == "finished", cursor
        if answer == HAS_IT_ALL and not form.endswith("POST"):
            assert stream.status == 204, cursor
            continue
        assert stream.status == 200, cursor
        if answer == HAS_IT_ALL:
            assert stream.events == [], cursor
        else:
            check_answer(stream.events, log, LOST if answer == WAIT else answer)
        assert WAIT not in stream.comments, "nothing can be repaired in a log that is closed"


@pytest.mark.parametrize("form", FORMS)
async def test_each_cursor_into_a_running_log_gets_its_answer_and_then_what_comes(
    place: Place, scribe: Scribe, form: str
) -> None:
    run = await two_attempts(scribe, f"running {form}")
    begun = await run.log()
    streams = {cursor: await ask(place, run, resolve(cursor, run), form) for cursor, _ in CURSORS}
    for cursor, answer in CURSORS:
        stream = streams[cursor]
        if answer == WAIT:
            await stream.until(lambda s=stream: WAIT in s.comments)  # type: ignore[misc]
            assert stream.events == [], cursor
        else:
            count = len(begun) + 1 if answer == LOST else len(begun) - int(answer)
            await stream.until(lambda s=stream, n=count: len(s.events) >= n)  # type: ignore[misc]
            assert WAIT not in stream.comments, cursor
    await run.tokens(1)
    await run.end()
    log = await run.log()
    for cursor, answer in CURSORS:
        assert await streams[cursor].ended() == "finished", cursor
        if cursor == "F-6":  # which the log has reached, while the client waited
            assert ids(log)[-1] == resolve(cursor, run)
            assert streams[cursor].events == []
        else:
            check_answer(streams[cursor].events, log, LOST if answer == WAIT else answer)


async def test_a_cursor_beyond_the_end_of_a_running_log_is_lost_when_no_repair_has_come(
    place: Place, scribe: Scribe
) -> None:
    """Whether the client brought it, or the log was rolled back under an open stream."""
    beyond, rolled_back = await two_attempts(scribe, "beyond"), await scribe.running(ALICE, "rolled back", tokens=9)
    async with streaming(place, rolled_back, gateway=place.watchful) as open_stream:
        await open_stream.until(lambda: len(open_stream.events) == 11)
        await rolled_back.roll_back(EventId(rolled_back.epoch, 6))
        cursors = ["F-5", "F-900", "F+1-1", "9999999999999999-9999999999999999"]
        streams = [
            await ask(place, beyond, resolve(cursor, beyond), FORMS[0], gateway)
            for cursor in cursors
            for gateway in (place.patient, place.watchful)
        ]
        log = await beyond.log()
        for stream in streams:
            await stream.until(lambda s=stream: WAIT in s.comments)  # type: ignore[misc]
        await open_stream.until(lambda: WAIT in open_stream.comments)
        assert len(open_stream.events) == 11
        await open_stream.until(lambda: len(open_stream.events) == 11 + 1 + 7, REPAIR_SECONDS + 10)
        check_answer(open_stream.events[11:], await rolled_back.log(), LOST)
        for stream in streams:
            await stream.until(lambda s=stream: len(s.events) > len(log), REPAIR_SECONDS + 10)  # type: ignore[misc]
            check_answer(stream.events, log, LOST)
            assert stream.ending is None, "it goes on"
        await beyond.tokens(1)
        await beyond.end()
        for stream in streams:
            assert await stream.ended() == "finished"
            check_answer(stream.events, await beyond.log(), LOST)


async def test_a_cursor_that_waits_for_repair_goes_on_where_it_stood_when_the_repair_comes(
    place: Place, scribe: Scribe
) -> None:
    run = await scribe.running(ALICE, "repaired", tokens=8)
    log = await run.log()
    lost = await run.roll_back(EventId(run.epoch, 4))
    assert len(lost) == 5
    async with streaming(place, run, log[-1].id) as stream:
        await stream.until(lambda: WAIT in stream.comments)
        await run.write_again(lost)
        await run.tokens(2)
        await run.end()
        assert await stream.ended() == "finished"
        check_reader(entries_of(stream.events), (await run.log())[len(log) :])


@pytest.mark.parametrize(
    "cursor",
    [
        "abc",
        "1",
        "1-",
        "-1",
        "1-2-3",
        "1 - 2",
        "01-2",
        "1-02",
        "+1-2",
        "1.0-2",
        "1e3-2",
        "0x1-2",
        "\u0661-\u0662",
        "1_0-2",
        "12345678901234567-1",
        "1-12345678901234567",
        "18446744073709551616-1",
        "$",
        ">",
        "*",
        "(1-1",
        "1-1\u2028",
        "1-1\x00",
        "1-1\n",
        "-",
        "/",
        "/1-2",
        "1-2/",
        "1-2/1-2",
        "x/1-2",
        "{rid}",
        "{rid}/",
        "{rid}/x",
        "{rid}//1-2",
        "{RID}/1-2",
        "{rid}/{rid}/1-2",
        "resp_{rid}/1-2",
        " {rid}/1-2",
        "00000000000000000000000000000000/1-2",
        "x" * 2000,
    ],
    ids=ascii,
)
async def test_a_malformed_or_foreign_cursor_is_refused_on_a_runs_own_routes(
    place: Place, scribe: Scribe, cursor: str
) -> None:
    run = await two_attempts(scribe, f"malformed {cursor!a}")
    text = cursor.replace("{rid}", run.request_id).replace("{RID}", run.request_id.upper())
    auth = ("Authorization", place.auth()["Authorization"])
    replies = [
        raw.ask(place.patient.url, "GET", f"{run.path}/stream?{name}={quote(text, safe='')}", auth)
        for name in ("last_event_id", "lastEventId")
    ]
    if text.isprintable():
        header = ("Last-Event-ID", text.strip(" ").encode("utf-8").decode("latin-1"))
        if text == text.strip(" "):
            replies.append(raw.ask(place.patient.url, "GET", f"{run.path}/stream", auth, header))
    for reply in replies:
        assert (reply.status, reply.json["code"]) == (400, "bad_cursor")
        assert reply.header("content-type") == "application/problem+json"


async def test_a_cursor_of_another_run_in_the_long_form_is_refused_and_in_the_short_form_gets_no_gap(
    place: Place, scribe: Scribe
) -> None:
    """The short form has no name in it: if the epoch is not this log's, the client starts again."""
    one, two = await two_attempts(scribe, "one", finished=True), await two_attempts(scribe, "two", finished=True)
    theirs = (await two.log())[-3].id
    async with streaming(place, one, f"{two.request_id}/{theirs}") as stream:
        assert stream.status == 400
    mine = {entry.id.epoch for entry in await one.log()}
    async with streaming(place, one, EventId(max(mine) + 1, 3)) as stream:
        await stream.ended()
        check_answer(stream.events, await one.log(), LOST)


async def test_the_header_wins_over_the_query_and_an_empty_cursor_is_none(place: Place, scribe: Scribe) -> None:
    run = await two_attempts(scribe, "which wins", finished=True)
    log = await run.log()
    first, later = log[2].id, log[5].id
    cases: list[tuple[str | None, str, int]] = [
        (str(first), f"?last_event_id={later}", 3),
        (str(first), "?lastEventId=nonsense", 3),
        (None, f"?last_event_id={first}&lastEventId={later}", 3),
        (None, f"?lastEventId={later}", 6),
        (None, f"?last_event_id=&lastEventId={later}", 6),
        (None, "?last_event_id=", 0),
        ("", "", 0),
        ("", f"?last_event_id={later}", 0),  # EventSource after an empty id: it asks for everything
    ]
    for header, query, have in cases:
        stream = Stream()
        cursor = {"Last-Event-ID": header} if header is not None else {}
        await stream.open(place.patient.url, f"{run.path}/stream{query}", place.auth() | cursor)
        assert await stream.ended() == "finished"
        check_answer(stream.events, log, have)


# Under an open stream


def check_folded(stream: Stream, log: Sequence[Entry]) -> None:
    """The client that folds what it read has what the log has: no gap, nothing twice, nothing void."""
    check_log(log)
    assert fold(entries_of(stream.events)) == fold(log)


async def test_a_failover_inside_an_attempt_is_taken_back_by_the_next_one(place: Place, scribe: Scribe) -> None:
    run = await scribe.running(ALICE, "failover within", tokens=9)
    async with streaming(place, run) as one, streaming(place, run, gateway=place.watchful) as two:
        for stream in (one, two):
            await stream.until(lambda s=stream: len(s.events) == 11)  # type: ignore[misc]
        await run.roll_back(EventId(run.epoch, 6))
        await run.attempt(EventId(run.epoch, 4))
        await run.tokens(3)
        await run.end()
        for stream in (one, two):
            assert await stream.ended() == "finished"
            check_folded(stream, await run.log())
            assert [event.type for event in stream.events].count("attempt") == 2


async def test_a_failover_that_took_the_whole_attempt_is_told_as_a_lost_cursor(place: Place, scribe: Scribe) -> None:
    run = await scribe.running(ALICE, "failover of all", tokens=9)
    async with streaming(place, run) as one, streaming(place, run, gateway=place.watchful) as two:
        for stream in (one, two):
            await stream.until(lambda s=stream: len(s.events) == 11)  # type: ignore[misc]
        await run.roll_back(EventId(0, 1))
        await run.attempt()
        await run.tokens(3)
        await run.end()
        log = await run.log()
        for stream in (one, two):
            assert await stream.ended() == "finished"
            check_answer(stream.events[11:], log, LOST)
            check_folded(stream, log)


async def test_a_failover_that_took_an_attempt_of_two_is_told_as_a_lost_cursor(place: Place, scribe: Scribe) -> None:
    run = await two_attempts(scribe, "failover of the second")
    first = EventId(run.epoch - 1000, 4)
    async with streaming(place, run) as one, streaming(place, run, gateway=place.watchful) as two:
        for stream in (one, two):
            await stream.until(lambda s=stream: len(s.events) == 9)  # type: ignore[misc]
        await run.roll_back(first)
        await run.attempt(EventId(first.epoch, 2))
        await run.tokens(3)
        await run.end()
        for stream in (one, two):
            assert await stream.ended() == "finished"
            check_answer(stream.events[9:], await run.log(), LOST)
            check_folded(stream, await run.log())


async def test_a_failover_that_is_repaired_shows_no_event_twice_and_leaves_none_out(
    place: Place, scribe: Scribe
) -> None:
    run = await scribe.running(ALICE, "failover, repaired", tokens=9)
    async with streaming(place, run) as one, streaming(place, run, gateway=place.watchful) as two:
        for stream in (one, two):
            await stream.until(lambda s=stream: len(s.events) == 11)  # type: ignore[misc]
        lost = await run.roll_back(EventId(run.epoch, 3))
        await two.until(lambda: WAIT in two.comments)
        await run.write_again(lost[:2])
        await run.write_again(lost[2:])
        await run.tokens(3)
        await run.end()
        for stream in (one, two):
            assert await stream.ended() == "finished"
            check_reader(entries_of(stream.events), await run.log())


@pytest.mark.parametrize(("cursor", "first"), [("0-1", None), ("7-4", "0-0")])
async def test_a_client_that_repeats_its_submit_of_a_run_that_was_lost_sees_no_event_twice_untold(
    place: Place, scribe: Scribe, cursor: str, first: str | None
) -> None:
    """The failover took the record and left the key: the repeat makes the run anew, under its id (PROTOCOL 3.1)."""
    path, body = "/api/v1/query/stream", json.dumps({"query": f"lost, and repeated after {cursor}"}).encode()
    headers = place.auth() | {"Content-Type": "application/json"}
    before, after = Stream(), Stream()
    await before.open(place.patient.url, path, headers, method="POST", body=body)
    await before.until(lambda: len(before.events) == 1)
    await before.close()
    request_id = before.headers["x-request-id"]
    await scribe.redis.delete(keys.run(request_id), keys.log(request_id))
    headers["Last-Event-ID"] = f"{request_id}/{cursor}"
    await after.open(place.patient.url, path, headers, method="POST", body=body)
    assert after.headers["x-request-id"] == request_id
    lease = await scribe.scripts.claim(request_id, 1, "t", 60_000)
    assert isinstance(lease, Lease)
    await after.until(lambda: len(after.events) >= (1 if first is None else 3))
    seen = [event.id for event in after.events]
    assert seen == [f"{request_id}/{lost}" for lost in ([] if first is None else [first, "0-1"])] + [
        f"{request_id}/{lease.epoch}-1"
    ]
    await after.close()


async def read_by_two(place: Place, run: Written, streams: contextlib.AsyncExitStack) -> Stream:
    """Pages of the log are kept where several clients read them. Returns the one that stays."""
    count = len(await run.log())
    first, second = [await streams.enter_async_context(streaming(place, run)) for _ in range(2)]
    for stream in (first, second):
        await stream.until(lambda s=stream: len(s.events) == count)  # type: ignore[misc]
    async with streaming(place, run) as third:
        await third.until(lambda: len(third.events) == count)
    return first


async def test_a_reader_that_comes_after_others_gets_no_entry_from_memory_that_a_failover_took(
    place: Place, scribe: Scribe
) -> None:
    """Pages must not outlive the log that they were read from."""
    run = await two_attempts(scribe, "memory, after")
    async with contextlib.AsyncExitStack() as streams:
        await read_by_two(place, run, streams)
    await run.roll_back(EventId(run.epoch, 2))
    await run.attempt(EventId(run.epoch, 2))
    await run.tokens(2)
    await run.end()
    async with streaming(place, run) as stream:
        assert await stream.ended() == "finished"
        check_reader(entries_of(stream.events), await run.log())


async def test_a_reader_that_comes_beside_others_gets_no_entry_from_memory_that_a_failover_took(
    place: Place, scribe: Scribe
) -> None:
    run = await scribe.running(ALICE, "memory, beside", tokens=9)
    async with contextlib.AsyncExitStack() as streams:
        one = await read_by_two(place, run, streams)
        await run.roll_back(EventId(run.epoch, 6))
        await run.attempt(EventId(run.epoch, 6))
        await run.tokens(3)
        await one.until(lambda: len(one.events) == 11 + 4)
        async with streaming(place, run) as two:
            await run.end()
            await two.ended()
            check_reader(entries_of(two.events), await run.log())
        await one.ended()
        check_folded(one, await run.log())


async def test_a_message_of_pubsub_that_was_lost_is_found_by_the_heartbeat(place: Place, scribe: Scribe) -> None:
    run = await scribe.running(ALICE, "unheard", tokens=2)
    async with streaming(place, run, gateway=place.watchful) as stream:
        await stream.until(lambda: len(stream.events) == 4)
        await run.tokens(3, silent=True)
        await stream.until(lambda: len(stream.events) == 7)
        check_reader(entries_of(stream.events), await run.log())


async def test_a_message_of_pubsub_that_was_lost_is_found_by_the_next_one(place: Place, scribe: Scribe) -> None:
    run = await scribe.running(ALICE, "unheard, then heard", tokens=2)
    async with streaming(place, run) as stream:
        await stream.until(lambda: len(stream.events) == 4)
        await run.tokens(3, silent=True)
        await run.tokens(1)
        await run.end()
        assert await stream.ended() == "finished"
        check_reader(entries_of(stream.events), await run.log())


# Deleted under an open stream


def check_gone(stream: Stream, had: Sequence[Entry]) -> None:
    """What there was, then `gone` without an id of its own: the client's cursor stays."""
    *events, gone = stream.events
    assert (gone.type, gone.json["code"]) == ("error", "gone")
    check_reader(entries_of(events), had)
    assert gone.id == (events[-1].id if events else "")
    assert not any(line.startswith(b"id:") for line in bytes(stream.body).rsplit(b"\n\n", 2)[1].split(b"\n"))


@pytest.mark.parametrize("state", ["queued", "running"])
async def test_an_erasure_over_http_ends_the_streams_of_every_gateway(place: Place, scribe: Scribe, state: str) -> None:
    run = await (scribe.create(ALICE, "erased") if state == "queued" else scribe.running(ALICE, "erased", tokens=3))
    log = await run.log()
    async with streaming(place, run) as one, streaming(place, run, gateway=place.watchful) as two:
        for stream in (one, two):
            await stream.until(lambda s=stream: len(s.events) == len(log))  # type: ignore[misc]
        with Client(place.watchful.url, ALICE) as client:
            assert client.delete(run.path).status_code == 204
        for stream in (one, two):
            assert await stream.ended() == "finished"
            check_gone(stream, log)
        async with streaming(place, run, log[-1].id) as again:
            assert again.status == 404


@pytest.mark.parametrize("state", ["running", "finished"])
@pytest.mark.parametrize("what", ["the log", "its beginning", "its middle", "an attempt of it", "its end"])
async def test_a_log_that_was_deleted_behind_our_back_is_gone_for_whoever_misses_something(
    place: Place, scribe: Scribe, what: str, state: str
) -> None:
    run = await two_attempts(scribe, f"{what} deleted, {state}", finished=state == "finished")
    log, stream_key = await run.log(), keys.log(run.request_id)
    if what == "the log":
        await scribe.redis.delete(stream_key)
    elif what == "its beginning":
        await scribe.redis.xtrim(stream_key, minid=str(log[3].id), approximate=False)
    else:
        at = {"its middle": [3], "an attempt of it": [5], "its end": [len(log) - 2, len(log) - 1]}[what]
        await scribe.redis.xdel(stream_key, *(str(log[n].id) for n in at))
    async with streaming(place, run) as stream:
        assert await stream.ended() == "finished"
        had = len(stream.events) - 1
        assert had <= (len(log) - 2 if what == "its end" else 0)
        check_gone(stream, log[:had])


async def test_a_reader_that_has_everything_misses_nothing_when_the_log_is_trimmed_behind_it(
    place: Place, scribe: Scribe
) -> None:
    run = await scribe.running(ALICE, "trimmed behind", tokens=5)
    async with streaming(place, run) as stream:
        await stream.until(lambda: len(stream.events) == 7)
        log = await run.log()
        await scribe.redis.delete(keys.log(run.request_id))
        await run.tokens(2)
        await run.end()
        assert await stream.ended() == "finished"
        check_reader(entries_of(stream.events), [*log, *await run.log()])


async def test_a_slow_reader_is_told_when_what_it_has_not_read_was_deleted(place: Place, scribe: Scribe) -> None:
    """One that is behind the ring reads from the log, and finds that a part of it is not there."""
    run = await scribe.running(ALICE, "slow")
    filler = json.dumps({"text": "x" * 10_000})
    for _ in range(24):
        await run.append([("token", filler)] * 50)
    log = await run.log()
    headers = place.auth()
    parts = httpx.URL(place.patient.url)
    # A small window of the reader's own: the gateway cannot send ahead what the reader does not read.
    reader, writer = await asyncio.open_connection(parts.host, parts.port, limit=2**16)
    try:
        head = f"GET {run.path}/stream HTTP/1.1\r\nHost: x\r\nAuthorization: {headers['Authorization']}\r\n\r\n"
        writer.write(head.encode())
        await reader.readuntil(b"\r\n\r\n")
        await scribe.redis.xdel(keys.log(run.request_id), str(log[-2].id))
        parser, seen = sse.EventStream(), list[sse.Event]()
        async with asyncio.timeout(30):
            while size := int(await reader.readuntil(b"\r\n"), 16):
                seen += parser.feed((await reader.readexactly(size + 2))[:-2])
        *events, gone = seen
        assert (gone.type, gone.json["code"]) == ("error", "gone")
        assert ids(entries_of(events)) == ids(log[: len(events)])
        assert len(events) <= len(log) - 2
    finally:
        writer.transport.abort()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


async def test_flushall_ends_every_stream_and_leaves_nothing_behind(launch: Launcher) -> None:
    server = launch.redis()
    gateways = [launch.gateway(server.url, lease_seconds=1, heartbeat_seconds=0.4) for _ in range(2)]
    worker = launch.worker(server.url, lease_seconds=1)
    place = Place(server, *gateways)
    async with Scribe(server.url) as scribe:
        run = await two_attempts(scribe, "flushed")
        with Client(gateways[0].url, ALICE) as client:
            real = client.submit("flushed too", agent="tokens", parameters={"count": 10_000, "pause": 0.02})
            client.run(real)
            had: Any = await run.log()
            auth = place.auth()
            streams = [await Stream().open(g.url, f"{run.path}/stream", auth) for g in gateways]
            streams += [await Stream().open(g.url, f"/api/v1/runs/{real}/stream", auth) for g in gateways]
            for stream in streams:
                await stream.until(lambda s=stream: len(s.events) >= 9)  # type: ignore[misc]
            await scribe.redis.flushall()
            for stream in streams:
                assert await stream.ended() == "finished"
                *events, gone = stream.events
                assert (gone.type, gone.json["code"]) == ("error", "gone")
                seen = entries_of(events)
                check_log(seen, finished=False)
                if stream in streams[:2]:
                    check_reader(seen, had)
            for request_id in (run.request_id, real):
                assert client.get(f"/api/v1/runs/{request_id}").status_code == 404
                for after in ({}, {"Last-Event-ID": "5-5"}):
                    assert client.get(f"/api/v1/runs/{request_id}/stream", headers=after).status_code == 404
            assert client.submit_and_read("after the flood")[-1].type == "final"
            await asyncio.sleep(0.5)
            assert not await scribe.redis.exists(keys.log(real), keys.run(real)), "the worker wrote on"
            assert len(worker.logged("run ended", request_id=real)) == 1
