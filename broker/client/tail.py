"""A run's stream over all its connections, without the connections: what came is checked, folded and given out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

from broker.client.backoff import Backoff
from broker.client.errors import DamagedStream, Unreachable, error_of, not_a_broker
from broker.client.frames import Frame, Frames, Oversized
from broker.client.received import Received, received
from broker.errors import BadCursor, BrokerError, RunNotFound
from broker.fold import rewind
from broker.ids import START, Cursor, EventId

TRIES_AT_A_HOLE = 4
"""Connections in a row that may bring the same hole."""
LEAST_PAUSE_SECONDS = 0.1
"""However little `retry:` asks for: what ends each connection at once must not be asked hundreds of times a second."""
AWAY = frozenset({408, 429, 502, 503, 504})
"""The service, or what is before it, says: come again."""


class Broken(Exception):
    """The connection brings nothing more that could be used; the next one will."""


class Disconnected(NamedTuple):
    """A stream has lost its connection, and connects again after `pause` seconds."""

    cause: str
    pause: float


class Tail:
    """Feed it what comes; it says what to do next.

    `headers()` for each connection, then `opened()` with what it was answered, `feed()` with its bytes, and `broken()`
    when it ended, until `done`. Its order of checks is that of PROTOCOL 6: ids are contiguous (1.2), a rewind voids
    what is above its `resume_from` (1.5), a lost cursor begins anew (6.5), the terminal ends it.
    """

    def __init__(
        self,
        request_id: str,
        url: str,
        backoff: Backoff,
        *,
        after: str | EventId | None = None,
        on_disconnect: Callable[[Disconnected], object] | None = None,
        on_reconnect: Callable[[], object] | None = None,
    ) -> None:
        """`url` is for messages. Raises BadCursor for an `after` that is none, or another run's."""
        self.request_id = request_id
        self.kept: list[Received] = []
        """What survives of what came."""
        self.position = cursor_of(request_id, after)
        self.end: Received | None = None
        """The terminal event."""
        self.done = False
        self.reconnects = 0
        self._url = url
        self._backoff = backoff
        self._on_disconnect = on_disconnect
        self._on_reconnect = on_reconnect
        self._frames = Frames()
        self._holes = 0
        self._lost = False
        self._refused: BrokerError | None = None
        self._retry_after = 0.0

    def headers(self) -> dict[str, str]:
        """Of the next connection's request."""
        self._frames = Frames()
        self._refused, self._retry_after = None, 0.0
        cursor = {"Last-Event-ID": str(self.position)} if self.position != START else {}
        return {"Accept": "text/event-stream", "Accept-Encoding": "identity", "Cache-Control": "no-store"} | cursor

    def opened(self, status: int, headers: Mapping[str, str], body: bytes) -> None:
        """`body` is read for a status other than 200 only. Raises Broken, or the error that the answer means."""
        self._backoff.answered()
        if status == 204:
            self.done = True
        elif status in AWAY:
            self._refused, self._retry_after = error_of(status, headers, body), retry_after(headers)
            raise Broken(self._refused.detail)
        elif status != 200:
            raise error_of(status, headers, body)
        else:
            media_type = headers.get("content-type", "").partition(";")[0].strip().lower()
            if media_type != "text/event-stream":
                raise not_a_broker(status, f"{media_type or 'untyped'}, not an event stream")
        if self._lost:
            self._lost = False
            self.reconnects += 1
            if self._on_reconnect is not None:
                self._on_reconnect()

    def feed(self, data: bytes) -> Iterator[Received]:
        """The events that `data` completes, but for the terminal, which is `end` then.

        Raises Broken where the log cannot go on so, RunNotFound where it is gone.
        """
        frames, comments = self._frames, self._frames.comments
        try:
            for frame in frames.feed(data):
                event = self._next(frame)
                if event is None:
                    continue
                self._backoff.succeeded()
                if event.terminal:
                    self.end, self.done = event, True
                    return
                yield event
        except Oversized as error:
            self._holes += 1
            raise Broken(str(error)) from None
        if frames.retry_ms is not None:
            self._backoff.base = max(frames.retry_ms / 1000, LEAST_PAUSE_SECONDS)
        if frames.comments > comments:
            self._backoff.succeeded()

    def broken(self, cause: str, now: float) -> float:
        """Seconds to wait before the next connection. Raises what ends it: Unreachable, Unavailable, DamagedStream."""
        if self._holes >= TRIES_AT_A_HOLE:
            raise DamagedStream(f"Run {self.request_id}: {cause}, also after {self._holes} tries.")
        pause = self._backoff.pause(now, at_least=self._retry_after)
        if pause is None:
            raise self._refused or Unreachable(self._url, cause)
        self._lost = True
        if self._on_disconnect is not None:
            self._on_disconnect(Disconnected(cause, pause))
        return pause

    def _next(self, frame: Frame) -> Received | None:
        """The event of a frame; None for one that was here before."""
        if frame.id is None:
            if frame.type == "error":
                raise RunNotFound(f"Run {self.request_id} no longer exists: it was erased, or lost.")
            return None
        try:
            event = received(frame.id, frame.type, frame.data)
            resume_from = EventId.parse(str(event.data.get("resume_from"))) if event.type == "attempt" else None
        except (ValueError, RecursionError, BadCursor) as error:
            raise self._hole(f"after {self.position} comes what is no event ({error})") from None
        if event.id == START and resume_from == START:  # the cursor was lost (PROTOCOL 6.5)
            self.position = START
            self.kept.clear()
            return event
        if event.id <= self.position:
            return None
        if not _follows(self.position, event.id, resume_from):
            raise self._hole(f"after {self.position} comes {event.id}")
        self.position, self._holes = event.id, 0
        if resume_from is None:
            self.kept.append(event)
        else:
            rewind(self.kept, resume_from)
        return event

    def _hole(self, what: str) -> Broken:
        self._holes += 1
        return Broken(what)


def _follows(position: EventId, event_id: EventId, resume_from: EventId | None) -> bool:
    """Whether nothing is missing between the two.

    An epoch begins with its `attempt`; what is missing before that is void, unless `resume_from` is above `position`.
    """
    if event_id.epoch == position.epoch:
        return event_id.seq == position.seq + 1
    return event_id.seq == 1 and resume_from is not None and resume_from <= position


def cursor_of(request_id: str, after: str | EventId | None) -> EventId:
    """Takes both forms of a cursor. Raises BadCursor."""
    if after is None:
        return START
    cursor = Cursor.parse(str(after))
    if cursor.request_id not in (None, request_id):
        raise BadCursor("This cursor belongs to another run.")
    return cursor.event_id


def retry_after(headers: Mapping[str, str]) -> float:
    """The seconds of a Retry-After; 0 where there is none. Its form with a date is not used by brokers."""
    text = headers.get("retry-after", "")
    return float(text) if text.isascii() and text.isdigit() and len(text) < 10 else 0.0
