"""Runs made by the scripts themselves, without a gateway or a worker."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Sequence
from typing import Any

import redis as sync_redis
from redis.asyncio import Redis

from broker.events import Entry, Start, dumps
from broker.ids import EventId, Owner, new_request_id
from broker.runs import keys, log
from broker.runs.record import Submission
from broker.runs.scripts import Batch, Lease, Reply, Scripts

LEASE_MS = 15_000
RETENTION_MS = 60_000
HOUR_MS = 3_600_000
OWNER = Owner("acme", "alice")
FINAL = ("final", '{"answer":null,"citations":[],"usage":{}}')


def words(*texts: str) -> list[tuple[str, str]]:
    """Entries of type `token`."""
    return [("token", dumps({"text": text})) for text in texts]


def now_ms() -> int:
    return int(time.time() * 1000)


async def create(
    scripts: Scripts, request_id: str, *, claimed_at_ms: int | None = None, owner: Owner = OWNER, **submission: Any
) -> Reply:
    asked = Submission(**{"query": "q", "agent": "echo", **submission})
    return await scripts.create(
        request_id,
        now_ms() if claimed_at_ms is None else claimed_at_ms,
        Start(request_id=request_id, session_id="s").json_data(),
        asked.fields(owner, asked.session_id or "s", asked.digest(), "k"),
    )


async def queued(scripts: Scripts, *, claimed_at_ms: int | None = None, **submission: Any) -> str:
    """The request_id of a new run."""
    request_id = new_request_id()
    reply = await create(scripts, request_id, claimed_at_ms=claimed_at_ms, **submission)
    assert reply.answer == "CREATED", reply
    return request_id


async def claim(scripts: Scripts, request_id: str, attempt: int = 1, token: str | None = None) -> Lease:
    lease = await scripts.claim(request_id, attempt, token or secrets.token_hex(8), LEASE_MS)
    assert isinstance(lease, Lease), lease
    return lease


async def running(scripts: Scripts, **submission: Any) -> Lease:
    """A new run that a worker has claimed."""
    return await claim(scripts, await queued(scripts, **submission))


async def append(
    scripts: Scripts,
    lease: Lease,
    first: int,
    *entries: tuple[str, str],
    kept_from: int | None = None,
    checkpoint: tuple[EventId, Any] | None = None,
    lease_ms: int = LEASE_MS,
) -> Reply:
    """`entries` as first, first + 1, …; by default the writer keeps nothing below them."""
    stored = (checkpoint[0], dumps(checkpoint[1])) if checkpoint else None
    batch = Batch(first, entries, first if kept_from is None else kept_from, stored)
    return await scripts.append(lease, batch, lease_ms=lease_ms, retention_ms=RETENTION_MS)


async def cancel(scripts: Scripts, request_id: str, token: str | None = None) -> Reply:
    return await scripts.close(
        request_id,
        kind="cancelled",
        data='{"reason":"client"}',
        reason="cancelled",
        token=token or secrets.token_hex(8),
        retention_ms=RETENTION_MS,
    )


async def field(redis: Redis, request_id: str, name: str) -> str:
    """Of the record; '' where it has none."""
    value = await redis.hget(keys.run(request_id), name)  # type: ignore[misc]
    return "" if value is None else value.decode()


async def snapshot(redis: Redis, request_id: str) -> object:
    """Both keys, the lease's deadline left out."""
    record = await redis.hgetall(keys.run(request_id))  # type: ignore[misc]
    record.pop(b"deadline", None)
    return record, await log.read_all(redis, request_id)


async def fence(
    scripts: Scripts,
    request_id: str,
    *,
    max_attempts: int = 3,
    max_run_ms: int = HOUR_MS,
    lease_ms: int = LEASE_MS,
    replid: str = "",
) -> Reply:
    """What a reaper does where it finds a run whose lease may have expired."""
    return await scripts.fence(
        request_id, lease_ms=lease_ms, max_attempts=max_attempts, max_run_ms=max_run_ms, replid=replid
    )


async def lose_worker(redis: Redis, scripts: Scripts, request_id: str) -> int:
    """The lease expires and a reaper sees it. Returns the next attempt."""
    await redis.hset(keys.run(request_id), "deadline", "1")  # type: ignore[misc]
    reply = await fence(scripts, request_id, max_attempts=1_000_000)
    assert reply.answer == "OK", reply
    attempt: int = reply.rest[0]
    return attempt


async def roll_back(redis: Redis, request_id: str, to: EventId, **fields: str) -> None:
    """What a failover does to a run: the log ends at `to`, and the record says so. `fields` go back too."""
    kept = [entry for entry in await log.read_all(redis, request_id) if entry.id <= to]
    await redis.delete(keys.log(request_id))
    for entry in kept:
        await redis.xadd(keys.log(request_id), {"t": entry.type, "d": entry.data}, id=str(entry.id))
    rewinds = "".join(
        f"{entry.id}:{json.loads(entry.data)['resume_from']} " for entry in kept if entry.type == "attempt"
    )
    counts = {"events": str(len(kept)), "bytes": str(sum(len(entry.data) for entry in kept))}
    stored = {"end": str(to), "rewinds": rewinds, **counts, **fields}
    await redis.hset(keys.run(request_id), mapping=stored)  # type: ignore[misc]


class Ears:
    """Hears what is published on channels, in order."""

    def __init__(self, url: str, *channels: str) -> None:
        self._redis = sync_redis.Redis.from_url(url)
        self._pubsub = self._redis.pubsub()  # type: ignore[no-untyped-call]
        self._pubsub.subscribe(*channels)
        self.heard()

    def __enter__(self) -> Ears:
        return self

    def __exit__(self, *error: object) -> None:
        self._pubsub.close()
        self._redis.close()

    def heard(self) -> list[tuple[str, bytes]]:
        """(channel, payload) of all that was published since the last call."""
        marker = secrets.token_hex(8)
        self._pubsub.ping(marker)
        heard: list[tuple[str, bytes]] = []
        while True:
            message = self._pubsub.get_message(timeout=10)
            assert message is not None, "Redis does not answer"
            if message["type"] == "pong" and message["data"] == marker.encode():
                return heard
            if message["type"] == "message":
                heard.append((message["channel"].decode(), message["data"]))

    def appended(self) -> list[log.Appended | None]:
        return [log.parse_message(payload) for _, payload in self.heard()]


def texts(entries: Sequence[Entry]) -> list[str]:
    return [json.loads(entry.data)["text"] for entry in entries if entry.type == "token"]


def channels(request_id: str) -> tuple[str, str]:
    return keys.channel(request_id), keys.control(request_id)
