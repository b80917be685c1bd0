"""Words for people."""

from __future__ import annotations

from broker.words import count, reason


def test_counts_have_a_plural() -> None:
    assert [count(number, "event") for number in (0, 1, 2, 1234)] == ["0 events", "1 event", "2 events", "1,234 events"]


def test_a_reason_is_one_line_and_never_empty() -> None:
    assert reason(OSError("connection refused,\n  or reset")) == "connection refused, or reset"
    assert reason(TimeoutError()) == "TimeoutError"
