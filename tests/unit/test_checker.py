"""The checker against planted faults: one that has never failed is not trusted."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from broker.events import Entry
from broker.ids import EventId
from tests.kit.checker import check_log, check_reader, entries_of, surviving_text
from tests.kit.sse import Event


def entry(epoch: int, seq: int, kind: str = "token", data: str = "{}") -> Entry:
    return Entry(EventId(epoch, seq), kind, data)


GOOD = [
    entry(0, 1, "start"),
    entry(5, 1, "attempt", '{"resume_from":"0-1"}'),
    entry(5, 2, data='{"text":"void"}'),
    entry(9, 1, "attempt", '{"resume_from":"0-1"}'),
    entry(9, 2, data='{"text":"kept"}'),
    entry(9, 3, "final"),
]


def test_a_whole_log_passes() -> None:
    check_log(GOOD)
    check_log(GOOD[:-1], finished=False)
    check_reader(GOOD, GOOD)
    assert surviving_text(GOOD) == "kept"


def without(at: int) -> list[Entry]:
    return GOOD[:at] + GOOD[at + 1 :]


BAD_LOGS: dict[str, list[Entry]] = {
    "nothing": [],
    "no start": without(0),
    "an epoch without its attempt": without(1),
    "a later epoch without its attempt": without(3),
    "a gap": without(4),
    "no terminal": without(5),
    "a double": [*GOOD[:3], *GOOD[2:]],
    "a swap": [*GOOD[:2], GOOD[4], GOOD[3], *GOOD[5:]],
    "an id that falls": [*GOOD[:4], entry(7, 1, "attempt"), entry(7, 2, "final")],
    "a gap within an epoch": [*GOOD[:2], entry(5, 3), entry(5, 4, "final")],
    "something after the end": [*GOOD, entry(9, 4)],
    "two ends": [*GOOD, entry(9, 4, "final")],
    "an end that is followed by another epoch's": [*GOOD, entry(12, 1, "attempt"), entry(12, 2, "cancelled")],
    "an epoch that begins with something else": [*GOOD[:3], entry(9, 1), entry(9, 2, "final")],
    "data that is not JSON": [*GOOD[:4], entry(9, 2, data="{"), GOOD[5]],
}


@pytest.mark.parametrize("name", BAD_LOGS)
def test_a_log_with_a_fault_does_not_pass(name: str) -> None:
    with pytest.raises((AssertionError, ValueError)):
        check_log(BAD_LOGS[name])


def test_an_end_in_a_log_that_is_not_finished_does_not_pass() -> None:
    with pytest.raises(AssertionError):
        check_log(GOOD, finished=False)


FAULTS: dict[str, Callable[[list[Entry]], list[Entry]]] = {
    "lost at the beginning": lambda seen: seen[1:],
    "lost in the middle": lambda seen: seen[:2] + seen[3:],
    "lost at the end": lambda seen: seen[:-1],
    "nothing at all": lambda seen: [],
    "doubled": lambda seen: seen[:3] + seen[2:],
    "everything twice": lambda seen: seen + seen,
    "out of order": lambda seen: [seen[0], seen[2], seen[1], *seen[3:]],
    "foreign": lambda seen: [*seen, entry(10, 1, "attempt")],
    "of another type": lambda seen: [*seen[:4], seen[4]._replace(type="message"), seen[5]],
    "with other data": lambda seen: [*seen[:4], seen[4]._replace(data='{"text":"forged"}'), seen[5]],
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_reader_that_saw_something_else_does_not_pass(name: str) -> None:
    with pytest.raises(AssertionError):
        check_reader(FAULTS[name](list(GOOD)), GOOD)


def test_events_of_either_id_form_are_the_same_entries() -> None:
    for prefix in ("", "0123456789abcdef0123456789abcdef/"):
        assert entries_of([Event(f"{prefix}9-2", "token", "{}")]) == [entry(9, 2)]
