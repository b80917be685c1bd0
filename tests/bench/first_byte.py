"""From a model's first byte to the client's: directly, and through gateway and worker, one after the other."""

from __future__ import annotations

import http.client
import json
import re
import socket
import statistics
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

from tests.bench.figures import Figures
from tests.bench.meter import Meter, redis_connections
from tests.bench.provider import PATH, TOKENS, Provider
from tests.bench.targets import Target

WARM_UP = 5
_STAMP = re.compile(rb'"(?:text|content)": ?"(\d{10,})')
_NS_PER_MS = 1e6


@dataclass(frozen=True, kw_only=True)
class FirstByte:
    """One request at a time, by turns: so what disturbs the machine disturbs both."""

    name: str
    requests: int

    @property
    def title(self) -> str:
        return f"a model's first byte to the client's: {self.requests:,} requests directly and as many through"

    def measure(self, target: Target) -> Figures:
        with Provider(target.model_port), _Listener(target.redis.port) as heard:
            target.work()
            for number in range(WARM_UP):
                _direct(target)
                _through(target, -number)
            meter = Meter(target)
            direct, through = [], []
            for number in range(self.requests):
                direct.append(_direct(target))
                through.append(_through(target, number))
            cost, connections = meter.stop(), redis_connections(target)
        first_direct = [each.first_ms for each in direct]
        first = [each.first_ms for each in through]
        return Figures(
            complete=all(len(each.came) == TOKENS for each in (*direct, *through)),
            disturbed=cost.disturbed,
            direct_p50_ms=statistics.median(first_direct),
            direct_p99_ms=_p99(first_direct),
            first_p50_ms=statistics.median(first),
            first_p99_ms=_p99(first),
            above_p50_ms=statistics.median(first) - statistics.median(first_direct),
            redis_connections=connections,
            later_p50_ms=statistics.median(ms for each in through for ms in each.later_ms),
            **parts_of(through, heard.times),
        )


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What one client saw, in ns."""

    came: dict[int, int] = field(default_factory=dict)
    """When each token came, by the time at which it was written."""
    worker: dict[str, list[int]] = field(default_factory=dict)
    """See agents.timed_chat."""

    @property
    def _taken_ms(self) -> list[float]:
        return [(at - stamp) / _NS_PER_MS for stamp, at in self.came.items()]

    @property
    def first_ms(self) -> float:
        return self._taken_ms[0]

    @property
    def later_ms(self) -> list[float]:
        return self._taken_ms[1:]


def _direct(target: Target) -> Reading:
    body = {"model": "bench", "stream": True, "messages": [{"role": "user", "content": "go"}]}
    return _read(f"http://127.0.0.1:{target.model_port}", PATH, body, {})


def _through(target: Target, number: int) -> Reading:
    headers = dict(header.split(": ", 1) for header in target.headers)
    return _read(target.url, target.submit_path, target.model_submission(f"first byte {number}"), headers)


def _read(url: str, path: str, body: dict[str, Any], headers: dict[str, str]) -> Reading:
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=60)
    reading = Reading()
    try:
        connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json", **headers})
        response = connection.getresponse()
        while line := response.readline():
            now = time.monotonic_ns()
            if b'"times"' in line:
                reading.worker.update(json.loads(line.partition(b":")[2])["usage"]["times"])
            elif found := _STAMP.search(line):
                reading.came[int(found[1])] = now
    finally:
        connection.close()
    return reading


def parts_of(readings: Sequence[Reading], heard: dict[int, int]) -> dict[str, float]:
    """Medians of the parts of a first token's way; empty where the target does not tell them."""
    parts: dict[str, list[float]] = {}
    for reading in readings:
        written, came = next(iter(reading.came.items()))
        if str(written) not in reading.worker:
            return {}
        agent, sent, answered = reading.worker[str(written)]
        published = heard[written]
        for name, began, ended in (
            ("agent_ms", written, agent),
            ("buffered_ms", agent, sent),
            ("append_ms", sent, published),
            ("gateway_ms", published, came),
            ("append_answer_ms", sent, answered),
        ):
            parts.setdefault(name, []).append((ended - began) / _NS_PER_MS)
    return {name: statistics.median(values) for name, values in parts.items()}


def _p99(values: Sequence[float]) -> float:
    return sorted(values)[int(len(values) * 0.99)]


class _Listener(threading.Thread):
    """Hears what gateways hear, and notes when: the time at which a token was published."""

    def __init__(self, port: int) -> None:
        super().__init__(daemon=True)
        self.times: dict[int, int] = {}
        self._socket = socket.create_connection(("127.0.0.1", port))
        self._socket.sendall(b"PSUBSCRIBE sb:*\r\n")

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self.join()
        self._socket.close()

    def run(self) -> None:
        while data := self._socket.recv(65536):
            now = time.monotonic_ns()
            for stamp in _STAMP.findall(data):
                self.times.setdefault(int(stamp), now)
