"""Server-Sent Events as they come: bytes in, frames out, wherever the bytes were cut (HTML standard, 9.2.6).

Lines end at LF, CR and CRLF only. Libraries that read an event stream as lines of text also split at U+2028, U+0085 and
others, and hold a line of any length.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

MAX_FRAME_BYTES = 16 * 1024 * 1024
"""More than any event of a broker: what does not end before is no event stream."""
_LINE_END = re.compile(rb"\r\n|\r|\n")
_MS = re.compile(r"[0-9]{1,9}")
_BOM = b"\xef\xbb\xbf"


class Oversized(Exception):
    """A frame that does not end."""


class Frame(NamedTuple):
    id: str | None
    """This frame's own; None where it has none."""
    type: str
    data: str


class Frames:
    """One connection's frames. One that the end has cut was never there, nor was its id."""

    def __init__(self) -> None:
        self.retry_ms: int | None = None
        """What the last `retry:` said."""
        self.comments = 0
        """How many came: heartbeats."""
        self.last_field = ""
        """The name of the last one that came; that of a comment is empty."""
        self._begun = False
        self._after_cr = False
        self._line: list[bytes] = []
        self._line_size = 0
        self._data_size = 0
        self._id: str | None = None
        self._type = ""
        self._data: list[str] = []

    def feed(self, data: bytes) -> Iterator[Frame]:
        """Raises Oversized."""
        for line in self._lines(data):
            if line:
                self._field(line.decode("utf-8", "replace"))
                continue
            frame = Frame(self._id, self._type or "message", "\n".join(self._data)) if self._data else None
            self._id, self._type, self._data, self._data_size = None, "", [], 0
            if frame is not None:
                yield frame
        if self._line_size + self._data_size > MAX_FRAME_BYTES:
            raise Oversized(f"an event of more than {MAX_FRAME_BYTES} bytes")

    def _lines(self, data: bytes) -> Iterator[bytes]:
        """The lines that end in `data`; the rest of it is kept."""
        if self._after_cr and data:
            data, self._after_cr = data.removeprefix(b"\n"), False
        if not data:
            return
        self._after_cr = data.endswith(b"\r")
        first, *others = _LINE_END.split(data)
        self._line.append(first)
        self._line_size += len(first)
        for other in others:
            line = b"".join(self._line)
            self._line, self._line_size = [other], len(other)
            if not self._begun:
                line, self._begun = line.removeprefix(_BOM), True
            yield line

    def _field(self, line: str) -> None:
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        self.last_field = name
        if name == "data":
            self._data.append(value)
            self._data_size += len(value) + 1
        elif name == "event":
            self._type = value
        elif name == "id" and "\0" not in value:
            self._id = value
        elif name == "retry" and _MS.fullmatch(value):
            self.retry_ms = int(value)
        elif name == "":
            self.comments += 1
