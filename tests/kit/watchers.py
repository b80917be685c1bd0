"""Clients of all kinds that watch a run for as long as it goes on, over any gateway, each in its own way."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Callable, Coroutine, Mapping
from typing import Any

from tests.kit import sse
from tests.kit.eventsource import EventSource, Stream
from tests.kit.http import token

AUTHORIZATION = {"Authorization": f"Bearer {token('alice', ttl=7200)}"}
POLL_SECONDS = 2.0
NO_ANSWER = (OSError, EOFError, TimeoutError)

Door = Callable[[], str]
"""The URL of a gateway that answers, each time perhaps of another one."""


class AnyGateway(EventSource):
    """A browser's EventSource behind a load balancer."""

    def __init__(self, door: Door, path: str, *, hurry: float = 1) -> None:
        super().__init__(door(), path, AUTHORIZATION, hurry=hurry)
        self._door = door

    async def _connect(self) -> None:
        self.url = self._door()
        await super()._connect()


async def event_source(door: Door, request_id: str, body: Mapping[str, Any]) -> None:
    await AnyGateway(door, f"/api/v1/runs/{request_id}/stream").run()


async def one_of_many(door: Door, request_id: str, body: Mapping[str, Any]) -> None:
    await AnyGateway(door, f"/api/v1/stream?run={request_id}").run()


async def post(door: Door, request_id: str, body: Mapping[str, Any]) -> None:
    """Repeats its POST /query/stream with the last id that it saw, after each `retry:`."""
    last, retry_ms = "", 3000
    while True:
        cursor = {"Last-Event-ID": last} if last else {}
        stream = Stream(sse.EventStream(last_event_id=last))
        with contextlib.suppress(*NO_ANSWER):
            headers = {**AUTHORIZATION, **cursor, "Content-Type": "application/json"}
            await stream.open(door(), "/api/v1/query/stream", headers, method="POST", body=json.dumps(body).encode())
            try:
                while stream.ending is None:
                    await asyncio.sleep(0.02)
            finally:
                await stream.close()
        last, retry_ms = stream.parser.last_event_id, stream.parser.retry_ms or retry_ms
        await asyncio.sleep(retry_ms / 1000)


async def poll(door: Door, request_id: str, body: Mapping[str, Any]) -> None:
    await _get(door, f"/api/v1/runs/{request_id}", pause=POLL_SECONDS)


async def wait(door: Door, request_id: str, body: Mapping[str, Any]) -> None:
    """Polls that are held for a minute."""
    await _get(door, f"/api/v1/runs/{request_id}?wait=60", pause=0.5)


async def pages(door: Door, request_id: str, body: Mapping[str, Any]) -> None:
    await _get(door, f"/api/v1/runs/{request_id}/events", pause=POLL_SECONDS)


async def _get(door: Door, path: str, *, pause: float) -> None:
    """Again and again; a poll that got no answer comes again half a second later, as clients do."""
    while True:
        stream = Stream()
        answered = False
        with contextlib.suppress(*NO_ANSWER):
            async with asyncio.timeout(70):
                await stream.open(door(), path, AUTHORIZATION)
                try:
                    while stream.ending is None:
                        await asyncio.sleep(0.02)
                finally:
                    await stream.close()
                answered = stream.status == 200 and stream.ending == "finished"
        await asyncio.sleep(pause if answered else 0.5)


KINDS: dict[str, Callable[[Door, str, Mapping[str, Any]], Coroutine[Any, Any, None]]] = {
    "event source": event_source,
    "one of many": one_of_many,
    "post": post,
    "poll": poll,
    "wait": wait,
    "pages": pages,
}
