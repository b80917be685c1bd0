"""The checker of whole histories: no alarm where all is right, and each planted fault is found."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from broker.events import TERMINAL, Attempt, Cancelled, Entry, Error, Final, Start, Token
from broker.fold import fold, is_void, outcome
from broker.ids import START, EventId
from broker.runs.record import parse_rewinds
from tests.kit.checker import Allowed, Violation, check
from tests.kit.history import Frame, History
from tests.kit.scale import scaled
from tests.kit.sse import Event

RUN = "0123456789abcdef0123456789abcdef"
OTHER = "fedcba9876543210fedcba9876543210"
CURSOR_LOST = Attempt(attempt=1, reason="cursor_lost", resume_from="0-0").json_data()
STATUS = {"final": "completed", "error": "failed", "cancelled": "cancelled"}


@dataclass
class World:
    """A log that is written, rewound, rolled back and repaired, and its readers, served as PROTOCOL 6.5 says."""

    request_id: str = RUN
    history: History = field(default_factory=History)
    log: list[Entry] = field(default_factory=list)
    lost: list[Entry] = field(default_factory=list)
    """What failovers have taken, and nobody has written again."""
    last_epoch: int = 0
    attempts: int = 0
    cursors: dict[str, EventId] = field(default_factory=dict)
    connected: set[str] = field(default_factory=set)
    told: bool = False
    """Whether a reader has seen what was lost afterwards, or was told of a lost cursor."""

    def __post_init__(self) -> None:
        self.log = [Entry(EventId(0, 1), "start", Start(request_id=self.request_id, session_id="s").json_data())]
        self.history.submitted("key", self.request_id)

    @property
    def end(self) -> EventId:
        return self.log[-1].id

    # -- writers ---------------------------------------------------------------------------------------------

    def attempt(self, resume: int, jump: int = 1) -> None:
        """From one of the entries that survive; the first from the beginning."""
        self.attempts += 1
        self.last_epoch = max(self.last_epoch, self.end.epoch) + jump
        kept = fold(self.log)
        resume_from = kept[resume % len(kept)].id if self.attempts > 1 else EventId(0, 1)
        data = Attempt(attempt=self.attempts, reason="worker_lost", resume_from=str(resume_from)).json_data()
        self.log.append(Entry(EventId(self.last_epoch, 1), "attempt", data))

    def can_write(self) -> bool:
        """Whether the epoch's writer may go on: it has repaired its tail first, for it uses no id twice."""
        self.repair(len(self.lost))
        return self.end.epoch > 0 and all(entry.id.epoch != self.end.epoch for entry in self.lost)

    def tokens(self, count: int) -> None:
        for _ in range(count if self.can_write() else 0):
            epoch, seq = self.end.epoch, self.end.seq + 1
            self.log.append(Entry(EventId(epoch, seq), "token", Token(text=f"{epoch}.{seq} ").json_data()))

    def close(self, kind: str) -> None:
        if not self.can_write() or kind == "cancelled":
            self.last_epoch = max(self.last_epoch, self.end.epoch) + 1
            data = Attempt(attempt=self.attempts, reason="cancelled", resume_from=str(self.end)).json_data()
            self.log.append(Entry(EventId(self.last_epoch, 1), "attempt", data))
        closing: dict[str, Any] = {
            "final": Final(usage={"tokens": 1}),
            "error": Error(code="agent_failed", message="."),
            "cancelled": Cancelled(reason="client"),
        }
        self.log.append(Entry(EventId(self.end.epoch, self.end.seq + 1), kind, closing[kind].json_data()))

    def roll_back(self, count: int) -> None:
        """A failover: the last entries are gone, but never `start`."""
        at = max(len(self.log) - count, 1)
        gone = {entry.id for entry in self.log[at:]}
        self.lost = sorted([*self.lost, *self.log[at:]])
        self.log = self.log[:at]
        self.told = self.told or any(
            EventId.parse(frame.id) in gone
            for reading in self.history.readings.values()
            for frame in reading.frames
            if frame.id
        )

    def repair(self, count: int) -> None:
        """Their writers append what was lost again, under the same ids, unless a later epoch has begun since."""
        for entry in self.lost[:count]:
            if entry.id > self.end and (entry.id.seq == 1 or entry.id == EventId(self.end.epoch, self.end.seq + 1)):
                self.log.append(entry)
                self.lost.remove(entry)

    # -- readers ---------------------------------------------------------------------------------------------

    def join(self, name: str, cursor: EventId = START) -> None:
        self.history.reads(name, self.request_id, "" if cursor == START else str(cursor))
        self.cursors[name] = cursor

    def read(self, name: str, count: int) -> None:
        """Serves up to `count` entries."""
        if name not in self.cursors:
            self.join(name)
        if name not in self.connected:
            cursor = self.cursors[name]
            self.history.connected(name, "http://gateway", "" if cursor == START else str(cursor), 200)
            self.connected.add(name)
        for _ in range(count):
            cursor = self.cursors[name]
            known = cursor == START or any(entry.id.epoch == cursor.epoch for entry in self.log)
            if not known and self.end.epoch > cursor.epoch:
                self._frame(name, Entry(START, "attempt", CURSOR_LOST))
                self.told = True
                continue
            following = next((entry for entry in self.log if entry.id > cursor), None)
            if not known or following is None:
                return
            self._frame(name, following)

    def _frame(self, name: str, entry: Entry) -> None:
        self.history.frame(name, Event(str(entry.id), entry.type, entry.data))
        self.cursors[name] = entry.id

    def cut(self, name: str) -> None:
        if name in self.connected:
            self.history.disconnected(name, "cut")
            self.connected.remove(name)

    # -- the end ---------------------------------------------------------------------------------------------

    def finish(self, kind: str = "final") -> Story:
        """All readers read to the end, and are told 204."""
        self.close(kind)
        for name in self.cursors:
            if self.cursors[name] > self.end:  # beyond the end of a closed log
                self.read(name, 0)
                self._frame(name, Entry(START, "attempt", CURSOR_LOST))
                self.told = True
            self.read(name, 2 * len(self.log) + 2)
            self.history.disconnected(name, "finished")
            self.history.connected(name, "http://gateway", str(self.cursors[name]), 204)
            self.history.disconnected(name, "finished")
            self.history.ended(name, "204")
        return self.story()

    def story(self) -> Story:
        run = self.poll()
        self.history.polled(self.request_id, run)
        rewinds = parse_rewinds(
            "".join(f"{e.id}:{json.loads(e.data)['resume_from']} " for e in self.log if e.type == "attempt")
        )
        return Story(
            history=self.history,
            logs={self.request_id: list(self.log)},
            polls={self.request_id: run},
            pages={self.request_id: [(entry, is_void(entry.id, rewinds)) for entry in self.log]},
            texts={self.request_id: "".join(json.loads(e.data)["text"] for e in fold(self.log) if e.type == "token")},
        )

    def poll(self) -> dict[str, Any]:
        end = self.log[-1]
        attempts = [json.loads(entry.data)["attempt"] for entry in self.log if entry.type == "attempt"]
        return {
            "request_id": self.request_id,
            "session_id": "s",
            "status": STATUS.get(end.type, "running"),
            "finished_at": "2030-01-01T00:00:00Z" if end.terminal else None,
            "last_event_id": str(end.id),
            "attempt": max(attempts, default=0),
            **outcome(self.log)._asdict(),
        }


