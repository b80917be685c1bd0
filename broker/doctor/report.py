"""Findings as lines for people, as JSON for programs, and as an exit code."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterable, Sequence

import click

from broker.doctor.finding import Finding, Severity
from broker.words import count

MARKS = {Severity.OK: "ok", Severity.NOTE: "note", Severity.WARNING: "warning", Severity.ERROR: "error"}
_COLORS = {Severity.OK: "green", Severity.NOTE: "cyan", Severity.WARNING: "yellow", Severity.ERROR: "red"}
_INDENT = max(map(len, MARKS.values())) + 2
_LEAST_WIDTH = 20


def lines(finding: Finding, *, width: int, color: bool) -> list[str]:
    """A mark and the title, then the advice, below it and indented; of what is not ok also the code."""
    mark = MARKS[finding.severity]
    title = finding.title if finding.severity is Severity.OK else f"{finding.title} [{finding.code}]"
    first, *rest = _wrapped(title, width)
    shown = click.style(mark, fg=_COLORS[finding.severity], bold=finding.severity is Severity.ERROR) if color else mark
    return [
        shown + " " * (_INDENT - len(mark)) + first,
        *(" " * _INDENT + line for line in (*rest, *_wrapped(finding.advice, width))),
    ]


def _wrapped(text: str, width: int) -> list[str]:
    """A word that is longer than a line, such as a setting to paste, stays whole."""
    return textwrap.wrap(text, max(width - _INDENT, _LEAST_WIDTH), break_long_words=False, break_on_hyphens=False)


def summary(findings: Sequence[Finding]) -> str:
    counts = {severity: sum(finding.severity is severity for finding in findings) for severity in Severity}
    worse = [(Severity.ERROR, "error"), (Severity.WARNING, "warning"), (Severity.NOTE, "note")]
    parts = [count(counts[severity], word) for severity, word in worse if counts[severity]]
    return ", ".join(parts) if parts else "Everything is fine."


def to_json(findings: Iterable[Finding]) -> str:
    """{"findings": [{code, severity, title, advice}], "exit_code"}"""
    found = list(findings)
    rows = [
        {"code": each.code, "severity": MARKS[each.severity], "title": each.title, "advice": each.advice}
        for each in found
    ]
    return json.dumps({"findings": rows, "exit_code": exit_code(found)}, indent=2)


def exit_code(findings: Iterable[Finding]) -> int:
    """0, 1 with a warning, 2 with an error."""
    worst = max((finding.severity for finding in findings), default=Severity.OK)
    return {Severity.WARNING: 1, Severity.ERROR: 2}.get(worst, 0)
