"""Server-Sent Events on the wire. Frames are ASCII, LF only, one `data:` line, and written whole."""

from __future__ import annotations

CONTENT_TYPE = b"text/event-stream; charset=utf-8"


def frame(event_type: str, data: str, event_id: str = "") -> bytes:
    """One event. `data` is JSON on one line, so it needs no splitting; `event_id` may be left out.

    The id is the first line: a stream of many runs puts more behind it (`Places.complete` in the gateway).
    """
    head = f"id: {event_id}\n" if event_id else ""
    return f"{head}event: {event_type}\ndata: {data}\n\n".encode("ascii")


def unnamed(data: str, event_id: str = "") -> bytes:
    """One event without a type of its own: `message` to an EventSource."""
    head = f"id: {event_id}\n" if event_id else ""
    return f"{head}data: {data}\n\n".encode("ascii")


def comment(text: str) -> bytes:
    """A comment, without a blank line: several clients dispatch an empty event for `: ping` + blank line."""
    return f": {text}\n".encode("ascii")


def retry(milliseconds: int) -> bytes:
    """How long EventSource waits before it reconnects. One line, for the reason that `comment` gives."""
    return b"retry: %d\n" % milliseconds