@dataclass
class Story:
    """What the checker is given."""

    history: History
    logs: dict[str, list[Entry]]
    polls: dict[str, dict[str, Any] | None]
    pages: dict[str, list[tuple[Entry, bool]]]
    texts: dict[str, str]

    def judge(self, allowed: Allowed | None = None) -> list[Violation]:
        return check(
            self.history, self.logs, self.polls, allowed=allowed or Allowed(), pages=self.pages, texts=self.texts
        )

    def kinds(self, allowed: Allowed | None = None) -> set[str]:
        return {violation.kind for violation in self.judge(allowed)}

    def frames(self, reader: str = "a", connection: int = -2) -> list[Frame]:
        """Of one connection; the last one is the one that was told 204."""
        return self.history.readings[reader].connections[connection].frames


# -- generated histories -----------------------------------------------------------------------------------------

Step = Callable[[World], None]
NAMES = ("a", "b", "c")


def steps(*, failovers: bool) -> st.SearchStrategy[list[tuple[str, str, int]]]:
    writes = ["tokens", "tokens", "tokens", "attempt", "poll"]
    reads = ["read", "read", "read", "read", "cut", "late"]
    faults = ["roll_back", "repair"] if failovers else []
    what = st.sampled_from(writes + reads + faults)
    return st.lists(st.tuples(what, st.sampled_from(NAMES), st.integers(1, 6)), min_size=5, max_size=60)


