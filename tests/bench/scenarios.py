"""The scenarios. Each measures one target, and leaves starting and stopping it to its caller."""

from __future__ import annotations

import contextlib
import json
import time
from dataclasses import dataclass, replace
from typing import Protocol

from tests.bench.figures import Figures
from tests.bench.first_byte import FirstByte
from tests.bench.machine import rss_kib
from tests.bench.meter import Cost, Meter, redis_connections
from tests.bench.targets import FIRST_SEQ, Target
from tests.bench.tools import Load, Loaded, publish

OPENING_SECONDS = 60.0
GRACE_SECONDS = 5.0
"""What a client has not got this long after the last append is not counted as delivered."""
SETTLE_SECONDS = 0.3
"""After the last response's head, until every stream has subscribed."""
WARM_UP = 20
QUERY = "one two three four five six seven"


class Scenario(Protocol):
    @property
    def name(self) -> str: ...

    @property
    def title(self) -> str: ...

    def measure(self, target: Target) -> Figures: ...


@dataclass(frozen=True, kw_only=True)
class Tail:
    """Clients that follow runs while events are appended at a steady rate."""

    name: str
    runs: int
    clients: int
    rate: int
    """Events a second of each run."""
    seconds: int

    @property
    def title(self) -> str:
        return f"{self.runs:,} runs, {self.clients:,} clients, {self.rate:,} events/s in each run, {self.seconds} s"

    def measure(self, target: Target) -> Figures:
        events = self.rate * self.seconds
        runs = ["--first", target.make_runs(self.runs), "--streams", self.runs]
        options = [*runs, "--n", self.clients, "--expect", events, "--timeout", 600]
        with Load(target.folder, target.url + target.stream_path, *options, headers=target.headers) as load:
            load.until_ready(OPENING_SECONDS)
            time.sleep(SETTLE_SECONDS)
            meter = Meter(target)
            published = publish(
                target.redis.port,
                target.append,
                *(*runs, "--per-stream", events, "--seq", FIRST_SEQ),
                *("--rate", self.rate * self.runs, "--timeout", self.seconds + 30),
            )
            memory, connections = rss_kib(target.pid), redis_connections(target)
            loaded = load.result(GRACE_SECONDS)
            figures = _delivery(meter.stop(), loaded, expected=events * self.clients, appended=published.sent)
        return replace(
            figures,
            p50_ms=loaded.p50_ms,
            p99_ms=loaded.p99_ms,
            rss_mib=memory / 1024,
            redis_connections=connections,
            publisher_late_ms=published.late_ms,
            complete=figures.complete and published.replies == events * self.runs,
        )


@dataclass(frozen=True, kw_only=True)
class Protocols:
    """Clients of one run, of which first all speak one protocol, then half of them another."""

    name: str
    clients: int
    rate: int
    seconds: int

    @property
    def title(self) -> str:
        what = f"1 run, {self.clients:,} clients, {self.rate:,} events/s, {self.seconds} s"
        return f"{what}: native, then half of them OpenAI"

    def measure(self, target: Target) -> Figures:
        one = self._measure(target, target.stream_path, target.stream_path)
        if target.other_stream_path is None:
            return one
        two = self._measure(target, target.stream_path, target.other_stream_path)
        assert one.server_us is not None and two.server_us is not None
        return replace(
            one,
            mixed_us=two.server_us,
            mixed_ratio=two.server_us / one.server_us,
            complete=one.complete and two.complete,
            disturbed=max(one.disturbed, two.disturbed),
        )

    def _measure(self, target: Target, *paths: str) -> Figures:
        events, half = self.rate * self.seconds, self.clients // len(paths)
        run = ["--first", target.make_runs(1)]
        options = [*run, "--n", half, "--expect", events, "--timeout", 600]
        with contextlib.ExitStack() as stack:
            loads = [
                stack.enter_context(Load(target.folder, target.url + path, *options, headers=target.headers))
                for path in paths
            ]
            for load in loads:
                load.until_ready(OPENING_SECONDS)
            time.sleep(SETTLE_SECONDS)
            meter = Meter(target)
            published = publish(
                target.redis.port,
                target.append,
                *(*run, "--per-stream", events, "--seq", FIRST_SEQ),
                *("--rate", self.rate, "--timeout", self.seconds + 30),
            )
            all_loaded = [load.result(GRACE_SECONDS) for load in loads]
            cost = meter.stop()
        each = [_delivery(cost, loaded, expected=events * half, appended=published.sent) for loaded in all_loaded]
        delivered = sum(loaded.messages for loaded in all_loaded)
        return replace(
            each[0],
            complete=all(figures.complete for figures in each),
            delivered_per_s=sum(figures.delivered_per_s or 0 for figures in each),
            delivered_share=delivered / (events * half * len(paths)),
            server_us=cost.server * 1e6 / max(delivered, 1),
            p50_ms=max(loaded.p50_ms for loaded in all_loaded),
            p99_ms=max(loaded.p99_ms for loaded in all_loaded),
            rss_mib=rss_kib(target.pid) / 1024,
            redis_connections=redis_connections(target),
            publisher_late_ms=published.late_ms,
        )


