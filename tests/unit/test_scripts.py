"""P3: the answers of the run's scripts, each case of PROTOCOL 2, on the installed Redis and on the oldest promised.

What a reaper, a drain and a failover need of them is in test_scripts_recovery.py.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Iterator

import pytest
from redis.asyncio import Redis
from redis.exceptions import ResponseError

from broker.ids import EventId, Owner, new_request_id
from broker.runs import keys, log
from broker.runs.connections import is_away
from broker.runs.scripts import Answer, IdempotencyClaim, Lease, Reply, Scripts, claim_key
from tests.kit.checker import check_log
from tests.kit.redis_server import VERSIONS, RedisServer, server_of
from tests.kit.runs import (
    FINAL,
    LEASE_MS,
    OWNER,
    RETENTION_MS,
    Ears,
    append,
    cancel,
    channels,
    claim,
    create,
    fence,
    field,
    lose_worker,
    now_ms,
    queued,
    roll_back,
    running,
    snapshot,
    texts,
    words,
)


@pytest.fixture(scope="module", params=VERSIONS)
def redis_server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    server = server_of(request.param, tmp_path_factory.mktemp("redis"))
    try:
        yield server.start()
    finally:
        server.close()


@pytest.fixture
def scripts(redis: Redis) -> Scripts:
    return Scripts(redis)


def later(lease: Lease) -> Lease:
    """A claim that a failover lost, as its worker holds it."""
    return Lease(**{**vars(lease), "epoch": lease.epoch + 9, "token": "later"})


# -- create --------------------------------------------------------------------------------------------------


async def test_create_makes_the_record_and_the_start_event(redis: Redis, scripts: Scripts) -> None:
    request_id = new_request_id()
    reply = await create(scripts, request_id, query="why?", metadata={"a": 1})
    assert reply[:3] == (Answer.CREATED, EventId(0, 1), "queued")
    [start] = await log.read_all(redis, request_id)
    assert (start.id, start.type) == (EventId(0, 1), "start")
    assert json.loads(start.data)["request_id"] == request_id
    assert await field(redis, request_id, "query") == '"why?"'
    assert await field(redis, request_id, "attempt") == "0"


async def test_creating_again_says_that_it_exists_and_changes_nothing(redis: Redis, scripts: Scripts) -> None:
    lease = await running(scripts, query="first")
    before = await snapshot(redis, lease.request_id)
    reply = await create(scripts, lease.request_id, query="second")
    assert (reply.answer, reply.status, reply.rest) == (Answer.EXISTS, "running", [1])
    assert reply.end == EventId(lease.epoch, 1)
    assert await snapshot(redis, lease.request_id) == before


async def test_a_key_that_was_claimed_a_minute_ago_creates_nothing_for_anybody(redis: Redis, scripts: Scripts) -> None:
    request_id = new_request_id()
    for _ in range(2):
        reply = await create(scripts, request_id, claimed_at_ms=now_ms() - 60_000)
        assert (reply.answer, reply.status) == (Answer.STALE, "")
    assert not await redis.exists(keys.run(request_id), keys.log(request_id))
    assert (await create(scripts, request_id, claimed_at_ms=now_ms() - 50_000)).answer is Answer.CREATED


async def test_a_run_that_exists_is_never_stale(scripts: Scripts) -> None:
    request_id = await queued(scripts)
    assert (await create(scripts, request_id, claimed_at_ms=0)).answer is Answer.EXISTS


async def test_an_erased_run_is_not_created_again(redis: Redis, scripts: Scripts) -> None:
    request_id = await queued(scripts)
    await scripts.erase(request_id, tombstone_ms=RETENTION_MS)
    reply = await create(scripts, request_id)
    assert (reply.answer, reply.status) == (Answer.EXISTS, "erased")
    assert not await redis.exists(keys.log(request_id))


# -- claim ---------------------------------------------------------------------------------------------------


async def test_a_claim_opens_an_epoch_that_begins_with_attempt(redis: Redis, scripts: Scripts) -> None:
    request_id = await queued(scripts, query="what?", parameters={"n": 1})
    lease = await claim(scripts, request_id)
    entries = await log.read_all(redis, request_id)
    check_log(entries, finished=False)
    assert entries[-1].id == EventId(lease.epoch, 1)
    assert json.loads(entries[-1].data) == {"attempt": 1, "reason": "started", "resume_from": "0-1"}
    assert (lease.attempt, lease.resume_from) == (1, EventId(0, 1))
    assert json.loads(lease.record["query"]) == "what?"
    assert json.loads(lease.record["parameters"]) == {"n": 1}
    assert abs(lease.now_ms - now_ms()) < 60_000
    assert await field(redis, request_id, "status") == "running"
    left = int(await field(redis, request_id, "deadline")) - lease.now_ms
    assert left == LEASE_MS


async def test_an_epoch_is_at_least_the_milliseconds_since_the_key_was_claimed(scripts: Scripts) -> None:
    """PROTOCOL 1.3: so a claim that a failover lost is never followed by another of the same number."""
    young = await running(scripts)
    assert 1 <= young.epoch < 30_000
    old = await running(scripts, claimed_at_ms=now_ms() - 45_000)
    assert 45_000 <= old.epoch < 60_000


async def test_an_epoch_is_above_every_epoch_of_the_log_and_of_the_record(redis: Redis, scripts: Scripts) -> None:
    lease = await running(scripts, claimed_at_ms=now_ms() + 3_600_000)
    assert lease.epoch == 1
    await lose_worker(redis, scripts, lease.request_id)
    second = await claim(scripts, lease.request_id, attempt=2)
    assert second.epoch == 2
    await lose_worker(redis, scripts, lease.request_id)
    await redis.hset(keys.run(lease.request_id), "epoch", "7")  # type: ignore[misc]
    third = await claim(scripts, lease.request_id, attempt=3)
    assert third.epoch == 8


async def test_a_claim_whose_reply_was_lost_is_repeated_with_its_token(redis: Redis, scripts: Scripts) -> None:
    request_id = await queued(scripts)
    first = await claim(scripts, request_id, token="mine")
    before = await snapshot(redis, request_id)
    again = await claim(scripts, request_id, token="mine")
    assert (again.epoch, again.attempt, again.resume_from) == (first.epoch, 1, first.resume_from)
    assert again.record == first.record
    assert await snapshot(redis, request_id) == before


@pytest.mark.parametrize("attempt", [0, 1, 2, 3])
async def test_a_run_that_another_worker_has_is_refused(redis: Redis, scripts: Scripts, attempt: int) -> None:
    lease = await running(scripts)
    before = await snapshot(redis, lease.request_id)
    reply = await scripts.claim(lease.request_id, attempt, "other", LEASE_MS)
    assert isinstance(reply, Reply)
    assert (reply.answer, reply.status) == (Answer.REFUSED, "running")
    assert await snapshot(redis, lease.request_id) == before


@pytest.mark.parametrize("attempt", [0, 2, 3])
async def test_a_job_of_another_attempt_is_refused(scripts: Scripts, attempt: int) -> None:
    reply = await scripts.claim(await queued(scripts), attempt, "t", LEASE_MS)
    assert isinstance(reply, Reply)
    assert (reply.answer, reply.status) == (Answer.REFUSED, "queued")


async def test_a_late_job_of_an_attempt_that_was_fenced_is_refused(redis: Redis, scripts: Scripts) -> None:
    lease = await running(scripts)
    await lose_worker(redis, scripts, lease.request_id)
    reply = await scripts.claim(lease.request_id, 1, "late", LEASE_MS)
    assert isinstance(reply, Reply)
    assert reply.answer is Answer.REFUSED


async def test_a_run_that_was_cancelled_before_its_claim_is_closed_to_it(scripts: Scripts) -> None:
    request_id = await queued(scripts)
    await cancel(scripts, request_id)
    reply = await scripts.claim(request_id, 1, "t", LEASE_MS)
    assert isinstance(reply, Reply)
    assert (reply.answer, reply.status) == (Answer.CLOSED, "cancelled")


async def test_a_later_attempt_resumes_from_the_checkpoint(redis: Redis, scripts: Scripts) -> None:
    lease = await running(scripts)
    at = EventId(lease.epoch, 3)
    await append(scripts, lease, 2, *words("a", "b"), checkpoint=(at, {"page": 2}))
    await append(scripts, lease, 4, *words("c"))
    assert (await scripts.hand_over(lease, "handed_over")).rest == [2]
    second = await claim(scripts, lease.request_id, attempt=2)
    assert (second.attempt, second.resume_from) == (2, at)
    assert json.loads(second.record["checkpoint"]) == {"page": 2}
    entries = await log.read_all(redis, lease.request_id)
    check_log(entries, finished=False)
    assert json.loads(entries[-1].data) == {"attempt": 2, "reason": "handed_over", "resume_from": str(at)}


async def test_a_later_attempt_without_a_checkpoint_begins_again(redis: Redis, scripts: Scripts) -> None:
    lease = await running(scripts)
    await append(scripts, lease, 2, *words("a"))
    await lose_worker(redis, scripts, lease.request_id)
    second = await claim(scripts, lease.request_id, attempt=2)
    assert second.resume_from == EventId(0, 1)
    assert second.record["started_at"] == (await field(redis, lease.request_id, "started_at"))
    rewinds = await field(redis, lease.request_id, "rewinds")
    assert rewinds == f"{lease.epoch}-1:0-1 {second.epoch}-1:0-1 "


# -- append --------------------------------------------------------------------------------------------------


async def test_a_batch_is_appended_under_its_own_ids(redis: Redis, scripts: Scripts) -> None:
    lease = await running(scripts)
    reply = await append(scripts, lease, 2, *words("a", "b", "c"))
    assert reply[:3] == (Answer.OK, EventId(lease.epoch, 4), "running")
    entries = await log.read_all(redis, lease.request_id)
    check_log(entries, finished=False)
    assert texts(entries) == ["a", "b", "c"]


async def test_the_same_batch_again_is_a_dup_and_changes_nothing(redis: Redis, scripts: Scripts) -> None:
    lease = await running(scripts)
    await append(scripts, lease, 2, *words("a", "b"))
    before = await snapshot(redis, lease.request_id)
    assert (await append(scripts, lease, 2, *words("a", "b"))).answer is Answer.DUP
    assert (await append(scripts, lease, 2, *words("a"))).answer is Answer.DUP
    assert await snapshot(redis, lease.request_id) == before


async def test_the_batch_with_the_final_again_is_a_dup_on_the_closed_run(redis: Redis, scripts: Scripts) -> None:
    lease = await running(scripts)
    assert (await append(scripts, lease, 2, *words("a"), FINAL)).status == "completed"
    before = await snapshot(redis, lease.request_id)
    reply = await append(scripts, lease, 2, *words("a"), FINAL)
    assert reply[:3] == (Answer.DUP, EventId(lease.epoch, 3), "completed")
    assert await snapshot(redis, lease.request_id) == before


async def test_of_a_batch_that_is_there_in_part_the_rest_is_appended(redis: Redis, scripts: Scripts) -> None:
    lease = await running(scripts)
    await append(scripts, lease, 2, *words("a", "b"))
    reply = await append(scripts, lease, 2, *words("a", "b", "c", "d"))
    assert reply[:2] == (Answer.OK, EventId(lease.epoch, 5))
    reply = await append(scripts, lease, 4, *words("c", "d"), FINAL)
    assert reply[:2] == (Answer.OK, EventId(lease.epoch, 6))
    entries = await log.read_all(redis, lease.request_id)
    check_log(entries)
    assert texts(entries) == ["a", "b", "c", "d"]


async def test_a_batch_beyond_the_end_is_a_gap_that_names_the_end(redis: Redis, scripts: Scripts) -> None:
    lease = await running(scripts)
    await append(scripts, lease, 2, *words("a"))
    before = await snapshot(redis, lease.request_id)
    reply = await append(scripts, lease, 5, *words("d"), kept_from=2)
    assert reply[:2] == (Answer.GAP, EventId(lease.epoch, 2))
    assert (await append(scripts, lease, 4, kept_from=1)).answer is Answer.GAP
    assert await snapshot(redis, lease.request_id) == before
    assert (await append(scripts, lease, 3, *words("b", "c", "d"), kept_from=2)).answer is Answer.OK


async def test_a_log_that_ends_below_the_kept_tail_is_lost(redis: Redis, scripts: Scripts) -> None:
    lease = await running(scripts)
    await append(scripts, lease, 2, *words("a", "b", "c"))
    await roll_back(redis, lease.request_id, EventId(lease.epoch, 2))
    before = await snapshot(redis, lease.request_id)
    reply = await append(scripts, lease, 5, *words("d"), kept_from=4)
    assert reply[:2] == (Answer.LOST, EventId(lease.epoch, 2))
    assert await snapshot(redis, lease.request_id) == before
    assert (await append(scripts, lease, 5, *words("d"), kept_from=3)).answer is Answer.GAP


async def test_a_log_that_ends_below_what_the_epoch_stands_on_is_lost(redis: Redis, scripts: Scripts) -> None:
    lease = await running(scripts)
    at = EventId(lease.epoch, 3)
    await append(scripts, lease, 2, *words("a", "b"), checkpoint=(at, 1))
    await lose_worker(redis, scripts, lease.request_id)
    second = await claim(scripts, lease.request_id, attempt=2)
    await append(scripts, second, 2, *words("c"))
    await roll_back(redis, lease.request_id, EventId(lease.epoch, 2), epoch=str(lease.epoch), token=lease.token)
    reply = await append(scripts, second, 1, second.opening, *words("c"))
    assert reply[:2] == (Answer.LOST, EventId(lease.epoch, 2))


async def test_after_a_later_epoch_began_an_older_one_is_fenced(redis: Redis, scripts: Scripts) -> None:
    lease = await running(scripts)
    await append(scripts, lease, 2, *words("a"))
    await lose_worker(redis, scripts, lease.request_id)
    await claim(scripts, lease.request_id, attempt=2)
    before = await snapshot(redis, lease.request_id)
    for first, entries in [(3, words("b")), (2, words("a")), (3, [FINAL]), (3, [])]:
        assert (await append(scripts, lease, first, *entries)).answer is Answer.FENCED
    assert await snapshot(redis, lease.request_id) == before


async def test_the_same_epoch_under_another_token_is_fenced(redis: Redis, scripts: Scripts) -> None:
    """After a failover two workers may hold the same number: only the one of the record goes on."""
    lease = await running(scripts)
    await append(scripts, lease, 2, *words("a"))
    before = await snapshot(redis, lease.request_id)
    twin = Lease(**{**vars(lease), "token": "another"})
    for first, entries in [(2, words("x")), (3, words("x")), (3, [])]:
        assert (await append(scripts, twin, first, *entries)).answer is Answer.FENCED
    assert await snapshot(redis, lease.request_id) == before


async def test_after_its_own_final_a_writer_finds_the_run_closed(redis: Redis, scripts: Scripts) -> None:
    lease = await running(scripts)
    await append(scripts, lease, 2, FINAL)
    before = await snapshot(redis, lease.request_id)
    reply = await append(scripts, lease, 3, *words("more"))
    assert (reply.answer, reply.status) == (Answer.CLOSED, "completed")
    assert (await append(scripts, lease, 2, FINAL, *words("more"))).answer is Answer.CLOSED
    assert await snapshot(redis, lease.request_id) == before


async def test_after_a_cancel_the_worker_is_fenced_and_told_the_status(scripts: Scripts) -> None:
    lease = await running(scripts)
    await cancel(scripts, lease.request_id)
    for first, entries in [(2, words("x")), (2, [])]:
        reply = await append(scripts, lease, first, *entries)
        assert (reply.answer, reply.status) == (Answer.FENCED, "cancelled")


async def test_a_later_epoch_finds_a_closed_run_closed(scripts: Scripts) -> None:
    lease = await running(scripts)
    await append(scripts, lease, 2, FINAL)
    reply = await append(scripts, later(lease), 1, ("attempt", "{}"))
    assert (reply.answer, reply.status) == (Answer.CLOSED, "completed")


async def test_an_append_whose_epoch_is_above_the_records_takes_the_record_over(redis: Redis, scripts: Scripts) -> None:
    """PROTOCOL 1.3: a failover lost the claim; its owner's tail begins with `attempt`."""
    lease = await running(scripts)
    attempt = (await log.read_all(redis, lease.request_id))[-1]
    await append(scripts, lease, 2, *words("a"))
    await roll_back(redis, lease.request_id, EventId(0, 1), status="queued", epoch="0", token="", attempt="0")
    tail = [(attempt.type, attempt.data), *words("a", "b")]
    assert (await append(scripts, lease, 4, *words("c"), kept_from=1)).answer is Answer.GAP
    reply = await append(scripts, lease, 1, *tail)
    assert reply[:3] == (Answer.OK, EventId(lease.epoch, 3), "running")
    check_log(await log.read_all(redis, lease.request_id), finished=False)
    for name, value in [("epoch", str(lease.epoch)), ("token", lease.token), ("attempt", "1")]:
        assert await field(redis, lease.request_id, name) == value
    assert await field(redis, lease.request_id, "rewinds") == f"{lease.epoch}-1:0-1 "
    assert (await append(scripts, lease, 4, *words("c"))).answer is Answer.OK