def play(script: list[tuple[str, str, int]], kind: str) -> tuple[World, Story]:
    world = World()
    world.join("a")
    for what, name, number in script:
        if what == "tokens":
            world.tokens(number)
        elif what == "attempt":
            world.attempt(-number if number < 4 else 0, jump=number)
        elif what == "poll":
            world.history.polled(RUN, world.poll())
        elif what == "read":
            world.read(name, number)
        elif what == "cut":
            world.cut(name)
        elif what == "late" and name not in world.cursors:
            world.join(name, world.log[number % len(world.log)].id)
        elif what == "roll_back":
            world.roll_back(2 * number)
        elif what == "repair":
            world.repair(number)
    return world, world.finish(kind)


ENDS = st.sampled_from(["final", "error", "cancelled"])
MANY = settings(max_examples=scaled(3_000))


@MANY
@given(steps(failovers=False), ENDS)
def test_no_alarm_where_nothing_was_lost(script: list[tuple[str, str, int]], kind: str) -> None:
    _, story = play(script, kind)
    assert story.judge() == []


@MANY
@given(steps(failovers=True), ENDS)
def test_no_alarm_where_what_was_lost_was_repaired_or_told(script: list[tuple[str, str, int]], kind: str) -> None:
    world, story = play(script, kind)
    event(f"told: {world.told}")
    assert story.judge(Allowed(rolled_back=True)) == []


@MANY
@given(steps(failovers=True), ENDS)
def test_a_rollback_that_a_reader_could_see_is_an_alarm_unless_it_is_allowed(
    script: list[tuple[str, str, int]], kind: str
) -> None:
    world, story = play(script, kind)
    stored = {entry.id for entry in story.logs[RUN]}
    seen = {EventId.parse(frame.id) for reading in world.history.readings.values() for frame in reading.frames}
    began = {EventId.parse(reading.cursor) for reading in world.history.readings.values() if reading.cursor}
    if not began <= stored:
        return  # a reader that begins with a cursor of its own making may be told so
    assert bool(story.kinds() & {"foreign", "restarted"}) == bool(seen - stored)


@MANY
@given(steps(failovers=False), ENDS, st.integers(0), st.sampled_from(["drop", "double", "swap", "type", "data", "run"]))
def test_whatever_happens_to_one_frame_is_found(
    script: list[tuple[str, str, int]], kind: str, where: int, what: str
) -> None:
    world, story = play(script, kind)
    places = [(c.frames, n) for c in world.history.readings["a"].connections for n in range(len(c.frames))]
    frames, n = places[where % len(places)]
    if what == "drop":
        del frames[n]
    elif what == "double":
        frames.insert(n, frames[n])
    elif what == "swap" and n:
        frames[n - 1], frames[n] = frames[n], frames[n - 1]
    elif what == "type":
        frames[n] = frames[n]._replace(type="message")
    elif what == "data":
        frames[n] = frames[n]._replace(data='{"text":"forged"}')
    elif what == "run":
        frames[n] = frames[n]._replace(id=f"{OTHER}/{frames[n].id}")
    else:
        return
    found = story.judge()
    assert found and {violation.reader for violation in found} == {"a"}, found


