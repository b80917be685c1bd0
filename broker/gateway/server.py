"""uvicorn, with a drain that lets streams move on, and its connections within reach of the streams."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
from collections.abc import Callable
from http import HTTPStatus
from types import FrameType
from typing import Any, ClassVar, Literal

import uvicorn
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from broker.gateway.problems import problem_bytes
from broker.gateway.sinks import EXTENSION, TransportSink

logger = logging.getLogger(__name__)

SEND_BUFFER = 256 * 1024
"""Bytes that the kernel keeps for a client that does not read; its own limit is 4 MB."""
MAX_HEAD = 64 * 1024
"""Bytes of a request's head."""
HEADER_TIMEOUT = 10.0
"""Seconds for a request's head, from the connection or from its first byte on."""
BODY_TIMEOUT = 30.0
"""Seconds for a request's body."""
SHUTDOWN_SECONDS = 5
END_SECONDS = SHUTDOWN_SECONDS + 4
"""From the drain delay's end to the exit, at most: the requests that have begun, and what was closed (PROTOCOL 5.2)."""


class LeanFlow(FlowControl):
    """uvicorn's flow control without an asyncio.Event for each connection, of which most never wait."""

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self.read_paused = False
        self.write_paused = False
        self._writable: asyncio.Future[None] | None = None

    async def drain(self) -> None:
        if self.write_paused:
            if self._writable is None:
                self._writable = asyncio.get_running_loop().create_future()
            await asyncio.shield(self._writable)

    def pause_writing(self) -> None:
        self.write_paused = True

    def resume_writing(self) -> None:
        self.write_paused = False
        if self._writable is not None:
            self._writable.set_result(None)
            self._writable = None


class LeanEvent(asyncio.Event):
    """An event with at most one waiter, and without asyncio's deque of them (700 bytes)."""

    def __init__(self) -> None:
        self._value = False
        self._waiter: asyncio.Future[None] | None = None

    def set(self) -> None:
        self._value = True
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def wait(self) -> Literal[True]:
        if not self._value:
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        return True


class Pipeline(list[Any]):
    """A deque as far as uvicorn needs one, for the pipelined requests that nobody sends."""

    __slots__ = ()

    def appendleft(self, item: Any) -> None:
        self.insert(0, item)


