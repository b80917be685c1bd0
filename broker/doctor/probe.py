"""A stream is watched: what came, when, and how it ended."""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import httpx

from broker.client.frames import Frames, Oversized
from broker.doctor.gateway import said
from broker.errors import BadCursor
from broker.events import TERMINAL
from broker.ids import EventId
from broker.words import reason

AGENT = "research"
POLL_SECONDS = 0.25


class Refused(Exception):
    """The gateway did not take a run."""

    def __init__(self, status: int, detail: str) -> None:
        super().__init__(detail)
        self.status = status


class Arrival(NamedTuple):
    """`at` is seconds by the event loop's clock, as all times here."""

    at: float
    id: EventId
    type: str
    data: Any


class Seen(NamedTuple):
    """A poll: at this time the log had come to this end."""

    at: float
    end: EventId


@dataclass
class Recording:
    """One response, while it comes and afterwards."""

    began: float
    status: int | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    http_version: str = ""
    detail: str = ""
    """What was said instead of a stream."""
    reads: list[float] = field(default_factory=list)
    """When bytes came."""
    heartbeats: list[float] = field(default_factory=list)
    events: list[Arrival] = field(default_factory=list)
    ended: float | None = None
    """When the response ended, or was cut; None where we have left."""
    failure: str = ""
    """How it was cut; '' where it ended properly."""
    told_to_return: bool = False
    """Whether its last line was `retry:`: the gateway itself has sent the client away."""
    left: float = 0.0
    """When we had seen enough."""
    polls: list[Seen] = field(default_factory=list)
    """Of the run meanwhile."""
    _frames: Frames = field(default_factory=Frames, init=False, repr=False)

    @property
    def finished(self) -> bool:
        return bool(self.events) and self.events[-1].type in TERMINAL

    @property
    def until(self) -> float:
        """Until when it was watched."""
        return self.ended if self.ended is not None else self.left

    def feed(self, data: bytes, at: float) -> None:
        """What came of the stream. Raises Oversized."""
        self.reads.append(at)
        frames, comments = self._frames, self._frames.comments
        for frame in frames.feed(data):
            try:
                event_id = EventId.parse((frame.id or "").rpartition("/")[2])
                self.events.append(Arrival(at, event_id, frame.type, json.loads(frame.data)))
            except (BadCursor, ValueError, RecursionError):
                continue  # none of ours
        self.heartbeats += [at] * (frames.comments - comments)
        self.told_to_return = frames.last_field == "retry" and len(self.reads) > 1


class Probe:
    """A run of ours at a gateway."""

    def __init__(self, client: httpx.AsyncClient, request_id: str) -> None:
        self._client = client
        self._run = f"api/v1/runs/{request_id}"

    async def watch(self, *, seconds: float, after: EventId | None = None, polling: bool = False) -> Recording:
        """Until the run ends, or its stream, or for so many seconds. `polling`: it is polled meanwhile."""
        recording = Recording(began=_now())
        poll = asyncio.create_task(self._poll(recording.polls)) if polling else None
        try:
            async with asyncio.timeout(seconds):
                await self._read(recording, after)
        except TimeoutError:
            recording.left = _now()
        finally:
            if poll is not None:
                poll.cancel()
                await asyncio.wait([poll])
        return recording

    async def _read(self, recording: Recording, after: EventId | None) -> None:
        headers = {"Accept-Encoding": "gzip", **({"Last-Event-ID": str(after)} if after else {})}
        try:
            async with self._client.stream("GET", f"{self._run}/stream", headers=headers) as response:
                recording.status, recording.headers = response.status_code, response.headers
                recording.http_version = response.http_version
                if response.status_code != 200:
                    await response.aread()
                    recording.detail = said(response)
                else:
                    async for data in response.aiter_bytes():
                        recording.feed(data, _now())
        except (httpx.HTTPError, httpx.StreamError, Oversized) as failure:
            recording.failure = reason(failure)
        recording.ended = _now()

    async def _poll(self, polls: list[Seen]) -> None:
        """Until cancelled: how far the log has come."""
        while True:
            try:
                response = await self._client.get(self._run)
                polls.append(Seen(_now(), EventId.parse(response.json()["last_event_id"])))
            except (httpx.HTTPError, ValueError, KeyError, TypeError, BadCursor):
                pass
            await asyncio.sleep(POLL_SECONDS)

    async def log(self) -> list[Arrival]:
        """Raises httpx.HTTPError, or ValueError or KeyError for an answer that is none of ours."""
        response = await self._client.get(f"{self._run}/events", params={"limit": "500"})
        rows = response.raise_for_status().json()["events"]
        return [Arrival(0.0, EventId.parse(row["id"]), row["type"], row["data"]) for row in rows]

    async def cancel(self) -> None:
        await self._quietly("POST", f"{self._run}/cancel")

    async def delete(self) -> bool:
        """Whether it is gone."""
        return await self._quietly("DELETE", self._run)

    async def _quietly(self, method: str, path: str) -> bool:
        try:
            return (await self._client.request(method, path)).is_success
        except httpx.HTTPError:
            return False


@asynccontextmanager
async def probe(client: httpx.AsyncClient, *, pace: float) -> AsyncIterator[Probe]:
    """A run whose agent says a word `pace` times a second; it is deleted at the end.

    Raises Refused and httpx.HTTPError.
    """
    body = {
        # One word, which is in nobody's documents; and the same query would join a run under way.
        "query": f"brokerdoctor{secrets.token_hex(8)}",
        "agent": AGENT,
        "parameters": {"pace": pace, "model": False},
    }
    response = await client.post("api/v1/query", json=body)
    try:
        request_id = response.json()["request_id"] if response.status_code == 202 else None
    except (ValueError, KeyError, TypeError):
        request_id = None
    if request_id is None:
        raise Refused(response.status_code, said(response))
    run = Probe(client, request_id)
    try:
        yield run
    finally:
        await run.cancel()
        if not await run.delete():
            await run.delete()


def _now() -> float:
    return asyncio.get_running_loop().time()
