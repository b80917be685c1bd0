"""A worker's runs on a real Redis: the claim, what the agent is given, and what becomes of the run afterwards."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator

import pytest
from redis.asyncio import Redis

from broker.ids import EventId
from broker.runs import keys, log
from broker.runs.queue import job_id
from broker.runs.scripts import Scripts
from broker.settings import Settings
from tests.kit.checker import check_log
from tests.kit.fleet import attempts, reasons
from tests.kit.redis_server import RedisServer
from tests.kit.runs import append, cancel, fence, field, lose_worker, now_ms, queued, roll_back, running, texts, words
from worker import Checkpoint, Event, Run, Token
from worker.attempt import WorkerLost
from worker.parts import Parts, make_parts
from worker.runner import Runner

Events = AsyncIterator[Event | Checkpoint]
LEASE = 1.2


class Agent:
    """Says its `words`, then waits until `go` is set; remembers what it was given, and whether it was closed."""

    def __init__(self, *words: str) -> None:
        self.words = words
        self.runs: list[Run] = []
        self.go = asyncio.Event()
        self.closed = False

    async def __call__(self, run: Run) -> Events:
        self.runs.append(run)
        try:
            for word in self.words:
                yield Token(text=word)
            await self.go.wait()
        finally:
            self.closed = True

    async def begun(self, attempts: int = 1) -> None:
        async with asyncio.timeout(10):
            while len(self.runs) < attempts:
                await asyncio.sleep(0.01)


@pytest.fixture
async def parts(redis: Redis, redis_server: RedisServer) -> AsyncIterator[Parts]:
    made = make_parts(Settings(redis_url=redis_server.url, lease_seconds=LEASE, max_run_seconds=100))
    yield made
    await made.close()


@pytest.fixture
def agent() -> Agent:
    return Agent("one ", "two ")


@pytest.fixture
async def runner(parts: Parts, agent: Agent) -> AsyncIterator[Runner]:
    made = Runner(parts, {"echo": agent})
    made.start()
    yield made
    await made.close()


@pytest.fixture
def scripts(redis: Redis) -> Scripts:
    return Scripts(redis)


async def written(redis: Redis, request_id: str, entries: int) -> None:
    async with asyncio.timeout(10):
        while await redis.xlen(keys.log(request_id)) < entries:
            await asyncio.sleep(0.01)


# -- the claim -----------------------------------------------------------------------------------------------


async def test_a_job_whose_run_is_not_there_or_is_another_attempts_is_left_alone(
    redis: Redis, scripts: Scripts, runner: Runner, agent: Agent
) -> None:
    lease = await running(scripts)
    ended = await queued(scripts)
    await cancel(scripts, ended)
    before = [await log.read_all(redis, request_id) for request_id in (lease.request_id, ended)]
    for request_id, attempt in [("0" * 32, 1), (lease.request_id, 1), (lease.request_id, 2), (ended, 1)]:
        await runner.run(request_id, attempt)
    assert not agent.runs
    assert [await log.read_all(redis, request_id) for request_id in (lease.request_id, ended)] == before
    assert await redis.pubsub_numsub(keys.control(ended)) == [(keys.control(ended).encode(), 0)]


async def test_the_agent_is_given_its_run_as_it_was_submitted(
    redis: Redis, scripts: Scripts, runner: Runner, agent: Agent
) -> None:
    agent.go.set()
    request_id = await queued(scripts, query="é\u2028\ud800", parameters={"n": [1, None]}, session_id="mine")
    await runner.run(request_id, 1)
    [run] = agent.runs
    assert (run.request_id, run.query, run.parameters, run.session_id) == (
        request_id,
        "é\u2028\ud800",
        {"n": [1, None]},
        "mine",
    )
    assert (run.tenant, run.subject, run.attempt, run.restored) == ("acme", "alice", 1, None)
    assert abs(run.deadline - time.time() - 100) < 10
    assert await field(redis, request_id, "status") == "completed"


async def test_the_time_of_a_run_counts_from_its_first_claim(
    redis: Redis, scripts: Scripts, runner: Runner, agent: Agent
) -> None:
    agent.go.set()
    first = await running(scripts)
    await redis.hset(keys.run(first.request_id), "started_at", str(now_ms() - 70_000))  # type: ignore[misc]
    await lose_worker(redis, scripts, first.request_id)
    await runner.run(first.request_id, 2)
    assert abs(agent.runs[0].deadline - time.time() - 30) < 10


async def test_a_later_attempt_is_given_the_state_of_the_last_checkpoint(
    redis: Redis, scripts: Scripts, runner: Runner, agent: Agent
) -> None:
    agent.go.set()
    first = await running(scripts)
    covered = EventId(first.epoch, 3)
    await append(scripts, first, 2, *words("a ", "b "), checkpoint=(covered, {"done": 2}))
    await append(scripts, first, 4, *words("c "))
    await lose_worker(redis, scripts, first.request_id)
    await runner.run(first.request_id, 2)
    assert (agent.runs[0].attempt, agent.runs[0].restored) == (2, {"done": 2})
    entries = await log.read_all(redis, first.request_id)
    check_log(entries)
    assert attempts(entries)[1] == (2, "worker_lost", str(covered))


# -- what becomes of a run -----------------------------------------------------------------------------------


async def test_an_attempt_whose_process_is_lost_lets_its_lease_go_and_a_reaper_counts_it(
    redis: Redis, scripts: Scripts, parts: Parts
) -> None:
    """PROTOCOL 4.4. What it has said before is in the log."""

    async def lost(run: Run) -> Events:
        yield Token(text="said ")
        yield Checkpoint(state="saved")
        raise WorkerLost

    runner = Runner(parts, {"echo": lost})
    runner.start()
    request_id = await queued(scripts)
    await runner.run(request_id, 1)
    await runner.close()
    entries = await log.read_all(redis, request_id)
    assert texts(entries) == ["said "]
    assert await field(redis, request_id, "status") == "running"
    assert int(await field(redis, request_id, "deadline")) <= now_ms() + LEASE * 500
    look_at = await redis.zscore(keys.LEASES, request_id)
    assert look_at is not None
    assert look_at <= now_ms() + LEASE * 500
    await asyncio.sleep(0.01)
    reply = await fence(scripts, request_id)
    assert (reply.answer, reply.rest) == ("OK", [2])
    assert await field(redis, request_id, "fails") == "1"
    assert await field(redis, request_id, "checkpoint") == '"saved"'


async def test_a_run_that_is_handed_over_is_queued_for_its_next_attempt_and_its_agent_is_closed(
    redis: Redis, scripts: Scripts, runner: Runner, agent: Agent
) -> None:
    request_id = await queued(scripts)
    job = asyncio.create_task(runner.run(request_id, 1))
    await written(redis, request_id, 4)
    runner.hand_over()
    await asyncio.wait_for(job, 10)
    assert agent.closed
    assert [await field(redis, request_id, name) for name in ("status", "attempt", "fails")] == ["queued", "1", ""]
    assert await redis.zscore(keys.QUEUE, job_id(request_id, 2, 0)) is not None
    agent.go.set()
    await runner.run(request_id, 2)
    entries = await log.read_all(redis, request_id)
    check_log(entries)
    assert reasons(entries) == ["started", "handed_over"]


async def test_what_an_agent_has_said_is_in_the_log_before_its_run_is_handed_over(
    redis: Redis, scripts: Scripts, runner: Runner, agent: Agent, caplog: pytest.LogCaptureFixture
) -> None:
    agent.words = tuple(f"{n} " for n in range(900))
    caplog.set_level(logging.INFO)
    request_id = await queued(scripts)
    job = asyncio.create_task(runner.run(request_id, 1))
    await agent.begun()
    runner.hand_over()
    await asyncio.wait_for(job, 10)
    [ended] = [record for record in caplog.records if record.getMessage() == "run ended"]
    said = texts(await log.read_all(redis, request_id))
    assert said == [f"{n} " for n in range(vars(ended)["events"])]
    assert said


async def test_a_run_that_is_to_be_handed_over_while_it_is_claimed_is_handed_over(
    redis: Redis, scripts: Scripts, runner: Runner, agent: Agent, parts: Parts
) -> None:
    """A primary that has not settled holds the claim up (PROTOCOL 4.6), and a drain begins meanwhile."""
    replid = (await redis.info("replication"))["master_replid"]
    await redis.hset(keys.PRIMARIES, mapping={"another": "0", replid: str(now_ms() - 4_000)})  # type: ignore[misc]
    request_id = await queued(scripts)
    job = asyncio.create_task(runner.run(request_id, 1))
    await asyncio.sleep(0.3)
    assert await field(redis, request_id, "status") == "queued"
    runner.hand_over()
    await asyncio.wait_for(job, 10)
    assert await redis.zscore(keys.QUEUE, job_id(request_id, 2, 0)) is not None
    assert not agent.runs, "it was not begun for nothing"


async def test_a_run_that_stands_on_what_a_failover_took_is_handed_over_and_begins_at_what_is_left(
    redis: Redis, scripts: Scripts, runner: Runner, agent: Agent
) -> None:
    """LOST: reason data_lost, which counts as no failure (PROTOCOL 2, 4.4)."""
    first = await running(scripts)
    await append(scripts, first, 2, *words("a "), checkpoint=(EventId(first.epoch, 2), 1))
    await lose_worker(redis, scripts, first.request_id)
    job = asyncio.create_task(runner.run(first.request_id, 2))
    await agent.begun()
    await redis.hdel(keys.run(first.request_id), "checkpoint", "checkpoint_id")  # type: ignore[misc]
    before = {"status": "running", "attempt": "1", "epoch": str(first.epoch), "token": first.token}
    await roll_back(redis, first.request_id, EventId(first.epoch, 1), **before)
    await asyncio.wait_for(job, 10)
    assert agent.closed
    assert await field(redis, first.request_id, "status") == "queued"
    agent.go.set()
    await runner.run(first.request_id, 3)
    entries = await log.read_all(redis, first.request_id)
    check_log(entries)
    assert attempts(entries)[-1] == (3, "data_lost", "0-1")
    assert await field(redis, first.request_id, "fails") == "1", "that of the lost worker, and no other"


async def test_an_end_is_kept_by_who_wrote_it_and_a_cancel_is_not(
    redis: Redis, scripts: Scripts, runner: Runner, agent: Agent, parts: Parts
) -> None:
    """PROTOCOL 5.2: who was cancelled has closed nothing, and may have no tail to send again."""
    cancelled, completed = await queued(scripts), await queued(scripts)
    jobs = [asyncio.create_task(runner.run(request_id, 1)) for request_id in (cancelled, completed)]
    for request_id in (cancelled, completed):
        await written(redis, request_id, 4)
    await cancel(scripts, cancelled)
    agent.go.set()
    await asyncio.wait_for(asyncio.gather(*jobs), 10)
    assert [kept.request_id for kept in parts.closings._kept] == [completed]


async def test_a_run_whose_agent_this_worker_does_not_have_ends(redis: Redis, scripts: Scripts, runner: Runner) -> None:
    request_id = await queued(scripts, agent="of another worker")
    await runner.run(request_id, 1)
    entries = await log.read_all(redis, request_id)
    check_log(entries)
    assert json.loads(entries[-1].data)["code"] == "unknown_agent"


async def test_a_run_whose_record_cannot_be_read_ends_all_the_same(
    redis: Redis, scripts: Scripts, runner: Runner, agent: Agent
) -> None:
    """What was accepted ends (P2), whatever is wrong with it."""
    request_id = await queued(scripts)
    await redis.hset(keys.run(request_id), "parameters", "no JSON")  # type: ignore[misc]
    await runner.run(request_id, 1)
    entries = await log.read_all(redis, request_id)
    check_log(entries)
    assert (entries[-1].type, json.loads(entries[-1].data)["code"]) == ("error", "internal")
    assert not agent.runs


async def test_two_attempts_of_a_run_in_one_worker_do_not_disturb_each_other(
    redis: Redis, scripts: Scripts, runner: Runner, agent: Agent
) -> None:
    """It was fenced, and has taken the next attempt itself, before it has heard of that."""
    request_id = await queued(scripts)
    first = asyncio.create_task(runner.run(request_id, 1))
    await written(redis, request_id, 4)
    await lose_worker(redis, scripts, request_id)
    second = asyncio.create_task(runner.run(request_id, 2))
    await agent.begun(2)
    await asyncio.wait_for(first, 10)
    assert not second.done()
    await cancel(scripts, request_id)
    await asyncio.wait_for(second, 10)
    entries = await log.read_all(redis, request_id)
    check_log(entries)
    assert reasons(entries) == ["started", "worker_lost", "cancelled"]


# -- the index of leases -------------------------------------------------------------------------------------


async def test_runs_under_way_are_to_be_looked_at_a_lease_later_and_ended_ones_much_later(
    redis: Redis, scripts: Scripts, runner: Runner, agent: Agent, parts: Parts
) -> None:
    """PROTOCOL 4.2."""
    await parts.primaries.look()
    keeping = asyncio.create_task(runner.keep_index())
    request_id = await queued(scripts)
    job = asyncio.create_task(runner.run(request_id, 1))

    async def score_between(low: float, high: float) -> None:
        async with asyncio.timeout(10):
            while not low < (await redis.zscore(keys.LEASES, request_id) or 0) - now_ms() <= high:
                await asyncio.sleep(0.01)

    await score_between(LEASE * 500, LEASE * 1000 + 100)
    agent.go.set()
    await asyncio.wait_for(job, 10)
    await score_between(60_000, 121_000)
    keeping.cancel()
    await asyncio.gather(keeping, return_exceptions=True)
