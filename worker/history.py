"""The earlier runs of a session, as an agent is told of them."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace

from redis.asyncio import Redis

from broker.ids import Owner
from broker.runs import index, keys, log
from broker.runs.connections import until_answered
from broker.runs.record import RECORD_FIELDS, Record, parse_record
from worker.agent import Turn, estimated_tokens

MOST_TURNS = 200
_PAGE = 20
_OWN_FIELDS = ["tenant", "subject", "query"]


class History:
    """What was completed in an owner's session before a time, which is that at which a run was created."""

    def __init__(self, redis: Redis, owner: Owner, session_id: str, *, before_ms: int, request_id: str) -> None:
        """`request_id` is the run for which it is read; only the log names it."""
        self._redis = redis
        self._owner = owner
        self._session_id = session_id
        self._before_ms = before_ms
        self._request_id = request_id

    async def recall(self, tokens: int) -> list[Turn]:
        """The newest turns within the budget, at most MOST_TURNS, oldest first. Waits while Redis is away."""
        return await until_answered(
            lambda: self._recall(tokens), "reading a session's history", request_id=self._request_id
        )

    async def _recall(self, tokens: int) -> list[Turn]:
        kept: list[Turn] = []
        async with aclosing(self._turns()) as turns:
            async for turn in turns:
                fitted = fit(turn, tokens, newest=not kept)
                if fitted is None:
                    break
                kept.append(fitted)
                tokens -= _cost(fitted)
                if len(kept) == MOST_TURNS:
                    break
        return kept[::-1]

    async def _turns(self) -> AsyncGenerator[Turn, None]:
        """All of them, newest first."""
        key, below = keys.session_of(self._owner, self._session_id), ("", self._before_ms + 1)
        while True:
            found = await index.page(self._redis, key, below=below, limit=_PAGE)
            for query, record in await self._records([request_id for request_id, _ in found[:_PAGE]]):
                answer = (await log.read_outcome(self._redis, record)).answer
                if answer:
                    yield Turn(
                        request_id=record.request_id,
                        agent=record.agent,
                        query=query,
                        answer=answer,
                        created_at=record.created_at_ms / 1000,
                    )
            if len(found) <= _PAGE:
                return
            below = found[_PAGE - 1]

    async def _records(self, request_ids: list[str]) -> list[tuple[str, Record]]:
        """(query, record) of those that count. The index only points: whose a run is, its record says."""
        async with self._redis.pipeline(transaction=False) as pipe:
            for request_id in request_ids:
                pipe.hmget(keys.run(request_id), _OWN_FIELDS + RECORD_FIELDS)
            rows = await pipe.execute()
        counted = []
        for request_id, (tenant, subject, query, *row) in zip(request_ids, rows, strict=True):
            record = parse_record(request_id, row)
            if record is not None and self._counts(record, Owner(json.loads(tenant), json.loads(subject))):
                counted.append((json.loads(query), record))
        return counted

    def _counts(self, record: Record, owner: Owner) -> bool:
        """What ended later than the run was created is never told: another attempt would be told something else."""
        return (
            (owner, record.session_id, record.status) == (self._owner, self._session_id, "completed")
            and record.finished_at_ms is not None
            and record.finished_at_ms <= self._before_ms
        )


def fit(turn: Turn, tokens: int, *, newest: bool) -> Turn | None:
    """The turn, if it is within the budget; the newest one's answer is cut to it."""
    if _cost(turn) <= tokens:
        return turn
    left = tokens - estimated_tokens(turn.query)
    if not newest or left <= 0:
        return None
    answer = turn.answer
    while (cost := estimated_tokens(answer)) > left:
        answer = answer[: len(answer) * left // cost]
    return replace(turn, answer=answer, cut=True)


def _cost(turn: Turn) -> int:
    return estimated_tokens(turn.query) + estimated_tokens(turn.answer)
