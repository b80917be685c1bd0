"""One attempt at a run on a real Redis: what an agent may do, and how each thing that it may not do ends its run."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, cast

import pytest
from redis.asyncio import Redis

from broker.events import (
    Attempt,
    Cancelled,
    Data,
    Entry,
    Error,
    Event,
    Final,
    Message,
    Progress,
    Reasoning,
    Sources,
    Start,
    Token,
    ToolCall,
    ToolResult,
)
from broker.runs import keys, log
from broker.runs.primaries import Primaries
from broker.runs.scripts import Lease, Scripts
from tests.kit.checker import check_log, surviving_text
from tests.kit.runs import RETENTION_MS, append, cancel, claim, running, texts, words
from worker.agent import MAX_EVENT_BYTES, Agent, Checkpoint, Run
from worker.attempt import (
    HANDED_OVER,
    MAX_LOG_BYTES,
    MAX_LOG_EVENTS,
    RESERVED_EVENTS,
    Encoded,
    Outcome,
    execute,
)
from worker.publisher import Limits, Publisher

Events = AsyncIterator[Event | Checkpoint]
LIMITS = Limits(lease_ms=900, retention_ms=RETENTION_MS)


@dataclass
class Ended:
    outcome: Outcome
    entries: list[Entry]
    record: dict[str, str]

    @property
    def error(self) -> dict[str, Any]:
        assert self.entries[-1].type == "error", self.entries[-1]
        return cast("dict[str, Any]", json.loads(self.entries[-1].data))

    @property
    def final(self) -> dict[str, Any]:
        assert self.entries[-1].type == "final", self.entries[-1]
        return cast("dict[str, Any]", json.loads(self.entries[-1].data))


class Attempts:
    def __init__(self, redis: Redis) -> None:
        self.redis = redis
        self.scripts = Scripts(redis)

    def begin(
        self, lease: Lease, agent: Callable[..., Any], *, seconds: float = 30, **run: Any
    ) -> tuple[asyncio.Task[Outcome], asyncio.Future[str]]:
        stop: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        asked = Run(request_id=lease.request_id, query="q", deadline=time.time() + seconds, **run)
        publisher = Publisher(self.scripts, lease, LIMITS, Primaries(self.redis, self.redis))
        return asyncio.create_task(execute(lease, cast(Agent, agent), publisher, asked, stop)), stop

    async def ended(self, lease: Lease, executing: asyncio.Task[Outcome], *, finished: bool = True) -> Ended:
        async with asyncio.timeout(20):
            outcome = await executing
        entries = await log.read_all(self.redis, lease.request_id)
        if entries:
            check_log(entries, finished=finished)
        raw = await self.redis.hgetall(keys.run(lease.request_id))  # type: ignore[misc]
        return Ended(outcome, entries, {name.decode(): value.decode() for name, value in raw.items()})

    async def run(self, agent: Callable[..., Any], *, seconds: float = 30, **run: Any) -> Ended:
        lease = await running(self.scripts)
        executing, _ = self.begin(lease, agent, seconds=seconds, **run)
        return await self.ended(lease, executing)


@pytest.fixture
def attempts(redis: Redis) -> Attempts:
    return Attempts(redis)


# -- the ordinary way ----------------------------------------------------------------------------------------


EVERY_EVENT: list[Event] = [
    Message(text="m"),
    Progress(percent=1.5, message="p"),
    Sources(stage="screened", count=1, items=[{"a": 1}]),
    Reasoning(text="r"),
    Token(text="t"),
    ToolCall(id="1", tool="x", args={"a": [1]}),
    ToolResult(id="1", tool="x", result=None),
    Data(name="n", value=[1, {"b": None}]),
]


async def test_every_event_is_stored_as_it_was_yielded(attempts: Attempts) -> None:
    async def agent(run: Run) -> Events:
        for event in EVERY_EVENT:
            yield event
        yield Final(answer="a", citations=[{"c": 1}], usage={"u": 2})

    ended = await attempts.run(agent)
    assert ended.outcome == Outcome("final", len(EVERY_EVENT))
    assert [(entry.type, entry.data) for entry in ended.entries[2:-1]] == [
        (event.type, event.json_data()) for event in EVERY_EVENT
    ]
    assert ended.final == {"answer": "a", "citations": [{"c": 1}], "usage": {"u": 2}}
    assert ended.record["status"] == "completed"


async def test_without_a_final_the_run_completes_with_its_tokens(attempts: Attempts) -> None:
    async def agent(run: Run) -> Events:
        yield Token(text="so ")
        yield Message(text="not part of it")
        yield Token(text="it is")

    assert (await attempts.run(agent)).final["answer"] == "so it is"


async def test_a_final_without_an_answer_gets_the_tokens_and_one_with_an_answer_keeps_it(attempts: Attempts) -> None:
    async def without(run: Run) -> Events:
        yield Token(text="tokens")
        yield Final(usage={"n": 1})

    async def with_one(run: Run) -> Events:
        yield Token(text="tokens")
        yield Final(answer="")

    assert (await attempts.run(without)).final == {"answer": "tokens", "citations": [], "usage": {"n": 1}}
    assert (await attempts.run(with_one)).final["answer"] == ""


async def test_an_agent_that_yields_nothing_completes_without_an_answer(attempts: Attempts) -> None:
    async def agent(run: Run) -> Events:
        for event in list[Event]():
            yield event

    ended = await attempts.run(agent)
    assert ended.final["answer"] is None
    assert [entry.type for entry in ended.entries] == ["start", "attempt", "final"]


@pytest.mark.parametrize("said", [True, False])
async def test_an_answer_beyond_the_cap_is_left_to_its_tokens(attempts: Attempts, said: bool) -> None:
    parts = [f"{n:04d} " + "x" * 995 for n in range(200)]

    async def agent(run: Run) -> Events:
        for part in parts:
            yield Token(text=part)
        if said:
            yield Final(answer="".join(parts))

    ended = await attempts.run(agent)
    assert ended.final["answer"] is None
    assert surviving_text(ended.entries) == "".join(parts)


async def test_an_answer_beyond_the_cap_that_no_token_said_is_refused(attempts: Attempts) -> None:
    async def agent(run: Run) -> Events:
        yield Token(text="short")
        yield Final(answer="y" * MAX_EVENT_BYTES)

    assert (await attempts.run(agent)).error["code"] == "event_too_large"


async def test_after_the_final_nothing_of_the_agent_is_taken_and_its_finally_runs(attempts: Attempts) -> None:
    after = list[str]()

    async def agent(run: Run) -> Events:
        try:
            yield Final(answer="a")
            after.append("went on")
            yield Token(text="too late")
        finally:
            after.append("finally")

    ended = await attempts.run(agent)
    assert [entry.type for entry in ended.entries] == ["start", "attempt", "final"]
    assert after == ["finally"]


async def test_a_later_attempt_does_not_pass_its_own_tokens_off_as_the_answer(redis: Redis, attempts: Attempts) -> None:
    """It saw only those after the checkpoint; the fold knows the others."""
    first = await running(attempts.scripts)
    at = first.resume_from._replace(epoch=first.epoch, seq=2)
    await append(attempts.scripts, first, 2, *words("one "), checkpoint=(at, {"n": 1}))
    await redis.hset(keys.run(first.request_id), mapping={"status": "queued", "token": ""})  # type: ignore[misc]
    lease = await claim(attempts.scripts, first.request_id, attempt=2)

    async def agent(run: Run) -> Events:
        yield Token(text="two")

    executing, _ = attempts.begin(lease, agent)
    ended = await attempts.ended(lease, executing)
    assert ended.final["answer"] is None
    assert surviving_text(ended.entries) == "one two"


# -- an agent that fails -------------------------------------------------------------------------------------


SECRET = "the password is hunter2"


async def raises(run: Run) -> Events:
    yield Token(text="so far")
    raise RuntimeError(SECRET)


async def exits(run: Run) -> Events:
    yield Token(text="so far")
    sys.exit(SECRET)


async def cancels_itself(run: Run) -> Events:
    yield Token(text="so far")
    raise asyncio.CancelledError(SECRET)


async def awaits_what_was_cancelled(run: Run) -> Events:
    yield Token(text="so far")
    inner = asyncio.create_task(asyncio.sleep(60))
    inner.cancel()
    await inner


async def stops_iteration(run: Run) -> Events:
    yield Token(text="so far")
    raise StopAsyncIteration(SECRET)


async def fails_in_its_finally(run: Run) -> Events:
    try:
        yield Token(text="so far")
    finally:
        raise RuntimeError(SECRET)


async def validates(run: Run) -> Events:
    yield Token(text="so far")
    yield Progress(percent=101, message=SECRET)


def for_ever() -> None:
    for_ever()


async def goes_too_deep(run: Run) -> Events:
    yield Token(text="so far")
    for_ever()


@pytest.mark.parametrize(
    "agent",
    [
        raises,
        exits,
        cancels_itself,
        awaits_what_was_cancelled,
        stops_iteration,
        fails_in_its_finally,
        validates,
        goes_too_deep,
    ],
)
async def test_an_agent_that_fails_ends_its_run_with_a_stable_code_and_no_secret(
    attempts: Attempts, caplog: pytest.LogCaptureFixture, agent: Agent
) -> None:
    lease = await running(attempts.scripts)
    executing, _ = attempts.begin(lease, agent)
    ended = await attempts.ended(lease, executing)
    assert ended.error["code"] == "agent_failed"
    assert SECRET not in "".join(entry.data for entry in ended.entries)
    assert texts(ended.entries) == ["so far"]
    assert ended.record["status"] == "failed"
    [record] = [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert getattr(record, "request_id", "") == lease.request_id
    assert record.exc_info is not None, "the traceback is in the log"


async def test_a_function_that_fails_before_its_first_event_is_an_agent_that_fails(attempts: Attempts) -> None:
    def agent(run: Run) -> Events:
        raise RuntimeError(SECRET)

    ended = await attempts.run(agent)
    assert ended.error["code"] == "agent_failed"
    assert SECRET not in ended.error["message"]


async def test_an_agent_that_yields_an_error_ends_its_run_with_it(attempts: Attempts) -> None:
    async def agent(run: Run) -> Events:
        yield Token(text="so far")
        yield Error(code="no_quota", message="Come back tomorrow.")
        yield Token(text="too late")

    ended = await attempts.run(agent)
    assert ended.error == {"code": "no_quota", "message": "Come back tomorrow."}
    assert texts(ended.entries) == ["so far"]


# -- what is no agent, and what is no event ------------------------------------------------------------------


async def coroutine(run: Run) -> None: ...


def returns_nothing(run: Run) -> None: ...


def generator(run: Run) -> Iterator[Event]:
    yield Token(text="not asynchronous")


class HalfAnIterator:
    def __aiter__(self) -> HalfAnIterator:
        return self

    async def __anext__(self) -> Event:
        return Token(text="without aclose")


@pytest.mark.parametrize(
    "agent", [coroutine, returns_nothing, generator, lambda run: [Token(text="x")], lambda run: HalfAnIterator()]
)
async def test_what_is_not_an_async_generator_function_is_refused(attempts: Attempts, agent: Any) -> None:
    ended = await attempts.run(agent)
    assert ended.error["code"] == "invalid_agent"
    assert [entry.type for entry in ended.entries] == ["start", "attempt", "error"]


def looped() -> Any:
    loop: dict[str, Any] = {}
    loop["self"] = loop
    return loop


JUNK: dict[str, Callable[[], Any]] = {
    "a dict": lambda: {"type": "token", "text": "x"},
    "a string": lambda: "x",
    "None": lambda: None,
    "an event of the broker": lambda: Start(request_id="r", session_id="s"),
    "an attempt": lambda: Attempt(attempt=2, reason="worker_lost", resume_from="0-1"),
    "a cancelled": lambda: Cancelled(reason="me"),
    "the class": lambda: Token,
    "NaN": lambda: Data(name="n", value=float("nan")),
    "infinity": lambda: Data(name="n", value=[{"a": float("-inf")}]),
    "NaN in usage": lambda: Final(usage={"cost": float("nan")}),
    "bytes": lambda: Data(name="n", value=b"\xff"),
    "a Decimal": lambda: ToolCall(id="1", tool="t", args=Decimal("1.5")),
    "a set": lambda: ToolResult(id="1", tool="t", result={1, 2}),
    "an object": lambda: Data(name="n", value=object()),
    "a cycle": lambda: ToolResult.model_construct(id="1", tool="t", result=looped()),
    "a state that is not JSON": lambda: Checkpoint(state=object()),
    "NaN in a state": lambda: Checkpoint(state=float("nan")),
    "a state that is a cycle": lambda: Checkpoint(state=looped()),
}


@pytest.mark.parametrize("name", JUNK)
@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")
async def test_what_is_no_event_or_no_json_ends_the_run(attempts: Attempts, name: str) -> None:
    closed = list[bool]()

    async def agent(run: Run) -> Any:
        try:
            yield Token(text="before")
            yield JUNK[name]()
            yield Token(text="after")
        finally:
            closed.append(True)

    ended = await attempts.run(agent)
    assert ended.error["code"] == "invalid_event"
    assert texts(ended.entries) == ["before"]
    assert closed == [True]


TOO_LARGE: dict[str, Callable[[], Any]] = {
    "a token": lambda: Token(text="x" * MAX_EVENT_BYTES),
    "escapes": lambda: Token(text="é" * (MAX_EVENT_BYTES // 6 + 1)),
    "a tool result": lambda: ToolResult(id="1", tool="t", result=["x" * 1000] * 70),
    "a final": lambda: Final(answer="a", citations=[{"text": "x" * 1000}] * 70),
    "an error": lambda: Error(code="x", message="y" * MAX_EVENT_BYTES),
    "a checkpoint": lambda: Checkpoint(state=["x" * 1000] * 70),
}


@pytest.mark.parametrize("name", TOO_LARGE)
async def test_an_event_beyond_the_cap_ends_the_run(attempts: Attempts, name: str) -> None:
    async def agent(run: Run) -> Any:
        yield Token(text="before")
        yield TOO_LARGE[name]()

    ended = await attempts.run(agent)
    assert ended.error["code"] == "event_too_large"
    assert texts(ended.entries) == ["before"]
    assert all(len(entry.data) <= MAX_EVENT_BYTES for entry in ended.entries)


async def test_what_was_checked_and_encoded_elsewhere_is_stored_as_it_is(attempts: Attempts) -> None:
    data = '{"text":"a\\u00e9 ","more":1}'

    async def agent(run: Run) -> AsyncIterator[Encoded]:
        yield Encoded("token", data)
        yield Encoded("data", '{"name":"n","value":null}')
        yield Encoded("token", '{"text":"b"}')

    ended = await attempts.run(cast("Agent", agent))
    assert [entry.data for entry in ended.entries if entry.type in ("token", "data")] == [
        data, '{"name":"n","value":null}', '{"text":"b"}']  # fmt: skip
    assert ended.final["answer"] == "aé b"


@pytest.mark.parametrize(
    ("kind", "data", "code"),
    [
        ("token", "{", "invalid_event"),
        ("token", '{"text":"a"}\n', "invalid_event"),
        ("token", '{"text":\r"a"}', "invalid_event"),
        ("token", '{"text":"\u2028"}', "invalid_event"),
        ("token", '{"text":1}', "invalid_event"),
        ("data", "[]", "invalid_event"),
        ("data", "[" * 60_000, "invalid_event"),
        ("attempt", '{"attempt":2}', "invalid_event"),
        ("final", '{"answer":"x"}', "invalid_event"),
        ("data", '{"name":"' + "x" * MAX_EVENT_BYTES + '"}', "event_too_large"),
    ],
)
async def test_what_is_said_to_be_encoded_and_is_not_an_event_ends_the_run(
    attempts: Attempts, kind: str, data: str, code: str
) -> None:
    async def agent(run: Run) -> AsyncIterator[Encoded]:
        yield Encoded(kind, data)

    ended = await attempts.run(cast("Agent", agent))
    assert ended.error["code"] == code
    assert [entry.type for entry in ended.entries] == ["start", "attempt", "error"]


async def test_an_event_of_exactly_the_cap_is_taken(attempts: Attempts) -> None:
    async def agent(run: Run) -> Events:
        yield Token(text="x" * (MAX_EVENT_BYTES - len('{"text":""}')))
        yield Final(answer="a")

    ended = await attempts.run(agent)
    assert len(ended.entries[2].data) == MAX_EVENT_BYTES
    assert ended.final["answer"] == "a"


async def endless(run: Run) -> Events:
    while True:
        yield Token(text="x" * 1000)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("events", MAX_LOG_EVENTS - RESERVED_EVENTS - 100),
        ("bytes", MAX_LOG_BYTES - 2 * MAX_EVENT_BYTES - 100_000),
    ],
)
async def test_a_log_that_is_full_ends_its_run_and_has_room_for_the_end(
    redis: Redis, attempts: Attempts, name: str, value: int
) -> None:
    """PROTOCOL 1.6; the record says that nearly all is used up."""
    lease = await running(attempts.scripts)
    await redis.hset(keys.run(lease.request_id), name, str(value))  # type: ignore[misc]
    lease.record[name] = str(value)
    executing, _ = attempts.begin(lease, endless)
    ended = await attempts.ended(lease, executing)
    assert ended.error["code"] == "log_full"
    assert 50 < len(texts(ended.entries)) <= 100
    assert int(ended.record["events"]) <= MAX_LOG_EVENTS
    assert int(ended.record["bytes"]) <= MAX_LOG_BYTES


# -- ends that come from outside -----------------------------------------------------------------------------


class Slow:
    """An agent that waits, and remembers whether it was closed."""

    def __init__(self) -> None:
        self.closed = asyncio.Event()

    async def agent(self, run: Run) -> Events:
        try:
            yield Token(text="begun")
            await asyncio.sleep(60)
            yield Token(text="too late")
        finally:
            self.closed.set()


async def begun(redis: Redis, lease: Lease) -> None:
    async with asyncio.timeout(10):
        while len(await log.read_all(redis, lease.request_id)) < 3:
            await asyncio.sleep(0.01)


async def test_a_run_that_takes_too_long_ends_with_timeout_and_its_agent_is_closed(attempts: Attempts) -> None:
    slow = Slow()
    ended = await attempts.run(slow.agent, seconds=0.2)
    assert ended.error["code"] == "timeout"
    assert slow.closed.is_set()
    assert texts(ended.entries) == ["begun"]


async def test_a_run_whose_time_is_over_when_it_is_claimed_ends_at_once(attempts: Attempts) -> None:
    ended = await attempts.run(Slow().agent, seconds=-5)
    assert ended.error["code"] == "timeout"


@pytest.mark.parametrize("told", [True, False])
async def test_a_cancel_closes_the_agent_also_when_the_control_message_is_lost(
    redis: Redis, attempts: Attempts, told: bool
) -> None:
    """P25: then the next renewal tells, within a third of the lease."""
    lease, slow = await running(attempts.scripts), Slow()
    executing, stop = attempts.begin(lease, slow.agent)
    await begun(redis, lease)
    await cancel(attempts.scripts, lease.request_id)
    if told:
        stop.set_result("cancelled")
    ended = await attempts.ended(lease, executing)
    assert slow.closed.is_set()
    assert ended.outcome == Outcome("cancelled", 1)
    assert [entry.type for entry in ended.entries] == ["start", "attempt", "token", "attempt", "cancelled"]


@pytest.mark.parametrize("told", [True, False])
async def test_an_erasure_closes_the_agent_and_leaves_nothing(redis: Redis, attempts: Attempts, told: bool) -> None:
    lease, slow = await running(attempts.scripts), Slow()
    executing, stop = attempts.begin(lease, slow.agent)
    await begun(redis, lease)
    await attempts.scripts.erase(lease.request_id, tombstone_ms=RETENTION_MS)
    if told:
        stop.set_result("erased")
    ended = await attempts.ended(lease, executing)
    assert slow.closed.is_set()
    assert ended.outcome.status == "erased"
    assert (ended.entries, ended.record) == ([], {"status": "erased"})


async def test_an_agent_that_writes_all_the_time_is_stopped_by_a_cancel(redis: Redis, attempts: Attempts) -> None:
    lease = await running(attempts.scripts)
    executing, _ = attempts.begin(lease, endless)
    await begun(redis, lease)
    await cancel(attempts.scripts, lease.request_id)
    ended = await attempts.ended(lease, executing)
    assert ended.outcome.status == "cancelled"
    assert ended.entries[-1].type == "cancelled"


async def test_a_later_attempt_stops_an_earlier_one(redis: Redis, attempts: Attempts) -> None:
    """P5: the zombie's agent is closed, and nothing of it is in the log after the later attempt began."""
    lease, slow = await running(attempts.scripts), Slow()
    executing, _ = attempts.begin(lease, slow.agent)
    await begun(redis, lease)
    await redis.hset(keys.run(lease.request_id), mapping={"status": "queued", "token": ""})  # type: ignore[misc]
    later = await claim(attempts.scripts, lease.request_id, attempt=2)
    ended = await attempts.ended(lease, executing, finished=False)
    assert slow.closed.is_set()
    assert ended.entries[-1].id.epoch == later.epoch


