"""A log in a dialect, without a gateway."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from broker.events import Entry
from broker.gateway.dialects.dialect import Dialect, Frame


def frames_of(dialect: Dialect, entries: Iterable[Entry]) -> list[Frame]:
    """Of a whole log, or of its beginning."""
    return folded(dialect, entries)[1]


def body_of(dialect: Dialect, entries: Iterable[Entry]) -> bytes:
    return b"".join(frame.data for frame in frames_of(dialect, entries))


def folded(dialect: Dialect, entries: Iterable[Entry]) -> tuple[Any, list[Frame]]:
    """The state after the entries, and their frames."""
    state, frames = dialect.start, list[Frame]()
    for entry in entries:
        if dialect.ended(state):
            break
        state, more = dialect.step(state, entry)
        frames += more
    return state, frames
