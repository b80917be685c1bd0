"""What came of a storm: what broke a promise, what PROTOCOL 7 excuses, and how long it took."""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from broker.ids import START, EventId
from broker.runs import keys
from broker.runs.layout import slot_of_key
from tests.chaos.site import Site
from tests.kit.checker import Allowed, Violation
from tests.kit.load import Evidence

_IN_FLIGHT = 0.3
"""An event that comes so soon after a primary went was on its way."""


def spread(seconds: Sequence[float]) -> str:
    if not seconds:
        return "none"
    return f"{len(seconds)}, median {statistics.median(seconds):.2f} s, max {max(seconds):.2f} s"


@dataclass
class Recoveries:
    """Seconds from the moment that a primary went to the next event of each run that was on it."""

    under_way: list[float] = field(default_factory=list)
    """Of those that a worker had."""
    queued: list[float] = field(default_factory=list)
    """Of those that had to wait for a claim, and so until the primary had settled (PROTOCOL 4.6)."""

    def add(self, others: Recoveries) -> None:
        self.under_way += others.under_way
        self.queued += others.queued

    def __str__(self) -> str:
        return (
            f"from a primary's end to the next event of a run: {spread(self.under_way)}; "
            f"where it was queued: {spread(self.queued)}"
        )


@dataclass
class Report:
    seed: int
    durability: str
    evidence: Evidence
    violations: list[Violation]
    excused: Counter[str] = field(default_factory=Counter)
    """What PROTOCOL 7 does not promise, by kind."""
    exits: list[str] = field(default_factory=list)
    healed: Counter[str] = field(default_factory=Counter)
    """What was lost and made good again, by kind."""
    outages: list[float] = field(default_factory=list)
    """For how many seconds there was no primary."""
    recoveries: Recoveries = field(default_factory=Recoveries)

    @property
    def sound(self) -> bool:
        return not self.violations and not self.exits

    def __str__(self) -> str:
        lines = [f"seed {self.seed}, {self.durability}: {self.evidence}; {len(self.violations)} violations"]
        if self.excused:
            lines[0] += f"; not promised: {dict(self.excused)}"
        if self.healed:
            lines.append(f"  healed: {dict(self.healed)}")
        if self.outages:
            lines.append(f"  from a primary's end to its successor: {spread(self.outages)}")
            lines.append(f"  {self.recoveries}")
        return "\n".join(lines + [f"  {text}" for text in (*map(str, self.violations), *self.exits)])


def judge(seed: int, site: Site, evidence: Evidence) -> Report:
    """Only where Redis has lost something, and only what PROTOCOL 7 names, is anything excused."""
    excused: Counter[str] = Counter()
    allowed = Allowed(erased=site.perhaps_erased)
    if site.may_lose:
        unsafe = site.durability == "fast" or site.may_lose_runs
        lost = _missed(evidence) - site.perhaps_erased if unsafe else set()
        closings = {
            request_id
            for request_id in evidence.logs.keys() - lost - site.perhaps_erased
            if _closing_may_be_lost(evidence, request_id)
        }
        excused.update({"runs lost with the primary": len(lost), "closings lost": len(closings)})
        allowed = Allowed(
            rolled_back=True, lost_keys=unsafe, lost_runs=lost, lost_closings=closings, erased=site.perhaps_erased
        )
    violations = [found for found in evidence.violations(allowed) if found.request_id not in allowed.lost_runs]
    violations += _taken_back(site, evidence, allowed)
    return Report(
        seed,
        site.durability,
        evidence,
        violations,
        +excused,
        site.exits + [f"{line['message']}: {line}" for line in site.errors()],
        +_healed(site, evidence),
        [outage.over_at - outage.at for outage in site.outages],
        _recoveries(site, evidence),
    )


def _missed(evidence: Evidence) -> set[str]:
    """Runs that are gone, or were until a repeated submit made them anew (PROTOCOL 5.3)."""
    missed = {reading.request_id for reading in evidence.history.readings.values() if reading.end in ("gone", "404")}
    missed |= {request_id for _, request_id, run in evidence.history.polls if run is None}
    missed |= {request_id for request_id, run in evidence.polls.items() if run is None}
    return missed - {""}  # that of readers whose submit was not accepted


def _closing_may_be_lost(evidence: Evidence, request_id: str) -> bool:
    """Whether a reader has seen an end that the log does not have, and PROTOCOL 7 says that this can be."""
    stored = {str(entry.id) for entry in evidence.logs[request_id]}
    unknown = [
        frame
        for reading in evidence.history.readings.values()
        if reading.request_id == request_id
        for frame in reading.frames
        if frame.type in ("final", "error", "cancelled") and frame.id.rpartition("/")[2] not in stored
    ]
    kinds = {fault.kind for fault in evidence.history.faults}
    writer_gone = bool(kinds & {"worker_killed", "worker_stopped", "worker_replaced"})
    return any(frame.type != "final" or writer_gone for frame in unknown) or any(
        json.loads(entry.data)["reason"] == "data_lost"
        for entry in evidence.logs[request_id]
        if entry.type == "attempt" and unknown
    )


def _taken_back(site: Site, evidence: Evidence, allowed: Allowed) -> Iterator[Violation]:
    """5.2: what was confirmed is there again, unless the gateway that has confirmed it is gone."""
    if any(fault.kind.startswith("gateway") for fault in evidence.history.faults):
        return
    for request_id in site.erased:
        if evidence.polls.get(request_id) is not None:
            yield Violation("erasure", request_id, "", "an erased run is there again")
    for request_id in site.cancelled.difference(allowed.lost_runs, allowed.erased):
        run = evidence.polls.get(request_id)
        if run is None or run["status"] not in ("cancelled", "completed"):
            yield Violation("cancel", request_id, "", f"a cancelled run is {run and run['status']}")


# -- figures ---------------------------------------------------------------------------------------------------


def _healed(site: Site, evidence: Evidence) -> Counter[str]:
    def count(message: str, **fields: object) -> int:
        return sum(line["request_id"] in evidence.logs for line in site.logged(message, **fields))

    readings = evidence.history.readings.values()
    told = [frame for reading in readings for frame in reading.frames if frame.id.rpartition("/")[2] == "0-0"]
    return Counter(
        {
            "repairs of a log": count("a part of a log was lost and is appended again"),
            "attempts for lost data": count("run handed over", reason="data_lost"),
            "cursors told lost": len(told),
        }
    )


def _recoveries(site: Site, evidence: Evidence) -> Recoveries:
    found = Recoveries()
    for outage in site.outages:
        for request_id in evidence.logs:
            if outage.slots is None or slot_of_key(keys.run(request_id)) in outage.slots:
                last, seconds = _next_event(request_id, outage.at, evidence)
                if seconds is not None and last > START:
                    (found.under_way if last.epoch else found.queued).append(seconds)
    return found


def _next_event(request_id: str, at: float, evidence: Evidence) -> tuple[EventId, float | None]:
    """The last event that somebody had read when the run's primary went `at` that time, and how many seconds later the
    first one came that nobody had."""
    frames = [
        (frame.at, EventId.parse(frame.id.rpartition("/")[2]))
        for reading in evidence.history.readings.values()
        if reading.request_id == request_id
        for frame in reading.frames
        if frame.id
    ]
    last = max((event_id for read_at, event_id in frames if read_at <= at + _IN_FLIGHT), default=START)
    later = [read_at for read_at, event_id in frames if read_at > at + _IN_FLIGHT and event_id > last]
    return last, min(later) - at if later else None
