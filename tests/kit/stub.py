"""A server that says exactly the bytes that a test wants, to see what a client makes of them."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Literal

Ending = Literal["fin", "reset"]
Step = bytes | float | threading.Event | Ending
"""Bytes to send, seconds or what to wait for (which is set after 10 s), or how to end the connection."""


def reset(sock: socket.socket) -> None:
    """Closes with an RST. A thread that waits in `recv` would put it off, so it is woken first."""
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        sock.shutdown(socket.SHUT_RD)
    sock.close()


def chunked(*parts: bytes, end: bool = True, status: str = "200 OK", content_type: str = "text/event-stream") -> bytes:
    """A response; each of `parts` is one chunk. `end`: whether the last chunk is sent."""
    head = f"HTTP/1.1 {status}\r\nContent-Type: {content_type}\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
    body = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts)
    return head + body + (b"0\r\n\r\n" if end else b"")


class Stub:
    """Answers the n-th connection with the n-th script and ends it. `requests` are the heads that came, and when."""

    def __init__(self, *scripts: Sequence[Step]) -> None:
        self._scripts = scripts
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}/"
        self.requests: list[str] = []
        self.times: list[float] = []
        self._thread = threading.Thread(target=self._serve, daemon=True)

    def __enter__(self) -> Stub:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(5)

    def sent(self, header: str) -> list[str | None]:
        """The header's value in each request."""
        found = []
        for request in self.requests:
            lines = (line.partition(": ") for line in request.split("\r\n")[1:])
            found.append(next((value for name, _, value in lines if name.lower() == header.lower()), None))
        return found

    def _serve(self) -> None:
        for script in self._scripts:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            with sock:
                self._answer(sock, script)

    def _answer(self, sock: socket.socket, script: Sequence[Step]) -> None:
        head = b""
        while b"\r\n\r\n" not in head:
            data = sock.recv(65536)
            if not data:
                return
            head += data
        self.requests.append(head.decode("latin-1"))
        self.times.append(time.monotonic())
        for step in script:
            if step == "reset":
                time.sleep(0.05)  # so that what was sent is read first
                reset(sock)
            elif isinstance(step, bytes):
                with contextlib.suppress(OSError):
                    sock.sendall(step)
            elif isinstance(step, threading.Event):
                step.wait(10)
                step.set()
            elif isinstance(step, float):
                time.sleep(step)