async def test_an_attempt_that_is_handed_over_is_closed_and_writes_no_end(redis: Redis, attempts: Attempts) -> None:
    lease, slow = await running(attempts.scripts), Slow()
    executing, stop = attempts.begin(lease, slow.agent)
    await begun(redis, lease)
    stop.set_result(HANDED_OVER)
    ended = await attempts.ended(lease, executing, finished=False)
    assert ended.outcome.status == HANDED_OVER
    assert ended.record["status"] == "running"
    assert slow.closed.is_set()


async def test_a_stubborn_agent_is_left_behind_with_a_warning_and_writes_nothing(
    monkeypatch: pytest.MonkeyPatch, redis: Redis, attempts: Attempts, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("worker.attempt.CLOSE_SECONDS", 0.2)
    lease = await running(attempts.scripts)
    went_on = asyncio.Event()

    async def stubborn(run: Run) -> Events:
        yield Token(text="I ")
        for _ in range(12):
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(0.1)
        went_on.set()
        yield Token(text="will not stop")

    executing, stop = attempts.begin(lease, stubborn)
    await begun(redis, lease)
    await cancel(attempts.scripts, lease.request_id)
    stop.set_result("cancelled")
    ended = await attempts.ended(lease, executing)
    assert not went_on.is_set(), "its end was not waited for"
    assert any("left behind" in record.getMessage() for record in caplog.records)
    async with asyncio.timeout(5):
        await went_on.wait()
    await asyncio.sleep(0.05)
    assert await log.read_all(redis, lease.request_id) == ended.entries


@pytest.mark.parametrize("code", ["timeout", HANDED_OVER])
async def test_what_an_agent_yields_after_it_was_cancelled_is_not_taken(
    redis: Redis, attempts: Attempts, code: str
) -> None:
    async def agent(run: Run) -> Events:
        yield Token(text="begun")
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(60)
        yield Token(text="my last words")
        yield Final(answer="and an end of my own")

    lease = await running(attempts.scripts)
    executing, stop = attempts.begin(lease, agent, seconds=0.2 if code == "timeout" else 30)
    await begun(redis, lease)
    if code == HANDED_OVER:
        stop.set_result(code)
    ended = await attempts.ended(lease, executing, finished=code == "timeout")
    assert code == HANDED_OVER or ended.error["code"] == code
    assert texts(ended.entries) == ["begun"]


# -- checkpoints ---------------------------------------------------------------------------------------------


async def test_an_agent_that_yields_nothing_but_checkpoints_has_them_stored(redis: Redis, attempts: Attempts) -> None:
    async def agent(run: Run) -> Events:
        for n in range(1000):
            yield Checkpoint(state=n)
        stored.append(await redis.hget(keys.run(run.request_id), "checkpoint"))  # type: ignore[misc]

    stored: list[bytes | None] = []
    await attempts.run(agent)
    assert stored[0] is not None


async def test_a_checkpoint_is_stored_with_the_event_that_it_covers(redis: Redis, attempts: Attempts) -> None:
    async def agent(run: Run) -> Events:
        yield Token(text="one ")
        yield Checkpoint(state={"n": 1})
        yield Token(text="two ")
        yield Checkpoint(state={"n": 2})
        yield Token(text="three")
        yield Error(code="x", message="y")

    ended = await attempts.run(agent)
    assert json.loads(ended.record["checkpoint"]) == {"n": 2}
    [covered] = [entry for entry in ended.entries if str(entry.id) == ended.record["checkpoint_id"]]
    assert json.loads(covered.data) == {"text": "two "}
    assert [entry.type for entry in ended.entries] == ["start", "attempt", "token", "token", "token", "error"]
