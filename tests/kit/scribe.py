"""Runs and logs that no agent makes, written through the broker's own scripts as gateways and workers write them."""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence
from types import TracebackType
from typing import Any, cast

from redis.asyncio import Redis

from broker.events import Attempt, Entry, Final, Start, Token
from broker.ids import EventId, Owner, new_request_id
from broker.runs import keys, log
from broker.runs.connections import connect
from broker.runs.record import Submission
from broker.runs.scripts import Answer, Batch, Lease, Scripts, claim_key

LEASE_MS = 600_000
RETENTION_MS = 3_600_000
_AFTER_START = EventId(0, 1)


class Scribe:
    """Writes runs on one Redis. An async context manager."""

    def __init__(self, url: str) -> None:
        self.redis: Redis = connect(url, connections=50)
        self.scripts = Scripts(self.redis)

    async def now_ms(self) -> int:
        seconds, micros = await self.redis.time()
        return int(seconds) * 1000 + int(micros) // 1000

    async def create(
        self, subject: str, query: str, *, age_ms: int = 20_000, joinable: bool = False, **body: Any
    ) -> Written:
        """A queued run of `subject`, accepted `age_ms` ago, that no queue knows. `joinable`: by the same query."""
        submission = Submission(query=query, agent=body.pop("agent", "echo"), **body)
        request_id = new_request_id()
        claimed_at = await self.now_ms() - age_ms
        session_id = submission.session_id or f"s-{request_id}"
        digest = submission.digest()
        owner = Owner(subject, subject)
        key = keys.idempotency(owner, "query", digest)
        if joinable:
            await claim_key(self.redis, key, replace=None, request_id=request_id, digest=digest, life_ms=RETENTION_MS)
        fields = submission.fields(owner, session_id, digest, key)
        start = Start(request_id=request_id, session_id=session_id).json_data()
        reply = await self.scripts.create(request_id, claimed_at, start, fields)
        assert reply.answer is Answer.CREATED
        return Written(self, request_id, submission)

    async def running(self, subject: str, query: str, tokens: int = 0, **body: Any) -> Written:
        """The same, claimed, with some tokens."""
        run = await self.create(subject, query, **body)
        await run.attempt()
        await run.tokens(tokens)
        return run

    async def __aenter__(self) -> Scribe:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.redis.aclose(close_connection_pool=True)


class Written:
    """A run whose worker is the test."""

    def __init__(self, scribe: Scribe, request_id: str, submission: Submission) -> None:
        self.request_id = request_id
        self.submission = submission
        self.attempts = 0
        self._scribe = scribe
        self._lease: Lease | None = None
        self._next = 1
        self._tokens = 0

    @property
    def path(self) -> str:
        return f"/api/v1/runs/{self.request_id}"

    @property
    def epoch(self) -> int:
        assert self._lease is not None
        return self._lease.epoch

    @property
    def body(self) -> dict[str, Any]:
        """The submit that means this run."""
        return {
            "query": self.submission.query,
            "agent": self.submission.agent,
            "session_id": self.submission.session_id,
            "parameters": self.submission.parameters,
        }

    async def attempt(self, resume_from: EventId = _AFTER_START, *, epochs_later: int = 1000) -> None:
        """Opens the next epoch: by a claim, and later ones as the repair of a claim that was lost (PROTOCOL 1.3)."""
        self.attempts += 1
        token = secrets.token_hex(8)
        if self.attempts == 1:
            lease = await self._scribe.scripts.claim(self.request_id, 1, token, LEASE_MS)
            assert isinstance(lease, Lease)
            self._lease, self._next = lease, 2
            return
        self._lease = Lease(
            request_id=self.request_id,
            epoch=self.epoch + epochs_later,
            token=token,
            attempt=self.attempts,
            resume_from=resume_from,
            now_ms=0,
            record={},
        )
        self._next = 1
        data = Attempt(attempt=self.attempts, reason="worker_lost", resume_from=str(resume_from)).json_data()
        await self.append([("attempt", data)])

    async def append(
        self, entries: Sequence[tuple[str, str]], *, first: int | None = None, silent: bool = False
    ) -> None:
        """`first`: the seq of the first entry, where it is not the next. `silent`: nobody hears of it."""
        assert self._lease is not None
        first = first or self._next
        # A script publishes by the verb that it is given; this one only fills a set that nobody looks at.
        scripts = Scripts(self._scribe.redis, publish="SADD") if silent else self._scribe.scripts
        batch = Batch(first, entries, kept_from=1)
        reply = await scripts.append(self._lease, batch, lease_ms=LEASE_MS, retention_ms=RETENTION_MS)
        assert reply.answer is Answer.OK, reply
        self._next = first + len(entries)

    async def tokens(self, count: int, *, silent: bool = False) -> None:
        if count:
            texts = [f"{self._tokens + n} " for n in range(count)]
            self._tokens += count
            await self.append([("token", Token(text=text).json_data()) for text in texts], silent=silent)

    async def end(self) -> None:
        await self.append([("final", Final(answer="the end").json_data())])

    async def log(self) -> list[Entry]:
        return await log.read_all(self._scribe.redis, self.request_id)

    async def roll_back(self, to: EventId) -> list[Entry]:
        """A failover: the server knows nothing of what came after `to`. Returns what was lost."""
        redis, run, stream = self._scribe.redis, keys.run(self.request_id), keys.log(self.request_id)
        lost = [entry for entry in await self.log() if entry.id > to]
        if lost:
            await redis.xdel(stream, *(str(entry.id) for entry in lost))
        await redis.execute_command("XSETID", stream, str(to))  # type: ignore[no-untyped-call]
        rewinds = (await redis.hget(run, "rewinds") or b"").decode().split()  # type: ignore[misc]
        kept = [item for item in rewinds if EventId.parse(item.partition(":")[0]) <= to]
        fields: dict[str, Any] = {
            "status": "running" if to.epoch else "queued",
            "end": str(to),
            "epoch": to.epoch,
            "attempt": len(kept),
            "rewinds": "".join(f"{item} " for item in kept),
        }
        if not to.epoch:
            fields["token"] = ""
        await cast(Any, redis.hset(run, mapping=fields))
        await cast(Any, redis.hdel(run, "finished_at", "result"))
        await redis.persist(run)
        await redis.persist(stream)
        return lost

    async def write_again(self, lost: Sequence[Entry]) -> None:
        """The repair: the worker appends its kept tail again, under the same ids (PROTOCOL 1.3, 5.2)."""
        assert all(entry.id.epoch == self.epoch for entry in lost)
        await self.append([(entry.type, entry.data) for entry in lost], first=lost[0].id.seq)


def texts(entries: Sequence[Entry]) -> list[str]:
    return [json.loads(entry.data)["text"] for entry in entries if entry.type == "token"]
