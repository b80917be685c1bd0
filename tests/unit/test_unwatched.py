"""PROTOCOL 5.6: when a run that nobody reads is stopped. The clock is a number here."""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.unwatched import FIRST_WATCHER_SECONDS, Watch

LIMIT, GRACE = 20.0, 15.0
NEVER = -math.inf


def watch() -> Watch:
    return Watch(LIMIT, GRACE)


def test_nobody_has_to_come_within_a_minute_after_the_submit() -> None:
    one = watch()
    assert FIRST_WATCHER_SECONDS == 60
    for age in (0.0, 30.0, 59.9):
        assert not one.expired("", now=1000 + age, age=age, calm_since=NEVER)
    for age in (60.0, 70.0, 79.8):
        assert not one.expired("", now=1000 + age, age=age, calm_since=NEVER)
    assert one.expired("", now=1080, age=80, calm_since=NEVER)


def test_who_begins_to_count_later_begins_at_nothing() -> None:
    """A worker that claims a run which has waited for an hour; a reaper that sees it for the first time."""
    one = watch()
    assert not one.expired("", now=5000, age=3600, calm_since=NEVER)
    assert not one.expired("", now=5019, age=3619, calm_since=NEVER)
    assert one.expired("", now=5020, age=3620, calm_since=NEVER)


def test_the_first_reader_starts_the_count_also_within_the_first_minute() -> None:
    one = watch()
    assert not one.expired("", now=1001, age=1, calm_since=NEVER)
    assert not one.expired("1", now=1002, age=2, calm_since=NEVER)
    assert not one.expired("1", now=1021.9, age=21.9, calm_since=NEVER)
    assert one.expired("1", now=1022, age=22, calm_since=NEVER)


def test_each_sign_of_a_reader_begins_the_count_anew() -> None:
    one = watch()
    for n in range(20):
        assert not one.expired(str(n), now=1000 + 19 * n, age=100, calm_since=NEVER)
    assert not one.expired("19", now=1000 + 19 * 20, age=100, calm_since=NEVER)
    assert one.expired("19", now=1000 + 19 * 19 + 20, age=100, calm_since=NEVER)


@pytest.mark.parametrize("back", ["0", ""])
def test_an_older_sign_that_a_failover_has_brought_back_is_a_sign(back: str) -> None:
    one = watch()
    assert not one.expired("1", now=1000, age=100, calm_since=NEVER)
    assert not one.expired(back, now=1019, age=119, calm_since=NEVER)
    assert not one.expired(back, now=1038, age=138, calm_since=NEVER)
    assert one.expired(back, now=1039, age=139, calm_since=NEVER)


def test_a_break_begins_the_count_anew_with_a_lease_of_grace() -> None:
    one = watch()
    assert not one.expired("1", now=1000, age=100, calm_since=NEVER)
    for now in (1020.0, 1030.0, 1018 + GRACE + LIMIT - 0.1):
        assert not one.expired("1", now=now, age=100, calm_since=1018)
    assert one.expired("1", now=1018 + GRACE + LIMIT, age=100, calm_since=1018)


class Look(NamedTuple):
    after: int
    """Seconds since the look before."""
    signs: bool
    """Whether there was a sign of a reader since."""
    breaks: bool


SELDOM = st.sampled_from([False, False, False, True])


@given(st.lists(st.builds(Look, st.integers(1, 12), SELDOM, SELDOM), max_size=40), st.booleans(), st.integers(0, 90))
def test_it_expires_exactly_when_it_was_quiet_for_the_limit(looks: list[Look], watched: bool, age: int) -> None:
    one = watch()
    now, accepted, signs, calm_since = 1000, 1000 - age, int(watched), NEVER
    assert not one.expired(str(signs or ""), now=now, age=age, calm_since=calm_since)
    quiet_since: float = now
    for look in looks:
        now += look.after
        if look.signs:
            signs += 1
            quiet_since = max(quiet_since, now)
        if look.breaks:
            calm_since = now
            quiet_since = max(quiet_since, now + GRACE)
        if not signs and now - accepted < FIRST_WATCHER_SECONDS:
            quiet_since = max(quiet_since, now)
        said = one.expired(str(signs or ""), now=now, age=now - accepted, calm_since=calm_since)
        assert said == (now - quiet_since >= LIMIT)