@dataclass(frozen=True, kw_only=True)
class Climb:
    """The most runs at one rate whose p99 stays below a limit; ends at the first step that fails."""

    name: str
    steps: tuple[int, ...]
    rate: int
    seconds: int
    limit_ms: float

    @property
    def title(self) -> str:
        steps = ", ".join(f"{step:,}" for step in self.steps)
        return f"as many runs at {self.rate} events/s as hold p99 <= {self.limit_ms:.0f} ms, of {steps}; 1 client each"

    def measure(self, target: Target) -> Figures:
        """The figures of the last step that held, or of the first where none did, and why the next one failed."""
        held: Figures | None = None
        for step in self.steps:
            tail = Tail(name=self.name, runs=step, clients=step, rate=self.rate, seconds=self.seconds)
            figures = tail.measure(target)
            late = max(figures.p99_ms or 0, figures.publisher_late_ms or 0)
            if not figures.complete or late > self.limit_ms:
                return replace(
                    held or replace(figures, runs_held=0),
                    failed_runs=step,
                    failed_p99_ms=late,
                    failed_server_busy=figures.server_busy,
                    failed_redis_busy=figures.redis_busy,
                )
            held = replace(figures, runs_held=step)
        assert held is not None
        return held


@dataclass(frozen=True, kw_only=True)
class Herd:
    """Clients that all come at once and replay a run that is not over."""

    name: str
    clients: int
    events: int
    other: bool = False
    """Whether they speak the service's other protocol, where it has one."""

    @property
    def title(self) -> str:
        protocol = " as OpenAI" if self.other else ""
        return f"{self.clients:,} clients come at once and replay {self.events:,} stored events each{protocol}"

    def measure(self, target: Target) -> Figures:
        run = ["--first", target.make_runs(1)]
        publish(target.redis.port, target.append, *run, "--per-stream", self.events, "--seq", FIRST_SEQ)
        options = [*run, "--n", self.clients, "--expect", self.events, "--at-once", self.clients, "--timeout", 600]
        path = (target.other_stream_path if self.other else None) or target.stream_path
        meter = Meter(target)
        with Load(target.folder, target.url + path, *options, headers=target.headers) as load:
            loaded = load.result(OPENING_SECONDS)
        figures = _delivery(meter.stop(), loaded, expected=self.events * self.clients)
        return replace(
            figures,
            all_s=loaded.last_s,
            delivered_per_s=loaded.messages / loaded.last_s,
            rss_mib=rss_kib(target.pid) / 1024,
            redis_connections=redis_connections(target),
        )


@dataclass(frozen=True, kw_only=True)
class Idle:
    """Open streams of runs in which nothing happens."""

    name: str
    streams: int
    seconds: float

    @property
    def title(self) -> str:
        return f"{self.streams:,} runs with one client each and no events, for {self.seconds} s"

    def measure(self, target: Target) -> Figures:
        first = ["--first", target.make_runs(self.streams)]
        url = target.url + target.stream_path
        with Load(target.folder, url, *first, "--n", WARM_UP, "--hold", headers=target.headers) as load:
            load.until_ready(OPENING_SECONDS)
            time.sleep(SETTLE_SECONDS)
        time.sleep(SETTLE_SECONDS)
        before = rss_kib(target.pid)
        options = [*first, "--n", self.streams, "--streams", self.streams, "--hold", "--timeout", 600]
        with Load(target.folder, url, *options, headers=target.headers) as load:
            load.until_ready(OPENING_SECONDS)
            meter = Meter(target)
            time.sleep(self.seconds)
            cost, after, connections = meter.stop(), rss_kib(target.pid), redis_connections(target)
            loaded = load.result(0)
        return Figures(
            complete=loaded.answered == self.streams and not loaded.failed,
            disturbed=cost.disturbed,
            kib_per_stream=(after - before) / self.streams,
            open_s=loaded.ready_s,
            heartbeats=loaded.least_comments,
            rss_mib=after / 1024,
            server_busy=cost.server / cost.seconds,
            redis_busy=cost.redis / cost.seconds,
            redis_commands=cost.commands,
            redis_connections=connections,
        )


