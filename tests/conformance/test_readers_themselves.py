"""The readers and the EventSource model against planted bytes: a judge that has never said no is not trusted."""

from __future__ import annotations

import pytest

from tests.kit.readers import READERS, Cut, Reader, Target
from tests.kit.resets import Resets
from tests.kit.sse import Event, EventSource
from tests.kit.stub import Ending, Stub, chunked

ONE = b'id: 1-1\nevent: token\ndata: {"text":"a"}\n\n'
TWO = b'id: 1-2\nevent: token\ndata: {"text":"b"}\n\n'
EVENTS = [Event("1-1", "token", '{"text":"a"}'), Event("1-2", "token", '{"text":"b"}')]
FIN: Ending = "fin"
GONE = b"HTTP/1.1 204 No Content\r\nContent-Length: 0\r\n\r\n"
BY_NAME = {reader.name: reader for reader in READERS}
every_reader = pytest.mark.parametrize("reader", READERS, ids=list(BY_NAME))


def _read(reader: Reader, *script: bytes | float) -> list[Event]:
    with Stub(script) as stub:
        return list(reader.read(Target(url=stub.url), ""))


@every_reader
def test_a_plain_stream_is_two_events(reader: Reader) -> None:
    assert _read(reader, chunked(b"retry: 1000\n", ONE, b": heartbeat 1-1 lease=1.0s\n", TWO)) == EVENTS


@every_reader
def test_a_last_event_id_is_sent_as_it_is(reader: Reader) -> None:
    with Stub([chunked(TWO)]) as stub:
        assert list(reader.read(Target(url=stub.url), f"{'ab' * 16}/1-1")) == EVENTS[1:]
    assert stub.sent("Last-Event-ID") == [f"{'ab' * 16}/1-1"]


@every_reader
@pytest.mark.parametrize("how", ["reset", "fin"])
def test_a_broken_body_is_a_cut_and_a_torn_frame_is_none(reader: Reader, how: Ending) -> None:
    seen = []
    torn = TWO[:-9]
    with (
        Stub([chunked(ONE, end=False), b"%x\r\n%b" % (len(TWO), torn), how]) as stub,
        pytest.raises(Cut),
    ):
        for event in reader.read(Target(url=stub.url), ""):
            seen.append(event)
    assert seen == EVENTS[:1]


@every_reader
def test_a_connection_that_ends_before_its_answer_is_a_cut(reader: Reader) -> None:
    with Stub([FIN]) as stub, pytest.raises(Cut):
        list(reader.read(Target(url=stub.url), ""))


@every_reader
def test_another_status_is_a_failure_and_not_the_end(reader: Reader) -> None:
    refused = b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 2\r\nConnection: close\r\n\r\nno"
    with Stub([refused]) as stub, pytest.raises(Exception, match=r"503|no"):
        list(reader.read(Target(url=stub.url), ""))


@pytest.mark.parametrize("name", ["httpx-sse", "openai"])
@pytest.mark.parametrize("block", [b": heartbeat 1-1 lease=1.0s\n\n", b"retry: 1000\n\n", b"id: 1-1\n\n"])
def test_a_block_without_data_would_be_seen(name: str, block: bytes) -> None:
    """Why heartbeats and `retry:` are one line: these two would tell of an extra event."""
    assert len(_read(BY_NAME[name], chunked(ONE, block, TWO))) == 3


@pytest.mark.parametrize("name", ["httpx", "requests"])
@pytest.mark.parametrize("character", ["\u2028", "\u0085", "\u2029"])
def test_a_line_separator_that_is_not_escaped_would_be_seen(name: str, character: str) -> None:
    """Why frames are ASCII."""
    frame = f'id: 1-1\nevent: token\ndata: {{"text":"a{character}b"}}\n\n'.encode()
    assert _read(BY_NAME[name], chunked(frame)) != [Event("1-1", "token", f'{{"text":"a{character}b"}}')]


def test_crlf_would_be_seen() -> None:
    """Why lines end with LF only: a split on two LFs finds no frame."""
    assert _read(BY_NAME["fetch"], chunked(ONE.replace(b"\n", b"\r\n"))) == []


