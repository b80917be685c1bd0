"""A strict model of the WHATWG event stream: parser and EventSource."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any


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
            self._buffer, self._skip_lf = rest, end == 0x0D
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
