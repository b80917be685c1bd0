"""A run as an SSE response."""

from __future__ import annotations

import asyncio
import random
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Mapping

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from broker import sse
from broker.errors import RunNotFound, Unavailable
from broker.gateway.dialects.dialect import Dialect
from broker.gateway.hub import Hub
from broker.gateway.reader import End, Reader
from broker.gateway.sinks import StreamSink, open_sink
from broker.settings import LONGEST_RETRY_SECONDS

HEADERS = [
    (b"content-type", sse.CONTENT_TYPE),
    (b"cache-control", b"no-cache, no-transform"),
    (b"x-accel-buffering", b"no"),
]

STREAM = "broker.stream"
"""The key in an ASGI scope under which a response that has begun leaves its stream to be run."""

RETRY_MS = (1000, int(LONGEST_RETRY_SECONDS * 1000))
"""EventSource has no back-off of its own: the jitter that spreads a reconnect storm is in `retry:`."""


def retry_ms() -> int:
    return random.randint(*RETRY_MS)


def event_stream(body: bytes, headers: Mapping[str, str]) -> Response:
    """A stream that is all there."""
    return Response(body, 200, {**{name.decode(): value.decode() for name, value in HEADERS}, **headers})


class StreamResponse(ABC):
    """An ASGI application that streams."""

    __slots__ = ("_headers", "_send_timeout", "dialect", "hub")

    def __init__(self, hub: Hub, dialect: Dialect, *, send_timeout: float, headers: dict[str, str]) -> None:
        self.hub = hub
        self.dialect = dialect
        self._send_timeout = send_timeout
        self._headers = [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Begins the response. The rest is left to the outermost layer: what idles shall hold no router."""
        await send({"type": "http.response.start", "status": 200, "headers": [*HEADERS, *self._headers]})
        if scope["method"] == "HEAD":
            await send({"type": "http.response.body", "body": b""})
            return
        await send({"type": "http.response.body", "body": self.dialect.opening(retry_ms()), "more_body": True})
        del self._headers
        scope[STREAM] = self

    async def run(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Streams, and ends the response."""
        _forget_request(scope)
        sink = open_sink(scope, receive, send, self._send_timeout)
        try:
            end = await self.follow(sink)
            if end is End.CUT:
                await sink.cut(self.dialect.closing(retry_ms()))
        finally:
            await sink.close()
        if end is End.FINISHED:
            try:
                async with asyncio.timeout(self._send_timeout):
                    await send({"type": "http.response.body", "body": b"", "more_body": False})
            except TimeoutError:
                sink.abort()

    @abstractmethod
    async def follow(self, sink: StreamSink) -> End:
        """Writes all that there is to write."""


class RunResponse(StreamResponse):
    """Streams one run, in one dialect."""

    __slots__ = ("_open_reader",)

    def __init__(
        self,
        hub: Hub,
        dialect: Dialect,
        open_reader: Callable[[StreamSink], Awaitable[Reader]],
        *,
        send_timeout: float,
        headers: dict[str, str],
    ) -> None:
        """`open_reader` is hub.open, but for the sink."""
        super().__init__(hub, dialect, send_timeout=send_timeout, headers=headers)
        self._open_reader = open_reader

    async def follow(self, sink: StreamSink) -> End:
        reader = await self._open(sink)
        if reader is None:
            return End.CUT
        self.dialect = reader.view.dialect  # one for all readers, instead of one for each
        try:
            return await self.hub.follow(reader)
        finally:
            self.hub.close_reader(reader)

    async def _open(self, sink: StreamSink) -> Reader | None:
        """None where the client must come again: the run cannot be watched now, or went a moment ago."""
        try:
            return await self._open_reader(sink)
        except (Unavailable, RunNotFound):
            return None
        finally:
            del self._open_reader


def _forget_request(scope: Scope) -> None:
    """The request is answered; what it brought would be held for as long as the stream."""
    scope["headers"].clear()
    for name in ("app", "router", "endpoint", "path_params", "state", "asgi", "starlette.exception_handlers"):
        scope.pop(name, None)


class ComeAgain:
    """What an EventSource gets instead of a 503, which would close it for good: 200, `retry:` and a cut."""

    def __init__(self, send_timeout: float) -> None:
        self.send_timeout = send_timeout

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": HEADERS})
        if scope["method"] == "HEAD":
            await send({"type": "http.response.body", "body": b""})
            return
        sink = open_sink(scope, receive, send, self.send_timeout)
        await sink.cut(sse.retry(retry_ms()))
        await sink.close()
