"""A run inside a gateway, without I/O: which messages fit, what the ring keeps, and who is up to date."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from broker.events import Entry
from broker.gateway.channel import Channel, State, heartbeat_text
from broker.gateway.dialects.agent.fold import Agent
from broker.gateway.dialects.dialect import Dialect
from broker.gateway.dialects.native.fold import Native
from broker.gateway.reader import End, Reader, Slice, chunk
from broker.gateway.view import RING_BYTES, RING_BYTES_MAX, SLICE_BYTES, View
from broker.ids import START, EventId
from tests.kit import folds
from tests.kit.checker import entries_of
from tests.kit.scale import scaled
from tests.kit.sse import parse

RID = "0123456789abcdef0123456789abcdef"


class Connection:
    def __init__(self, *, chunked: bool = False) -> None:
        self.chunked = chunked
        self.paused = False
        self.writes: list[bytes] = []

    @property
    def write(self) -> Callable[[bytes], None]:
        return self.writes.append

    def attach(self, reader: Reader) -> None: ...

    async def drain(self) -> None: ...

    def abort(self) -> None: ...

    @property
    def body(self) -> bytes:
        return b"".join(self.writes)


def token(epoch: int, seq: int, text: str = "x") -> Entry:
    return Entry(EventId(epoch, seq), "token", f'{{"text":"{text}"}}')


BEGUN = EventId(5, 1)


def opened(end: EventId = BEGUN, status: str = "running") -> Channel:
    channel = Channel(RID)
    channel.update(State(status, end, 1000))
    return channel


def reader_of(
    channel: Channel, *, chunked: bool = False, long_ids: bool = False, dialect: Dialect | None = None
) -> Reader:
    """One that is up to date."""
    view = channel.view(dialect or Native(RID, long_ids=long_ids))
    reader = Reader(view, Connection(chunked=chunked), channel.end if view.dialect.seekable else None, None)
    view.readers.add(reader)
    view.join(reader)
    return reader


def frames(entries: Iterable[Entry]) -> bytes:
    return folds.body_of(Native(RID, long_ids=False), entries)


def body_of(reader: Reader) -> bytes:
    connection = reader.sink
    assert isinstance(connection, Connection)
    return connection.body


# -- which messages fit --------------------------------------------------------------------------------------


def test_a_message_that_follows_the_end_is_taken() -> None:
    channel = opened()
    assert channel.accept(EventId(5, 1), [token(5, 2), token(5, 3)])
    assert channel.end == EventId(5, 3)


def test_a_message_of_a_later_epoch_that_follows_the_end_is_taken() -> None:
    channel = opened()
    assert channel.accept(EventId(5, 1), [Entry(EventId(9, 1), "attempt", "{}")])
    assert channel.end == EventId(9, 1)


@pytest.mark.parametrize(
    ("prev", "last"),
    [
        (EventId(5, 4), EventId(5, 5)),  # one was missed
        (EventId(6, 1), EventId(6, 2)),  # a whole epoch was missed
        (EventId(5, 2), EventId(5, 4)),  # begins below the end: after a failover
        (EventId(0, 1), EventId(7, 1)),
    ],
)
def test_a_message_that_does_not_follow_the_end_is_refused_and_changes_nothing(prev: EventId, last: EventId) -> None:
    channel = opened(EventId(5, 3))
    reader = reader_of(channel)
    assert not channel.accept(prev, [Entry(last, "token", "{}")])
    channel.flush()
    assert (channel.end, channel.status) == (EventId(5, 3), "running")
    assert body_of(reader) == b""


def test_who_comes_after_a_fold_failed_gets_another_view_which_stays_when_the_others_have_left() -> None:
    channel = opened()
    reader = reader_of(channel, dialect=Agent("s"))
    assert channel.accept(EventId(5, 1), [Entry(EventId(5, 2), "token", "{}")])
    assert reader.ending is End.CUT
    later = channel.view(Agent("s"))
    assert later is not reader.view
    channel.drop(reader.view)
    assert channel.view(Agent("s")) is later


def test_a_message_that_is_known_already_is_taken_and_sent_to_nobody() -> None:
    channel = opened(EventId(5, 3))
    reader = reader_of(channel)
    assert channel.accept(EventId(5, 1), [token(5, 2), token(5, 3)])
    channel.flush()
    assert body_of(reader) == b""


@pytest.mark.parametrize(("kind", "status"), [("final", "completed"), ("error", "failed"), ("cancelled", "cancelled")])
def test_a_terminal_event_finishes_the_channel(kind: str, status: str) -> None:
    channel = opened()
    reader = reader_of(channel)
    assert channel.accept(EventId(5, 1), [token(5, 2), Entry(EventId(5, 3), kind, "{}")])
    channel.flush()
    assert (channel.finished, channel.status) == (True, status)
    assert reader.position == EventId(5, 3)
    assert [entry.type for entry in entries_of(parse(body_of(reader)))] == ["token", kind]


# -- what goes to the readers --------------------------------------------------------------------------------


def test_whoever_is_up_to_date_gets_each_batch_in_one_write() -> None:
    channel = opened()
    plain, framed = reader_of(channel), reader_of(channel, chunked=True)
    channel.accept(EventId(5, 1), [token(5, 2)])
    channel.accept(EventId(5, 2), [token(5, 3), token(5, 4)])
    assert body_of(plain) == b""
    channel.flush()
    channel.flush()
    assert isinstance(plain.sink, Connection)
    assert isinstance(framed.sink, Connection)
    assert plain.sink.writes == [plain.sink.body]
    assert entries_of(parse(plain.sink.body)) == [token(5, 2), token(5, 3), token(5, 4)]
    assert framed.sink.writes == [chunk(plain.sink.body)]


def test_an_entry_of_which_a_dialect_shows_nothing_is_no_end_of_the_body() -> None:
    """An empty chunk would be one."""
    channel = opened()
    reader = Reader(channel.view(Agent("s")), Connection(chunked=True), None, None)
    reader.view.join(reader)
    assert channel.accept(BEGUN, [Entry(EventId(5, 2), "message", '{"text":"x"}')])
    channel.flush()
    reader.view.leave(reader)
    reader.position = BEGUN
    part = reader.view.after(BEGUN)
    assert part is not None
    reader.write(part)
    assert isinstance(reader.sink, Connection)
    assert reader.sink.body == b""
    assert chunk(b"") == b""


def test_each_id_form_has_its_own_frames() -> None:
    channel = opened()
    short, long = reader_of(channel), reader_of(channel, long_ids=True)
    channel.accept(EventId(5, 1), [token(5, 2)])
    channel.flush()
    assert parse(body_of(short))[0].id == "5-2"
    assert parse(body_of(long))[0].id == f"{RID}/5-2"


def test_a_reader_that_leaves_goes_on_from_where_the_channel_is() -> None:
    channel = opened()
    reader = reader_of(channel)
    channel.accept(EventId(5, 1), [token(5, 2)])
    channel.flush()
    reader.view.leave(reader)
    channel.accept(EventId(5, 2), [token(5, 3)])
    channel.flush()
    assert reader.position == EventId(5, 2)
    assert entries_of(parse(body_of(reader))) == [token(5, 2)]
    reader.view.leave(reader)
    assert reader.position == EventId(5, 2), "leaving twice moves nobody"


@pytest.mark.parametrize("stop", [Reader.paused, Reader.closed, Reader.cut])
def test_a_reader_that_stops_gets_nothing_more(stop: Callable[[Reader], None]) -> None:
    channel = opened()
    reader, other = reader_of(channel), reader_of(channel)
    stop(reader)
    channel.accept(EventId(5, 1), [token(5, 2)])
    channel.flush()
    assert body_of(reader) == b""
    assert entries_of(parse(body_of(other))) == [token(5, 2)]


def test_a_reader_that_stops_within_a_write_is_the_only_one_that_does() -> None:
    channel = opened()
    readers = [reader_of(channel, chunked=n % 2 == 0) for n in range(6)]
    for reader in readers[::3]:
        connection = reader.sink
        assert isinstance(connection, Connection)

        class Stops(list[bytes]):
            def __init__(self, who: Reader) -> None:
                self.who = who

            def append(self, data: bytes) -> None:
                super().append(data)
                self.who.paused()

        reader.view.leave(reader)
        connection.writes = Stops(reader)
        reader.view.join(reader)
    for seq in (2, 3):
        channel.accept(EventId(5, seq - 1), [token(5, seq)])
        channel.flush()
    for n, reader in enumerate(readers):
        assert isinstance(reader.sink, Connection)
        assert len(reader.sink.writes) == (1 if n % 3 == 0 else 2)
        assert n % 3 or reader.position == EventId(5, 2)


@pytest.mark.parametrize("chunked", [False, True])
def test_a_reader_that_stops_before_a_write_has_what_was_written_and_finds_the_rest(chunked: bool) -> None:
    """What came is accepted for every run before it is written to any reader, and a connection may have several."""
    channel = opened()
    reader = reader_of(channel, chunked=chunked)
    channel.accept(EventId(5, 1), [token(5, 2)])
    channel.flush()
    sent = body_of(reader)
    for seq in (3, 5):
        channel.accept(EventId(5, seq - 1), [token(5, seq), token(5, seq + 1)])
    reader.paused()
    channel.flush()
    assert body_of(reader) == sent
    assert reader.position == EventId(5, 2)
    assert ring_of(reader.view, reader.position) == [token(5, seq) for seq in range(3, 7)]


def test_the_first_ending_stands() -> None:
    reader = reader_of(opened())
    reader.cut()
    reader.closed()
    assert reader.ending is End.CUT


def test_after_the_end_every_reader_goes_on_by_itself() -> None:
    channel = opened()
    reader = reader_of(channel)
    channel.accept(EventId(5, 1), [Entry(EventId(5, 2), "final", "{}")])
    channel.flush()
    assert reader.position == channel.end == EventId(5, 2)
    reader.view.leave(reader)
    assert reader.position == EventId(5, 2)


# -- the ring ------------------------------------------------------------------------------------------------


def ring_of(view: View, position: EventId) -> list[Entry] | None:
    """All slices from `position` on; None where the ring does not reach back so far."""
    entries: list[Entry] = []
    while (part := view.after(position)) is not None:
        assert part.chunk == chunk(part.data)
        got = entries_of(parse(part.data))
        assert got[-1].id == part.last
        entries += got
        position = part.last
    return entries if entries or position >= view.base else None


def test_the_ring_answers_from_its_base_on_and_nothing_below() -> None:
    """A reader at the ring's edge: exactly at the base it is served, one below it is not."""
    channel = opened()
    view = reader_of(channel).view
    entries = [token(5, seq) for seq in range(2, 12)]
    for entry in entries:
        channel.accept(EventId(5, entry.id.seq - 1), [entry])
    assert view.base == EventId(5, 1)
    for at in range(1, 12):
        assert ring_of(view, EventId(5, at)) == [entry for entry in entries if entry.id.seq > at]
    assert view.after(EventId(5, 11)) is None
    assert view.after(START) is None
    assert view.after(EventId(4, 99)) is None


