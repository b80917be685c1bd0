"""Runs as a gateway uses them, on a real Redis: submit and its healing, what a poll shows, lists, stop and erase."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any, cast

import pytest
from redis.asyncio import Redis

from broker.errors import BadRequest, KeyReused, RunNotFound, Unavailable
from broker.ids import EventId, Owner
from broker.runs import keys, log, store
from broker.runs.connections import connect
from broker.runs.queue import Queue
from broker.runs.record import Submission
from broker.runs.scripts import STALE_AFTER_MS, Scripts, claim_key
from broker.runs.store import Accepted, Runs
from broker.settings import Settings
from tests.kit.checker import check_log
from tests.kit.proxy import Command, Proxy, calls
from tests.kit.redis_server import RedisServer
from tests.kit.runs import FINAL, append, claim, now_ms, words

ALICE, BOB, SAME_TENANT = Owner("acme", "alice"), Owner("other", "alice"), Owner("acme", "bob")


def asked(query: str = "why?", **fields: object) -> Submission:
    return Submission(**{"query": query, "agent": "echo", **fields})  # type: ignore[arg-type]


@pytest.fixture
def proxy(redis_server: RedisServer) -> Iterator[Proxy]:
    with Proxy(redis_server.port) as proxy:
        yield proxy


@pytest.fixture
def scripts(redis: Redis) -> Scripts:
    return Scripts(redis)


@pytest.fixture
async def runs(redis: Redis, proxy: Proxy) -> AsyncIterator[Runs]:
    """Reaches Redis through the proxy; the tests, directly."""
    client, queue = connect(proxy.url, connections=4), Queue(proxy.url, connections=2)
    yield Runs(client, queue, Settings(retention_seconds=60))
    await queue.close()
    await client.aclose(close_connection_pool=True)


async def jobs(redis: Redis) -> list[str]:
    return [job.decode().partition(":")[0] for job in await redis.zrange(keys.QUEUE, 0, -1)]


async def finish(scripts: Scripts, request_id: str, *entries: tuple[str, str]) -> None:
    lease = await claim(scripts, request_id)
    await append(scripts, lease, 2, *(entries or [*words("so ", "it is"), FINAL]))


# -- submit --------------------------------------------------------------------------------------------------


async def test_a_submit_makes_the_run_its_job_and_its_index(redis: Redis, runs: Runs) -> None:
    accepted = await runs.submit(ALICE, asked(parameters={"n": 1}, metadata={"m": 2}))
    assert (accepted.status, accepted.joined) == ("queued", False)
    record = await runs.record(accepted.request_id)
    assert (record.agent, record.metadata, record.attempt) == ("echo", {"m": 2}, 0)
    assert record.session_id == accepted.session_id
    assert await jobs(redis) == [accepted.request_id]
    for session_id in (None, accepted.session_id):
        page = await runs.page(ALICE, session_id=session_id, limit=10)
        assert [record.request_id for record in page.records] == [accepted.request_id]
    head = await runs.head(accepted.request_id)
    assert head is not None
    assert (head.owner, head.end) == (ALICE, EventId(0, 1))


async def test_the_same_query_joins_the_run_while_it_lives(redis: Redis, runs: Runs, scripts: Scripts) -> None:
    first = await runs.submit(ALICE, asked())
    assert await runs.submit(ALICE, asked()) == first._replace(joined=True)
    await claim(scripts, first.request_id)
    assert await runs.submit(ALICE, asked()) == first._replace(joined=True, status="running")
    assert await jobs(redis) == [first.request_id]


async def test_who_joins_a_run_counts_as_its_reader(redis: Redis, runs: Runs) -> None:
    """PROTOCOL 5.6"""
    request_id = (await runs.submit(ALICE, asked(cancel_if_unwatched=60.0))).request_id
    assert await redis.hget(keys.run(request_id), "watched_at") is None  # type: ignore[misc]
    await runs.submit(ALICE, asked())
    assert await redis.hget(keys.run(request_id), "watched_at") is not None  # type: ignore[misc]


async def test_an_erasure_is_remembered_for_longer_than_its_id_can_be_made_again(redis: Redis, proxy: Proxy) -> None:
    client, queue = connect(proxy.url, connections=4), Queue(proxy.url, connections=2)
    runs = Runs(client, queue, Settings(retention_seconds=1))
    request_id = (await runs.submit(ALICE, asked())).request_id
    await runs.erase(request_id)
    assert await redis.pttl(keys.run(request_id)) > 3 * STALE_AFTER_MS
    await queue.close()
    await client.aclose(close_connection_pool=True)


async def test_parallel_submits_of_one_query_are_one_run(redis: Redis, runs: Runs) -> None:
    accepted = await asyncio.gather(*(runs.submit(ALICE, asked()) for _ in range(50)))
    assert len({each.request_id for each in accepted}) == 1
    assert await jobs(redis) == [accepted[0].request_id]
    check_log(await log.read_all(redis, accepted[0].request_id), finished=False)


@pytest.mark.parametrize(
    "other",
    [
        asked("how?"),
        asked(agent="slow"),
        asked(parameters={"n": 1}),
        asked(session_id="mine"),
    ],
)
async def test_another_query_is_another_run(runs: Runs, other: Submission) -> None:
    first, second = await runs.submit(ALICE, asked()), await runs.submit(ALICE, other)
    assert first.request_id != second.request_id


async def test_metadata_makes_no_other_query(runs: Runs) -> None:
    first = await runs.submit(ALICE, asked(metadata={"a": 1}))
    assert (await runs.submit(ALICE, asked(metadata={"b": 2}))).request_id == first.request_id


async def test_owners_never_share_a_run(runs: Runs) -> None:
    ids = {(await runs.submit(owner, asked(), idempotency_key="k")).request_id for owner in (ALICE, BOB, SAME_TENANT)}
    ids |= {(await runs.submit(owner, asked())).request_id for owner in (ALICE, BOB, SAME_TENANT)}
    assert len(ids) == 6


async def test_after_the_end_the_same_query_is_a_new_run(runs: Runs, scripts: Scripts) -> None:
    first = await runs.submit(ALICE, asked())
    await finish(scripts, first.request_id)
    second = await runs.submit(ALICE, asked())
    assert second.request_id != first.request_id
    assert not second.joined


async def test_after_a_cancel_the_same_query_is_a_new_run_at_once(runs: Runs) -> None:
    """PROTOCOL 3.4."""
    first = await runs.submit(ALICE, asked())
    await runs.cancel(first.request_id, "client")
    for repeated in (True, False):
        assert (await runs.submit(ALICE, asked(), repeated=repeated)).request_id != first.request_id


async def test_after_an_erasure_the_same_query_and_the_same_key_are_new_runs(runs: Runs) -> None:
    for key in (None, "k"):
        first = await runs.submit(ALICE, asked(), idempotency_key=key)
        await runs.erase(first.request_id)
        second = await runs.submit(ALICE, asked(), idempotency_key=key)
        assert second.request_id != first.request_id


async def test_a_key_answers_also_after_the_end(runs: Runs, scripts: Scripts) -> None:
    first = await runs.submit(ALICE, asked(), idempotency_key="k")
    await finish(scripts, first.request_id)
    again = await runs.submit(ALICE, asked(), idempotency_key="k")
    assert again == first._replace(joined=True, status="completed")


async def test_a_key_with_another_query_is_refused_and_starts_nothing(redis: Redis, runs: Runs) -> None:
    first = await runs.submit(ALICE, asked(), idempotency_key="k")
    with pytest.raises(KeyReused):
        await runs.submit(ALICE, asked("how?"), idempotency_key="k")
    assert await jobs(redis) == [first.request_id]


async def test_a_key_and_a_query_are_two_ways_to_two_runs(runs: Runs) -> None:
    ids = [(await runs.submit(ALICE, asked(), idempotency_key=key)).request_id for key in (None, "a", "b")]
    assert len(set(ids)) == 3


async def test_a_repeat_that_says_so_joins_what_completed_a_moment_ago(
    redis: Redis, runs: Runs, scripts: Scripts
) -> None:
    """PROTOCOL 3.5."""
    first = await runs.submit(ALICE, asked())
    await finish(scripts, first.request_id)
    again = await runs.submit(ALICE, asked(), repeated=True)
    assert again == first._replace(joined=True, status="completed")
    await redis.hset(keys.run(first.request_id), "finished_at", str(now_ms() - 61_000))  # type: ignore[misc]
    assert (await runs.submit(ALICE, asked(), repeated=True)).request_id != first.request_id


async def test_a_repeat_does_not_join_what_failed(runs: Runs, scripts: Scripts) -> None:
    first = await runs.submit(ALICE, asked())
    await finish(scripts, first.request_id, ("error", '{"code":"x","message":"y"}'))
    assert (await runs.submit(ALICE, asked(), repeated=True)).request_id != first.request_id


# -- a submit that was interrupted ---------------------------------------------------------------------------


async def claimed(redis: Redis, request_id: str, submission: Submission) -> str:
    """The first step of a submit whose gateway died after it. Returns the key."""
    key = keys.idempotency(ALICE, "query", submission.digest())
    await claim_key(redis, key, replace=None, request_id=request_id, digest=submission.digest(), life_ms=60_000)
    return key


async def test_a_claim_without_a_run_is_completed_by_whoever_comes_next(redis: Redis, runs: Runs) -> None:
    request_id = "ab" * 16
    await claimed(redis, request_id, asked())
    accepted = await runs.submit(ALICE, asked())
    assert accepted.request_id == request_id
    assert await jobs(redis) == [request_id]


async def test_a_run_without_a_job_gets_one_from_whoever_comes_next(redis: Redis, runs: Runs) -> None:
    accepted = await runs.submit(ALICE, asked())
    await redis.delete(keys.QUEUE, f"arq:job:{accepted.request_id}:1:0")
    assert await jobs(redis) == []
    assert (await runs.submit(ALICE, asked())).request_id == accepted.request_id
    assert await jobs(redis) == [accepted.request_id]


async def test_a_claim_that_is_a_minute_old_without_a_run_is_taken_over(redis: Redis, runs: Runs) -> None:
    request_id = "ab" * 16
    key = await claimed(redis, request_id, asked())
    await redis.set(key, f"{request_id} {asked().digest()} {now_ms() - 61_000}")
    accepted = await runs.submit(ALICE, asked())
    assert accepted.request_id != request_id
    assert await runs.head(request_id) is None
    assert (await runs.submit(ALICE, asked())).request_id == accepted.request_id


def nth(n: int) -> Callable[[Command], bool]:
    """Matches the n-th command that is no part of a connection's greeting."""
    seen = 0

    def matches(command: Command) -> bool:
        nonlocal seen
        if command[0].upper() == b"CLIENT":
            return False
        seen += 1
        return seen == n

    return matches


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("step", range(1, 15))
async def test_a_submit_that_lost_any_command_or_reply_is_healed_by_its_repeat(
    redis: Redis, runs: Runs, proxy: Proxy, step: int, before: bool
) -> None:
    """P1, P2: whatever was done, the repeat leads to one run with one job; and what is accepted has its job."""
    warm = await runs.submit(ALICE, asked("warm"))
    await runs.erase(warm.request_id)
    await redis.delete(keys.QUEUE)
    proxy.swallow(nth(step), before=before)
    first: Accepted | None = None
    try:
        first = await runs.submit(ALICE, asked())
        assert await jobs(redis) == [first.request_id]
    except Unavailable:
        assert proxy.swallowed == 1
    proxy.heal()
    again = await runs.submit(ALICE, asked())
    assert first is None or again.request_id == first.request_id
    assert await jobs(redis) == [again.request_id]
    page = await runs.page(ALICE, limit=10)
    assert [record.request_id for record in page.records] == [again.request_id]


