"""A run that has readers in this process: where its log ends, and its views. No I/O happens here."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Hashable
from typing import NamedTuple

from broker.events import Entry
from broker.gateway.dialects.dialect import Dialect, FoldFailed
from broker.gateway.view import View
from broker.ids import START, EventId
from broker.runs.record import FINISHED
from broker.status import STATUS_OF

logger = logging.getLogger(__name__)


class State(NamedTuple):
    """What Redis says of a run, in one read."""

    status: str
    end: EventId
    lease_ms: int | None
    """What is left of its lease, negative when it has expired; None where nobody holds one."""

    @property
    def expired(self) -> bool:
        return self.lease_ms is not None and self.lease_ms < 0


class Channel:
    """A run with readers in this process."""

    __slots__ = (
        "counted",
        "end",
        "gone",
        "inbox",
        "next_beat",
        "opened",
        "page",
        "reading",
        "request_id",
        "stale",
        "status",
        "subscribed",
        "users",
        "views",
        "watchers",
    )

    def __init__(self, request_id: str) -> None:
        self.request_id = request_id
        self.end = START
        self.status = ""
        self.gone = False
        self.counted = False
        """Whether the run is cancelled when nobody reads it."""
        self.subscribed = False
        self.opened = False
        """Whether the run was read since the subscription."""
        self.users = 0
        self.views: dict[Hashable, View] = {}
        self.watchers: list[asyncio.Future[None]] = []
        self.inbox: list[tuple[EventId, list[Entry]]] = []
        """Messages that wait while the run is read again."""
        self.stale = False
        """Whether something came meanwhile that only another read can tell."""
        self.reading: asyncio.Task[None] | None = None
        self.next_beat = 0.0
        self.page = 64
        """Entries in one read of the log: by their size so far, what a page may hold."""

    @property
    def finished(self) -> bool:
        """Nothing follows: the log's end is a terminal event, or the run was erased."""
        return self.gone or self.status in FINISHED

    def view(self, dialect: Dialect) -> View:
        key = dialect.key
        if key not in self.views:
            self.views[key] = View(self, dialect)
        return self.views[key]

    def drop(self, view: View) -> None:
        """Whoever comes for its dialect gets a new one."""
        if self.views.get(view.key) is view:
            del self.views[view.key]

    def accept(self, prev: EventId, entries: list[Entry]) -> bool:
        """Takes a message. False: it does not follow the channel's end, so the run must be read again (6.1)."""
        last = entries[-1]
        if last.id <= self.end:
            return True  # known: an id never has two contents, so there is nothing new in it
        if prev != self.end:
            return False
        self.end = last.id
        self.status = "running"
        for view in tuple(self.views.values()):
            try:
                view.extend(entries)
            except FoldFailed:
                # Of this dialect only: its readers come again, and those of the others have missed nothing.
                logger.exception("a fold failed", extra={"request_id": self.request_id, "dialect": repr(view.key)})
                self.drop(view)
                view.fail()
        if last.terminal:
            self.status = STATUS_OF[last.type]
            self._finish()
        return True

    def flush(self) -> None:
        for view in self.views.values():
            view.flush()

    def update(self, state: State | None) -> None:
        """The run was read again: readers go on by themselves, through the log, to where it ends now."""
        if state is None:
            self.erase()
            return
        moved = state.end != self.end
        for view in self.views.values():
            if moved:
                view.release()
            for reader in view.readers:
                reader.verified = False
                if moved:
                    reader.fold_again()
                reader.wake()
        self.end, self.status = state.end, state.status
        if moved:
            for view in self.views.values():
                view.restart()
        if self.finished:
            self._finish()

    def erase(self) -> None:
        self.gone = True
        self._finish()

    def _finish(self) -> None:
        for watcher in self.watchers:
            if not watcher.done():
                watcher.set_result(None)
        if self.gone:
            for view in self.views.values():
                view.release()

    def beat(self, state: State | None) -> None:
        text = heartbeat_text(self.end, state)
        for view in self.views.values():
            view.beat(text)


def heartbeat_text(end: EventId, state: State | None) -> str:
    """The truth as far as it is known: `heartbeat 12-812 lease=1.3s`."""
    if state is None:
        return f"heartbeat {end} lease=unknown"
    if state.lease_ms is None:
        return f"heartbeat {end} {state.status}"
    lease = f"{state.lease_ms / 1000:.1f}s" if state.lease_ms > 0 else "expired"
    return f"heartbeat {end} lease={lease}"