async def test_an_epoch_that_takes_over_drops_a_checkpoint_of_what_it_voids(redis: Redis, scripts: Scripts) -> None:
    """A failover lost the second attempt's claim, the first one's worker went on, and then the second one's came back.
    A third attempt that went on from the first one's last checkpoint would stand on events that the second has voided.
    """
    first = await running(scripts)
    await append(scripts, first, 2, *words("a"), checkpoint=(EventId(first.epoch, 2), 1))
    await lose_worker(redis, scripts, first.request_id)
    second = await claim(scripts, first.request_id, attempt=2)
    before = {"epoch": str(first.epoch), "token": first.token, "attempt": "1", "status": "running"}
    await roll_back(redis, first.request_id, EventId(first.epoch, 2), **before)
    await append(scripts, first, 3, *words("b"), checkpoint=(EventId(first.epoch, 3), 2))
    assert (await append(scripts, second, 1, second.opening)).answer is Answer.OK
    assert await field(redis, first.request_id, "checkpoint_id") == ""
    assert await field(redis, first.request_id, "checkpoint") == ""
    assert (await scripts.hand_over(second, "handed_over")).answer is Answer.OK
    third = await claim(scripts, first.request_id, attempt=3)
    assert (third.resume_from, third.record["checkpoint"]) == (EventId(0, 1), "")