def test_a_full_ring_drops_its_oldest_and_its_edge_moves_with_them() -> None:
    channel = opened()
    view = reader_of(channel).view
    entries = [token(5, seq, "z" * 1000) for seq in range(2, 200)]
    for entry in entries:
        channel.accept(EventId(5, entry.id.seq - 1), [entry])
        channel.flush()
    size = len(frames(ring_of(view, view.base) or []))
    assert RING_BYTES // 2 < size <= 2 * RING_BYTES + 2000
    edge = view.base.seq
    assert ring_of(view, EventId(5, edge)) == entries[edge - 1 :]
    assert view.after(EventId(5, edge - 1)) is None


def test_the_ring_is_bounded_however_many_readers_there_are() -> None:
    channel = opened()
    for _ in range(500):
        reader = reader_of(channel)
    channel.views[reader.view.key].release()
    for seq in range(2, 100):
        channel.accept(EventId(5, seq - 1), [token(5, seq, "z" * 60_000)])
        channel.flush()
    kept = ring_of(reader.view, reader.view.base)
    assert kept is not None
    assert sum(len(entry.data) for entry in kept) <= 2 * RING_BYTES_MAX + 61_000


def test_one_event_larger_than_the_ring_is_kept_whole() -> None:
    channel = opened()
    view = reader_of(channel).view
    for seq in range(2, 6):
        channel.accept(EventId(5, seq - 1), [token(5, seq, "z" * 100_000)])
        assert ring_of(view, EventId(5, seq - 1)) == [token(5, seq, "z" * 100_000)]


