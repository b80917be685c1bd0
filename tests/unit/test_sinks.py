"""The fast path's sink, on the event loop that a gateway runs on."""

from __future__ import annotations

import asyncio
import socket
from typing import cast

import uvloop
from starlette.types import Message

from broker.gateway.sinks import TransportSink


class Connection(asyncio.Protocol):
    def __init__(self) -> None:
        self.transport: asyncio.Transport
        self.sink: TransportSink | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)


async def _receive() -> Message:
    return {"type": "http.disconnect"}


def test_a_client_that_is_gone_fails_nobody_who_writes_to_it() -> None:
    """One sweep writes the heartbeats of all streams."""

    async def write() -> None:
        with socket.create_server(("127.0.0.1", 0)) as server:
            _, connection = await asyncio.get_running_loop().create_connection(Connection, *server.getsockname())
            client, _ = server.accept()
            with client:
                sink = TransportSink(connection, _receive, 1)
                sink.write(b"before")
                connection.transport.abort()
                await asyncio.sleep(0.05)
                sink.write(b"after")
                assert client.recv(100) == b"before"

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(write())
