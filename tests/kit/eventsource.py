"""Readers of event streams on asyncio, cheap enough for hundreds: one connection, and EventSource over many."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable
from typing import Literal
from urllib.parse import urlsplit

from tests.kit import sse

Ending = Literal["finished", "cut", "left"]
SMALL_BUFFER = 4096


class Stream:
    """One connection, read in the background as it comes.

    `heard` is called with each event. After `budget` bytes of the body the stream leaves, wherever that is. With a
    `pause` it reads a few kilobytes, waits for so many seconds, and so on.
    """

    def __init__(
        self,
        parser: sse.EventStream | None = None,
        *,
        heard: Callable[[sse.Event], None] | None = None,
        budget: int | None = None,
        pause: float = 0,
    ) -> None:
        self.parser = parser or sse.EventStream()
        self._heard = heard
        self._budget = budget
        self._pause = pause
        self.status = 0
        self.headers: dict[str, str] = {}
        self.events: list[sse.Event] = []
        self.body = bytearray()
        """Without the chunks' framing."""
        self.opened_at = 0.0
        self.fed_at = 0.0
        """When bytes came last."""
        self.ended_at = 0.0
        self.ending: Ending | None = None
        """`finished`: the body ended as its framing says; `cut`: the connection did before; `left`: the budget did."""
        self._writer: asyncio.StreamWriter | None = None
        self._task: asyncio.Task[None] | None = None

    async def open(
        self, url: str, path: str, headers: dict[str, str], *, method: str = "GET", body: bytes | None = None
    ) -> Stream:
        """Returns when the reply's head is there. Raises OSError or EOFError where none comes."""
        parts = urlsplit(url)
        reader, self._writer = await self._connect(str(parts.hostname), parts.port)
        try:
            lines = [f"{method} {path} HTTP/1.1", f"Host: {parts.netloc}", "Accept: text/event-stream"]
            lines += [f"{name}: {value}" for name, value in headers.items()]
            if body is not None:
                lines.append(f"Content-Length: {len(body)}")
            self._writer.write(("\r\n".join(lines) + "\r\n\r\n").encode("latin-1") + (body or b""))
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        except BaseException:
            await self._close_writer()
            raise
        self.status = int(head[0].split(" ")[1])
        pairs = [line.partition(":") for line in head[1:] if line]
        self.headers = {name.lower(): value.strip() for name, _, value in pairs}
        self.opened_at = self.fed_at = asyncio.get_running_loop().time()
        self._task = asyncio.create_task(self._read(reader))
        return self

    async def _connect(self, host: str, port: int | None) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        if not self._pause:
            return await asyncio.open_connection(host, port)
        sock = socket.socket()
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SMALL_BUFFER)
            sock.setblocking(False)
            await asyncio.get_running_loop().sock_connect(sock, (host, port))
        except BaseException:
            sock.close()
            raise
        return await asyncio.open_connection(sock=sock, limit=SMALL_BUFFER)

    async def _read(self, reader: asyncio.StreamReader) -> None:
        try:
            if self.headers.get("transfer-encoding") == "chunked":
                while size := int(await reader.readuntil(b"\r\n"), 16):
                    self._feed((await reader.readexactly(size + 2))[:-2])
                    if self._budget is not None and len(self.body) >= self._budget:
                        self.ending = "left"
                        return
                    if self._pause:
                        await asyncio.sleep(self._pause)
                await reader.readexactly(2)
            else:
                self._feed(await reader.readexactly(int(self.headers.get("content-length", 0))))
            self.ending = "finished"
        except (EOFError, ConnectionError):
            self.ending = "cut"
        finally:
            self.ended_at = asyncio.get_running_loop().time()
            await self._close_writer()

    def _feed(self, data: bytes) -> None:
        if self._budget is not None:
            data = data[: max(self._budget - len(self.body), 0)]
        self.body += data
        self.fed_at = asyncio.get_running_loop().time()
        if self.headers.get("content-type", "").startswith("text/event-stream"):
            events = self.parser.feed(data)
            self.events += events
            if self._heard is not None:
                for event in events:
                    self._heard(event)

    @property
    def comments(self) -> list[str]:
        return self.parser.comments

    async def until(self, condition: Callable[[], bool], seconds: float = 15) -> None:
        """Until it holds; fails when it does not within `seconds`."""
        try:
            async with asyncio.timeout(seconds):
                while not condition():
                    await asyncio.sleep(0.005)
        except TimeoutError:
            seen = [(event.id, event.type) for event in self.events]
            raise AssertionError(f"waited {seconds} s in vain: {self.status} {seen} {self.comments}") from None

    async def ended(self, seconds: float = 15) -> Ending:
        await self.until(lambda: self.ending is not None, seconds)
        assert self.ending is not None
        return self.ending

    async def ends(self, within: float) -> bool:
        """Whether it ends within so many seconds."""
        if self._task is not None:
            await asyncio.wait([self._task], timeout=within)
        return self.ending is not None

    async def close(self) -> None:
        if self._task is not None:
            if self.ending is None:
                self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        await self._close_writer()

    async def _close_writer(self) -> None:
        if self._writer is not None:
            self._writer.transport.abort()
            with contextlib.suppress(OSError):
                await self._writer.wait_closed()


class EventSource:
    """The WHATWG EventSource: reconnects after `retry`, without limit; closes for good on 204 and on any error status.

    `headers` are what a browser's would be if it could set them. `hurry` divides the reconnection time.
    """

    def __init__(self, url: str, path: str, headers: dict[str, str], *, hurry: float = 1) -> None:
        self.url, self.path, self.headers, self.hurry = url, path, headers, hurry
        self.streams: list[Stream] = []
        self.refused = 0
        """Connections that ended before a reply's head."""
        self.closed: str | None = None
        """Why it is closed for good; `204` is as it should be."""
        self.last_event_id = ""
        self.retry_ms = 3000

    @property
    def events(self) -> list[sse.Event]:
        return [event for stream in self.streams for event in stream.events]

    async def run(self) -> None:
        """Until it is closed for good, or cancelled."""
        while self.closed is None:
            await self._connect()
            if self.closed is None:
                await asyncio.sleep(self.retry_ms / 1000 / self.hurry)

    async def _connect(self) -> None:
        parser = sse.EventStream(last_event_id=self.last_event_id, retry_ms=self.retry_ms)
        cursor = {"Last-Event-ID": self.last_event_id} if self.last_event_id else {}
        stream = Stream(parser)
        try:
            await stream.open(self.url, self.path, {**self.headers, **cursor})
        except (OSError, EOFError):
            self.refused += 1
            return
        self.streams.append(stream)
        try:
            while stream.ending is None:
                await asyncio.sleep(0.02)
            if stream.status != 200 or not stream.headers.get("content-type", "").startswith("text/event-stream"):
                self.closed = str(stream.status)
        finally:
            self.last_event_id = parser.last_event_id
            self.retry_ms = parser.retry_ms or self.retry_ms
            await stream.close()
