"""A model that failed is asked again within the deadline, and no longer than it makes sense."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from worker.models import failures
from worker.models.failures import Failed
from worker.models.retries import LONGEST_SECONDS, MOST_EMPTY, Retries

DOWN = Failed("model_unavailable", "down")


def retries(*, deadline: float = 1e6, seconds: float = 120, jitter: float = 1.0) -> Retries:
    return Retries(deadline=deadline, seconds=seconds, jitter=lambda: jitter)


def test_pauses_grow_and_have_a_longest() -> None:
    patient = retries(seconds=1e6)
    assert [patient.pause(DOWN, 0) for _ in range(8)] == [0.5, 1, 2, 4, 8, 16, LONGEST_SECONDS, LONGEST_SECONDS]


def test_pauses_have_a_jitter() -> None:
    assert retries(jitter=0).pause(DOWN, 0) == 0.25


def test_what_fails_in_the_same_way_again_is_not_tried_again() -> None:
    assert retries().pause(Failed("model_unauthorized", "no"), 0) is None


def test_the_server_says_how_long() -> None:
    pause = retries().pause(Failed("model_rate_limited", "slow", after=30), 0)
    assert pause is not None
    assert 30 <= pause < 31


def test_a_wish_beyond_the_deadline_fails_at_once() -> None:
    assert retries(deadline=100).pause(Failed("model_rate_limited", "slow", after=101), 0) is None


def test_a_wish_beyond_the_patience_fails_at_once() -> None:
    assert retries(seconds=10).pause(Failed("model_rate_limited", "slow", after=11), 0) is None
    assert retries(seconds=10).pause(Failed("model_rate_limited", "slow", after=9), 0) is not None


def test_a_wish_counts_from_the_first_failure_too() -> None:
    patient = retries(seconds=10)
    assert patient.pause(DOWN, 1000) is not None
    assert patient.pause(Failed("model_rate_limited", "slow", after=5), 1006) is None


def test_no_patience_means_no_second_try() -> None:
    assert retries(seconds=0).pause(DOWN, 0) is None
    assert retries(seconds=0).pause(Failed("model_rate_limited", "slow", after=0), 0) is None


def test_empty_answers_cost_tokens_and_are_soon_enough() -> None:
    few = retries()
    pauses = [few.pause(failures.empty("stop"), 0) for _ in range(MOST_EMPTY + 1)]
    assert pauses[-1] is None
    assert None not in pauses[:-1]


def test_patience_counts_from_the_first_failure() -> None:
    patient = retries(seconds=10)
    assert patient.pause(DOWN, 1000) is not None
    assert patient.pause(DOWN, 1005) is not None
    assert patient.pause(DOWN, 1009.5) is None


@given(
    deadline=st.floats(1, 1000),
    seconds=st.floats(0, 1000),
    jitter=st.floats(0, 1),
    wishes=st.lists(st.none() | st.floats(0, 100), max_size=30),
)
def test_no_try_begins_after_the_deadline_or_beyond_the_patience(
    deadline: float, seconds: float, jitter: float, wishes: list[float | None]
) -> None:
    patient, now = Retries(deadline=deadline, seconds=seconds, jitter=lambda: jitter), 0.0
    for wish in wishes:
        pause = patient.pause(Failed("model_unavailable", "down", after=wish), now)
        if pause is None:
            return
        assert pause >= (wish or 0)
        now += pause
        assert now < deadline
        assert now <= seconds
