"""The pure checker: what must hold for every log, for what a reader saw of it, and for a whole history."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

from broker.events import Entry
from broker.fold import fold
from broker.ids import EventId
from tests.kit.findings import STATUS_OF, Exempt, Finding, of_log, of_pages, of_poll, of_reading, of_text
from tests.kit.history import History, Poll, Reading
from tests.kit.sse import Event

# -- one log, one reader, one poll: for tests that have a few ----------------------------------------------------


def check_log(entries: Sequence[Entry], *, finished: bool = True) -> None:
    """P3, P7: contiguous and rising ids, `start` first, each epoch begins with `attempt`, one terminal, the last."""
    findings = list(of_log(entries, finished=finished))
    assert not findings, findings


def entries_of(events: Sequence[Event]) -> list[Entry]:
    """What a client of the native dialect read, as entries; ids in either form."""
    return [Entry(EventId.parse(event.id.rpartition("/")[2]), event.type, event.data) for event in events]


def check_reader(seen: Sequence[Entry], log: Sequence[Entry]) -> None:
    """P8: what a reader saw over all its connections is the log: nothing lost, doubled, foreign or out of order."""
    assert [entry.id for entry in seen] == [entry.id for entry in log], _difference(seen, log)
    for mine, stored in zip(seen, log, strict=True):
        assert mine == stored, f"{mine} differs from the log's {stored}"


def _difference(seen: Sequence[Entry], log: Sequence[Entry]) -> str:
    mine, stored = [str(entry.id) for entry in seen], [str(entry.id) for entry in log]
    lost = [event_id for event_id in stored if event_id not in set(mine)]
    foreign = [event_id for event_id in mine if event_id not in set(stored)]
    return (
        f"lost {lost[:5]}, foreign {foreign[:5]}, doubled {len(mine) - len(set(mine))}, read {len(mine)} of {len(log)}"
    )


def surviving_text(entries: Sequence[Entry]) -> str:
    return "".join(json.loads(entry.data)["text"] for entry in fold(entries) if entry.type == "token")


def check_poll(run: Mapping[str, Any], log: Sequence[Entry]) -> None:
    """P23: the polled run is the folded stream."""
    findings = list(of_poll(run, log))
    assert not findings, findings


# -- a whole history ---------------------------------------------------------------------------------------------


class Violation(NamedTuple):
    kind: str
    """lost, doubled, reordered, foreign, altered, after the end, terminal, fold, restarted, false end, turned away,
    missing, unfinished, poll, page, text or twins.
    """
    request_id: str
    reader: str
    """"" where it is not one reader's."""
    text: str

    def __str__(self) -> str:
        return f"{self.kind} ({', '.join(filter(None, [self.request_id, self.reader]))}): {self.text}"


@dataclass(frozen=True, kw_only=True)
class Allowed:
    """What a test's faults excuse. Each is excused only where the test says so (PROTOCOL 7)."""

    rolled_back: bool = False
    """Redis lost entries that it had acknowledged: a failover, a cut append-only file. Readers may have seen them if
    they were told of a rewind or of a lost cursor since, and a run that had ended may have been under way again.
    """
    lost_closings: Collection[str] = ()
    """Runs whose closing a failover took in one of the ways of PROTOCOL 7: who saw it may differ from the log."""
    lost_runs: Collection[str] = ()
    """Accepted with BROKER_DURABILITY=fast, and lost together with the primary (5.3)."""
    lost_keys: bool = False
    """A failover took an idempotency key: a query may have two runs."""
    erased: Collection[str] = ()
    """Runs that the test has deleted."""
    unfinished: Collection[str] = ()
    """Runs whose end the test did not wait for."""

    def of(self, request_id: str) -> Exempt:
        return Exempt(
            rolled_back=self.rolled_back,
            lost_closing=request_id in self.lost_closings,
            missing=request_id in self.lost_runs or request_id in self.erased,
            unfinished=request_id in self.unfinished,
        )


NOTHING = Allowed()