@pytest.mark.parametrize("own", [False, True])
async def test_an_epoch_that_takes_over_keeps_the_checkpoint_it_stands_on_or_brings(
    redis: Redis, scripts: Scripts, own: bool
) -> None:
    first = await running(scripts)
    covered = EventId(first.epoch, 2)
    await append(scripts, first, 2, *words("a"), checkpoint=(covered, 1))
    await lose_worker(redis, scripts, first.request_id)
    second = await claim(scripts, first.request_id, attempt=2)
    brought = EventId(second.epoch, 2)
    await append(scripts, second, 2, *words("b"), checkpoint=(brought, 2))
    before = {"epoch": str(first.epoch), "token": "", "attempt": "1", "status": "queued"}
    before |= {"checkpoint_id": str(covered), "checkpoint": "1"}
    await roll_back(redis, first.request_id, covered, **before)
    tail = [second.opening, *words("b")]
    reply = await append(scripts, second, 1, *tail, checkpoint=(brought, 2) if own else None)
    assert reply.answer is Answer.OK
    assert await field(redis, first.request_id, "checkpoint_id") == str(brought if own else covered)
    assert await field(redis, first.request_id, "checkpoint") == ("2" if own else "1")


async def test_an_epoch_that_would_stand_on_what_another_has_voided_is_lost(redis: Redis, scripts: Scripts) -> None:
    """Two failovers, three workers: the second attempt went on from the first one's first checkpoint, the third from
    its second one. Each was lost and comes back: the second's `attempt` voids what the third stands on.
    """
    first = await running(scripts, claimed_at_ms=now_ms() + 3_600_000)
    at = EventId(first.epoch, 3)
    await append(scripts, first, 2, *words("a", "b"), checkpoint=(at, 2))
    await lose_worker(redis, scripts, first.request_id)
    second = await claim(scripts, first.request_id, attempt=2)
    second = Lease(**{**vars(second), "resume_from": EventId(first.epoch, 2)})
    third = Lease(**{**vars(second), "epoch": second.epoch + 1, "token": "third", "resume_from": at})
    before = {"epoch": str(first.epoch), "token": "", "attempt": "1", "status": "queued"}
    await roll_back(redis, first.request_id, at, **before)
    assert (await append(scripts, second, 1, second.opening, *words("c"))).answer is Answer.OK
    state = await snapshot(redis, first.request_id)
    reply = await append(scripts, third, 1, third.opening, *words("d"))
    assert reply[:2] == (Answer.LOST, EventId(second.epoch, 2))
    assert await snapshot(redis, first.request_id) == state
    on_its_entry = Lease(**{**vars(third), "resume_from": EventId(second.epoch, 2)})
    assert (await append(scripts, on_its_entry, 1, on_its_entry.opening)).answer is Answer.OK


