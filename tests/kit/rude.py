"""Clients that come and are killed."""

from __future__ import annotations

import random
import socket
import struct
import time
from urllib.parse import urlsplit

from tests.kit.http import token

AUTHORIZATION = f"Bearer {token('alice', ttl=7200)}"


def come_and_be_killed(url: str, request_id: str, n: int, chance: random.Random) -> None:
    """The n-th reads the run, or holds a poll of it, and goes in one of many ways, at any moment."""
    parts = urlsplit(url)
    with socket.socket() as sock:
        sock.connect((parts.hostname, parts.port))
        path = f"/api/v1/runs/{request_id}/stream" if n % 7 else f"/api/v1/runs/{request_id}?wait=60"
        request = (
            f"GET {path} HTTP/1.{n % 5 != 0:d}\r\nHost: {parts.netloc}\r\nAuthorization: {AUTHORIZATION}\r\n\r\n"
        ).encode()
        sock.sendall(request[: chance.randrange(len(request))] if n % 11 == 0 else request)
        if n % 3:
            time.sleep(chance.random() * 0.01)
        if n % 4 == 1:
            sock.settimeout(0.05)
            try:
                sock.recv(chance.randrange(1, 2000))
            except TimeoutError:
                pass
        if n % 2:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        elif n % 6 == 0:
            sock.shutdown(socket.SHUT_WR)
