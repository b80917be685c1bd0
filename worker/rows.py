"""Records as the reaper sees them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import NamedTuple

from redis.asyncio import Redis

from broker.runs import keys
from broker.runs.connections import is_away

logger = logging.getLogger(__name__)


class Row(NamedTuple):
    """Times are milliseconds, 0 where there is none."""

    request_id: str
    status: str
    deadline: int
    attempt: int
    enqueues: int
    started_at: int
    finished_at: int
    created_at: int
    unwatched_ms: int
    key: str
    watched_at: str


_FIELDS = list(Row._fields[1:])
_TEXTS = ("status", "key", "watched_at")


async def read_rows(redis: Redis, request_ids: Sequence[str], *, quiet: bool = False) -> dict[str, Row | None]:
    """None for what is not a record: missing, or nothing that we wrote, which is logged unless `quiet`.

    Runs whose shard is away are left out. Raises redis-py's exceptions when all are.
    """
    if not request_ids:
        return {}
    async with redis.pipeline(transaction=False) as pipe:
        for request_id in request_ids:
            pipe.hmget(keys.run(request_id), _FIELDS)
        found = await pipe.execute(raise_on_error=False)
    away = [values for values in found if isinstance(values, Exception) and is_away(values)]
    if len(away) == len(found):
        raise away[0]
    rows = dict(zip(request_ids, found, strict=True))
    return {name: _row(name, values, quiet) for name, values in rows.items() if values not in away}


def _row(request_id: str, values: list[bytes | None] | Exception, quiet: bool) -> Row | None:
    try:
        return _parse(request_id, values)
    except ValueError:
        if not quiet:
            logger.exception("a record cannot be read", extra={"request_id": request_id})
        return None


def _parse(request_id: str, values: list[bytes | None] | Exception) -> Row | None:
    if isinstance(values, Exception):  # the key is of another type
        raise ValueError from values
    text = dict(zip(_FIELDS, ((value or b"").decode("ascii") for value in values), strict=True))
    if not text["status"]:
        return None
    return Row._make([request_id, *(text[name] if name in _TEXTS else int(text[name] or 0) for name in _FIELDS)])