async def test_an_epoch_that_stands_on_what_survived_another_rewind_takes_over(redis: Redis, scripts: Scripts) -> None:
    first = await running(scripts)
    at = EventId(first.epoch, 2)
    await append(scripts, first, 2, *words("a", "b"), checkpoint=(at, 1))
    await lose_worker(redis, scripts, first.request_id)
    second = await claim(scripts, first.request_id, attempt=2)
    for resume_from in (EventId(0, 1), at):
        third = Lease(**{**vars(later(second)), "resume_from": resume_from})
        before = {"epoch": str(second.epoch), "token": second.token, "attempt": "2"}
        await roll_back(redis, first.request_id, EventId(second.epoch, 1), **before)
        assert (await append(scripts, third, 1, third.opening)).answer is Answer.OK


async def test_a_claim_that_was_lost_with_a_part_of_the_tail_that_is_not_kept_is_lost(
    redis: Redis, scripts: Scripts
) -> None:
    """It cannot begin its epoch without `attempt`, and a GAP would ask for it."""
    lease = await running(scripts)
    await append(scripts, lease, 2, *words("a", "b"))
    await roll_back(redis, lease.request_id, EventId(0, 1), status="queued", epoch="0", token="", attempt="0")
    for first, entries in [(4, words("c")), (4, []), (3, words("b"))]:
        reply = await append(scripts, lease, first, *entries, kept_from=3)
        assert reply[:3] == (Answer.LOST, EventId(0, 1), "queued")