# -- what a poll shows ---------------------------------------------------------------------------------------


async def test_the_outcome_is_the_finals_answer_with_its_citations(runs: Runs, scripts: Scripts) -> None:
    accepted = await runs.submit(ALICE, asked())
    final = {"answer": "42", "citations": [{"path": "a"}], "usage": {"tokens": 3}}
    await finish(scripts, accepted.request_id, *words("6 ", "times 7"), ("final", json.dumps(final)))
    outcome = await runs.outcome(await runs.record(accepted.request_id))
    assert outcome == ("42", [{"path": "a"}], {"tokens": 3}, None)


async def test_the_outcome_without_an_answer_is_the_surviving_tokens(runs: Runs, scripts: Scripts) -> None:
    accepted = await runs.submit(ALICE, asked())
    lease = await claim(scripts, accepted.request_id)
    await append(scripts, lease, 2, *words("so ", "far"))
    assert (await runs.outcome(await runs.record(accepted.request_id))).answer == "so far"
    await runs.cancel(accepted.request_id, "client")
    record = await runs.record(accepted.request_id)
    assert record.status == "cancelled"
    assert record.finished_at_ms is not None
    assert (await runs.outcome(record)).answer == "so far"


async def test_the_outcome_of_a_failure_has_its_error(runs: Runs, scripts: Scripts) -> None:
    accepted = await runs.submit(ALICE, asked())
    await finish(scripts, accepted.request_id, *words("so far"), ("error", '{"code":"x","message":"y"}'))
    outcome = await runs.outcome(await runs.record(accepted.request_id))
    assert (outcome.answer, outcome.error) == ("so far", {"code": "x", "message": "y"})


