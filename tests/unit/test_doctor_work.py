"""What `broker doctor` says of the queue, the workers and the keys of tokens; and how it says things."""

from __future__ import annotations

import json
from typing import Any

import click
import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.doctor import report
from broker.doctor.auth import Auth, Jwks, judge_auth
from broker.doctor.finding import Finding, Severity
from broker.doctor.queue import Queue, judge_queue
from broker.doctor.workers import judge_workers
from broker.runs.workers import WorkerInfo
from tests.kit.doctor import documented, in_source, the, worst

OK, NOTE, WARNING, ERROR = Severity
JWKS = Jwks(url="https://id/jwks", is_private=True, keys=2, algorithms=["RS256"], needed=["RS256"])


def worker(number: int = 1, **facts: Any) -> WorkerInfo:
    sound: dict[str, Any] = {
        "id": f"w{number}",
        "host": "box",
        "pid": number,
        "version": "1.0",
        "started_at_ms": 0,
        "runs": 0,
        "max_jobs": 10,
        "agents": ("research",),
    }
    return WorkerInfo(**{**sound, **facts})


def judged(*workers: WorkerInfo, waiting: int = 0) -> list[Finding]:
    return judge_workers(workers, waiting=waiting, agents=("research",), version="1.0")


def test_an_empty_queue_and_no_abandoned_run_are_fine() -> None:
    assert worst(judge_queue(Queue(waiting=0))) is OK
    assert worst(judge_queue(Queue(waiting=5, oldest_seconds=2))) is OK


def test_a_queue_in_which_runs_wait_long_is_a_warning() -> None:
    finding = the(judge_queue(Queue(waiting=1, oldest_seconds=11)), "queue")
    assert finding.severity is WARNING and finding.title.startswith("1 run in the queue")


def test_runs_without_a_worker_are_an_error_that_names_some() -> None:
    queue = Queue(waiting=0, abandoned=5, abandoned_seconds=90, abandoned_ids=("a" * 32, "b" * 32))
    finding = the(judge_queue(queue), "runs_without_worker")
    assert finding.severity is ERROR
    assert "5 runs" in finding.title and "90 s" in finding.title and "a" * 32 in finding.title
    assert finding.title.endswith(", …")


def test_no_worker_is_an_error_where_runs_wait_and_a_warning_else() -> None:
    assert the(judged(waiting=1), "workers").severity is ERROR
    assert the(judged(), "workers").severity is WARNING


def test_workers_that_agree_are_fine_and_full_ones_a_note() -> None:
    assert worst(judged(worker(1), worker(2, runs=3))) is OK
    assert the(judged(worker(runs=10)), "workers").severity is NOTE


def test_workers_of_other_versions_are_a_warning() -> None:
    found = judged(worker(1), worker(2, version="0.9"))
    assert the(found, "worker_versions").severity is WARNING
    assert "0.9 (box:2)" in the(found, "worker_versions").title
    assert the(judged(worker(version="2.0")), "worker_versions").severity is WARNING


def test_workers_with_other_agents_are_a_warning_that_names_what_fails() -> None:
    found = judge_workers([worker(1, agents=())], waiting=0, agents=("research",), version="1.0")
    assert "runs of research fail" in the(found, "worker_agents").title
    more = judge_workers([worker(agents=("research", "x"))], waiting=0, agents=("research",), version="1.0")
    assert the(more, "worker_agents").severity is WARNING and "fail" not in the(more, "worker_agents").title


@pytest.mark.parametrize(
    ("auth", "code", "expected"),
    [
        (Auth(none=True), "auth", WARNING),
        (Auth(refused="BROKER_JWT_SECRET must have at least 32 bytes"), "auth", ERROR),
        (Auth(algorithms=["HS256"], secret_variety=20), "auth", OK),
        (Auth(algorithms=["HS256"], secret_variety=1), "auth_secret", WARNING),
        (Auth(algorithms=["RS256"], jwks=JWKS), "auth_jwks", OK),
        (Auth(algorithms=["HS256"], jwks=Jwks(url="u", is_private=True)), "auth_jwks", NOTE),
    ],
)
def test_how_tokens_are_verified_is_judged(auth: Auth, code: str, expected: Severity) -> None:
    assert the(judge_auth(auth), code).severity is expected
    assert worst(judge_auth(auth)) is expected


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        ({}, OK),
        ({"is_private": False}, WARNING),
        ({"failure": "status 404", "keys": 0, "algorithms": []}, ERROR),
        ({"keys": 0, "algorithms": []}, ERROR),
        ({"needed": ["RS256", "ES256"]}, NOTE),
    ],
)
def test_a_jwks_is_judged_by_its_keys_and_by_the_way_to_it(facts: dict[str, Any], expected: Severity) -> None:
    jwks = Jwks(**{**vars(JWKS), **facts})
    assert worst(judge_auth(Auth(algorithms=["RS256"], jwks=jwks))) is expected


def finding(severity: Severity, *, title: str = "a title", advice: str = "what to do") -> Finding:
    return Finding(code="some_code", severity=severity, title=title, advice=advice)


@given(st.lists(st.sampled_from(Severity)))
def test_the_exit_code_is_that_of_the_worst_finding(severities: list[Severity]) -> None:
    expected = 2 if ERROR in severities else 1 if WARNING in severities else 0
    assert report.exit_code([finding(severity) for severity in severities]) == expected


def test_a_finding_is_a_mark_a_title_and_its_advice_indented() -> None:
    assert report.lines(finding(WARNING), width=80, color=False) == [
        "warning  a title [some_code]",
        "         what to do",
    ]
    assert report.lines(finding(OK, advice=""), width=80, color=False) == ["ok       a title"]


def test_colors_change_nothing_but_the_mark() -> None:
    colored = report.lines(finding(ERROR), width=80, color=True)
    assert colored[0].startswith("\x1b[") and click.unstyle(colored[0]) == "error    a title [some_code]"
    assert "\x1b" not in colored[1]


@given(st.integers(1, 200), st.text("ab ", max_size=300))
def test_lines_keep_to_the_width_of_the_terminal(width: int, text: str) -> None:
    words = " ".join(word[:15] for word in text.split())
    for line in report.lines(finding(NOTE, title="t", advice=words), width=width, color=False)[1:]:
        assert len(line) <= max(width, 29)


def test_the_summary_counts_what_is_not_ok() -> None:
    assert report.summary([finding(OK)]) == "Everything is fine."
    assert report.summary([finding(ERROR), finding(NOTE), finding(NOTE), finding(OK)]) == "1 error, 2 notes"


def test_json_has_every_finding_and_the_exit_code() -> None:
    printed = json.loads(report.to_json([finding(WARNING), finding(OK)]))
    assert printed["exit_code"] == 1
    assert printed["findings"][0] == {
        "code": "some_code", "severity": "warning", "title": "a title", "advice": "what to do"
    }  # fmt: skip


def test_every_finding_is_documented_as_bad_as_it_can_be_and_no_other_is() -> None:
    assert documented() == in_source()
