"""What a client of a stream of many runs has read: each event is of the run that its id names first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from urllib.parse import urlencode

from broker.events import Entry
from broker.gateway.dialects.native.many.cursor import MAX_RUNS, Composite
from broker.ids import START, EventId
from tests.kit import sse
from tests.kit.checker import check_reader
from tests.kit.findings import is_gone


def path_of(*request_ids: str, session_id: str | None = None, **query: str) -> str:
    pairs = [("run", request_id) for request_id in request_ids]
    if session_id is not None:
        pairs.append(("session_id", session_id))
    return f"/api/v1/stream?{urlencode([*pairs, *query.items()])}"


def run_of(event: sse.Event) -> str:
    return event.id.partition("/")[0]


def by_run(events: Sequence[sse.Event]) -> dict[str, list[Entry]]:
    """The entries of each run as they came; `gone` is none."""
    runs: dict[str, list[Entry]] = {}
    for event in events:
        at = Composite.parse(event.id).places[run_of(event)]
        entries = runs.setdefault(run_of(event), [])
        if at is not None:
            entries.append(Entry(at, event.type, event.data))
        else:
            assert is_gone(event.type, event.data)
    return runs


def check_runs(events: Sequence[sse.Event], logs: Mapping[str, Sequence[Entry]]) -> None:
    """P8: of each run exactly its log, and of no other run anything."""
    seen = by_run(events)
    assert seen.keys() <= logs.keys()
    for request_id, log in logs.items():
        check_reader(seen.get(request_id, []), log)


def check_cursors(events: Sequence[sse.Event], first: str = "") -> None:
    """Each id says where the client stands in every run: what it has read, and nothing else. `first` is the cursor with
    which it began. Of a session, runs that are over may have been left out."""
    places: dict[str, EventId | None] = dict(Composite.parse(first).places) if first else {}
    floor = -1
    for event in events:
        cursor = Composite.parse(event.id)
        assert len(cursor.places) <= MAX_RUNS
        assert next(iter(cursor.places)) == run_of(event)
        places[run_of(event)] = cursor.places[run_of(event)]
        if cursor.floor is None:
            assert cursor.places == places
        else:
            assert cursor.places.items() <= places.items()
            assert cursor.floor >= floor, "the floor fell"
            floor = cursor.floor
    assert START not in places.values() or any("cursor_lost" in event.data for event in events)
