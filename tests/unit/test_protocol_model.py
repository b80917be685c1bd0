"""PROTOCOL as an executable model: random schedules of faults violate nothing, and each rule is needed."""

from __future__ import annotations

import random

import pytest

from tests.kit.scale import LONG, scaled
from tests.model.explore import explore, play, schedule, shortened
from tests.model.planted import search
from tests.model.rules import Rule

pytestmark = pytest.mark.timeout(1800 if LONG else 120)


def test_no_schedule_of_faults_violates_anything() -> None:
    """P2, P3, P5, P7, P11, P25: whatever is lost, late, dead or rolled back."""
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    found = explore(range(seed, seed + scaled(30_000)))
    assert found is None, str(shortened(found))


@pytest.mark.parametrize("rule", Rule, ids=[rule.name for rule in Rule])
def test_without_a_rule_something_is_violated(rule: Rule) -> None:
    found = search(rule, range(20_000 if LONG else 2_000))
    assert found is not None, f"nobody misses the rule '{rule}'"


def test_without_the_scan_nothing_is_missed_as_long_as_the_index_is_written_in_time_and_kept() -> None:
    """Else the search for INDEX_FIRST and FORGET_LATE would find only the scan's absence."""
    found = explore(range(scaled(10_000)), {Rule.SCAN}, spared="index")
    assert found is None, str(shortened(found, {Rule.SCAN}))


def test_a_schedule_can_be_played_again_and_shortened() -> None:
    found = search(Rule.GAP, range(2_000))
    assert found is not None
    assert found.steps == schedule(random.Random(found.seed))
    less = shortened(found, {Rule.GAP})
    assert len(less.steps) < len(found.steps)
    again = play(less.steps, {Rule.GAP})
    assert again is not None
    assert again.kind == found.violation.kind
    assert play(less.steps) is None