@dataclass(frozen=True, kw_only=True)
class Submit:
    """From a submit to its first token, through queue and worker: one after another, then at a steady rate."""

    name: str
    at_rest: int
    rate: int
    seconds: int

    @property
    def title(self) -> str:
        return f"POST to first token: {self.at_rest:,} one after another, then {self.rate}/s for {self.seconds} s"

    def measure(self, target: Target) -> Figures:
        target.work()
        self._post(target, 0, WARM_UP, "--sequential", "--at-once", 1)
        resting = Meter(target)
        rest = self._post(target, 1_000, self.at_rest, "--sequential", "--at-once", 1)
        rested, meter = resting.stop(), Meter(target)
        loaded = self._post(target, 100_000, self.rate * self.seconds, "--per-second", self.rate)
        cost = meter.stop()
        return Figures(
            complete=all(self._everything(target, each) for each in (rest, loaded)),
            disturbed=max(cost.disturbed, rested.disturbed),
            rest_p50_ms=rest.first_p50_ms,
            rest_p99_ms=rest.first_p99_ms,
            loaded_p50_ms=loaded.first_p50_ms,
            loaded_p99_ms=loaded.first_p99_ms,
            server_ms=cost.server * 1e3 / loaded.connections,
            worker_ms=cost.workers * 1e3 / loaded.connections,
            delivered_per_s=loaded.events / cost.seconds,
            rss_mib=rss_kib(target.pid) / 1024,
            server_busy=cost.server / cost.seconds,
            redis_busy=cost.redis / cost.seconds,
            redis_us=cost.redis * 1e6 / loaded.events,
            redis_commands=cost.commands,
            redis_connections=redis_connections(target),
        )

    @staticmethod
    def _post(target: Target, first: int, count: int, *options: object) -> Loaded:
        """Each submit has a query of its own: the same one would join the run under way."""
        body = json.dumps(target.submission(QUERY + " {i}"))
        every = ["--n", count, "--streams", count, "--first", first, "--method", "POST", "--body", body]
        every += ["--first-name", "token", "--timeout", 120, *options]
        with Load(target.folder, target.url + target.submit_path, *every, headers=target.headers) as load:
            return load.result(120)

    @staticmethod
    def _everything(target: Target, loaded: Loaded) -> bool:
        words = len(QUERY.split()) + 1
        return loaded.done == loaded.connections and loaded.events == loaded.connections * (words + target.other_events)


def _delivery(cost: Cost, loaded: Loaded, *, expected: int, appended: int = 0) -> Figures:
    delivered = max(loaded.messages, 1)
    return Figures(
        complete=loaded.everything,
        disturbed=cost.disturbed,
        delivered_per_s=loaded.messages / loaded.span_s if loaded.span_s else 0,
        delivered_share=loaded.messages / expected,
        server_us=cost.server * 1e6 / delivered,
        server_busy=cost.server / cost.seconds,
        redis_busy=cost.redis / cost.seconds,
        redis_us=cost.redis * 1e6 / appended if appended else None,
        redis_commands=cost.commands,
    )


@dataclass(frozen=True, kw_only=True)
class Suite:
    scenarios: tuple[Scenario, ...]
    heartbeat: int
    """Seconds between the heartbeats of an idle stream."""
    own_target: bool
    """Whether each measurement has a gateway and a Redis of its own, as those that count must."""


FULL = Suite(
    scenarios=(
        Tail(name="fanout", runs=1, clients=1_000, rate=200, seconds=10),
        Tail(name="fanout-fast", runs=1, clients=500, rate=1_000, seconds=10),
        Protocols(name="protocols", clients=1_000, rate=50, seconds=10),
        Tail(name="runs", runs=500, clients=500, rate=20, seconds=10),
        Climb(name="runs-max", steps=(500, 1_000, 1_500, 2_000, 2_500, 3_000, 4_000), rate=20, seconds=5, limit_ms=250),
        Herd(name="herd", clients=500, events=2_000),
        Herd(name="herd-openai", clients=500, events=2_000, other=True),
        Idle(name="idle", streams=5_000, seconds=20),
        Submit(name="submit", at_rest=500, rate=100, seconds=10),
        FirstByte(name="first-byte", requests=300),
    ),
    heartbeat=15,
    own_target=True,
)
QUICK = Suite(
    scenarios=(
        Tail(name="fanout", runs=1, clients=50, rate=50, seconds=1),
        Tail(name="fanout-fast", runs=1, clients=20, rate=200, seconds=1),
        Protocols(name="protocols", clients=50, rate=50, seconds=1),
        Tail(name="runs", runs=20, clients=20, rate=20, seconds=1),
        Climb(name="runs-max", steps=(5, 10), rate=20, seconds=1, limit_ms=60_000),
        Herd(name="herd", clients=20, events=600),
        Herd(name="herd-openai", clients=20, events=600, other=True),
        Idle(name="idle", streams=100, seconds=2),
        Submit(name="submit", at_rest=20, rate=20, seconds=1),
        FirstByte(name="first-byte", requests=10),
    ),
    heartbeat=1,
    own_target=False,
)
