"""Workers that come and go on one Redis, and what their attempts leave in the logs."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from itertools import count
from typing import Any, NamedTuple

import redis as sync_redis

from broker.events import Entry
from broker.ids import EventId
from broker.runs import keys
from tests.kit.checker import check_log, check_poll
from tests.kit.findings import survivors
from tests.kit.http import Client
from tests.kit.processes import wait_for
from tests.kit.redis_server import RedisServer

LEASE = 1.5
"""Of the workers, in seconds, where a test does not need another one."""
_numbers = count(1)


class Fleet:
    """A Redis and a client of a gateway; a test starts its workers itself."""

    def __init__(self, redis: RedisServer, client: Client, direct: sync_redis.Redis) -> None:
        self.redis = redis
        self.client = client
        self.direct = direct

    def submit(self, agent: str, **parameters: Any) -> str:
        """A query that nobody has asked before."""
        return self.client.submit(f"{agent} {next(_numbers)}", agent=agent, parameters=parameters)

    def field(self, request_id: str, name: str) -> str:
        value = self.direct.hget(keys.run(request_id), name)
        assert value is None or isinstance(value, bytes)
        return value.decode() if value else ""

    def statuses(self, request_ids: Sequence[str]) -> list[str]:
        return [self.field(request_id, "status") for request_id in request_ids]

    def until(self, condition: Callable[[str], bool], request_ids: Sequence[str], seconds: float = 30) -> None:
        """Until it holds for each run at the same time."""
        deadline = time.monotonic() + seconds
        while late := next((request_id for request_id in request_ids if not condition(request_id)), None):
            assert time.monotonic() < deadline, f"after {seconds} s: {late} is {self.direct.hgetall(keys.run(late))}"
            time.sleep(0.05)

    def until_running(self, request_ids: Sequence[str], events: int = 3, attempt: int = 1, seconds: float = 30) -> None:
        """Until each is in this attempt, or a later one, and has so many entries in its log."""
        self.until(
            lambda request_id: (
                int(self.field(request_id, "attempt") or 0) >= attempt
                and int(self.field(request_id, "events") or 0) >= events
            ),
            request_ids,
            seconds,
        )

    def until_ended(self, request_ids: Sequence[str], seconds: float = 60) -> None:
        self.until(lambda request_id: bool(self.field(request_id, "finished_at")), request_ids, seconds)

    def look_now(self, request_ids: Sequence[str]) -> None:
        """Reapers look at these runs at once, and not only when it is their time; at those that they know of."""
        if request_ids:
            self.direct.zadd(keys.LEASES, dict.fromkeys(request_ids, 0), xx=True)

    def until_reaped(self, queued: Sequence[str]) -> None:
        """Until they have ended. Reapers look at a queued run every ten seconds, and less; here all the time."""

        def ended() -> bool:
            self.look_now(queued)
            return all(self.field(request_id, "finished_at") for request_id in queued)

        wait_for(ended, seconds=60, every=0.3)

    def all_runs(self) -> list[str]:
        """Every run that Redis knows, whoever made it."""
        return sorted(keys.request_id_of(name.decode()) for name in self.direct.scan_iter(keys.run("*")))

    def claimed_ms(self, request_id: str, log: Sequence[Entry]) -> list[int]:
        """When each attempt was claimed, by Redis' clock: an epoch is the milliseconds since `claimed_at`."""
        base = int(self.field(request_id, "claimed_at"))
        return [base + entry.id.epoch for entry in log if entry.type == "attempt"]

    def ended(self, request_id: str) -> tuple[dict[str, Any], list[Entry]]:
        """The run and its log, both checked: P3, P7, P23."""
        run, log = self.client.run(request_id), self.client.log(request_id)
        check_log(log)
        check_poll(run, log)
        return run, log


class AttemptSeen(NamedTuple):
    attempt: int
    reason: str
    resume_from: str


def attempts(log: Sequence[Entry]) -> list[AttemptSeen]:
    return [AttemptSeen(**json.loads(entry.data)) for entry in log if entry.type == "attempt"]


def reasons(log: Sequence[Entry]) -> list[str]:
    return [seen.reason for seen in attempts(log)]


def restored(log: Sequence[Entry]) -> dict[int, Any]:
    """By epoch, what the agent `steps` said that it was restored to."""
    data = [(entry.id.epoch, json.loads(entry.data)) for entry in log if entry.type == "data"]
    return {epoch: item["value"] for epoch, item in data if item["name"] == "restored"}


class Step(NamedTuple):
    """A token of the agent `steps`."""

    id: EventId
    attempt: int
    n: int


def steps(log: Sequence[Entry]) -> list[Step]:
    found = []
    for entry in log:
        if entry.type == "token":
            attempt, n = json.loads(entry.data)["text"].split(":")
            found.append(Step(entry.id, int(attempt), int(n)))
    return found


def check_steps(log: Sequence[Entry], total: int | None = None) -> None:
    """P5, P6: each token is in the epoch of the attempt that wrote it, and the surviving ones are 0, 1, 2, …: nothing
    that a checkpoint covers is said again, nothing is left out. `total` is how many there must be.
    """
    writers = {entry.id.epoch: json.loads(entry.data)["attempt"] for entry in log if entry.type == "attempt"}
    for step in steps(log):
        assert step.attempt == writers[step.id.epoch], f"{step} is in the epoch of attempt {writers[step.id.epoch]}"
    surviving = [step.n for step in steps(survivors(log))]
    assert surviving == list(range(len(surviving))), surviving
    assert total is None or len(surviving) == total, f"{len(surviving)} of {total} survive"


def check_resumed(log: Sequence[Entry], every: int) -> None:
    """P6: each attempt of `steps` with a checkpoint after `every` tokens was given the state of its `resume_from`, said
    nothing again that this covers, and had to say again no more than was written after the last checkpoint but one.
    """
    states = restored(log)
    for entry in log:
        if entry.type != "attempt" or entry.id.epoch not in states:
            continue
        resume_from, state = json.loads(entry.data)["resume_from"], states[entry.id.epoch]
        done = state["done"] if state else 0
        before = {str(step.id): step.n for step in steps(log) if step.id < entry.id}
        assert before[resume_from] == done - 1 if state else resume_from == "0-1", f"{entry} was given {state}"
        assert done % every == 0
        assert max(before.values(), default=0) < done + 2 * every, f"{entry} was given {state}, and not the last one"
        assert all(step.n >= done for step in steps(log) if step.id.epoch == entry.id.epoch)


def now_ms() -> int:
    return int(time.time() * 1000)