@pytest.mark.parametrize("claimed", [False, True])
async def test_a_run_that_is_taken_over_has_begun_when_it_was_first_claimed(
    redis: Redis, scripts: Scripts, claimed: bool
) -> None:
    """PROTOCOL 4.4: its time counts over all attempts. Where that is lost too, it counts from now."""
    lease = await running(scripts)
    await roll_back(redis, lease.request_id, EventId(0, 1), status="queued", epoch="0", token="", attempt="0")
    await redis.hdel(keys.run(lease.request_id), "started_at")  # type: ignore[misc]
    if claimed:
        await redis.hset(keys.run(lease.request_id), "started_at", "12345")  # type: ignore[misc]
    assert (await append(scripts, lease, 1, lease.opening)).answer is Answer.OK
    started_at = int(await field(redis, lease.request_id, "started_at"))
    assert started_at == 12345 if claimed else abs(started_at - now_ms()) < 60_000


async def test_who_takes_over_makes_no_attempt_out_of_an_earlier_number(redis: Redis, scripts: Scripts) -> None:
    """After two failovers an older attempt may have the later epoch: the next one is after both."""
    lease = await running(scripts)
    await redis.hset(keys.run(lease.request_id), "attempt", "4")  # type: ignore[misc]
    second = later(lease)
    assert (await append(scripts, second, 1, second.opening)).answer is Answer.OK
    assert await field(redis, lease.request_id, "attempt") == "4"
    assert (await scripts.hand_over(second, "handed_over")).rest == [5]


async def test_a_renewal_is_an_empty_append_that_moves_the_deadline(redis: Redis, scripts: Scripts) -> None:
    lease = await running(scripts)
    await append(scripts, lease, 2, *words("a"))
    before = await snapshot(redis, lease.request_id)
    deadline = int(await field(redis, lease.request_id, "deadline"))
    reply = await append(scripts, lease, 3, lease_ms=99_000)
    assert reply[:2] == (Answer.DUP, EventId(lease.epoch, 2))
    assert int(await field(redis, lease.request_id, "deadline")) - deadline >= 99_000 - LEASE_MS
    assert await snapshot(redis, lease.request_id) == before


