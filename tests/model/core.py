"""The world without its processes' steps: servers, time, and how calls fare."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, TypeVar

from broker.ids import EventId
from tests.model.judge import REPAIR_MS, Judge
from tests.model.processes import Gateway, Job, Kept, KeyClaim, Mode, Reader, Reaper, Submitter, Worker
from tests.model.rules import Rule
from tests.model.scripts import LEASE_MS, Entry, Record, Scripts, Server

MAX_CLOCK_OFFSET = 2000
"""How far a server's clock may be off, in ms."""

T = TypeVar("T")


class Core:
    """The servers, the processes, the time, and how calls fare. Each part of the World adds steps to it."""

    def __init__(self, dropped: Collection[Rule] = ()) -> None:
        self.dropped = frozenset(dropped)
        self.now = 0
        self._count = 0
        self.runs: Server[str, Record] = Server("runs")
        self.keys: Server[str, KeyClaim] = Server("keys")
        self.index: Server[str, int] = Server("index")
        self.queue: Server[Job, bool] = Server("queue")
        self.judge = Judge(self)
        self.scripts = Scripts(self.runs, self)
        self.submitters: list[Submitter] = []
        self.workers = [Worker(f"worker {n}") for n in range(3)]
        self.reapers = [Reaper(f"reaper {n}", LEASE_MS) for n in range(2)]
        self.gateways = [Gateway(f"gateway {n}") for n in range(2)]
        self.readers = [Reader() for _ in range(2)]
        self.kept: list[Kept] = []
        self._late: list[tuple[Server[Any, Any], int, Callable[[], object]]] = []
        self._failed_over_at = -REPAIR_MS

    # -- the scripts' witness --------------------------------------------------------------------------------

    def run_time(self) -> int:
        return self.now + self.runs.clock_offset

    def unique(self) -> int:
        self._count += 1
        return self._count

    def wrote(self, request_id: str, previous: EventId, entries: tuple[Entry, ...]) -> None:
        self.judge.wrote(request_id, entries)
        for gateway in self.gateways:
            if request_id in gateway.hubs:
                gateway.hubs[request_id].inbox.append((previous, entries))

    def heard(self, request_id: str, epoch: int) -> None:
        self.judge.heard(request_id, epoch)

    def displaced(self, request_id: str, epoch: int) -> None:
        self.judge.displaced(request_id, epoch)

    def fenced(self, request_id: str) -> None:
        self.judge.fenced(request_id)

    def created(self, request_id: str) -> None:
        self.judge.created(request_id)

    # -- calls ----------------------------------------------------------------------------------------------

    def call(self, mode: Mode, server: Server[Any, Any], work: Callable[[], T]) -> T | None:
        """None where the caller hears an error, or nothing."""
        self.now += 1
        if mode == "lost request":
            return None
        if mode == "late":
            self._late.append((server, server.generation, work))
            return None
        answer = work()
        return answer if mode == "ok" else None

    def enqueue(self, mode: Mode, job: Job) -> bool:
        def put() -> bool:
            self.queue.put(job, True)
            return True

        return self.call(mode, self.queue, put) is True

    @property
    def settled(self) -> bool:
        return Rule.SETTLED in self.dropped or self.now >= self._failed_over_at + REPAIR_MS

    def step_wait(self, ms: int) -> None:
        self.now += ms

    def step_arrive(self, n: int) -> None:
        """Something that was late is done, unless its connection broke."""
        if self._late:
            server, generation, work = self._late.pop(n % len(self._late))
            if server.generation == generation:
                work()

    @property
    def index_time(self) -> int:
        return self.now + self.index.clock_offset

    def find(self, request_id: str) -> Record | None:
        record = self.runs.state.get(request_id)
        return None if record is None or record.status == "erased" else record

    def kept_of(self, request_id: str) -> list[Kept]:
        return [kept for kept in self.kept if kept.request_id == request_id]

    # -- servers --------------------------------------------------------------------------------------------

    @property
    def servers(self) -> tuple[Server[Any, Any], ...]:
        return (self.runs, self.keys, self.index, self.queue)

    def step_fail_over(self, name: str, states: int, clock_offset: int) -> None:
        """A server, or its replica, goes on from where it was `states` writes ago."""
        server = next(server for server in self.servers if server.name == name)
        before = self.runs.state
        server.fall_back(states, max(-MAX_CLOCK_OFFSET, min(MAX_CLOCK_OFFSET, clock_offset)))
        self._late = [late for late in self._late if late[0] is not server]
        if server is self.runs:
            self._failed_over_at = self.now
            for reaper in self.reapers:
                reaper.patient_until = max(reaper.patient_until, self.now + LEASE_MS)
            for gateway in self.gateways:
                for hub in gateway.hubs.values():
                    hub.inbox = []
            self.judge.failed_over(before)