def test_a_lost_line_would_be_seen() -> None:
    assert _read(BY_NAME["curl"], chunked(ONE, TWO.replace(b"id: 1-2\n", b""))) != EVENTS


# -- the EventSource model -------------------------------------------------------------------------------------


def test_an_event_source_reconnects_after_its_last_whole_event_and_ends_at_a_204() -> None:
    with Stub([chunked(b"retry: 20\n", ONE, TWO[:-1], end=False)], [chunked(TWO)], [GONE]) as stub:
        source = EventSource(stub.url)
        assert list(source) == EVENTS
    assert stub.sent("Last-Event-ID") == [None, "1-1", "1-2"]
    assert [connection.status for connection in source.connections] == [200, 200, 204]
    assert source.ready_state == "closed"


def test_an_event_source_never_counts_a_torn_frame() -> None:
    for size in range(1, len(TWO)):
        with Stub([chunked(b"retry: 1\n", ONE, TWO[:size], end=False)], [GONE]) as stub:
            assert list(EventSource(stub.url)) == EVENTS[:1]
        assert stub.sent("Last-Event-ID") == [None, "1-1"]


def test_an_event_source_honours_the_last_retry_that_it_was_told() -> None:
    with Stub(
        [chunked(b"retry: 300\n", ONE, b"retry: 120\n")], [chunked(b"retry: 260", end=False)], [FIN], [GONE]
    ) as stub:
        source = EventSource(stub.url)
        list(source)
    gaps = [later - earlier for earlier, later in zip(stub.times, stub.times[1:], strict=False)]
    assert [connection.waited for connection in source.connections] == [0.0, 0.12, 0.12, 0.12]
    assert all(gap >= 0.12 for gap in gaps), "it came back too early"


def test_an_event_source_waits_three_seconds_when_it_was_told_nothing() -> None:
    with Stub([chunked(ONE)], [GONE]) as stub:
        source = EventSource(stub.url, haste=100)
        list(source)
    assert source.connections[1].waited == 3.0


@pytest.mark.parametrize("status", ["404 Not Found", "500 Internal Server Error", "503 Service Unavailable"])
def test_an_event_source_closes_for_good_on_any_other_status(status: str) -> None:
    with Stub([chunked(b"retry: 1\n", ONE)], [chunked(TWO, status=status)], [chunked(TWO)]) as stub:
        source = EventSource(stub.url)
        assert list(source) == EVENTS[:1]
        assert len(stub.requests) == 2
    assert source.ready_state == "closed"


def test_an_event_source_closes_for_good_on_another_type() -> None:
    with Stub([chunked(ONE, content_type="application/json")], [chunked(TWO)]) as stub:
        assert list(EventSource(stub.url)) == []
        assert len(stub.requests) == 1


def test_an_event_source_keeps_its_id_over_a_frame_without_one() -> None:
    """As Chromium does; it is what makes a frame without an id (`gone`) harmless."""
    with Stub([chunked(b"retry: 1\n", ONE)], [chunked(b"event: error\ndata: {}\n\n")], [GONE]) as stub:
        assert list(EventSource(stub.url)) == [EVENTS[0], Event("1-1", "error", "{}")]
    assert stub.sent("Last-Event-ID") == [None, "1-1", "1-1"]


# -- the proxy that breaks connections -------------------------------------------------------------------------


@every_reader
def test_the_proxy_breaks_the_answer_after_the_bytes_that_it_was_told(reader: Reader) -> None:
    answer = chunked(ONE, TWO)
    end = answer.index(TWO) + len(TWO) - answer.index(b"\r\n\r\n") - 4
    for size, expected in ((0, 0), (1, 0), (end - 3, 1), (end + len(b"\r\n"), 2)):
        with Stub([answer]) as stub, Resets([stub.url], lambda size=size: size) as proxy:  # type: ignore[misc]
            seen = []
            with pytest.raises(Cut):
                for event in reader.read(Target(url=proxy.url), ""):
                    seen.append(event)
            assert proxy.broken == 1
            assert seen == EVENTS[:expected]
