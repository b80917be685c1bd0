"""The clients on real connections, to a server that says exactly what a test wants; each test is one of both."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator
from typing import Any

import pytest

from broker.client import ApiError, DamagedStream, Disconnected, RunCancelled, RunFailed, Unreachable
from broker.errors import RunNotFound, Unauthorized
from broker.events import Entry, Token, dumps
from broker.gateway.dialects.native.fold import Native
from broker.ids import EventId
from tests.kit import folds
from tests.kit.clients import CLIENTS, IDS, AnyClient, AnyStream
from tests.kit.redis_server import free_port
from tests.kit.stub import Step, Stub, chunked

RID = "ab" * 16


def entry(event_id: str, event_type: str, **data: object) -> Entry:
    return Entry(EventId.parse(event_id), event_type, dumps(data))


LOG = [
    entry("0-1", "start", request_id=RID, session_id="s"),
    entry("3-1", "attempt", attempt=1, reason="started", resume_from="0-1"),
    entry("3-2", "token", text="one "),
    entry("3-3", "token", text="two"),
    entry("3-4", "final", answer=None, citations=[], usage={}),
]


NATIVE = Native(RID, long_ids=False)


def frames(entries: Iterable[Entry]) -> bytes:
    return b"retry: 1\n" + folds.body_of(NATIVE, entries)


def stream(entries: Iterable[Entry], *, end: bool = True) -> bytes:
    return chunked(frames(entries), end=end)


def problem(status: str, code: str, *headers: str) -> bytes:
    body = dumps({"code": code, "detail": f"It is {code}."}).encode()
    lines = [f"HTTP/1.1 {status}", "Content-Type: application/problem+json", f"Content-Length: {len(body)}", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


NO_CONTENT = b"HTTP/1.1 204 No Content\r\n\r\n"


@pytest.fixture(params=CLIENTS, ids=IDS)
def kind(request: pytest.FixtureRequest) -> type[AnyClient]:
    made: type[AnyClient] = request.param
    return made


def client(kind: type[AnyClient], server: Stub, **options: Any) -> AnyClient:
    return kind(server.url, "a.b.c", **{"longest_pause": 0.01, **options})


def ids(stream: AnyStream) -> list[str]:
    return [str(received.id) for received in stream]


ALL = [str(item.id) for item in LOG]


def read(kind: type[AnyClient], *scripts: Iterable[Step], **options: Any) -> tuple[list[str], Stub, AnyStream]:
    with Stub(*(tuple(script) for script in scripts)) as server, client(kind, server) as made:
        following = made.stream(RID, **options)
        return ids(following), server, following


# -- connections -----------------------------------------------------------------------------------------------


def test_a_stream_is_read_to_its_end(kind: type[AnyClient]) -> None:
    seen, server, following = read(kind, [stream(LOG)])
    assert seen == ALL
    assert following.text == following.answer == "one two"
    assert [item.type for item in following.events] == ["start", "token", "token", "final"]
    assert (following.reconnects, str(following.last_event_id), following.done) == (0, "3-4", True)
    assert server.requests[0].startswith(f"GET /api/v1/runs/{RID}/stream HTTP/1.1\r\n")
    assert server.sent("Authorization") == ["Bearer a.b.c"]
    assert server.sent("Last-Event-ID") == [None]


@pytest.mark.parametrize("ending", ["fin", "reset"])
@pytest.mark.parametrize("proper", [True, False], ids=["whole body", "cut body"])
def test_a_connection_that_ends_early_is_made_anew_after_the_last_event(
    kind: type[AnyClient], ending: Any, proper: bool
) -> None:
    """However it ends: a body without a terminal event is not the end of the run."""
    seen, server, following = read(kind, [stream(LOG[:3], end=proper), 0.05, ending], [stream(LOG[3:])])
    assert seen == ALL
    assert server.sent("Last-Event-ID") == [None, "3-2"]
    assert following.reconnects == 1


def test_who_has_it_all_gets_nothing_more(kind: type[AnyClient]) -> None:
    seen, server, following = read(kind, [NO_CONTENT], after="3-4")
    assert seen == []
    assert server.sent("Last-Event-ID") == ["3-4"]
    assert (following.done, following.end) == (True, None)


def test_a_service_that_is_away_is_asked_again(kind: type[AnyClient]) -> None:
    away = problem("503 Service Unavailable", "draining", "Retry-After: 0")
    seen, server, _ = read(
        kind, [stream(LOG[:2], end=False)], [away], [b"HTTP/1.1 502 Bad\r\n\r\n"], [], [stream(LOG[2:])]
    )
    assert seen == ALL
    assert server.sent("Last-Event-ID") == [None, "3-1", "3-1", "3-1", "3-1"]


def test_a_silent_connection_is_given_up(kind: type[AnyClient]) -> None:
    """A live one has heartbeats; one behind a NAT that forgot it has nothing, for ever."""
    said: list[Disconnected] = []
    silent: list[Step] = [stream(LOG[:2], end=False), 1.2]
    seen, server, _ = read(kind, silent, [stream(LOG[2:])], silence=0.9, on_disconnect=said.append)
    assert seen == ALL
    assert [lost.cause for lost in said] == ["nothing came for too long"]
    assert server.sent("Last-Event-ID") == [None, "3-1"]


def test_heartbeats_keep_a_connection(kind: type[AnyClient]) -> None:
    beat = b"c\r\n: heartbeat\n\r\n"
    rest = frames(LOG[2:])
    script: list[Step] = [stream(LOG[:2], end=False)]
    for _ in range(6):
        script += [0.25, beat]
    script.append(b"%x\r\n%b\r\n0\r\n\r\n" % (len(rest), rest))
    seen, _, following = read(kind, script, silence=1.0)
    assert seen == ALL
    assert following.reconnects == 0


def test_a_token_that_is_no_longer_accepted_ends_the_stream(kind: type[AnyClient]) -> None:
    """Each connection is authorised again, also those that a stream makes by itself (P21)."""
    refused = problem("401 Unauthorized", "unauthorized")
    with Stub([stream(LOG[:3], end=False)], [refused]) as server, client(kind, server) as made:
        following = made.stream(RID)
        assert [str(next(following).id) for _ in range(3)] == ALL[:3]
        with pytest.raises(Unauthorized, match="It is unauthorized"):
            next(following)
        assert str(following.last_event_id) == "3-2"


def test_a_token_may_be_a_function_that_renews_it(kind: type[AnyClient]) -> None:
    tokens = iter(["one", "two"])
    with Stub([stream(LOG[:3], end=False)], [stream(LOG[3:])]) as server:
        with kind(server.url, lambda: next(tokens), longest_pause=0.01) as made:
            assert ids(made.stream(RID)) == ALL
        assert server.sent("Authorization") == ["Bearer one", "Bearer two"]


def test_after_an_error_the_same_stream_goes_on(kind: type[AnyClient]) -> None:
    refused = problem("401 Unauthorized", "unauthorized")
    with Stub([stream(LOG[:3], end=False)], [refused], [stream(LOG[3:])]) as server, client(kind, server) as made:
        following = made.stream(RID)
        with pytest.raises(Unauthorized):
            ids(following)
        assert ids(following) == ALL[3:]
        assert following.text == "one two"


def test_a_hole_is_healed_by_connecting_again(kind: type[AnyClient]) -> None:
    seen, server, _ = read(kind, [stream([*LOG[:2], *LOG[3:]])], [stream(LOG[2:])])
    assert seen == ALL
    assert server.sent("Last-Event-ID") == [None, "3-1"]


def test_a_hole_that_stays_is_told(kind: type[AnyClient]) -> None:
    holed = [stream([*LOG[:2], *LOG[3:]])]
    with pytest.raises(DamagedStream, match="after 3-1 comes 3-3"):
        read(kind, *[holed] * 6)


def test_a_stream_without_end_is_not_kept_in_memory(kind: type[AnyClient], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("broker.client.frames.MAX_FRAME_BYTES", 10_000)
    endless: list[Step] = [chunked(b"data: " + b"x" * 50_000, end=False), 0.1]
    with pytest.raises(DamagedStream, match="more than 10000 bytes"):
        read(kind, *[endless] * 6)


def test_what_is_no_event_stream_is_told(kind: type[AnyClient]) -> None:
    page = chunked(b"<html>", content_type="text/html")
    with pytest.raises(ApiError, match="text/html, not an event stream"):
        read(kind, [page])


def test_a_redirect_does_not_get_the_token(kind: type[AnyClient]) -> None:
    with Stub([NO_CONTENT]) as elsewhere, pytest.raises(ApiError) as refused:
        read(kind, [b"HTTP/1.1 302 Found\r\nContent-Length: 0\r\nLocation: %b\r\n\r\n" % elsewhere.url.encode()])
    assert refused.value.code == "http_302"
    assert f"leads to {elsewhere.url}" in str(refused.value)
    assert elsewhere.requests == []


def test_a_run_that_is_gone_is_not_found(kind: type[AnyClient]) -> None:
    with pytest.raises(RunNotFound):
        read(kind, [chunked(frames(LOG[:3]) + NATIVE.gone(NATIVE.start))])


def test_where_nothing_listens_it_is_told_soon(kind: type[AnyClient]) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    with kind(url, longest_pause=0.01, patience=0.3) as made:
        for ask in (lambda: ids(made.stream(RID)), lambda: made.result(RID), lambda: made.submit("why?")):
            with pytest.raises(Unreachable, match=url) as unreachable:
                ask()
            assert "refused" in str(unreachable.value)


def test_patience_ends(kind: type[AnyClient]) -> None:
    with Stub([stream(LOG[:3], end=False)]) as server, client(kind, server, patience=0.5) as made:
        following = made.stream(RID, silence=0.3)
        assert [str(next(following).id) for _ in range(3)] == ALL[:3]
        with pytest.raises(Unreachable):
            next(following)


def test_the_hooks_say_when_the_connection_is_lost_and_when_it_is_back(kind: type[AnyClient]) -> None:
    said: list[object] = []
    read(
        kind,
        [stream(LOG[:3], end=False)],
        [stream(LOG[3:])],
        on_disconnect=said.append,
        on_reconnect=lambda: said.append("back"),
    )
    lost, back = said
    assert isinstance(lost, Disconnected) and lost.cause and 0 <= lost.pause <= 0.01
    assert back == "back"


# -- what is left behind ---------------------------------------------------------------------------------------


@pytest.fixture
def over() -> Iterator[threading.Event]:
    """Until then a server that waits for it keeps its connection open."""
    event = threading.Event()
    yield event
    event.set()


def is_closed(server: Stub) -> bool:
    """Whether nobody has a connection to the server any more."""
    port = int(server.url.rsplit(":", 1)[1].strip("/"))
    with open("/proc/net/tcp") as table:
        rows = [line.split() for line in table][1:]
    return not any(int(row[2].rsplit(":", 1)[1], 16) == port and row[3] == "01" for row in rows)


def until_closed(server: Stub) -> None:
    deadline = time.monotonic() + 10
    while not is_closed(server):
        assert time.monotonic() < deadline, "the connection is still open"
        time.sleep(0.01)


def test_closing_a_stream_closes_its_connection_at_once(kind: type[AnyClient], over: threading.Event) -> None:
    with Stub([stream(LOG[:3], end=False), over]) as server, client(kind, server) as made:
        with made.stream(RID) as following:
            assert len([next(following) for _ in range(3)]) == 3
            assert not is_closed(server)
        until_closed(server)
        over.set()
        assert list(following) == [], "it is closed, not broken"


def test_the_terminal_event_closes_the_connection_before_it_is_given_out(
    kind: type[AnyClient], over: threading.Event
) -> None:
    with Stub([stream(LOG, end=False), over]) as server, client(kind, server) as made:
        for received in made.stream(RID):
            if received.terminal:
                assert not over.is_set(), "it has waited until the server closed it"
                until_closed(server)
                break
        else:
            pytest.fail("no terminal event")
        over.set()


# -- the fold --------------------------------------------------------------------------------------------------


def test_a_rewind_takes_back_what_it_voids(kind: type[AnyClient]) -> None:
    log = [
        *LOG[:4],
        entry("9-1", "attempt", attempt=2, reason="worker_lost", resume_from="3-2"),
        entry("9-2", "token", text="2"),
        entry("9-3", "final", answer="the answer", citations=[], usage={}),
    ]
    seen, _, following = read(kind, [stream(log[:5], end=False)], [stream(log[5:])])
    assert seen == [str(item.id) for item in log]
    assert [item.event for item in following.events if item.type == "token"] == [Token(text="one "), Token(text="2")]
    assert (following.text, following.answer) == ("one 2", "the answer")


def test_a_stream_can_raise_what_its_run_has_ended_with(kind: type[AnyClient]) -> None:
    read(kind, [stream(LOG)])[2].raise_for_error()
    failed = [*LOG[:3], entry("3-3", "error", code="no_quota", message="Come back tomorrow.")]
    with pytest.raises(RunFailed, match=r"Come back tomorrow\.") as error:
        read(kind, [stream(failed)])[2].raise_for_error()
    assert error.value.code == "no_quota"
    cancelled = [
        *LOG[:3],
        entry("4-1", "attempt", attempt=1, reason="cancelled", resume_from="3-2"),
        entry("4-2", "cancelled", reason="client"),
    ]
    following = read(kind, [stream(cancelled)])[2]
    with pytest.raises(RunCancelled, match=RID):
        following.raise_for_error()
    assert following.answer == "one "
