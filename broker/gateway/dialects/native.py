"""The native dialect: each event as it is stored, its id as the SSE id."""

from __future__ import annotations

from broker import sse
from broker.events import Entry, Error


class Native:
    name = "native"

    def projection(self, request_id: str, *, long_ids: bool) -> NativeProjection:
        return NativeProjection(f"{request_id}/" if long_ids else "")

    def opening(self, retry_ms: int) -> bytes:
        return sse.retry(retry_ms)

    def heartbeat(self, text: str) -> bytes:
        return sse.comment(text)

    def gone(self) -> bytes:
        """Without an id: it is not an event of the log, and the client's cursor stays."""
        return sse.frame("error", Error(code="gone", message="This run no longer exists.").json_data())

    def closing(self, retry_ms: int) -> bytes:
        return sse.retry(retry_ms)


class NativeProjection:
    def __init__(self, prefix: str) -> None:
        self._prefix = prefix

    def feed(self, entry: Entry) -> bytes:
        return sse.frame(entry.type, entry.data, f"{self._prefix}{entry.id}")
