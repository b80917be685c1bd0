"""HTTP/1.1 byte by byte: for what no client library would send, and for replies as they are on the wire."""

from __future__ import annotations

import contextlib
import json
import socket
from typing import Any, NamedTuple
from urllib.parse import urlsplit


class Reply(NamedTuple):
    status: int
    headers: list[tuple[str, str]]
    """As they came: order, case and repetitions."""
    body: bytes

    def header(self, name: str) -> str | None:
        values = [value for key, value in self.headers if key.lower() == name.lower()]
        assert len(values) <= 1, f"{name} came {len(values)} times"
        return values[0] if values else None

    @property
    def json(self) -> Any:
        return json.loads(self.body)


def request(method: str, path: str, *headers: tuple[str, str], body: bytes | None = None, host: str = "test") -> bytes:
    """A request's bytes; `Host`, `Connection: close` and `Content-Length` are added."""
    lines = [f"{method} {path} HTTP/1.1", f"Host: {host}", "Connection: close"]
    lines += [f"{name}: {value}" for name, value in headers]
    if body is not None:
        lines.append(f"Content-Length: {len(body)}")
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1") + (body or b"")


def exchange(url: str, data: bytes, *, seconds: float = 15, half_close: bool = False) -> bytes:
    """Sends `data`; returns all that comes until the server closes the connection."""
    parts = urlsplit(url)
    assert parts.hostname and parts.port
    received = b""
    with socket.create_connection((parts.hostname, parts.port), timeout=seconds) as sock:
        with contextlib.suppress(ConnectionError):  # it may close before it has read all
            sock.sendall(data)
            if half_close:
                sock.shutdown(socket.SHUT_WR)
        with contextlib.suppress(ConnectionResetError):
            while part := sock.recv(65536):
                received += part
    return received


def parse(data: bytes, *, head_only: bool = False) -> Reply:
    """The one reply in `data`; its length must be what its head says."""
    head, blank, body = data.partition(b"\r\n\r\n")
    assert blank, f"no reply: {data[:200]!r}"
    status_line, *lines = head.decode("latin-1").split("\r\n")
    version, status, *_ = status_line.split(" ")
    assert version == "HTTP/1.1", status_line
    pairs = [line.partition(":") for line in lines]
    reply = Reply(int(status), [(name, value.strip()) for name, _, value in pairs], body)
    length = reply.header("content-length")
    if length is not None:
        assert len(body) == (0 if head_only else int(length)), f"{len(body)} bytes, content-length {length}"
    return reply


def ask(
    url: str, method: str, path: str, *headers: tuple[str, str], body: bytes | None = None, host: str | None = None
) -> Reply:
    """One request on its own connection."""
    data = request(method, path, *headers, body=body, host=host or urlsplit(url).netloc)
    return parse(exchange(url, data), head_only=method == "HEAD")
