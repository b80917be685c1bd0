"""The fold: what survives of a log, and what it has come to (PROTOCOL 1.5)."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.events import Entry
from broker.fold import Rewind, fold, is_void, outcome
from broker.ids import EventId


def entry(event_id: str, kind: str = "token", **data: Any) -> Entry:
    return Entry(EventId.parse(event_id), kind, json.dumps(data or {"text": event_id + " "}))


def attempt(event_id: str, resume_from: str, number: int = 1, reason: str = "worker_lost") -> Entry:
    return entry(event_id, "attempt", attempt=number, reason=reason, resume_from=resume_from)


START = entry("0-1", "start", request_id="ab" * 16, session_id="s")


def ids(entries: list[Entry]) -> list[str]:
    return [str(each.id) for each in entries]


def test_an_empty_log_folds_to_nothing() -> None:
    assert fold([]) == []
    assert outcome([]) == (None, [], {}, None)


def test_the_first_attempt_voids_nothing() -> None:
    log = [START, attempt("7-1", "0-1", reason="started"), entry("7-2"), entry("7-3")]
    assert ids(fold(log)) == ["0-1", "7-2", "7-3"]


def test_a_later_attempt_takes_back_what_came_after_its_resume_from() -> None:
    log = [START, attempt("7-1", "0-1"), entry("7-2"), entry("7-3"), attempt("9-1", "7-2", 2), entry("9-2")]
    assert ids(fold(log)) == ["0-1", "7-2", "9-2"]


def test_an_attempt_that_starts_over_takes_everything_back_but_the_start() -> None:
    log = [START, attempt("7-1", "0-1"), entry("7-2"), attempt("9-1", "0-1", 2), entry("9-2")]
    assert ids(fold(log)) == ["0-1", "9-2"]


def test_an_attempt_may_take_back_another_one() -> None:
    """The third goes on where the first was: the second, its rewind included, is as if it had not been."""
    log = [
        START,
        attempt("7-1", "0-1"),
        entry("7-2"),
        entry("7-3"),
        attempt("9-1", "7-3", 2),
        entry("9-2"),
        attempt("12-1", "7-2", 3),
        entry("12-2"),
    ]
    assert ids(fold(log)) == ["0-1", "7-2", "12-2"]


def test_what_was_taken_back_stays_so() -> None:
    """A rewind to an id that itself is void keeps what survives below it."""
    log = [
        START,
        attempt("7-1", "0-1"),
        entry("7-2"),
        attempt("9-1", "0-1", 2),
        entry("9-2"),
        attempt("12-1", "7-2", 3),
        entry("12-2"),
    ]
    assert ids(fold(log)) == ["0-1", "12-2"]


def test_a_cancel_takes_nothing_back() -> None:
    log = [START, attempt("7-1", "0-1"), entry("7-2"), attempt("9-1", "7-2", reason="cancelled")]
    log.append(entry("9-2", "cancelled", reason="client"))
    assert ids(fold(log)) == ["0-1", "7-2", "9-2"]
    assert outcome(log).answer == "7-2 "


def test_ids_are_compared_as_numbers() -> None:
    log = [START, attempt("7-1", "0-1"), *(entry(f"7-{n}") for n in range(2, 12)), attempt("10-1", "7-10", 2)]
    assert ids(fold(log))[-1] == "7-10"


# -- against the definition ------------------------------------------------------------------------------------


ENDS: list[tuple[str, dict[str, Any]]] = [
    ("final", {"answer": None, "citations": [], "usage": {}}),
    ("final", {"answer": "said", "citations": [{"a": 1}], "usage": {"b": 2}}),
    ("error", {"code": "c", "message": "m"}),
    ("cancelled", {"reason": "client"}),
]


@st.composite
def logs(draw: st.DrawFn) -> list[Entry]:
    """Attempts of some entries each; each resumes from any id that the log has by then."""
    log = [START]
    epoch = 0
    for number in range(draw(st.integers(0, 5))):
        epoch += draw(st.integers(1, 40))
        resume_from = draw(st.sampled_from([each.id for each in log])) if number else EventId(0, 1)
        log.append(attempt(f"{epoch}-1", str(resume_from), number + 1))
        for seq in range(2, 2 + draw(st.integers(0, 4))):
            kind = draw(st.sampled_from(["token", "message", "token"]))
            log.append(entry(f"{epoch}-{seq}", kind))
    if draw(st.booleans()):
        kind, data = draw(st.sampled_from(ENDS))
        log.append(entry(f"{log[-1].id.epoch}-{log[-1].id.seq + 1}", kind, **data))
    return log


def survives(log: list[Entry], index: int) -> bool:
    """PROTOCOL 1.4, word by word: no later attempt voids it, which is above its resume_from and below itself."""
    me = log[index]
    for later in log[index + 1 :]:
        if later.type == "attempt":
            resume_from = EventId.parse(json.loads(later.data)["resume_from"])
            if resume_from < me.id < later.id:
                return False
    return me.type != "attempt"


@given(logs())
def test_the_fold_keeps_what_no_later_attempt_voids(log: list[Entry]) -> None:
    assert fold(log) == [log[index] for index in range(len(log)) if survives(log, index)]


@given(logs())
def test_void_says_of_an_entry_what_the_fold_does(log: list[Entry]) -> None:
    rewinds = [
        Rewind(each.id, EventId.parse(json.loads(each.data)["resume_from"])) for each in log if each.type == "attempt"
    ]
    kept = set(fold(log))
    for each in log:
        if each.type != "attempt":
            assert is_void(each.id, rewinds) == (each not in kept)


@given(logs(), st.data())
def test_folding_in_two_steps_is_folding_at_once(log: list[Entry], data: st.DataObject) -> None:
    """So a reader may fold as it goes."""
    at = data.draw(st.integers(0, len(log)))
    assert fold([*fold(log[:at]), *log[at:]]) == fold(log)


@given(logs())
def test_the_outcome_is_the_last_word_or_the_surviving_tokens(log: list[Entry]) -> None:
    kept = [log[index] for index in range(len(log)) if survives(log, index)]
    text = [json.loads(each.data)["text"] for each in kept if each.type == "token"]
    found, end = outcome(log), log[-1]
    if end.type == "final" and json.loads(end.data)["answer"] is not None:
        assert found == ("said", [{"a": 1}], {"b": 2}, None)
        return
    assert found.answer == ("".join(text) if text else None)
    assert found.error == (json.loads(end.data) if end.type == "error" else None)
    assert (found.citations, found.usage) == ([], {})


# -- outcomes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("answer", ["", "said"])
def test_an_answer_wins_over_tokens_even_when_it_is_empty(answer: str) -> None:
    log = [START, attempt("1-1", "0-1"), entry("1-2"), entry("1-3", "final", answer=answer, citations=[], usage={})]
    assert outcome(log).answer == answer


def test_a_run_without_a_token_has_no_answer() -> None:
    log = [START, attempt("1-1", "0-1"), entry("1-2", "message")]
    assert outcome(log).answer is None
    assert outcome([*log, entry("1-3", "final", answer=None, citations=[], usage={})]).answer is None


def test_an_empty_token_is_an_answer() -> None:
    log = [START, attempt("1-1", "0-1"), entry("1-2", "token", text="")]
    assert outcome(log).answer == ""


def test_messages_and_reasoning_are_no_part_of_the_answer() -> None:
    log = [START, attempt("1-1", "0-1"), entry("1-2", "reasoning"), entry("1-3"), entry("1-4", "message")]
    assert outcome(log).answer == "1-3 "


def test_a_failed_run_keeps_its_tokens_and_tells_its_error() -> None:
    error = {"code": "agent_failed", "message": "m"}
    log = [START, attempt("1-1", "0-1"), entry("1-2"), entry("1-3", "error", **error)]
    assert outcome(log) == ("1-2 ", [], {}, error)
