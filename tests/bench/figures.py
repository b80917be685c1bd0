"""What one measurement says."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any


def _row(label: str, form: str) -> Any:
    return field(default=None, metadata={"label": label, "form": form})


@dataclass(frozen=True, kw_only=True)
class Figures:
    """None is what a scenario does not measure."""

    complete: bool
    """Whether every client got everything, once and in order."""
    disturbed: float
    """The largest share of a core that processes which are none of ours took meanwhile."""
    delivered_per_s: float | None = _row("delivered events/s", ",.0f")
    delivered_share: float | None = _row("delivered of what was appended", ".1%")
    server_us: float | None = _row("gateway CPU per delivered event, µs", ".1f")
    mixed_us: float | None = _row("… half of the clients in another protocol", ".1f")
    mixed_ratio: float | None = _row("… as a multiple", ".2f")
    p50_ms: float | None = _row("append to client, p50, ms", ",.2f")
    p99_ms: float | None = _row("append to client, p99, ms", ",.2f")
    runs_held: float | None = _row("most runs", ",.0f")
    failed_runs: float | None = _row("the next step", ",.0f")
    failed_p99_ms: float | None = _row("… its p99, or the publisher's delay, ms", ",.0f")
    failed_server_busy: float | None = _row("… gateway's core in use", ".0%")
    failed_redis_busy: float | None = _row("… Redis CPU, of a core", ".0%")
    all_s: float | None = _row("until every client has all, s", ".2f")
    rest_p50_ms: float | None = _row("submit to first token at rest, p50, ms", ".2f")
    rest_p99_ms: float | None = _row("submit to first token at rest, p99, ms", ".2f")
    loaded_p50_ms: float | None = _row("submit to first token under load, p50, ms", ",.2f")
    loaded_p99_ms: float | None = _row("submit to first token under load, p99, ms", ",.2f")
    server_ms: float | None = _row("gateway CPU per submit, ms", ".2f")
    worker_ms: float | None = _row("worker CPU per submit, ms", ".2f")
    direct_p50_ms: float | None = _row("model's first byte to client, directly, p50, ms", ".2f")
    direct_p99_ms: float | None = _row("… p99, ms", ".2f")
    first_p50_ms: float | None = _row("model's first byte to client, through, p50, ms", ".2f")
    first_p99_ms: float | None = _row("… p99, ms", ".2f")
    above_p50_ms: float | None = _row("… above a direct connection, p50, ms", ".2f")
    agent_ms: float | None = _row("… of it model to agent, ms", ".2f")
    buffered_ms: float | None = _row("… agent to append, ms", ".2f")
    append_ms: float | None = _row("… append to publish, ms", ".2f")
    gateway_ms: float | None = _row("… publish to client, ms", ".2f")
    append_answer_ms: float | None = _row("an append's answer, ms", ".2f")
    later_p50_ms: float | None = _row("a later token to client, through, p50, ms", ".2f")
    kib_per_stream: float | None = _row("gateway memory per open stream, KiB", ".1f")
    open_s: float | None = _row("opening all streams, s", ".2f")
    heartbeats: float | None = _row("heartbeats that every stream got, at least", ".0f")
    rss_mib: float | None = _row("gateway memory (RSS), MiB", ".0f")
    server_busy: float | None = _row("gateway's core in use", ".0%")
    redis_busy: float | None = _row("Redis CPU, of a core", ".0%")
    redis_us: float | None = _row("Redis CPU per appended event, µs", ".1f")
    redis_commands: float | None = _row("Redis commands", ",.0f")
    redis_connections: float | None = _row("Redis connections of the gateway", ",.0f")
    publisher_late_ms: float | None = _row("publisher behind its schedule, at most, ms", ".1f")


ROWS = [(item.name, item.metadata["label"], item.metadata["form"]) for item in fields(Figures) if item.metadata]


def median(measured: Sequence[Figures]) -> Figures:
    """Of each figure by itself; complete only if all are, disturbed as the worst."""

    def middle(name: str) -> float | None:
        values = [value for each in measured if (value := getattr(each, name)) is not None]
        return statistics.median(values) if values else None

    return Figures(
        complete=all(each.complete for each in measured),
        disturbed=max(each.disturbed for each in measured),
        **{name: middle(name) for name, _, _ in ROWS},
    )