def check(
    history: History,
    logs: Mapping[str, Sequence[Entry]],
    polls: Mapping[str, Mapping[str, Any] | None],
    *,
    allowed: Allowed = NOTHING,
    pages: Mapping[str, Sequence[tuple[Entry, bool]]] | None = None,
    texts: Mapping[str, str] | None = None,
) -> list[Violation]:
    """Judges a whole history (P1 to P3, P7 to P11, P23).

    `logs` and `polls` are of the end; a run that is not there is an empty log and None. `pages` are the entries as GET
    /events gave them, each with its `void`; `texts` are what the surviving tokens of the runs must say.
    """
    found: list[Violation] = []
    readings = _by_run(history.readings.values())
    seen = _by_run(history.polls)
    accepted = {submit.request_id for submit in history.submits}
    for request_id in sorted(accepted | {*logs, *polls, *readings, *seen}):
        log, run, exempt = logs.get(request_id, ()), polls.get(request_id), allowed.of(request_id)
        findings: list[Finding] = []
        if request_id:  # "" is that of readers whose submit was never accepted
            findings += [*_of_run(request_id, log, run, exempt), *_over_time(seen.get(request_id, ()), run, exempt)]
        if any(finding.kind == "altered" for finding in findings):
            log = ()  # it cannot be read, so nothing can be compared with it
        if log and run is not None:
            findings += of_poll(run, log)
        if log and pages is not None:
            findings += of_pages(pages.get(request_id, ()), log)
        if log and texts is not None and request_id in texts:
            findings += of_text(texts[request_id], log)
        found += _violations(request_id, "", findings)
        for reading in readings.get(request_id, ()):
            found += _violations(request_id, reading.name, of_reading(reading, log, exempt))
    if not allowed.lost_keys:
        found += _twins(history, allowed.erased)
    return found


T = TypeVar("T", Reading, Poll)


def _by_run(items: Iterable[T]) -> dict[str, list[T]]:
    grouped: dict[str, list[T]] = {}
    for item in items:
        grouped.setdefault(item.request_id, []).append(item)
    return grouped


def _violations(request_id: str, reader: str, findings: Iterable[Finding]) -> Iterator[Violation]:
    """One of each kind, which tells the first few."""
    by_kind: dict[str, list[str]] = {}
    for kind, text in findings:
        by_kind.setdefault(kind, []).append(text)
    for kind, texts in by_kind.items():
        more = [f"{len(texts) - 4} more"] if len(texts) > 4 else []
        yield Violation(kind, request_id, reader, "; ".join([*texts[:4], *more]))


def _of_run(request_id: str, log: Sequence[Entry], run: Mapping[str, Any] | None, exempt: Exempt) -> Iterator[Finding]:
    """P2, P3, P7."""
    if not log or run is None:
        if not exempt.missing:
            yield Finding("missing", f"{len(log)} entries in the log, the poll says {run}")
        return
    yield from of_log(log, finished=not exempt.unfinished or log[-1].terminal)
    if log[0].type == "start" and json.loads(log[0].data).get("request_id") != request_id:
        yield Finding("foreign", f"the log's start is {log[0].data}")


def _over_time(polls: Sequence[Poll], last: Mapping[str, Any] | None, exempt: Exempt) -> Iterator[Finding]:
    """A run that has ended stays as it is, and one that was accepted is there."""
    ended: dict[str, Any] | None = None
    for at, _, run in polls:
        if run is None:
            if not exempt.missing:
                yield Finding("missing", f"a poll at {at} s found nothing")
        elif run["status"] in STATUS_OF.values():
            if last is not None and not exempt.lost_closing and _end_of(run) != _end_of(last):
                yield Finding("poll", f"{_end_of(run)} at {at} s, and {_end_of(last)} in the end")
            ended = run
        elif ended is not None and not exempt.rolled_back:
            yield Finding("poll", f"{run['status']} at {at} s, after it had {ended['status']}")


def _end_of(run: Mapping[str, Any]) -> tuple[Any, ...]:
    return run["status"], run["last_event_id"], run["answer"]


def _twins(history: History, erased: Collection[str]) -> Iterator[Violation]:
    """P1: one run for each key; another one after it was erased."""
    ids: dict[str, set[str]] = {}
    for submit in history.submits:
        if submit.request_id not in erased:
            ids.setdefault(submit.key, set()).add(submit.request_id)
    for key, same in ids.items():
        if len(same) > 1:
            yield Violation("twins", min(same), "", f"{key!r} has the runs {sorted(same)}")
