"""A stream's bytes, and when they came."""

from __future__ import annotations

import time

import httpx

from tests.kit.readers import TIMEOUT, Target


class Watch:
    def __init__(self) -> None:
        self.body = b""
        self.longest_gap = 0.0
        self.first_byte = 0.0

    def comments(self) -> list[bytes]:
        return [line[2:] for line in self.body.split(b"\n") if line.startswith(b": ")]


def observe(target: Target, after: str = "") -> Watch:
    watch, last = Watch(), time.monotonic()
    with httpx.stream(
        target.method,
        target.url,
        headers=target.request_headers(after),
        json=target.body,
        timeout=TIMEOUT,
        verify=False,
    ) as response:
        assert response.status_code == 200
        for data in response.iter_raw():
            now = time.monotonic()
            watch.first_byte = watch.first_byte or now - last
            watch.longest_gap = max(watch.longest_gap, now - last)
            watch.body, last = watch.body + data, now
    return watch
