"""A stream of a session: wherever it is cut, every run comes whole, once and in order, also one that comes late into
the index; and its cursor never grows beyond the most runs that one may name."""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from broker import sse
from broker.gateway.dialects.native.many.cursor import MAX_RUNS, Composite
from broker.gateway.dialects.native.many.progress import SETTLE_MS, Progress
from tests.kit.sse import parse

NOW = 1_763_668_800_000


@dataclass
class Submitted:
    name: str
    at: int
    indexed_at: int
    events: int
    """0: it never gets a record."""


@dataclass
class Play:
    """A session and a client of it. The client has what was written before each cut, and its last cursor."""

    limit: int
    now: int = NOW
    runs: dict[str, Submitted] = field(default_factory=dict)
    had: dict[str, list[int]] = field(default_factory=dict)
    cursor: str = ""
    longest: int = 0

    def __post_init__(self) -> None:
        self.connect()

    def connect(self) -> None:
        cursor = Composite.parse(self.cursor) if self.cursor else Composite({}, 0)
        self.progress = Progress(cursor)
        self.under_way = list(cursor.positions)
        self.seq = {name: at.seq for name, at in cursor.positions.items()}

    def submit(self, late: int, events: int) -> None:
        name = f"{len(self.runs):032x}"
        self.runs[name] = Submitted(name, self.now, self.now + late, events)

    def look(self) -> None:
        floor = self.progress.floor
        rows = sorted((r.at, r.name) for r in self.runs.values() if r.at > floor and r.indexed_at <= self.now)
        ends = rows[: self.limit][-1:] or [(0, "")]
        page = [(name, at) for at, name in rows if at <= ends[0][0]]  # never only a part of one millisecond
        for name in self.progress.look(page, complete=len(page) == len(rows), now_ms=self.now):
            if self.runs[name].events:
                self.progress.begin(name)
                self.under_way.append(name)
            elif self.progress.never_came(name, self.now):
                self.progress.over(name)

    def write(self, choice: int, count: int) -> None:
        """The next events of one of the runs that are under way, and the cursor of each."""
        if not self.under_way:
            return
        name = self.under_way[choice % len(self.under_way)]
        last = self.runs[name].events
        for seq in range(self.seq.get(name, 0) + 1, last + 1)[:count]:
            frame = sse.frame("token", "{}", f"{name}/0-{seq}")
            [event] = parse(self.progress.complete(name, frame))
            self.seq[name], self.cursor = seq, event.id
            self.had.setdefault(name, []).append(seq)
            self.longest = max(self.longest, len(Composite.parse(self.cursor).places))
        if self.seq.get(name, 0) == last:
            self.progress.over(name)
            self.under_way.remove(name)

    def finish(self) -> None:
        for _ in range(3 * len(self.runs) + 3):
            self.now += SETTLE_MS
            self.look()
            for _ in [*self.under_way]:
                self.write(0, 10)


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("submit"), st.integers(0, SETTLE_MS - 1), st.integers(0, 4)),
        st.tuples(st.just("wait"), st.sampled_from([0, 1, 500, 30_000, SETTLE_MS]), st.just(0)),
        st.tuples(st.just("look"), st.just(0), st.just(0)),
        st.tuples(st.just("write"), st.integers(0, 5), st.integers(1, 4)),
        st.tuples(st.just("cut"), st.just(0), st.just(0)),
    ),
    max_size=60,
)


@given(STEPS, st.integers(1, 5))
@settings(max_examples=400)
def test_wherever_it_is_cut_every_run_comes_whole_and_once(steps: list[tuple[str, int, int]], limit: int) -> None:
    """`limit`: rows of the index in one look. A run without an event in it has nothing in its log, and never will."""
    play = Play(limit)
    for kind, one, two in steps:
        match kind:
            case "submit":
                play.submit(one, two)
            case "wait":
                play.now += one
            case "look":
                play.look()
            case "write":
                play.write(one, two)
            case "cut":
                play.connect()
    play.finish()
    for run in play.runs.values():
        assert play.had.get(run.name, []) == list(range(1, run.events + 1)), run
    assert play.under_way == []


def test_the_cursor_names_at_most_as_many_runs_as_it_may_and_the_others_follow() -> None:
    play = Play(2 * MAX_RUNS)
    for _ in range(3 * MAX_RUNS):
        play.submit(0, 2)
        play.now += 1
    for round_ in range(5):
        play.now += 1000
        play.look()
        for choice in range(len(play.under_way)):
            play.write(choice, 1)
        assert len(play.had) == MAX_RUNS, f"round {round_}"
        assert play.progress.crowded
    play.finish()
    assert not play.progress.crowded
    assert len(play.had) == 3 * MAX_RUNS
    assert play.longest == MAX_RUNS


def test_runs_that_are_long_over_leave_the_cursor_and_do_not_come_again() -> None:
    play = Play(100)
    for _ in range(10):
        play.submit(0, 2)
        play.now += 10
    play.look()
    for _ in range(10):
        play.write(0, 2)
    play.now += SETTLE_MS
    play.look()
    play.submit(0, 1)
    play.look()
    play.write(0, 1)
    assert list(Composite.parse(play.cursor).places) == [f"{10:032x}"]
    play.connect()
    play.look()
    assert play.under_way == [f"{10:032x}"], "its end is for the log to say"
    assert len(play.had) == 11


def test_a_run_that_came_late_into_the_index_is_not_passed_over() -> None:
    play = Play(100)
    play.submit(SETTLE_MS - 1, 1)
    play.now += 1
    play.submit(0, 1)
    for _ in range(3):
        play.look()
        play.write(0, 1)
        play.connect()
        play.now += 20_000
    assert f"{0:032x}" not in play.had
    play.finish()
    assert play.had == {f"{0:032x}": [1], f"{1:032x}": [1]}
