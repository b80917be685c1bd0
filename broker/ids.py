"""Names of runs and of events: `request_id`, event id, cursor."""

from __future__ import annotations

import re
import secrets
from typing import NamedTuple

from broker.errors import BadCursor

REQUEST_ID = re.compile(r"[0-9a-f]{32}")
_EVENT_ID = re.compile(r"(0|[1-9][0-9]{0,15})-(0|[1-9][0-9]{0,15})", re.ASCII)


class EventId(NamedTuple):
    """`<epoch>-<seq>`: Redis entry id, SSE id and cursor in one. Compares as two integers (PROTOCOL 1.2)."""

    epoch: int
    seq: int

    def __str__(self) -> str:
        return "%d-%d" % self  # noqa: UP031  # twice as fast as an f-string

    @classmethod
    def parse(cls, text: str) -> EventId:
        """Raises BadCursor unless `text` is exactly `<epoch>-<seq>`."""
        match = _EVENT_ID.fullmatch(text)
        if match is None:
            raise BadCursor("An event id is '<epoch>-<seq>', two decimal numbers.")
        return cls(int(match[1]), int(match[2]))


START = EventId(0, 0)
"""The cursor that means: from the beginning."""


class Cursor(NamedTuple):
    """Where a client stands: an event id and, in the long form `<request_id>/<event id>`, the run's name."""

    event_id: EventId
    request_id: str | None = None

    @classmethod
    def parse(cls, text: str) -> Cursor:
        """Raises BadCursor for anything but the short and the long form."""
        request_id, slash, rest = text.rpartition("/")
        if slash and not REQUEST_ID.fullmatch(request_id):
            raise BadCursor("A cursor is '<event id>' or '<request_id>/<event id>'.")
        return cls(EventId.parse(rest), request_id or None)


def new_request_id() -> str:
    return secrets.token_hex(16)


class Owner(NamedTuple):
    """Whose run it is. To everyone else the run does not exist."""

    tenant: str
    subject: str