def test_a_slice_is_never_much_more_than_what_back_pressure_can_bear() -> None:
    channel = opened()
    for _ in range(40):
        view = reader_of(channel).view
    channel.accept(EventId(5, 1), [token(5, seq, "z" * 500) for seq in range(2, 600)])
    position, slices = EventId(5, 1), list[Slice]()
    while (part := view.after(position)) is not None:
        slices.append(part)
        position = part.last
    assert len(slices) > 2
    assert all(len(part.data) <= SLICE_BYTES + 1000 for part in slices)


def test_a_view_that_begins_later_knows_nothing_of_before() -> None:
    channel = opened(EventId(5, 40))
    view = reader_of(channel).view
    assert view.base == EventId(5, 40)
    assert view.after(EventId(5, 39)) is None
    assert view.after(EventId(5, 40)) is None


# -- a run that was read again -------------------------------------------------------------------------------


def test_after_a_hole_the_ring_begins_anew_and_everybody_reads_for_himself() -> None:
    channel = opened()
    reader = reader_of(channel)
    channel.accept(EventId(5, 1), [token(5, 2)])
    channel.flush()
    channel.update(State("running", EventId(5, 9), 1000))
    channel.accept(EventId(5, 9), [token(5, 10)])
    channel.flush()
    assert reader.position == EventId(5, 2)
    assert reader.view.after(EventId(5, 2)) is None
    assert ring_of(reader.view, EventId(5, 9)) == [token(5, 10)]
    assert not reader.verified


