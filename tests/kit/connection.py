"""One HTTP/1.1 connection at the level of its bytes: keep-alive, pipelining, chunks, and how a body ends."""

from __future__ import annotations

import io
import socket
from types import TracebackType
from typing import NamedTuple
from urllib.parse import urlsplit


class Head(NamedTuple):
    version: str
    status: int
    headers: dict[str, str]
    """Names in lower case; each comes once."""


class Connection:
    """Sends bytes, and reads answers one after the other."""

    def __init__(self, url: str, *, seconds: float = 15) -> None:
        parts = urlsplit(url)
        assert parts.hostname and parts.port
        self._socket = socket.create_connection((parts.hostname, parts.port), timeout=seconds)
        self._file: io.BufferedReader = self._socket.makefile("rb")
        self._host = parts.netloc

    def __enter__(self) -> Connection:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._file.close()
        self._socket.close()

    def send(self, data: bytes) -> None:
        self._socket.sendall(data)

    def request(
        self, method: str, path: str, headers: dict[str, str], body: bytes | None = None, *, version: str = "1.1"
    ) -> bytes:
        """A request's bytes, to be sent."""
        lines = [f"{method} {path} HTTP/{version}", f"Host: {self._host}"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        if body is not None:
            lines += [f"Content-Length: {len(body)}", "Content-Type: application/json"]
        return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1") + (body or b"")

    def head(self) -> Head:
        version, status, *_ = self._line().split(" ")
        headers: dict[str, str] = {}
        while line := self._line():
            name, _, value = line.partition(":")
            assert name.lower() not in headers, f"{name} came twice"
            headers[name.lower()] = value.strip()
        return Head(version, int(status), headers)

    def chunk(self) -> bytes | None:
        """The next chunk; b"" is the last one, None the end of the connection where a chunk should begin."""
        line = self._file.readline()
        if not line:
            return None
        data = self._file.read(int(line, 16))
        assert self._file.read(2) == b"\r\n", "a chunk without its end"
        return data

    def chunked(self) -> tuple[bytes, bool]:
        """(a chunked body, whether its last chunk came)"""
        body = b""
        while data := self.chunk():
            body += data
        return body, data is not None

    def body(self, head: Head) -> bytes:
        """A body that must end as its framing says."""
        if head.headers.get("transfer-encoding") == "chunked":
            body, ended = self.chunked()
            assert ended, f"the last chunk is missing after {body[-100:]!r}"
            return body
        return self._file.read(int(head.headers.get("content-length", 0)))

    def rest(self) -> bytes:
        """Until the server closes the connection."""
        return self._file.read()

    def _line(self) -> str:
        line = self._file.readline()
        assert line.endswith(b"\r\n"), f"the connection ended in a head, at {line!r}"
        return line[:-2].decode("latin-1")