# -- planted faults ----------------------------------------------------------------------------------------------


def right() -> Story:
    """A run with two rewinds; `a` read it live and was cut twice, `b` came at the end, `c` with a cursor."""
    world = World()
    world.read("a", 9)
    world.attempt(0)
    world.history.polled(RUN, world.poll())
    world.tokens(6)
    world.read("a", 5)
    world.cut("a")
    world.history.fault("worker killed")
    world.attempt(-2)
    world.tokens(4)
    world.join("c", world.log[4].id)
    world.read("c", 3)
    world.attempt(0)
    world.tokens(5)
    world.read("a", 9)
    world.cut("a")
    world.join("b")
    return world.finish()


def test_the_history_in_which_faults_are_planted_is_right() -> None:
    story = right()
    assert story.judge() == []
    assert len(story.history.readings["a"].connections) == 4
    assert len(fold(story.logs[RUN])) < len(story.logs[RUN]) - 3


def set_frame(story: Story, at: int, **fields: Any) -> None:
    frames = story.frames("b")
    frames[at] = frames[at]._replace(**fields)


def set_entry(story: Story, at: int, **fields: Any) -> None:
    story.logs[RUN][at] = story.logs[RUN][at]._replace(**fields)


def set_row(story: Story, at: int, void: bool | None = None, **fields: Any) -> None:
    entry, was_void = story.pages[RUN][at]
    assert void != was_void
    story.pages[RUN][at] = (entry._replace(**fields), was_void if void is None else void)


def set_run(story: Story, **fields: Any) -> None:
    run = story.polls[RUN]
    assert run is not None
    story.polls[RUN] = {**run, **fields}
    story.history.polls.clear()


def add_frames(story: Story, *entries: tuple[str, str, str], reader: str = "b") -> None:
    story.frames(reader).extend(Frame(9.0, *entry) for entry in entries)


def after_the_end(story: Story, offset: int = 1) -> str:
    end = story.logs[RUN][-1].id
    return f"{end.epoch}-{end.seq + offset}"


