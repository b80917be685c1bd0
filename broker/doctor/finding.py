"""What a check has found."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum


class Severity(IntEnum):
    """In rising order. An error breaks a promise, or will; a warning breaks one on a bad day."""

    OK = 0
    NOTE = 1
    WARNING = 2
    ERROR = 3


@dataclass(frozen=True, kw_only=True)
class Finding:
    code: str
    """What was checked: stable, and what docs/doctor.md lists."""
    severity: Severity
    title: str
    """What is so, in one line."""
    advice: str = ""
    """What to do; never empty for a warning or an error."""


def ok(code: str, title: str) -> Finding:
    return Finding(code=code, severity=Severity.OK, title=title)


def note(code: str, title: str, advice: str = "") -> Finding:
    return Finding(code=code, severity=Severity.NOTE, title=title, advice=advice)


def warning(code: str, title: str, advice: str) -> Finding:
    return Finding(code=code, severity=Severity.WARNING, title=title, advice=advice)


def error(code: str, title: str, advice: str) -> Finding:
    return Finding(code=code, severity=Severity.ERROR, title=title, advice=advice)
