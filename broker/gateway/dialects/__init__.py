"""Dialects: the wire formats that a log can be projected into. One module each; this table registers them.

A dialect is a pure, deterministic fold over a run's entries. It keeps nothing between connections: the same log gives
the same frames on every gateway and every replay.
"""

from __future__ import annotations

from typing import Protocol

from broker.events import Entry
from broker.gateway.dialects.native import Native


class Projection(Protocol):
    """The fold, somewhere in a log. An entry's frames depend on that entry alone, so that it can begin anywhere."""

    def feed(self, entry: Entry) -> bytes:
        """The frames of the next entry, whole; b"" where the dialect shows nothing for it."""


class Dialect(Protocol):
    """A wire format. All bytes are whole lines."""

    @property
    def name(self) -> str: ...

    def projection(self, request_id: str, *, long_ids: bool) -> Projection:
        """A fold. `long_ids`: cursors of the form `<request_id>/<event id>`."""

    def opening(self, retry_ms: int) -> bytes:
        """A connection's first bytes."""

    def heartbeat(self, text: str) -> bytes:
        """What keeps an idle connection alive; no client sees an event."""

    def gone(self) -> bytes:
        """The run is no longer there."""

    def closing(self, retry_ms: int) -> bytes:
        """The last bytes of a connection that is cut before the end."""


DIALECTS: dict[str, Dialect] = {dialect.name: dialect for dialect in (Native(),)}
"""Every dialect by its name."""