FAULTS: dict[str, tuple[str, Callable[[Story], object]]] = {
    # a reader
    "a frame is lost": ("lost", lambda s: s.frames("b").pop(4)),
    "the first frames are lost": ("lost", lambda s: s.frames("b").__delitem__(slice(0, 3))),
    "frames are lost at a reconnection": ("lost", lambda s: s.frames("a", 1).pop(0)),
    "frames are lost behind a start cursor": ("lost", lambda s: s.frames("c").pop(0)),
    "the last frames of an epoch are lost": ("lost", lambda s: s.frames("b").pop(7)),
    "a whole epoch is lost": ("lost", lambda s: s.frames("b").__delitem__(slice(8, 13))),
    "the end is lost": ("terminal", lambda s: s.frames("b").pop()),
    "a frame comes twice": ("doubled", lambda s: s.frames("b").insert(4, s.frames("b")[4])),
    "a frame comes twice over a reconnection": ("doubled", lambda s: s.frames("a", 1).insert(0, s.frames("a", 0)[-1])),
    "everything comes twice": ("doubled", lambda s: s.frames("b").extend(s.frames("b"))),
    "two frames change places": ("reordered", lambda s: s.frames("b").insert(3, s.frames("b").pop(5))),
    "a frame is another run's": ("foreign", lambda s: set_frame(s, 4, id=f"{OTHER}/{s.frames('b')[4].id}")),
    "a frame that is not in the log": (
        "foreign",
        lambda s: s.logs[RUN].pop(3),
    ),
    "an id that is none": ("foreign", lambda s: set_frame(s, 4, id="12")),
    "an epoch without its attempt": ("foreign", lambda s: set_frame(s, 1, type="token", data='{"text":""}')),
    "an attempt in the middle of an epoch": (
        "foreign",
        lambda s: set_frame(s, 4, type="attempt", data='{"attempt":1,"reason":"started","resume_from":"0-1"}'),
    ),
    "a frame with other data": ("altered", lambda s: set_frame(s, 4, data='{"text":"forged"}')),
    "a frame of another type": ("altered", lambda s: set_frame(s, 4, type="message")),
    "a frame that is not JSON": ("altered", lambda s: set_frame(s, 4, data="{")),
    "a frame after the end": (
        "after the end",
        lambda s: add_frames(s, (after_the_end(s), "token", '{"text":""}')),
    ),
    "two ends": ("terminal", lambda s: add_frames(s, (after_the_end(s), "final", "{}"))),
    "told that all is well, without the end": ("terminal", lambda s: s.frames("a").pop()),
    "told of a lost cursor, though nothing was lost": (
        "restarted",
        lambda s: s.frames("b").insert(4, Frame(1.0, "0-0", "attempt", CURSOR_LOST)),
    ),
    "a frame with the id 0-0 that says nothing of a lost cursor": (
        "foreign",
        lambda s: s.frames("b").insert(4, Frame(1.0, "0-0", "message", "{}")),
    ),
    "a body that ends without a terminal": (
        "false end",
        lambda s: setattr(s.history.readings["a"].connections[0], "ending", "finished"),
    ),
    "closed for good by a 503": ("turned away", lambda s: setattr(s.history.readings["a"], "end", "503")),
    "told that there is no such run": ("missing", lambda s: setattr(s.history.readings["a"], "end", "404")),
    "told that it is gone": ("missing", lambda s: setattr(s.history.readings["a"], "end", "gone")),
    "still reading when the test ends": ("unfinished", lambda s: setattr(s.history.readings["a"], "end", "")),
    # the log
    "no log": ("missing", lambda s: s.logs.clear()),
    "a log without its start": ("lost", lambda s: s.logs[RUN].pop(0)),
    "a log of another run": (
        "foreign",
        lambda s: set_entry(s, 0, data=Start(request_id=OTHER, session_id="s").json_data()),
    ),
    "a gap in the log": ("lost", lambda s: s.logs[RUN].pop(4)),
    "a double in the log": ("doubled", lambda s: s.logs[RUN].insert(4, s.logs[RUN][4])),
    "a swap in the log": ("reordered", lambda s: s.logs[RUN].insert(3, s.logs[RUN].pop(5))),
    "an epoch of the log without its attempt": ("foreign", lambda s: set_entry(s, 1, type="token")),
    "a rewind to what is not there": (
        "lost",
        lambda s: set_entry(s, 8, data='{"attempt":2,"reason":"worker_lost","resume_from":"0-7"}'),
    ),
    "a rewind to what comes later": (
        "foreign",
        lambda s: set_entry(s, 8, data='{"attempt":2,"reason":"worker_lost","resume_from":"99-1"}'),
    ),
    "data in the log that is not JSON": ("altered", lambda s: set_entry(s, 4, data="{")),
    "a log without an end": ("unfinished", lambda s: s.logs[RUN].pop()),
    "a log with two ends": (
        "terminal",
        lambda s: s.logs[RUN].append(Entry(EventId.parse(after_the_end(s)), "cancelled", "{}")),
    ),
    "a log that goes on after the end": (
        "after the end",
        lambda s: s.logs[RUN].append(Entry(EventId.parse(after_the_end(s)), "token", '{"text":""}')),
    ),
    # the poll
    "no run": ("missing", lambda s: s.polls.clear()),
    "a status that is not the log's": ("poll", lambda s: set_run(s, status="failed")),
    "a status that does not end": ("poll", lambda s: set_run(s, status="running")),
    "an answer that is not the fold": ("poll", lambda s: set_run(s, answer="something")),
    "another last event": ("poll", lambda s: set_run(s, last_event_id="9-9")),
    "another attempt": ("poll", lambda s: set_run(s, attempt=1)),
    "no time of its end": ("poll", lambda s: set_run(s, finished_at=None)),
    "an error where there is none": ("poll", lambda s: set_run(s, error={"code": "x"})),
    "other citations": ("poll", lambda s: set_run(s, citations=[{}])),
    "another usage": ("poll", lambda s: set_run(s, usage={})),
    "a poll that found nothing for a while": ("missing", lambda s: s.history.polled(RUN, None)),
    "a run that goes on after its end": (
        "poll",
        lambda s: s.history.polled(RUN, {**(s.polls[RUN] or {}), "status": "running"}),
    ),
    "a run that had another end before": (
        "poll",
        lambda s: s.history.polled(RUN, {**(s.polls[RUN] or {}), "status": "cancelled"}),
    ),
    # the pages
    "a page without an entry": ("page", lambda s: s.pages[RUN].pop(4)),
    "an entry that is void and not marked": ("page", lambda s: set_row(s, 4, void=False)),
    "an entry that is marked and not void": ("page", lambda s: set_row(s, 0, void=True)),
    "an entry of a page with other data": ("page", lambda s: set_row(s, 4, data='{"text":"forged"}')),
    # what the agent said, and who asked
    "a token that was written twice": ("text", lambda s: s.texts.__setitem__(RUN, s.texts[RUN][4:])),
    "a reader whose submit was never accepted": ("unfinished", lambda s: s.history.reads("d")),
    "a reader whose submit was refused": ("turned away", lambda s: setattr(s.history.reads("d"), "end", "400")),
    "two runs for one key": ("twins", lambda s: s.history.submitted("key", OTHER)),
    "an accepted run that never was": ("missing", lambda s: s.history.submitted("other", OTHER)),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found(name: str) -> None:
    kind, plant = FAULTS[name]
    story = right()
    plant(story)
    found = story.judge()
    assert kind in {violation.kind for violation in found}, [str(violation) for violation in found]


def test_every_kind_of_violation_has_been_planted() -> None:
    assert {kind for kind, _ in FAULTS.values()} | {"fold"} == {
        *("lost", "doubled", "reordered", "foreign", "altered", "after the end", "terminal", "fold", "restarted"),
        *("false end", "turned away", "missing", "unfinished", "poll", "page", "text", "twins"),
    }


# -- rollbacks: what was lost must have been told ------------------------------------------------------------------


def ghost(told: str) -> Story:
    """`a` has read two entries that a failover took; then comes a later attempt, of which it is told or not."""
    world = World()
    world.attempt(0)
    world.tokens(8)
    world.read("a", 20)
    world.roll_back(2)
    world.attempt(2)
    world.tokens(2)
    story = world.finish()
    frames = story.frames("a")
    at = next(n for n, frame in enumerate(frames) if frame.id == "2-1")
    if told == "nothing":
        del frames[at]
    elif told == "another rewind":
        frames[at] = frames[at]._replace(data=frames[at].data.replace('"0-1"', '"1-1"').replace('"1-3"', '"1-9"'))
    return story


def test_a_ghost_that_was_voided_is_allowed_only_after_a_rollback() -> None:
    story = ghost("the rewind")
    assert story.judge(Allowed(rolled_back=True)) == []
    assert story.kinds() == {"foreign"}


@pytest.mark.parametrize("told", ["nothing", "another rewind"])
def test_a_ghost_that_survives_in_a_reader_is_found(told: str) -> None:
    found = ghost(told).kinds(Allowed(rolled_back=True))
    assert "fold" in found


def test_what_a_rollback_allows_is_nothing_else() -> None:
    for name in ("a frame is lost", "a frame comes twice", "a frame with other data", "two ends", "a gap in the log"):
        kind, plant = FAULTS[name]
        story = right()
        plant(story)
        assert kind in story.kinds(Allowed(rolled_back=True)), name


# -- what a test may excuse, and only where it says so -----------------------------------------------------------


def lost_closing() -> Story:
    """`a` has read an end that a failover took; the run was executed again."""
    world = World()
    world.attempt(0)
    world.tokens(3)
    world.close("final")
    world.read("a", 9)
    world.history.polled(RUN, world.poll())
    world.roll_back(1)
    world.attempt(0)
    world.tokens(2)
    return world.finish("error")


def lost_closing_of_others() -> Story:
    """`b` joined with the cursor of such an end, and was told that it has it all."""
    world = World()
    world.attempt(0)
    world.tokens(3)
    world.close("cancelled")
    cursor = str(world.end)
    world.history.reads("b", RUN, cursor)
    world.history.connected("b", "http://127.0.0.1", cursor, 204)
    world.history.disconnected("b", "finished")
    world.history.ended("b", "204")
    world.roll_back(3)
    world.lost.clear()
    return world.finish("cancelled")


def lost_run() -> Story:
    world = World()
    world.read("a", 1)
    world.history.disconnected("a", "cut")
    world.history.ended("a", "404")
    story = world.story()
    story.logs, story.polls = {}, {RUN: None}
    world.history.polls.clear()
    world.history.polled(RUN, None)
    return story


def waiting() -> Story:
    world = World()
    world.attempt(0)
    world.read("a", 9)
    return world.story()


def twins() -> Story:
    story = right()
    story.history.submits.append(story.history.submits[0]._replace(request_id=OTHER))
    return story


THERE = {OTHER}
EXCUSES: dict[str, tuple[Callable[[], Story], Allowed, set[str]]] = {
    "a closing": (lost_closing, Allowed(rolled_back=True, lost_closings={RUN}), {"after the end", "poll", "terminal"}),
    "a closing that others saw": (
        lost_closing_of_others,
        Allowed(rolled_back=True, lost_closings={RUN}),
        {"fold"},
    ),
    "a run": (lost_run, Allowed(lost_runs={RUN}), {"missing"}),
    "an erased run": (lost_run, Allowed(erased={RUN}), {"missing"}),
    "the end": (waiting, Allowed(unfinished={RUN}), {"unfinished"}),
    "an erased run's key": (twins, Allowed(erased={OTHER}), {"twins", "missing"}),
    "a key": (twins, Allowed(lost_keys=True, lost_runs={OTHER}), {"twins", "missing"}),
}


@pytest.mark.parametrize("name", EXCUSES)
def test_what_is_excused_is_a_violation_where_it_is_not(name: str) -> None:
    build, allowed, kinds = EXCUSES[name]
    assert build().judge(allowed) == []
    without = replace(allowed, lost_closings=(), lost_runs=(), erased=(), unfinished=(), lost_keys=False)
    assert build().kinds(without) >= kinds


@pytest.mark.parametrize("name", EXCUSES)
def test_an_excuse_is_one_runs_own(name: str) -> None:
    build, allowed, kinds = EXCUSES[name]

    def others(runs: Collection[str]) -> Collection[str]:
        return {"0" * 32} if runs else ()

    other = replace(
        allowed,
        lost_closings=others(allowed.lost_closings),
        lost_runs=others(allowed.lost_runs),
        erased=others(allowed.erased),
        unfinished=others(allowed.unfinished),
    )
    assert build().kinds(other) & kinds


# -- frames without an id ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_a_stream_that_ends_with_gone_is_a_missing_run_and_no_foreign_frame(seed: int) -> None:
    world = World()
    world.attempt(0)
    world.tokens(5)
    world.read("a", random.Random(seed).randrange(5))
    last = str(world.cursors["a"]) if world.cursors["a"] != START else ""
    world.history.frame("a", Event(last, "error", '{"code":"gone","message":"."}'))
    world.history.disconnected("a", "finished")
    world.history.ended("a", "gone")
    story = world.story()
    story.logs, story.polls = {}, {RUN: None}
    world.history.polls.clear()
    assert story.judge(Allowed(erased={RUN})) == []
    assert story.kinds() == {"missing"}


def test_a_violation_says_what_and_where() -> None:
    story = right()
    story.frames("b").pop(4)
    [found] = story.judge()
    assert str(found).startswith(f"lost ({RUN}, b): ") and "1-4" in found.text
    assert set(TERMINAL) == set(STATUS)
