"""One reader of a load: it reconnects as its kind does, to any gateway, and records what it gets."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from broker.events import TERMINAL
from tests.kit import sse
from tests.kit.eventsource import Stream
from tests.kit.findings import is_gone

if TYPE_CHECKING:
    from tests.kit.load import Load

NO_ANSWER = (OSError, EOFError, TimeoutError)
TORN_BYTES = 2_000
"""Readers that tear their connections do so within so many bytes of a body."""


class Reader:
    """One reader of a load: over as many connections as it needs, each to a random gateway."""

    def __init__(self, load: Load, name: str) -> None:
        self._load = load
        self._history = load.history
        self._name = name
        self._pause = load.chance.uniform(0.01, 0.1) if load.chance.random() < load.plan.slow else 0.0
        self._torn = load.chance.random() < load.plan.torn
        self._run = ""
        self._cursor = ""
        self._retry_ms = 3000
        self._last: sse.Event | None = None

    async def read(self, request_id: str, cursor: str) -> None:
        """An EventSource: comes again until it is told 204, or turned away."""
        self._run, self._cursor = request_id, cursor
        self._history.reads(self._name, request_id, cursor)
        while True:
            status = await self._connect("GET", f"/api/v1/runs/{request_id}/stream")
            if status not in (None, 200):
                return self._history.ended(self._name, str(status))
            if self._is_gone:
                return self._history.ended(self._name, "gone")
            await self._wait()

    async def submit_and_read(self, key: str, body: bytes) -> None:
        """A client that repeats its POST with the last id that it saw, blindly, until the run has ended."""
        self._history.reads(self._name)
        while True:
            status = await self._connect("POST", "/api/v1/query/stream", key, body)
            if status not in (None, 200, 503):
                return self._history.ended(self._name, str(status))
            if self._last is not None and self._last.type in TERMINAL:
                return self._history.ended(self._name, "gone" if self._is_gone else "terminal")
            await self._wait()

    @property
    def _is_gone(self) -> bool:
        return self._last is not None and is_gone(self._last.type, self._last.data)

    async def _wait(self) -> None:
        await asyncio.sleep(self._retry_ms / 1000 / self._load.plan.hurry)

    async def _connect(self, method: str, path: str, key: str = "", body: bytes | None = None) -> int | None:
        """One connection, to its end. Returns its status; None where no answer came."""
        headers = self._load.headers()
        if self._cursor:
            headers["Last-Event-ID"] = self._cursor
        if body is not None:
            headers |= {"Idempotency-Key": key, "Content-Type": "application/json"}
        stream = Stream(
            sse.EventStream(last_event_id=self._cursor),
            heard=self._heard,
            budget=self._load.chance.randrange(TORN_BYTES) if self._torn else None,
            pause=self._pause,
        )
        url, sent = self._load.gateway(), self._cursor
        try:
            async with asyncio.timeout(self._load.plan.silence):
                await stream.open(url, path, headers, method=method, body=body)
        except NO_ANSWER:
            self._history.connected(self._name, url, sent, None)
            return None
        if body is not None and "content-location" in stream.headers:
            self._accepted(key, stream.headers["x-request-id"])
        self._history.connected(self._name, url, sent, stream.status)
        try:
            await self._until_it_ends(stream)
        finally:
            self._history.disconnected(self._name, stream.ending or "left")
            self._cursor = stream.parser.last_event_id
            self._retry_ms = stream.parser.retry_ms or self._retry_ms
            await stream.close()
        return stream.status

    async def _until_it_ends(self, stream: Stream) -> None:
        """Or until it has been silent for too long."""
        silence = self._load.plan.silence
        while not await stream.ends(within=min(silence, 1)):
            if asyncio.get_running_loop().time() - stream.fed_at > silence:
                return

    def _heard(self, event: sse.Event) -> None:
        self._last = event
        self._history.frame(self._name, event)

    def _accepted(self, key: str, request_id: str) -> None:
        """The reader's run; another one where the first was lost, and then it reads anew."""
        if self._run == request_id:
            return
        if self._run:
            self._history.ended(self._name, "404")
            self._name += "'"
            self._history.reads(self._name, request_id)
        else:
            self._history.told(self._name, request_id)
        self._run = request_id
        self._load.accepted(key, request_id)
