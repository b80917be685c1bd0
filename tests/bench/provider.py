"""A model server that says when: each token is the time at which it was written, in ns of CLOCK_MONOTONIC.

`python -m tests.bench.provider --port 8001`. It serves POST /v1/chat/completions, streaming only, whatever is asked.
All processes of a machine share the clock, so whoever gets a token knows how long it took.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import socket
import subprocess
import sys
import time
from types import TracebackType
from typing import Self

from tests.kit.processes import wait_for

TOKENS = 5
THINKS_SECONDS = 0.03
"""Until the first token."""
PAUSE_SECONDS = 0.02
PATH = "/v1/chat/completions"
_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


async def _serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """One connection, as many requests as come."""
    with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
        while True:
            head = await reader.readuntil(b"\r\n\r\n")
            length = next(line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
            await reader.readexactly(int(length.partition(b":")[2]))
            await _answer(writer)
    writer.close()


async def _answer(writer: asyncio.StreamWriter) -> None:
    writer.write(_HEAD)
    for number in range(TOKENS):
        await asyncio.sleep(PAUSE_SECONDS if number else THINKS_SECONDS)
        # With the role, as the first chunk of many servers has it. One write, for the time is in it.
        delta = {"role": "assistant", "content": f"{time.monotonic_ns()} "}
        writer.write(_chunk(json.dumps(_body(delta, None))))
    writer.write(_chunk(json.dumps(_body({}, "stop"))) + _chunk("[DONE]") + b"0\r\n\r\n")
    await writer.drain()


def _body(delta: dict[str, str], reason: str | None) -> dict[str, object]:
    choice = {"index": 0, "delta": delta, "finish_reason": reason}
    return {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "bench", "choices": [choice]}


def _chunk(data: str) -> bytes:
    frame = f"data: {data}\n\n".encode("ascii")
    return b"%x\r\n%s\r\n" % (len(frame), frame)


class Provider:
    """The server as a process."""

    def __init__(self, port: int) -> None:
        self._port = port

    def __enter__(self) -> Self:
        command = [sys.executable, "-m", "tests.bench.provider", "--port", str(self._port)]
        self._process = subprocess.Popen(command)
        wait_for(self._listens)
        return self

    def _listens(self) -> bool:
        with socket.socket() as sock:
            return sock.connect_ex(("127.0.0.1", self._port)) == 0

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.wait()


async def _main(port: int) -> None:
    async with await asyncio.start_server(_serve, "127.0.0.1", port) as server:
        await server.serve_forever()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="A model server that says when it wrote each token")
    parser.add_argument("--port", type=int, required=True)
    asyncio.run(_main(parser.parse_args().port))
