"""Folds of whole logs, of which the last ones are kept: who polls a run, or resumes one that has ended, asks again."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Hashable
from typing import NamedTuple

from broker.events import Entry
from broker.gateway.dialects.dialect import Dialect, Folded, fold_log
from broker.ids import EventId
from broker.runs.record import Record

KEPT_BYTES = 16 * 1024 * 1024
KEPT_SECONDS = 60.0
"""Any gateway may erase a run: for so long this one may still have its text in memory, which nobody is given."""
ENTRY_BYTES = 500
"""About what a state takes for each entry beside its text; it bounds the number of what is kept as well."""

_Key = tuple[str, Hashable]


class _Kept(NamedTuple):
    end: EventId
    folded: Folded
    size: int
    forgetting: asyncio.TimerHandle


class Folds:
    """By run and dialect, each of the log up to one end: an id never has two contents (PROTOCOL 6.1)."""

    def __init__(self, read: Callable[[Record], Awaitable[list[Entry]]]) -> None:
        """`read` reads a log as of its record."""
        self._read = read
        self._kept: OrderedDict[_Key, _Kept] = OrderedDict()
        self._size = 0

    async def of(self, record: Record, dialect: Dialect) -> Folded:
        """The run's log as of `record`, folded. The record is as it is now: one that is erased has none.

        Raises FoldFailed, and what `read` does.
        """
        key = (record.request_id, dialect.key)
        kept = self._kept.get(key)
        if kept is not None and kept.end == record.end:
            self._kept.move_to_end(key)
            return kept.folded
        entries = await self._read(record)
        folded = await fold_log(dialect, entries)
        if entries and entries[-1].id == record.end:  # else a failover took something between the two reads
            self._keep(key, record.end, folded, sum(ENTRY_BYTES + len(entry.data) for entry in entries))
        return folded

    def _keep(self, key: _Key, end: EventId, folded: Folded, size: int) -> None:
        self._forget(key)
        forgetting = asyncio.get_running_loop().call_later(KEPT_SECONDS, self._forget, key)
        self._kept[key] = _Kept(end, folded, size, forgetting)
        self._size += size
        while self._size > KEPT_BYTES:
            self._forget(next(iter(self._kept)))

    def _forget(self, key: _Key) -> None:
        kept = self._kept.pop(key, None)
        if kept is not None:
            kept.forgetting.cancel()
            self._size -= kept.size
