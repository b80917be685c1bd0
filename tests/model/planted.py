"""The rules dropped one by one: what the model does not notice, it does not show."""

from __future__ import annotations

from tests.model.explore import Found, explore
from tests.model.rules import Rule

NEEDS = {
    Rule.INDEX_FIRST: frozenset({Rule.SCAN}),
    Rule.FORGET_LATE: frozenset({Rule.SCAN}),
}
"""Rules whose loss the scan of all records makes up for, later: they are dropped together with it."""


def search(rule: Rule, seeds: range) -> Found | None:
    """A schedule that goes wrong without `rule`. Where it needs the scan dropped, the index is never lost by itself."""
    needed = NEEDS.get(rule, frozenset())
    return explore(seeds, {rule, *needed}, spared="index" if needed else "")
