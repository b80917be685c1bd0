"""A TCP proxy that breaks connections in the middle of an answer, as networks do."""

from __future__ import annotations

import contextlib
import itertools
import socket
import threading
from collections.abc import Callable, Sequence
from types import TracebackType
from urllib.parse import urlsplit

from tests.kit.stub import reset


class Resets:
    """Hands each new connection to the next of `upstreams`, and breaks it after `budget()` bytes of its answer's body.

    `budget` is asked once for each connection: 0 breaks it before the head, None lets it live. Every second break is an
    RST, the others are a FIN. Heads are not torn, since http.client, and so requests, takes a torn head for a whole
    one; with `heads` they are, and the budget counts from their first byte.
    """

    def __init__(self, upstreams: Sequence[str], budget: Callable[[], int | None], *, heads: bool = False) -> None:
        self._upstreams = itertools.cycle([(urlsplit(url).hostname, urlsplit(url).port) for url in upstreams])
        self._budget = budget
        self._heads = heads
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.broken = 0
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []
        self._sockets: list[socket.socket] = []

    def __enter__(self) -> Resets:
        self._start(self._accept)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for sock in self._sockets:
            _shut(sock)
        for thread in self._threads:
            thread.join(5)
        for sock in self._sockets:
            sock.close()

    def _start(self, work: Callable[[], None]) -> None:
        thread = threading.Thread(target=work, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            try:
                server = socket.create_connection(next(self._upstreams))
            except OSError:
                client.close()
                continue
            self._sockets += [client, server]
            budget = self._budget()
            self._start(lambda c=client, s=server: self._up(c, s))  # type: ignore[misc]
            self._start(lambda c=client, s=server, b=budget: self._down(s, c, b))  # type: ignore[misc]

    def _up(self, client: socket.socket, server: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := client.recv(65536):
                server.sendall(data)
        _shut(server)

    def _down(self, server: socket.socket, client: socket.socket, budget: int | None) -> None:
        left, head = budget, b""
        with contextlib.suppress(OSError):
            while data := server.recv(65536):
                if left is not None and not self._heads and not head.endswith(b"\r\n\r\n"):
                    head, rest = _through_head(head + data)
                    left += len(data) - len(rest) if budget else 0
                if left is not None and len(data) >= left:
                    client.sendall(data[:left])
                    self._break(client, server)
                    return
                client.sendall(data)
                if left is not None:
                    left -= len(data)
        _shut(client)

    def _break(self, client: socket.socket, server: socket.socket) -> None:
        with self._lock:
            self.broken += 1
            hard = self.broken % 2
        if hard:
            reset(client)
        _shut(client)
        _shut(server)


def _through_head(data: bytes) -> tuple[bytes, bytes]:
    """(the head, as far as it is there; what follows it)"""
    at = data.find(b"\r\n\r\n")
    return (data, b"") if at < 0 else (data[: at + 4], data[at + 4 :])


def _shut(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)