async def test_events_come_in_pages_after_a_cursor(redis: Redis, runs: Runs, scripts: Scripts) -> None:
    accepted = await runs.submit(ALICE, asked())
    await finish(scripts, accepted.request_id, *words(*"abcdefgh"), FINAL)
    stored = await log.read_all(redis, accepted.request_id)
    assert await runs.events(accepted.request_id, stored[3].id, 4) == stored[4:8]
    assert await runs.events(accepted.request_id, stored[-1].id, 4) == []


async def test_what_is_not_there_and_what_was_erased_are_the_same(runs: Runs) -> None:
    accepted = await runs.submit(ALICE, asked())
    await runs.erase(accepted.request_id)
    for request_id in (accepted.request_id, "ab" * 16):
        assert await runs.head(request_id) is None
        with pytest.raises(RunNotFound):
            await runs.record(request_id)
        with pytest.raises(RunNotFound):
            await runs.cancel(request_id, "client")
        with pytest.raises(RunNotFound):
            await runs.erase(request_id)


async def test_a_cancel_of_what_has_ended_changes_nothing(redis: Redis, runs: Runs, scripts: Scripts) -> None:
    accepted = await runs.submit(ALICE, asked())
    await finish(scripts, accepted.request_id)
    before = await log.read_all(redis, accepted.request_id)
    await runs.cancel(accepted.request_id, "client")
    assert await log.read_all(redis, accepted.request_id) == before
    assert (await runs.record(accepted.request_id)).status == "completed"