@pytest.mark.parametrize("checkpoint", [False, True])
async def test_an_append_may_leave_the_lease_as_it_is(redis: Redis, scripts: Scripts, checkpoint: bool) -> None:
    lease = await running(scripts)
    await redis.hset(keys.run(lease.request_id), "deadline", "12345")  # type: ignore[misc]
    covered = (EventId(lease.epoch, 2), 1) if checkpoint else None
    for answer in (Answer.OK, Answer.DUP):
        reply = await append(scripts, lease, 2, *words("a"), lease_ms=0, checkpoint=covered)
        assert reply.answer is answer
        assert await field(redis, lease.request_id, "deadline") == "12345"
    await append(scripts, lease, 3, *words("b"), checkpoint=covered)
    assert int(await field(redis, lease.request_id, "deadline")) > now_ms()


async def test_an_expired_lease_refuses_nothing(redis: Redis, scripts: Scripts) -> None:
    """PROTOCOL 4.5: only fencing ends it."""
    lease = await running(scripts)
    await redis.hset(keys.run(lease.request_id), "deadline", "1")  # type: ignore[misc]
    assert (await append(scripts, lease, 2, *words("a"))).answer is Answer.OK
    assert int(await field(redis, lease.request_id, "deadline")) > now_ms()


async def test_a_renewal_finds_that_the_log_was_rolled_back(redis: Redis, scripts: Scripts) -> None:
    lease = await running(scripts)
    await append(scripts, lease, 2, *words("a", "b"))
    await roll_back(redis, lease.request_id, EventId(lease.epoch, 2))
    assert (await append(scripts, lease, 4, kept_from=2)).answer is Answer.GAP
    assert (await append(scripts, lease, 4, kept_from=4)).answer is Answer.LOST


async def test_a_checkpoint_is_stored_with_its_batch(redis: Redis, scripts: Scripts) -> None:
    lease = await running(scripts)
    at = EventId(lease.epoch, 2)
    await append(scripts, lease, 2, *words("a"), checkpoint=(at, {"n": 1}))
    assert await field(redis, lease.request_id, "checkpoint_id") == str(at)
    assert await field(redis, lease.request_id, "checkpoint") == '{"n":1}'
    await append(scripts, lease, 3, checkpoint=(at, {"n": 2}))
    assert await field(redis, lease.request_id, "checkpoint") == '{"n":2}'


async def test_a_batch_that_comes_late_does_not_set_the_checkpoint_back(redis: Redis, scripts: Scripts) -> None:
    """Its reply was lost with its connection, so it was sent again, and others after it; then the first one arrives."""
    lease = await running(scripts)
    for seq in (2, 3):
        await append(scripts, lease, seq, *words("a"), checkpoint=(EventId(lease.epoch, seq), {"n": seq}))
    before = await snapshot(redis, lease.request_id)
    reply = await append(scripts, lease, 2, *words("a"), checkpoint=(EventId(lease.epoch, 2), {"n": 2}))
    assert reply.answer is Answer.DUP
    assert await snapshot(redis, lease.request_id) == before


async def test_a_checkpoint_of_a_batch_that_is_not_taken_is_not_stored(redis: Redis, scripts: Scripts) -> None:
    lease = await running(scripts)
    await append(scripts, lease, 5, *words("a"), kept_from=2, checkpoint=(EventId(lease.epoch, 5), 1))
    assert await field(redis, lease.request_id, "checkpoint_id") == ""


async def test_the_records_counts_are_the_logs(redis: Redis, scripts: Scripts) -> None:
    """PROTOCOL 1.6: the caps stand on them."""
    lease = await running(scripts)
    await append(scripts, lease, 2, *words("a", "bb"))
    await append(scripts, lease, 2, *words("a", "bb", "ccc"))
    await cancel(scripts, lease.request_id)
    entries = await log.read_all(redis, lease.request_id)
    assert int(await field(redis, lease.request_id, "events")) == len(entries)
    assert int(await field(redis, lease.request_id, "bytes")) == sum(len(entry.data) for entry in entries)


@pytest.mark.parametrize(("kind", "status"), [("final", "completed"), ("error", "failed")])
async def test_a_terminal_sets_status_result_and_one_expiry_for_both_keys(
    redis: Redis, scripts: Scripts, kind: str, status: str
) -> None:
    lease = await running(scripts)
    await append(scripts, lease, 2, *words("a"))
    for key in (keys.run(lease.request_id), keys.log(lease.request_id)):
        assert await redis.pttl(key) == -1, "a live run has no TTL"
    reply = await append(scripts, lease, 3, (kind, '{"code":"x"}'))
    assert (reply.answer, reply.status) == (Answer.OK, status)
    ttls = [await redis.pttl(key) for key in (keys.run(lease.request_id), keys.log(lease.request_id))]
    assert all(RETENTION_MS - 10_000 < ttl <= RETENTION_MS for ttl in ttls)
    assert await field(redis, lease.request_id, "status") == status
    assert await field(redis, lease.request_id, "result") == '{"code":"x"}'
    assert abs(int(await field(redis, lease.request_id, "finished_at")) - now_ms()) < 60_000


