"""What a dialect is: a pure, deterministic fold over a run's log.

It keeps nothing between connections: the same log gives the same frames, with the same positions, on every gateway and
every replay.
"""

from __future__ import annotations

import asyncio
from collections.abc import Hashable, Iterable, Sequence
from typing import Any, NamedTuple, Protocol

from broker import sse
from broker.events import Entry


class Frame(NamedTuple):
    """What a client gets in one piece."""

    position: Any
    """Where a client stands that has this frame: it rises from frame to frame, and can be compared."""
    data: bytes
    """Whole lines: the frame of one SSE event."""


class Dialect(Protocol):
    """A run in one wire format, made for each request from what never changes of the run. All bytes are whole lines.

    A fold begins at the log's beginning, or at any entry where the dialect is `seekable`. Old states are kept and gone
    on from, so that a state is an immutable value.
    """

    @property
    def key(self) -> Hashable:
        """Name and variant: equal keys of one run give equal bytes, which all their readers share."""

    @property
    def seekable(self) -> bool:
        """Whether an entry's frames depend on that entry alone, and their position is its id."""

    @property
    def exact(self) -> bool:
        """Whether a cursor that no frame has as its position is lost: what its client has shown is not in the log."""

    @property
    def may_be_ahead(self) -> bool:
        """Whether a cursor above all frames is none of these: its client may name frames that it has not seen, and gets
        what comes above it."""

    @property
    def start(self) -> Any:
        """The state before the first entry."""

    def step(self, state: Any, entry: Entry) -> tuple[Any, Sequence[Frame]]:
        """The state after the next entry, and the frames that show it; none where the dialect shows nothing of it."""

    def ended(self, state: Any) -> bool:
        """Whether nothing follows, whatever the log brings."""

    def opening(self, retry_ms: int) -> bytes:
        """A connection's first bytes."""

    def heartbeat(self, text: str) -> bytes:
        """What keeps an idle connection alive; no client sees an event."""

    def gone(self, state: Any) -> bytes:
        """The run is no longer there: the end of a stream. `state` is where the client stands, or the start where that
        is not known."""

    def lost(self, state: Any) -> bytes:
        """The log does not know the client's cursor. The whole log follows where the dialect is `seekable`; elsewhere
        this is the end of the stream. `state` as in `gone`."""

    def closing(self, retry_ms: int) -> bytes:
        """The last bytes of a connection that is cut before the end."""


class SseConnection:
    """How a connection begins, idles and is cut, for clients that take `retry:` and comments."""

    def opening(self, retry_ms: int) -> bytes:
        return sse.retry(retry_ms)

    def heartbeat(self, text: str) -> bytes:
        return sse.comment(text)

    def closing(self, retry_ms: int) -> bytes:
        return sse.retry(retry_ms)


class Folded(NamedTuple):
    """A fold, somewhere in a log."""

    state: Any
    seen: Any
    """The position of the last frame so far; None before the first."""


FOLDED_AT_ONCE = 500
"""Entries of a log, before others get their turn."""


class FoldFailed(Exception):
    """A dialect's `step` raised: an event has what the dialect does not know, or the dialect is wrong. It will raise
    again for whoever folds the same log."""


def step(dialect: Dialect, folded: Folded, entry: Entry) -> tuple[Folded, Sequence[Frame]]:
    """Raises FoldFailed."""
    state, seen = folded
    try:
        state, frames = dialect.step(state, entry)
    except Exception as error:
        raise FoldFailed(f"the dialect {dialect.key!r} cannot show {entry.type} {entry.id}") from error
    folded = _new(Folded, (state, frames[-1][0] if frames else seen))
    return folded, frames


_new: Any = tuple.__new__
"""Half the time of a NamedTuple's own constructor: this is on the way of every event."""


async def fold_log(dialect: Dialect, entries: Iterable[Entry]) -> Folded:
    """A whole log, or its beginning. A long one holds nobody up. Raises FoldFailed."""
    folded = Folded(dialect.start, None)
    for number, entry in enumerate(entries):
        folded, _ = step(dialect, folded, entry)
        if number % FOLDED_AT_ONCE == 0:
            await asyncio.sleep(0)
    return folded
