"""Redis loses what it had confirmed, under a load: what must hold afterwards, and what PROTOCOL 7 excuses."""

from __future__ import annotations

import asyncio
import contextlib
import random
import statistics
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from tests.conftest import Launcher
from tests.kit.checker import Allowed, Violation
from tests.kit.fleet import reasons
from tests.kit.load import NO_ANSWER, Evidence, Load, Plan
from tests.kit.processes import Gateway, Process, Worker
from tests.kit.scale import LONG

SETTINGS: dict[str, Any] = {"lease_seconds": 2, "heartbeat_seconds": 0.5, "grace_seconds": 1, "max_attempts": 100}
CHATTING = Plan(runs=24, readers=3, count=50, pause=0.04, spread=3.5, silence=6, polls=0.1, limit=60)
BULKY = Plan(
    name="bulky",
    runs=2,
    readers=2,
    agents=("bulky",),
    count=80,
    pause=0.04,
    spread=0.5,
    late=0,
    torn=0,
    slow=0,
    limit=60,
)
"""More than a worker keeps for a repair: what is lost of such a run must end in another attempt."""
TURNS = range(20 if LONG else 1)
"""Seeds, each with a service of its own."""
JUST_BEFORE = 1.0
"""What was confirmed so shortly before the loss may not have reached the replica."""


@dataclass
class Confirmed:
    """What clients were told just before the loss."""

    cancelled: set[str] = field(default_factory=set)
    erased: set[str] = field(default_factory=set)


class Stage:
    """Two gateways and two workers on a Redis, and the loads on them."""

    def __init__(self, launch: Launcher, redis_url: str, seed: int) -> None:
        print(f"seed {seed}")
        self.chance = random.Random(seed)
        self.seed = seed
        self.gateways: list[Gateway] = [launch.gateway(redis_url, **SETTINGS) for _ in range(2)]
        self.workers: list[Worker] = [launch.worker(redis_url, **SETTINGS) for _ in range(2)]
        self.confirmed = Confirmed()
        self.lost_at = 0.0
        """When Redis stopped to keep what it confirmed: seconds since the histories began."""
        self.back_at = 0.0
        self._launch = launch
        self._redis_url = redis_url
        self._loads: list[Load] = []

    @contextlib.asynccontextmanager
    async def load(self, *plans: Plan) -> Any:
        urls = [gateway.url for gateway in self.gateways]
        async with contextlib.AsyncExitStack() as stack:
            for plan in plans:
                load = Load(urls, self._redis_url, plan, chance=self.chance, folder=self._launch.folder)
                self._loads.append(await stack.enter_async_context(load))
            yield

    async def until_under_way(self) -> None:
        """Runs have ended, others are in their midst, others still come."""
        load = self._loads[0]
        async with asyncio.timeout(30):
            while len(load.runs) < load.plan.runs * 0.6 or sum(len(r.frames) for r in _readings(load)) < 100:
                await asyncio.sleep(0.02)

    async def cancel_and_erase_for(self, seconds: float) -> None:
        """What clients do while Redis confirms what it will not keep."""
        self.lost_at = self._loads[0].history.now
        ends = asyncio.get_running_loop().time() + seconds
        while asyncio.get_running_loop().time() < ends:
            await asyncio.sleep(self.chance.uniform(0, 0.15))
            load = self._loads[0]
            request_id = self.chance.choice(sorted(set(load.runs.values())))
            path = f"/api/v1/runs/{request_id}"
            with contextlib.suppress(*NO_ANSWER):
                if self.chance.random() < 0.7:
                    status, run = await load.ask("POST", f"{path}/cancel")
                    if status == 200 and run["status"] == "cancelled":
                        self.confirmed.cancelled.add(request_id)
                else:
                    status, _ = await load.ask("DELETE", path)
                    if status == 204:
                        self.confirmed.erased.add(request_id)

    async def lose(self, kind: str, lose: Callable[[], Awaitable[object]]) -> None:
        for load in self._loads:
            load.history.fault(kind)
        await lose()
        self.back_at = self._loads[0].history.now

    async def judge(self) -> Judgement:
        """When all runs have ended: readers may have read an end that was lost, and wait for nothing more."""
        for load in self._loads:
            async with asyncio.timeout(load.plan.limit):
                while not load.done or not all([await _ended(load, request_id) for request_id in load.runs.values()]):
                    await asyncio.sleep(0.2)
        evidence = [await load.finish() for load in self._loads]
        return Judgement(self, evidence)


