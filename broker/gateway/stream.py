"""A run as an SSE response."""

from __future__ import annotations

import asyncio
import random

from starlette.types import Receive, Scope, Send

from broker import sse
from broker.errors import RunNotFound, Unavailable
from broker.gateway.channel import End, chunk
from broker.gateway.dialects import Dialect
from broker.gateway.hub import Hub
from broker.gateway.sinks import StreamSink, open_sink
from broker.ids import EventId
from broker.runs.record import Head

HEADERS = [
    (b"content-type", sse.CONTENT_TYPE),
    (b"cache-control", b"no-cache, no-transform"),
    (b"x-accel-buffering", b"no"),
]

RETRY_MS = (1000, 3000)
"""EventSource has no back-off of its own: the jitter that spreads a reconnect storm is in `retry:`."""


def retry_ms() -> int:
    return random.randint(*RETRY_MS)


class StreamResponse:
    """An ASGI application that streams one run, from `position`, in one dialect."""

    def __init__(
        self,
        hub: Hub,
        request_id: str,
        head: Head,
        dialect: Dialect,
        *,
        position: EventId,
        long_ids: bool,
        send_timeout: float,
        seconds: float | None,
        headers: dict[str, str],
    ) -> None:
        """`seconds`: how long the stream may last; None is for ever."""
        self.hub = hub
        self.request_id = request_id
        self.head = head
        self.dialect = dialect
        self.position = position
        self.long_ids = long_ids
        self.send_timeout = send_timeout
        self.seconds = seconds
        self.headers = [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [*HEADERS, *self.headers]})
        if scope["method"] == "HEAD":
            await send({"type": "http.response.body", "body": b""})
            return
        await send({"type": "http.response.body", "body": self.dialect.opening(retry_ms()), "more_body": True})
        sink = open_sink(scope, receive, send, self.send_timeout)
        try:
            end = await self._run(sink)
            if end is End.CUT:
                await sink.cut(self.dialect.closing(retry_ms()))
        finally:
            await sink.close()
        if end is End.FINISHED:
            try:
                async with asyncio.timeout(self.send_timeout):
                    await send({"type": "http.response.body", "body": b"", "more_body": False})
            except TimeoutError:
                sink.abort()

    async def _run(self, sink: StreamSink) -> End:
        cut_at = asyncio.get_running_loop().time() + self.seconds if self.seconds is not None else None
        try:
            return await self.hub.stream(
                self.request_id,
                self.head,
                self.dialect,
                sink,
                position=self.position,
                long_ids=self.long_ids,
                cut_at=cut_at,
            )
        except Unavailable:
            return End.CUT
        except RunNotFound:
            gone = self.dialect.gone()
            sink.write(chunk(gone) if sink.chunked else gone)
            return End.FINISHED


class ComeAgain:
    """What an EventSource gets instead of a 503, which would close it for good: 200, `retry:` and a cut."""

    def __init__(self, dialect: Dialect, send_timeout: float) -> None:
        self.dialect = dialect
        self.send_timeout = send_timeout

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": HEADERS})
        if scope["method"] == "HEAD":
            await send({"type": "http.response.body", "body": b""})
            return
        sink = open_sink(scope, receive, send, self.send_timeout)
        await sink.cut(self.dialect.closing(retry_ms()))
        await sink.close()