class StreamProtocol(HttpToolsProtocol):
    """Offers itself to the application as an extension of the scope (broker.gateway.sinks)."""

    # In slots, because more attributes than uvicorn's own would cost each connection a dict of 1.5 KB.
    __slots__ = ("_answering", "_head_bytes", "_in_head", "_request_timer", "_stall_timer", "sink")
    send_timeout: ClassVar[float] = 30.0
    """Seconds after which a client that takes nothing is cut; uvicorn would wait for ever."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.pipeline = Pipeline()  # type: ignore[assignment]
        self.sink: TransportSink | None = None
        self._answering: RequestResponseCycle | None = None
        self._request_timer: asyncio.TimerHandle | None = None
        self._stall_timer: asyncio.TimerHandle | None = None
        self._in_head = False
        self._head_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.flow = LeanFlow(transport)
        sock: socket.socket | None = transport.get_extra_info("socket")
        if sock is not None:
            with contextlib.suppress(OSError):
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
        self._expect_within(HEADER_TIMEOUT)

    def connection_lost(self, exc: Exception | None) -> None:
        self._expect_nothing()
        if self._stall_timer is not None:
            self._stall_timer.cancel()
        super().connection_lost(exc)
        # uvicorn lets it run on where this was a reset (HAProxy ends idle connections so), and hold all of it for 75 s.
        self._unset_keepalive_if_required()
        if self._answering is not None and not self._answering.response_complete:
            # uvicorn tells the newest request only: where others are pipelined, that is not the one that has begun.
            self._answering.disconnected = True
            self._answering.message_event.set()
        if self.sink is not None:
            self.sink.lost()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._in_head:
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD:
                self._refuse(431, "The request's head is too large.")
            elif self._request_timer is None:
                self._expect_within(HEADER_TIMEOUT)

    def on_message_begin(self) -> None:
        self._in_head, self._head_bytes = True, 0
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._expect_within(BODY_TIMEOUT)
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._expect_nothing()
        super().on_message_complete()

    def _expect_within(self, seconds: float) -> None:
        """The rest of what the client has begun to send; uvicorn would wait for ever."""
        self._expect_nothing()
        self._request_timer = self.loop.call_later(seconds, self.transport.abort)

    def _expect_nothing(self) -> None:
        if self._request_timer is not None:
            self._request_timer.cancel()
            self._request_timer = None

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        if not cycle.message_event.is_set():
            cycle.message_event = LeanEvent()
        self._answering = cycle
        scope: Any = cycle.scope
        scope["extensions"] = {EXTENSION: self}
        super()._start_asgi_task(cycle, app if scope["http_version"] == "1.1" else _without_chunks(cycle, app))

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stall_timer = self.loop.call_later(self.send_timeout, self.transport.abort)
        if self.sink is not None:
            self.sink.pause()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._stall_timer is not None:
            self._stall_timer.cancel()
            self._stall_timer = None
        if self.sink is not None:
            self.sink.resume()

    def send_400_response(self, msg: str) -> None:
        """uvicorn answers what it cannot parse in plain text; here every error is a problem document."""
        self._refuse(400, msg)

    def _refuse(self, status: int, detail: str) -> None:
        phrase = HTTPStatus(status).phrase
        body = problem_bytes(status, phrase.lower().replace(" ", "_"), phrase, detail)
        head = (
            f"HTTP/1.1 {status} {phrase}\r\ncontent-type: application/problem+json\r\n"
            f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
        )
        self.transport.write(head.encode("ascii") + body)
        self.transport.close()


def _without_chunks(cycle: RequestResponseCycle, app: Any) -> Any:
    """For HTTP/1.0, to which uvicorn sends chunks as well: a body without a length ends with its connection."""

    async def unchunked(scope: Scope, receive: Receive, send: Send) -> None:
        async def plain_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                names = {name.lower() for name, _ in message["headers"]}
                cycle.chunked_encoding = None if b"content-length" in names else False
            elif cycle.chunked_encoding is False and not cycle.expected_content_length:
                cycle.expected_content_length = len(message.get("body", b""))
            await send(message)

        await app(scope, receive, plain_send)

    return unchunked


class Server(uvicorn.Server):
    """On SIGTERM or SIGINT: `on_drain` at once, `on_cut` after the drain delay, then the end; twice: at once."""

    def __init__(
        self, config: uvicorn.Config, *, drain_delay: float, on_drain: Callable[[], None], on_cut: Callable[[], None]
    ) -> None:
        super().__init__(config)
        self._drain_delay = drain_delay
        self._on_drain = on_drain
        self._on_cut = on_cut
        self._draining = False
        self._loop: asyncio.AbstractEventLoop | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """uvicorn would close its listener at once, and re-raise the signal at its end: the exit code is 0 here."""
        if self._loop is None:
            self.should_exit = True
        else:
            self._loop.call_soon_threadsafe(self._signalled, sig)

    def _signalled(self, sig: int) -> None:
        if self._draining:
            self.should_exit = self.force_exit = True
            return
        self._draining = True
        logger.info("draining", extra={"signal": signal.Signals(sig).name, "delay": self._drain_delay})
        self._on_drain()
        asyncio.get_running_loop().call_later(self._drain_delay, self._cut)

    def _cut(self) -> None:
        self._on_cut()
        self.should_exit = True


def configure(app: ASGIApp, *, send_timeout: float) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        http=type("Protocol", (StreamProtocol,), {"__slots__": (), "send_timeout": send_timeout}),
        ws="none",
        loop="auto",
        lifespan="on",
        access_log=False,
        log_config=None,
        server_header=False,
        proxy_headers=False,
        backlog=4096,
        timeout_keep_alive=75,
        timeout_graceful_shutdown=SHUTDOWN_SECONDS,
    )
