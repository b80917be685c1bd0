"""Words for people."""

from __future__ import annotations


def count(number: int, noun: str) -> str:
    """`1 event`, `2 events`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def reason(failure: BaseException) -> str:
    """What an exception says, on one line, or else its name."""
    return " ".join(str(failure).split()) or type(failure).__name__