def test_after_a_rollback_the_old_entries_are_not_served_from_the_ring() -> None:
    channel = opened()
    reader = reader_of(channel)
    channel.accept(EventId(5, 1), [token(5, 2, "lost"), token(5, 3, "lost")])
    channel.flush()
    channel.update(State("running", EventId(5, 1), 1000))
    assert reader.position == EventId(5, 3)
    assert channel.end == EventId(5, 1)
    channel.accept(EventId(5, 1), [token(5, 2, "new")])
    assert ring_of(reader.view, EventId(5, 1)) == [token(5, 2, "new")]


def test_a_read_that_finds_nothing_new_keeps_the_ring() -> None:
    channel = opened()
    reader = reader_of(channel)
    channel.accept(EventId(5, 1), [token(5, 2)])
    channel.update(State("running", EventId(5, 2), 1000))
    channel.flush()
    assert ring_of(reader.view, EventId(5, 1)) == [token(5, 2)]
    assert entries_of(parse(body_of(reader))) == [token(5, 2)]


async def test_a_run_that_is_no_longer_there_finishes_the_channel() -> None:
    channel = opened()
    reader = reader_of(channel)
    watcher: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    channel.watchers.append(watcher)
    channel.update(None)
    assert channel.gone
    assert channel.finished
    assert watcher.done()
    channel.accept(EventId(5, 1), [token(5, 2)])
    channel.flush()
    assert body_of(reader) == b"", "nothing of an erased run is sent"


# -- any schedule --------------------------------------------------------------------------------------------


@settings(max_examples=scaled(400))
@given(st.data())
def test_in_any_schedule_every_reader_gets_each_entry_once(data: st.DataObject) -> None:
    """Batches, losses, re-reads and readers that come and go, in any order; readers catch up as the follower does."""
    stored = [token(5, seq, "z" * data.draw(st.sampled_from([1, 3000, 20_000]))) for seq in range(2, 40)]
    channel = opened()
    readers: list[tuple[EventId, Reader]] = []
    live: set[Reader] = set()
    at = 0

    def catch_up(reader: Reader) -> None:
        reader.view.leave(reader)
        while reader.position < channel.end:
            part = reader.view.after(reader.position)
            if part is None:
                entries = [e for e in stored if reader.position < e.id <= channel.end][:7]
                body = frames(entries)
                part = Slice(entries[-1].id, body, chunk(body), reader.folded)
            reader.write(part)
        reader.view.join(reader)
        live.add(reader)

    while at < len(stored):
        step = data.draw(st.sampled_from(["append", "append", "append", "lose", "join", "pause", "resume", "read"]))
        if step in ("append", "lose"):
            batch = stored[at : at + data.draw(st.integers(1, 5))]
            prev = EventId(5, batch[0].id.seq - 1)
            at += len(batch)
            if step == "append":
                if not channel.accept(prev, batch):
                    channel.update(State("running", batch[-1].id, 1))
                    live.clear()
                channel.flush()
        elif step == "join":
            view = channel.view(Native(RID, long_ids=False))
            position = EventId(5, data.draw(st.integers(1, channel.end.seq)))
            reader = Reader(view, Connection(), position, None)
            view.readers.add(reader)
            readers.append((position, reader))
            catch_up(reader)
        elif step == "read":
            channel.update(State("running", EventId(5, at + 1), 1))
        elif readers:
            reader = data.draw(st.sampled_from(readers))[1]
            reader.paused() if step == "pause" else catch_up(reader)
    channel.update(State("running", stored[-1].id, 1))
    for position, reader in readers:
        catch_up(reader)
        assert entries_of(parse(body_of(reader))) == [entry for entry in stored if entry.id > position]


# -- heartbeats ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("state", "text"),
    [
        (State("running", EventId(5, 3), 1340), "heartbeat 5-3 lease=1.3s"),
        (State("running", EventId(5, 3), 0), "heartbeat 5-3 lease=expired"),
        (State("running", EventId(5, 3), -4000), "heartbeat 5-3 lease=expired"),
        (State("queued", EventId(5, 3), None), "heartbeat 5-3 queued"),
        (None, "heartbeat 5-3 lease=unknown"),
    ],
)
def test_a_heartbeat_says_what_is_known(state: State | None, text: str) -> None:
    assert heartbeat_text(EventId(5, 3), state) == text


def test_a_heartbeat_goes_to_every_reader_that_can_take_one_in_its_own_form() -> None:
    channel = opened(EventId(5, 3))
    plain, framed, full, waiting = (reader_of(channel, chunked=n == 1) for n in range(4))
    assert isinstance(full.sink, Connection)
    full.sink.paused = True
    waiting.waiting = True
    channel.beat(State("queued", EventId(5, 3), None))
    assert body_of(plain) == b": heartbeat 5-3 queued\n"
    assert body_of(framed) == chunk(b": heartbeat 5-3 queued\n")
    assert body_of(full) == b""
    assert body_of(waiting) == b": waiting for repair\n"
