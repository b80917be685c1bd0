"""A strict model of the WHATWG event stream: parser and EventSource."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import httpx


@dataclass(frozen=True)
class Event:
    id: str
    """The last event id as it is when the event is dispatched."""
    type: str
    data: str

    @property
    def json(self) -> Any:
        return json.loads(self.data)


@dataclass
class EventStream:
    """Bytes in, events out. HTML standard, 9.2.6."""

    last_event_id: str = ""
    retry_ms: int | None = None
    comments: list[str] = field(default_factory=list)
    _buffer: bytes = b""
    _started: bool = False
    _skip_lf: bool = False
    _data: list[str] = field(default_factory=list)
    _type: str = ""
    _id: str | None = None

    def feed(self, data: bytes) -> list[Event]:
        events = []
        for line in self._lines(data):
            event = self._line(line.decode("utf-8", "replace"))
            if event is not None:
                events.append(event)
        return events

    def _lines(self, data: bytes) -> Iterator[bytes]:
        self._buffer += data
        if not self._started and len(self._buffer) >= 3:
            self._buffer = self._buffer.removeprefix(b"\xef\xbb\xbf")
            self._started = True
        while True:
            if self._skip_lf and self._buffer:
                self._buffer = self._buffer.removeprefix(b"\n")
                self._skip_lf = False
            ends = [at for at in (self._buffer.find(b"\n"), self._buffer.find(b"\r")) if at >= 0]
            if not ends:
                return
            line, end, rest = self._buffer[: min(ends)], self._buffer[min(ends)], self._buffer[min(ends) + 1 :]
            self._buffer, self._skip_lf, self._started = rest, end == 0x0D, True
            yield line

    def _line(self, line: str) -> Event | None:
        if line == "":
            return self._dispatch()
        if line.startswith(":"):
            self.comments.append(line[1:].removeprefix(" "))
            return None
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if name == "data":
            self._data.append(value)
        elif name == "event":
            self._type = value
        elif name == "id" and "\0" not in value:
            self._id = value
        elif name == "retry" and value.isascii() and value.isdigit():
            self.retry_ms = int(value)
        return None

    def _dispatch(self) -> Event | None:
        if self._id is not None:
            self.last_event_id, self._id = self._id, None
        data, kind = self._data, self._type
        self._data, self._type = [], ""
        if not data:
            return None
        return Event(self.last_event_id, kind or "message", "\n".join(data))


def parse(body: bytes) -> list[Event]:
    return EventStream().feed(body)


def read(chunks: Iterable[bytes]) -> Iterator[Event]:
    stream = EventStream()
    for data in chunks:
        yield from stream.feed(data)


class Connection(NamedTuple):
    """One of an EventSource's requests."""

    last_event_id: str | None
    """The header that it sent, if any."""
    status: int | None
    """None where no answer came."""
    waited: float
    """The reconnection time before it, in seconds."""


class EventSource:
    """The EventSource of HTML 9.2: iterate over it to get its events, over as many connections as it needs.

    Like Chromium, which keeps the last event id over connections; unlike a browser it can send headers and a body, as
    @microsoft/fetch-event-source does. `haste` shortens the waits, which are then only recorded.
    """

    def __init__(
        self, url: str, *, headers: Mapping[str, str] | None = None, body: Any = None, haste: float = 1.0
    ) -> None:
        self.url = url
        self.ready_state: Literal["connecting", "open", "closed"] = "connecting"
        self.last_event_id = ""
        self.reconnection_ms = 3000
        self.connections: list[Connection] = []
        self.comments: list[str] = []
        self._headers = {"Accept": "text/event-stream", "Cache-Control": "no-store", **(headers or {})}
        self._body = body
        self._haste = haste

    def close(self) -> None:
        self.ready_state = "closed"

    def __iter__(self) -> Iterator[Event]:
        with httpx.Client(timeout=30, follow_redirects=True, verify=False) as client:
            yield from self._connect(client, 0.0)
            while self.ready_state != "closed":
                self.ready_state = "connecting"
                wait = self.reconnection_ms / 1000
                time.sleep(wait / self._haste)
                yield from self._connect(client, wait)

    def _connect(self, client: httpx.Client, waited: float) -> Iterator[Event]:
        """One connection. A broken one is reestablished, as is one that ends."""
        sent = self.last_event_id or None
        headers = {**self._headers, "Last-Event-ID": sent} if sent else self._headers
        method, content = ("GET", None) if self._body is None else ("POST", json.dumps(self._body).encode("ascii"))
        if content:
            headers = {**headers, "Content-Type": "application/json"}
        number = len(self.connections)
        self.connections.append(Connection(sent, None, waited))
        with (
            contextlib.suppress(httpx.NetworkError, httpx.RemoteProtocolError),
            client.stream(method, self.url, headers=headers, content=content) as response,
        ):
            self.connections[number] = Connection(sent, response.status_code, waited)
            content_type = response.headers.get("content-type", "").partition(";")[0]
            if response.status_code != 200 or content_type != "text/event-stream":
                self.close()
                return
            self.ready_state = "open"
            yield from self._read(response)

    def _read(self, response: httpx.Response) -> Iterator[Event]:
        """What is left of a frame at the end of a connection was never there: not its data, not its id."""
        stream = EventStream(last_event_id=self.last_event_id, comments=self.comments)
        for data in response.iter_raw():
            for event in stream.feed(data):
                self.last_event_id = event.id
                yield event
                if self.ready_state == "closed":
                    return
            self.last_event_id = stream.last_event_id
            if stream.retry_ms is not None:
                self.reconnection_ms = stream.retry_ms