# -- close ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("claimed", [False, True])
async def test_a_cancel_closes_a_run_in_an_epoch_of_its_own(redis: Redis, scripts: Scripts, claimed: bool) -> None:
    request_id = await queued(scripts, claimed_at_ms=now_ms() + 3_600_000)
    if claimed:
        await append(scripts, await claim(scripts, request_id), 2, *words("a"))
    end = (await log.read_all(redis, request_id))[-1].id
    reply = await cancel(scripts, request_id)
    entries = await log.read_all(redis, request_id)
    check_log(entries)
    assert reply[:3] == (Answer.OK, entries[-1].id, "cancelled")
    attempt, cancelled = entries[-2:]
    assert attempt.id == EventId(end.epoch + 1, 1)
    assert json.loads(attempt.data) == {"attempt": int(claimed), "reason": "cancelled", "resume_from": str(end)}
    assert (cancelled.type, cancelled.data) == ("cancelled", '{"reason":"client"}')
    assert await field(redis, request_id, "status") == "cancelled"
    for key in (keys.run(request_id), keys.log(request_id)):
        assert 0 < await redis.pttl(key) <= RETENTION_MS


async def test_the_epoch_of_a_cancel_is_at_least_the_milliseconds_since_the_key_was_claimed(scripts: Scripts) -> None:
    """PROTOCOL 1.3: as that of a claim."""
    request_id = await queued(scripts, claimed_at_ms=now_ms() - 45_000)
    assert 45_000 <= (await cancel(scripts, request_id)).end.epoch < 60_000


async def test_a_cancel_whose_reply_was_lost_is_repeated_with_its_token(redis: Redis, scripts: Scripts) -> None:
    lease = await running(scripts)
    first = await cancel(scripts, lease.request_id, "mine")
    before = await snapshot(redis, lease.request_id)
    assert await cancel(scripts, lease.request_id, "mine") == first
    assert await snapshot(redis, lease.request_id) == before


async def test_what_comes_first_wins_and_the_answer_says_which(redis: Redis, scripts: Scripts) -> None:
    cancelled = await running(scripts)
    await cancel(scripts, cancelled.request_id)
    reply = await cancel(scripts, cancelled.request_id)
    assert (reply.answer, reply.status) == (Answer.CLOSED, "cancelled")
    completed = await running(scripts)
    await append(scripts, completed, 2, FINAL)
    before = await snapshot(redis, completed.request_id)
    reply = await cancel(scripts, completed.request_id)
    assert (reply.answer, reply.status) == (Answer.CLOSED, "completed")
    assert await snapshot(redis, completed.request_id) == before


# -- erase ---------------------------------------------------------------------------------------------------


async def test_an_erasure_leaves_a_tombstone_that_says_nothing_else(redis: Redis, scripts: Scripts) -> None:
    lease = await running(scripts)
    assert (await scripts.erase(lease.request_id, tombstone_ms=9_000)).answer is Answer.OK
    assert await redis.hgetall(keys.run(lease.request_id)) == {b"status": b"erased"}  # type: ignore[misc]
    assert not await redis.exists(keys.log(lease.request_id))
    assert 0 < await redis.pttl(keys.run(lease.request_id)) <= 9_000
    reply = await scripts.erase(lease.request_id, tombstone_ms=9_000)
    assert (reply.answer, reply.status) == (Answer.GONE, "erased")


Call = Callable[[Scripts, Lease], Awaitable[Reply | Lease]]
CALLS: dict[str, Call] = {
    "claim": lambda scripts, lease: scripts.claim(lease.request_id, 1, lease.token, LEASE_MS),
    "append": lambda scripts, lease: append(scripts, lease, 2, *words("a")),
    "renewal": lambda scripts, lease: append(scripts, lease, 2),
    "takeover": lambda scripts, lease: append(scripts, later(lease), 1, ("attempt", "{}")),
    "cancel": lambda scripts, lease: cancel(scripts, lease.request_id),
    "fence": lambda scripts, lease: fence(scripts, lease.request_id),
    "hand_over": lambda scripts, lease: scripts.hand_over(lease, "handed_over"),
    "hand_over of a later epoch": lambda scripts, lease: scripts.hand_over(later(lease), "data_lost"),
    "requeue": lambda scripts, lease: scripts.requeue(lease.request_id, 1, 0),
    "watch": lambda scripts, lease: scripts.watch(lease.request_id),
    "erase": lambda scripts, lease: scripts.erase(lease.request_id, tombstone_ms=RETENTION_MS),
}


@pytest.mark.parametrize("name", CALLS)
async def test_an_erased_run_is_gone_to_every_script(redis: Redis, scripts: Scripts, name: str) -> None:
    lease = await running(scripts)
    await scripts.erase(lease.request_id, tombstone_ms=RETENTION_MS)
    reply = await CALLS[name](scripts, lease)
    assert isinstance(reply, Reply)
    assert (reply.answer, reply.status) == (Answer.GONE, "erased")
    assert await redis.hgetall(keys.run(lease.request_id)) == {b"status": b"erased"}  # type: ignore[misc]
    assert not await redis.exists(keys.log(lease.request_id))


@pytest.mark.parametrize("name", CALLS)
async def test_a_run_that_is_not_there_is_gone_and_no_script_but_create_makes_it(
    redis: Redis, scripts: Scripts, name: str
) -> None:
    lease = await running(scripts)
    await redis.delete(keys.run(lease.request_id), keys.log(lease.request_id))
    reply = await CALLS[name](scripts, lease)
    assert isinstance(reply, Reply)
    assert (reply.answer, reply.end, reply.status) == (Answer.GONE, EventId(0, 0), "")
    assert not await redis.exists(keys.run(lease.request_id), keys.log(lease.request_id))


