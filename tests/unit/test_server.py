"""The limits of a connection, which uvicorn has not: on a real socket, with short times."""

from __future__ import annotations

import asyncio
import gc
import socket
import struct
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any

import pytest
from starlette.types import Receive, Scope, Send
from uvicorn.server import ServerState

from broker.gateway import server as server_module
from broker.gateway.server import MAX_HEAD, StreamProtocol, configure

Connect = Callable[[], Awaitable[tuple[asyncio.StreamReader, asyncio.StreamWriter]]]
GET = b"GET /%b HTTP/1.1\r\nHost: test\r\n\r\n"


async def app(scope: Scope, receive: Receive, send: Send) -> None:
    """Reads the body; `/large` has an answer that no buffer holds."""
    while (await receive()).get("more_body"):
        pass
    body = b"x" * (64 * 1024 * 1024) if scope["path"] == "/large" else b"ok"
    length = str(len(body)).encode()
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", length)]})
    await send({"type": "http.response.body", "body": body})


@pytest.fixture
async def connect(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Connect]:
    monkeypatch.setattr(server_module, "HEADER_TIMEOUT", 0.3)
    monkeypatch.setattr(server_module, "BODY_TIMEOUT", 0.3)
    config = configure(app, send_timeout=0.3)
    config.load()
    state, kind = ServerState(), config.http_protocol_class

    def protocol() -> Any:
        return kind(config=config, server_state=state, app_state={})  # type: ignore[call-arg]

    async with AsyncExitStack() as stack:
        listener = await asyncio.get_running_loop().create_server(protocol, "127.0.0.1", 0)
        stack.callback(listener.close)
        port = listener.sockets[0].getsockname()[1]

        async def open_connection() -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
            reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1024)
            stack.callback(writer.close)
            return reader, writer

        yield open_connection
        for connection in tuple(state.connections):
            connection.transport.abort()
        await asyncio.sleep(0.05)


async def closed(reader: asyncio.StreamReader) -> bytes:
    """What still comes until the connection is closed; fails when it is not."""
    received = b""
    async with asyncio.timeout(10):
        try:
            while part := await reader.read(65536):
                received += part
        except ConnectionResetError:
            pass
    return received


async def answered(reader: asyncio.StreamReader) -> None:
    async with asyncio.timeout(10):
        assert (await reader.readuntil(b"\r\n\r\nok")).startswith(b"HTTP/1.1 200")


async def test_a_connection_that_sends_nothing_is_closed(connect: Connect) -> None:
    reader, _ = await connect()
    assert await closed(reader) == b""


async def test_a_head_that_does_not_end_is_cut_off(connect: Connect) -> None:
    reader, writer = await connect()
    writer.write(GET[:-4] % b"")
    assert await closed(reader) == b""


async def test_a_second_head_that_does_not_end_is_cut_off_too(connect: Connect) -> None:
    reader, writer = await connect()
    writer.write(GET % b"")
    await answered(reader)
    writer.write(b"GET / HT")
    assert await closed(reader) == b""


async def test_a_body_that_does_not_end_is_cut_off(connect: Connect) -> None:
    reader, writer = await connect()
    writer.write(b"POST / HTTP/1.1\r\nHost: test\r\nContent-Length: 10\r\n\r\nhalf")
    assert await closed(reader) == b""


async def test_a_connection_that_is_kept_alive_may_rest(connect: Connect) -> None:
    reader, writer = await connect()
    for _ in range(2):
        writer.write(GET % b"")
        await answered(reader)
        await asyncio.sleep(0.6)


async def test_a_connection_that_is_reset_while_it_rests_is_forgotten_at_once(connect: Connect) -> None:
    reader, writer = await connect()
    writer.write(GET % b"")
    await answered(reader)
    name = writer.get_extra_info("sockname")
    mine = (kept for kept in gc.get_objects() if isinstance(kept, StreamProtocol) and kept.client == name)
    [held] = map(weakref.ref, mine)
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
    async with asyncio.timeout(10):
        while held() is not None:
            await asyncio.sleep(0.01)
            gc.collect()


@pytest.mark.parametrize("lines", [1, 1000])
async def test_a_head_that_is_too_large_is_refused(connect: Connect, lines: int) -> None:
    reader, writer = await connect()
    line = b"X: " + b"x" * (MAX_HEAD // lines) + (b"" if lines == 1 else b"\r\n")
    head = b"GET / HTTP/1.1\r\n" + line * lines
    # What is over the limit comes by itself, so that nothing is left unread: a reset would overtake the answer.
    writer.write(head[: MAX_HEAD - 1])
    await asyncio.sleep(0.1)
    writer.write(head[MAX_HEAD - 1 : MAX_HEAD + 100])
    assert (await closed(reader)).startswith(b"HTTP/1.1 431")


async def test_a_client_that_does_not_take_its_answer_is_cut(connect: Connect) -> None:
    reader, writer = await connect()
    writer.write(GET % b"large")
    await asyncio.sleep(1.5)
    assert len(await closed(reader)) < 64 * 1024 * 1024
