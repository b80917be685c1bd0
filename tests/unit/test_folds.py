"""Folds of whole logs: made once for each end of a log, and kept within bounds."""

from __future__ import annotations

import asyncio

import pytest

from broker.events import Entry
from broker.gateway import folds as module
from broker.gateway.dialects.aisdk.fold import AiSdk
from broker.gateway.dialects.dialect import Dialect, Folded
from broker.gateway.dialects.prompt.fold import Prompt
from broker.gateway.folds import ENTRY_BYTES, KEPT_BYTES, Folds
from broker.ids import EventId
from broker.runs.record import Record
from tests.kit.folds import folded as expected
from tests.kit.logs import REQUEST_ID, attempt, entry, start

LOG = [start(), attempt("5-1", "0-1", reason="first"), *(entry(f"5-{n}", "token", text=f"{n} ") for n in range(2, 9))]
PROMPT = Prompt(REQUEST_ID)


class Logs:
    """What Redis has: a log, the same for every run."""

    def __init__(self, log: list[Entry]) -> None:
        self.log = log
        self.reads: list[str] = []
        self.folds = Folds(self._read)

    async def _read(self, record: Record) -> list[Entry]:
        self.reads.append(record.request_id)
        return [entry for entry in self.log if entry.id <= record.end]


def record(end: str = "5-8", request_id: str = REQUEST_ID) -> Record:
    return Record(
        request_id=request_id,
        session_id="s",
        status="running",
        agent="echo",
        attempt=1,
        end=EventId.parse(end),
        created_at_ms=0,
        started_at_ms=0,
        finished_at_ms=None,
        metadata={},
        result=None,
        rewinds=(),
    )


def names(count: int) -> list[str]:
    return [f"{n:032x}" for n in range(count)]


async def test_who_asks_again_gets_the_same_and_the_log_is_read_once() -> None:
    logs = Logs(LOG)
    first = await logs.folds.of(record(), PROMPT)
    assert first.state == expected(PROMPT, LOG)[0]
    assert await logs.folds.of(record(), Prompt(REQUEST_ID)) is first
    assert len(logs.reads) == 1


@pytest.mark.parametrize("end", ["5-4", "5-9"])
async def test_a_log_that_ends_elsewhere_is_folded_anew(end: str) -> None:
    """It has grown, or a failover took its end."""
    logs = Logs([*LOG, entry("5-9", "token", text="more")])
    await logs.folds.of(record(), PROMPT)
    found = await logs.folds.of(record(end), PROMPT)
    assert found.state == expected(PROMPT, [entry for entry in logs.log if entry.id <= EventId.parse(end)])[0]


async def test_each_dialect_variant_and_run_has_its_own() -> None:
    logs = Logs(LOG)
    dialects: list[Dialect] = [PROMPT, AiSdk(REQUEST_ID, reset_step=False), AiSdk(REQUEST_ID, reset_step=True)]
    for dialect in dialects:
        assert (await logs.folds.of(record(), dialect)).state == expected(dialect, LOG)[0]
    other = "cd" * 16
    await logs.folds.of(record(request_id=other), PROMPT)
    assert logs.reads == [REQUEST_ID] * 3 + [other]


async def test_a_log_that_lost_its_end_between_the_two_reads_is_not_kept() -> None:
    logs = Logs(LOG[:4])
    assert (await logs.folds.of(record(), PROMPT)).state == expected(PROMPT, LOG[:4])[0]
    logs.log = LOG
    assert (await logs.folds.of(record(), PROMPT)).state == expected(PROMPT, LOG)[0]


async def test_what_is_kept_is_bounded_and_what_was_asked_for_last_stays() -> None:
    logs = Logs([*LOG[:2], entry("5-2", "token", text="x" * (KEPT_BYTES // 10))])
    for name in names(12):
        await logs.folds.of(record("5-2", name), PROMPT)
        await logs.folds.of(record("5-2", names(1)[0]), PROMPT)
    assert logs.reads == names(12), "the one that is asked for again and again stays"
    await logs.folds.of(record("5-2", names(2)[1]), PROMPT)
    assert len(logs.reads) == 13, "the one that nobody has asked for longest is gone"


async def test_small_logs_are_bounded_too() -> None:
    logs = Logs(LOG[:1])
    count = KEPT_BYTES // ENTRY_BYTES + 1
    for name in names(count):
        await logs.folds.of(record("0-1", name), PROMPT)
    await logs.folds.of(record("0-1", names(1)[0]), PROMPT)
    assert len(logs.reads) == count + 1


async def test_a_log_that_is_larger_than_all_that_is_kept_is_folded_each_time() -> None:
    logs = Logs([*LOG[:2], entry("5-2", "token", text="x" * KEPT_BYTES)])
    found: list[Folded] = [await logs.folds.of(record("5-2"), PROMPT) for _ in range(2)]
    assert found[0].state == found[1].state
    assert len(logs.reads) == 2


async def test_nothing_is_kept_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """An erased run's text leaves this gateway's memory, whichever gateway erased it."""
    monkeypatch.setattr(module, "KEPT_SECONDS", 0.05)
    logs = Logs(LOG)
    await logs.folds.of(record(), PROMPT)
    await asyncio.sleep(0.2)
    assert not logs.folds._kept
    await logs.folds.of(record(), PROMPT)
    assert len(logs.reads) == 2