async def test_when_memory_is_full_an_erasure_still_works_and_nothing_else_is_half_done(
    redis: Redis, scripts: Scripts
) -> None:
    lease = await running(scripts)
    other = await queued(scripts)
    await append(scripts, lease, 2, *words("a"))
    before = await snapshot(redis, lease.request_id)
    await redis.config_set("maxmemory", "1")
    try:
        for call in (
            append(scripts, lease, 3, *words("b")),
            append(scripts, lease, 3, FINAL),
            cancel(scripts, lease.request_id),
            scripts.claim(other, 1, "t", LEASE_MS),
            create(scripts, new_request_id()),
        ):
            with pytest.raises(ResponseError) as caught:
                await call
            assert is_away(caught.value), "memory that is full is an outage, not an answer"
        assert await snapshot(redis, lease.request_id) == before
        assert (await scripts.erase(lease.request_id, tombstone_ms=RETENTION_MS)).answer is Answer.OK
        assert await redis.hgetall(keys.run(lease.request_id)) == {b"status": b"erased"}  # type: ignore[misc]
        assert not await redis.exists(keys.log(lease.request_id))
    finally:
        await redis.config_set("maxmemory", "0")


# -- what is published ---------------------------------------------------------------------------------------


async def test_each_append_is_published_once_with_the_id_before_it(
    redis: Redis, redis_server: RedisServer, scripts: Scripts
) -> None:
    request_id = await queued(scripts)
    with Ears(redis_server.url, *channels(request_id)) as ears:
        lease = await claim(scripts, request_id, token="t")
        await claim(scripts, request_id, token="t")
        await append(scripts, lease, 2, *words("a", "b"))
        await append(scripts, lease, 2, *words("a", "b"))
        await append(scripts, lease, 4)
        await append(scripts, lease, 2, *words("a", "b", "c"))
        await append(scripts, lease, 5, FINAL)
        await append(scripts, lease, 5, FINAL)
        appended = ears.appended()
    assert all(appended)
    assert [len(message.entries) for message in appended if message] == [1, 2, 1, 1]
    previous, seen = EventId(0, 1), []
    for message in appended:
        assert message is not None
        assert message.prev == previous
        previous = message.entries[-1].id
        seen += message.entries
    assert seen == (await log.read_all(redis, request_id))[1:]


async def test_a_cancel_is_published_and_the_worker_told(
    redis: Redis, redis_server: RedisServer, scripts: Scripts
) -> None:
    lease = await running(scripts)
    channel, control = channels(lease.request_id)
    with Ears(redis_server.url, channel, control) as ears:
        await cancel(scripts, lease.request_id)
        await cancel(scripts, lease.request_id)
        heard = ears.heard()
    assert [name for name, _ in heard] == [channel, control]
    message = log.parse_message(heard[0][1])
    assert message is not None
    assert message.prev == EventId(lease.epoch, 1)
    assert message.entries == (await log.read_all(redis, lease.request_id))[-2:]
    assert heard[1][1] == b"cancelled"


async def test_an_erasure_is_published_and_the_worker_told(redis_server: RedisServer, scripts: Scripts) -> None:
    lease = await running(scripts)
    channel, control = channels(lease.request_id)
    with Ears(redis_server.url, channel, control) as ears:
        await scripts.erase(lease.request_id, tombstone_ms=RETENTION_MS)
        heard = ears.heard()
    assert heard == [(channel, b"1 erased"), (control, b"erased")]
    assert log.parse_message(heard[0][1]) is None


# -- the idempotency key -------------------------------------------------------------------------------------


async def take(redis: Redis, request_id: str, replace: IdempotencyClaim | None = None) -> IdempotencyClaim:
    key = keys.idempotency(OWNER, "query", "digest")
    return await claim_key(redis, key, replace=replace, request_id=request_id, digest="d", life_ms=60_000)


async def test_a_free_key_is_taken_and_its_holder_told_to_everybody_else(redis: Redis) -> None:
    mine = await take(redis, "a")
    assert (mine.request_id, mine.digest) == ("a", "d")
    assert abs(mine.claimed_at_ms - now_ms()) < 60_000
    assert await take(redis, "b") == mine
    assert 0 < await redis.pttl(keys.idempotency(OWNER, "query", "digest")) <= 60_000


async def test_a_key_is_replaced_by_compare_and_set_and_who_loses_joins_the_winner(redis: Redis) -> None:
    first = await take(redis, "a")
    winner = await take(redis, "b", replace=first)
    assert winner.request_id == "b"
    assert await take(redis, "c", replace=first) == winner


async def test_keys_of_other_owners_and_kinds_are_other_keys() -> None:
    names = {
        keys.idempotency(owner, kind, value)
        for owner in (Owner("a", "b"), Owner("ab", ""), Owner("", "ab"))
        for kind in ("query", "key")
        for value in ("v", "")
    }
    assert len(names) == 12