@dataclass
class Judgement:
    stage: Stage
    evidence: list[Evidence]

    def __post_init__(self) -> None:
        stage, told = self.stage, self.stage.confirmed
        self.lost_runs = {
            request_id
            for request_id, at in self._first_submits()
            if at > stage.lost_at - JUST_BEFORE and self._was_missing(request_id)
        } - told.erased
        self.lost_ends = set(self._ends_that_stood_on_what_was_lost())
        self.allowed = Allowed(
            rolled_back=True,
            lost_keys=True,
            lost_runs=self.lost_runs,
            lost_closings=told.cancelled | self.lost_ends,
            erased=told.erased,
        )
        self.violations = [found for one in self.evidence for found in one.violations(self.allowed)]
        self.violations += self._taken_back()

    def _ends_that_stood_on_what_was_lost(self) -> Iterator[str]:
        """PROTOCOL 7: their attempts had written more than is kept, and have gone on with another one (LOST)."""
        for one in self.evidence:
            for reading in one.history.readings.values():
                log = one.logs.get(reading.request_id, [])
                ends = {frame.id.rpartition("/")[2] for frame in reading.frames if frame.type == "final"}
                if ends - {str(entry.id) for entry in log} and "data_lost" in reasons(log):
                    yield reading.request_id

    def _first_submits(self) -> Iterator[tuple[str, float]]:
        first: dict[str, float] = {}
        for one in self.evidence:
            for submit in one.history.submits:
                first.setdefault(submit.request_id, submit.at)
        yield from first.items()

    def _was_missing(self, request_id: str) -> bool:
        return any(
            poll.request_id == request_id and poll.run is None for one in self.evidence for poll in one.history.polls
        ) or any(
            reading.request_id == request_id and reading.end in ("gone", "404")
            for one in self.evidence
            for reading in one.history.readings.values()
        )

    def _taken_back(self) -> Iterator[Violation]:
        """5.2: what was confirmed is there again."""
        polls = {request_id: run for one in self.evidence for request_id, run in one.polls.items()}
        for request_id in self.stage.confirmed.erased:
            if polls.get(request_id) is not None:
                yield Violation("erasure", request_id, "", "an erased run is there again")
        for request_id in self.stage.confirmed.cancelled - self.stage.confirmed.erased - self.lost_runs:
            run = polls.get(request_id)
            if run is None or run["status"] not in ("cancelled", "completed"):
                yield Violation("cancel", request_id, "", f"a cancelled run is {run and run['status']}")

    @property
    def lost_anything(self) -> bool:
        """Without that, nothing was tested."""
        return bool(self.repairs or self.hand_overs or self.lost_runs or self.lost_ends)

    # -- figures ---------------------------------------------------------------------------------------------

    def __str__(self) -> str:
        logs = [log for one in self.evidence for log in one.logs.values()]
        attempts = Counter(reason for log in logs for reason in reasons(log))
        told = sum(
            frame.id.endswith("0-0") and frame.type == "attempt"
            for one in self.evidence
            for reading in one.history.readings.values()
            for frame in reading.frames
        )
        return "\n".join(
            [
                f"seed {self.stage.seed}: {len(logs)} runs, "
                f"{sum(len(one.history.readings) for one in self.evidence)} readers, "
                f"{sum(len(r.frames) for one in self.evidence for r in one.history.readings.values())} events read, "
                f"{self.stage.back_at - self.stage.lost_at:.1f} s lost; {len(self.violations)} violations",
                f"  repairs {self.repairs}, hand-overs {self.hand_overs}, readers told {told}, "
                f"runs lost {len(self.lost_runs)}, ends lost {len(self.lost_ends)}, "
                f"cancelled and erased meanwhile {len(self.stage.confirmed.cancelled)} and "
                f"{len(self.stage.confirmed.erased)}, attempts by reason {dict(attempts)}",
                f"  from the loss to the first event: {_spread(self.gaps())}",
                *(f"  {violation}" for violation in self.violations),
            ]
        )

    @property
    def repairs(self) -> int:
        """How often a worker appended again what was lost (GAP)."""
        return self._count("a part of a log was lost and is appended again")

    @property
    def hand_overs(self) -> int:
        """How often that was more than it had kept (LOST)."""
        return self._count("run handed over", reason="data_lost")

    def _count(self, message: str, **fields: object) -> int:
        return sum(len(worker.logged(message, **fields)) for worker in self.stage.workers)

    def gaps(self) -> list[float]:
        """Of each run that was under way: seconds from the moment that Redis was there again to its next event."""
        found: dict[str, float] = {}
        for one in self.evidence:
            for reading in one.history.readings.values():
                times = [frame.at for frame in reading.frames]
                later = [at for at in times if at > self.stage.back_at]
                if later and any(at < self.stage.back_at for at in times):
                    gap = later[0] - self.stage.back_at
                    found[reading.request_id] = min(gap, found.get(reading.request_id, gap))
        return list(found.values())


def _spread(seconds: Sequence[float]) -> str:
    if not seconds:
        return "none"
    return f"{len(seconds)} runs, median {statistics.median(seconds):.2f} s, max {max(seconds):.2f} s"


async def _ended(load: Load, request_id: str) -> bool:
    """Or it is not there."""
    with contextlib.suppress(*NO_ANSWER):
        status, run = await load.ask("GET", f"/api/v1/runs/{request_id}")
        return status == 404 or (status == 200 and run["finished_at"] is not None)
    return False


def _readings(load: Load) -> list[Any]:
    return list(load.history.readings.values())


def errors_of(processes: Iterable[Process]) -> list[dict[str, Any]]:
    """What they have logged as an error."""
    return [line for process in processes for line in process.log_lines() if line["level"] in ("ERROR", "CRITICAL")]