# -- lists ---------------------------------------------------------------------------------------------------


async def test_a_list_pages_through_everything_once_newest_first(redis: Redis, runs: Runs) -> None:
    ids = [(await runs.submit(ALICE, asked(f"{n}"))).request_id for n in range(23)]
    for n, request_id in enumerate(ids):  # many of the same millisecond
        await redis.zadd(keys.runs_of(ALICE), {request_id: 1000 + n // 7})
    await runs.submit(BOB, asked())
    for limit in (1, 2, 5, 23, 50):
        seen, cursor = list[str](), None
        while True:
            page = await runs.page(ALICE, cursor=cursor, limit=limit)
            assert len(page.records) <= limit
            seen += [record.request_id for record in page.records]
            if page.next is None:
                break
            cursor = page.next
        assert seen == sorted(ids, key=lambda request_id: (1000 + ids.index(request_id) // 7, request_id))[::-1]


async def test_a_list_leaves_out_what_is_gone_and_what_was_never_made(redis: Redis, runs: Runs) -> None:
    kept, erased = [await runs.submit(ALICE, asked(f"{n}", session_id="s")) for n in range(2)]
    await runs.erase(erased.request_id)
    await redis.zadd(keys.runs_of(ALICE), {"ab" * 16: 1})
    for session_id in (None, "s"):
        page = await runs.page(ALICE, session_id=session_id, limit=10)
        assert [record.request_id for record in page.records] == [kept.request_id]
    assert (await runs.page(ALICE, session_id="another", limit=10)).records == []
    assert (await runs.page(BOB, session_id="s", limit=10)).records == []


async def test_pages_of_a_status_have_each_of_its_runs_once_however_many_others_lie_between(
    redis: Redis, runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = cast("Any", redis)
    monkeypatch.setattr(store, "_SLICE", 3)
    monkeypatch.setattr(store, "_MOST_SLICES", 2)
    ids = [(await runs.submit(ALICE, asked(f"{n}"))).request_id for n in range(30)]
    for n, request_id in enumerate(ids):  # some of the same millisecond
        await redis.zadd(keys.runs_of(ALICE), {request_id: 1000 + n // 3})
    chance = random.Random(1)
    for end, share in ((10, 0.8), (22, 0.0), (30, 0.5)):
        for request_id in ids[end - 10 : end]:
            if chance.random() < share:
                await plain.hset(keys.run(request_id), "status", "failed")
    for request_id in chance.sample(ids, 3):
        await redis.delete(keys.run(request_id))
    in_order = [member.decode() for member in await redis.zrevrange(keys.runs_of(ALICE), 0, -1)]
    expected = [name for name in in_order if await plain.hget(keys.run(name), "status") == b"failed"]
    assert 5 < len(expected) < 20
    for limit in (1, 2, 3, 5, 50):
        found, cursor, pages = list[str](), None, 0
        while pages == 0 or cursor is not None:
            page = await runs.page(ALICE, status="failed", cursor=cursor, limit=limit)
            assert len(page.records) <= limit
            found += [record.request_id for record in page.records]
            cursor, pages = page.next, pages + 1
        assert found == expected, limit
    none = await runs.page(ALICE, status="running", limit=50)
    assert none.records == [] and none.next is not None, "a page looks at so many runs, and not at all"


@pytest.mark.parametrize("cursor", ["x", "!!", "AAAA", "bm90OmE6Y3Vyc29y", "é"])
async def test_a_cursor_that_no_list_gave_out_is_refused(runs: Runs, cursor: str) -> None:
    with pytest.raises(BadRequest):
        await runs.page(ALICE, cursor=cursor, limit=10)


# -- Redis away ----------------------------------------------------------------------------------------------


async def test_everything_says_unavailable_while_redis_is_away(runs: Runs, proxy: Proxy) -> None:
    accepted = await runs.submit(ALICE, asked())
    record = await runs.record(accepted.request_id)
    proxy.refuse()
    for call in (
        runs.submit(ALICE, asked("other")),
        runs.head(accepted.request_id),
        runs.record(accepted.request_id),
        runs.outcome(record),
        runs.page(ALICE, limit=10),
        runs.cancel(accepted.request_id, "client"),
        runs.erase(accepted.request_id),
        runs.events(accepted.request_id, EventId(0, 0), 10),
        runs.ping(),
    ):
        with pytest.raises(Unavailable):
            await call
    proxy.accept()
    assert (await runs.record(accepted.request_id)).status == "queued"


async def test_a_cancel_whose_reply_was_lost_is_unavailable_and_done_when_it_is_asked_again(
    runs: Runs, proxy: Proxy
) -> None:
    accepted = await runs.submit(ALICE, asked())
    other = await runs.submit(ALICE, asked("other"))
    await runs.cancel(other.request_id, "client")  # the script is known to Redis from here on
    proxy.swallow(calls("close"))
    with pytest.raises(Unavailable):
        await runs.cancel(accepted.request_id, "client")
    proxy.heal()
    await runs.cancel(accepted.request_id, "client")
    assert (await runs.record(accepted.request_id)).status == "cancelled"
