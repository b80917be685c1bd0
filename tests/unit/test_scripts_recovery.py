"""P5, P6, P7, P11: the scripts of reapers, drains and failovers, each answer, on the installed Redis and on 6.2."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from redis.asyncio import Redis

from broker.events import AttemptReason, Cancelled, Error, Event
from broker.ids import EventId, new_request_id
from broker.runs import keys, log
from broker.runs.scripts import Answer, Lease, Reply, Scripts, primary_ages
from tests.kit.checker import check_log
from tests.kit.redis_server import VERSIONS, RedisServer, server_of
from tests.kit.runs import (
    FINAL,
    HOUR_MS,
    LEASE_MS,
    RETENTION_MS,
    Ears,
    append,
    cancel,
    channels,
    claim,
    fence,
    field,
    lose_worker,
    now_ms,
    queued,
    roll_back,
    running,
    snapshot,
    words,
)

ELSEWHERE = "f" * 40
"""The `master_replid` of another primary."""
WORKER_LOST = Error(code="worker_lost", message="lost")


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


@pytest.fixture
def here(redis_server: RedisServer) -> str:
    """The `master_replid` of this primary."""
    replid: str = redis_server.info("replication")["master_replid"]
    return replid


async def put(redis: Redis, request_id: str, **fields: str | int) -> None:
    await redis.hset(keys.run(request_id), mapping=dict(fields))  # type: ignore[misc]


async def close(
    scripts: Scripts,
    request_id: str,
    *,
    event: Event = WORKER_LOST,
    reason: AttemptReason = "worker_lost",
    token: str = "reaper",
    replid: str = "",
    if_still: tuple[str, str] = ("", ""),
) -> Reply:
    return await scripts.close(
        request_id,
        kind=event.type,
        data=event.json_data(),
        reason=reason,
        token=token,
        retention_ms=RETENTION_MS,
        replid=replid,
        if_still=if_still,
    )


# -- fence ---------------------------------------------------------------------------------------------------


async def test_a_run_whose_lease_holds_is_not_fenced(redis: Redis, scripts: Scripts) -> None:
    lease = await running(scripts)
    before = await redis.hgetall(keys.run(lease.request_id))  # type: ignore[misc]
    for replid in ("", ELSEWHERE):
        reply = await fence(scripts, lease.request_id, replid=replid)
        assert reply[:3] == (Answer.REFUSED, EventId(lease.epoch, 1), "running")
    assert await redis.hgetall(keys.run(lease.request_id)) == before  # type: ignore[misc]
    assert (await append(scripts, lease, 2, *words("a"))).answer is Answer.OK


async def test_a_deadline_further_ahead_than_a_lease_is_set_back(redis: Redis, scripts: Scripts) -> None:
    """PROTOCOL 4.7: a clock that was set back must not keep a dead worker's lease for ever."""
    lease = await running(scripts)
    await put(redis, lease.request_id, deadline=now_ms() + HOUR_MS)
    before = now_ms()
    assert (await fence(scripts, lease.request_id)).answer is Answer.REFUSED
    deadline = int(await field(redis, lease.request_id, "deadline"))
    assert before - 50 <= deadline - LEASE_MS <= now_ms() + 50
    assert (await fence(scripts, lease.request_id)).answer is Answer.REFUSED
    assert int(await field(redis, lease.request_id, "deadline")) == deadline


async def test_a_reaper_with_a_shorter_lease_leaves_the_owner_its_own(redis: Redis, scripts: Scripts) -> None:
    """A rolling change of the setting has workers of both."""
    lease = await running(scripts)
    before = await field(redis, lease.request_id, "deadline")
    reply = await scripts.fence(lease.request_id, lease_ms=1000, max_attempts=3, max_run_ms=HOUR_MS)
    assert reply.answer is Answer.REFUSED
    assert await field(redis, lease.request_id, "deadline") == before


async def test_an_expired_run_is_queued_for_its_next_attempt(redis: Redis, scripts: Scripts) -> None:
    lease = await running(scripts)
    await append(scripts, lease, 2, *words("a"))
    entries = await log.read_all(redis, lease.request_id)
    await put(redis, lease.request_id, deadline=now_ms() - 1, enqueues=3)
    reply = await fence(scripts, lease.request_id)
    assert reply == (Answer.OK, EventId(lease.epoch, 2), "queued", [2])
    assert await log.read_all(redis, lease.request_id) == entries, "a fence writes nothing into the log"
    for name, value in [("status", "queued"), ("fails", "1"), ("enqueues", "0"), ("attempt", "1")]:
        assert await field(redis, lease.request_id, name) == value
    again = await fence(scripts, lease.request_id)
    assert (again.answer, again.status) == (Answer.REFUSED, "queued"), "another reaper was here"
    second = await claim(scripts, lease.request_id, attempt=2)
    assert second.reason == "worker_lost"


async def test_a_fenced_owner_can_do_nothing_more(redis: Redis, scripts: Scripts) -> None:
    """P5: not before the next attempt has begun, and not after."""
    lease = await running(scripts)
    await append(scripts, lease, 2, *words("a"))
    await lose_worker(redis, scripts, lease.request_id)
    for claimed in (False, True):
        if claimed:
            await claim(scripts, lease.request_id, attempt=2)
        before = await snapshot(redis, lease.request_id)
        status = "running" if claimed else "queued"
        for first, entries in [(2, words("a")), (3, words("b")), (3, [FINAL]), (3, [])]:
            reply = await append(scripts, lease, first, *entries)
            assert (reply.answer, reply.status) == (Answer.FENCED, status)
        assert (await scripts.hand_over(lease, "handed_over")).answer is Answer.FENCED
        assert await snapshot(redis, lease.request_id) == before


async def test_a_run_that_was_lost_too_often_is_spent_and_left_as_it_is(redis: Redis, scripts: Scripts) -> None:
    lease = await running(scripts)
    for attempt in (2, 3):
        await put(redis, lease.request_id, deadline=1)
        assert (await fence(scripts, lease.request_id, max_attempts=3)).rest == [attempt]
        lease = await claim(scripts, lease.request_id, attempt)
    await put(redis, lease.request_id, deadline=77)
    before = await snapshot(redis, lease.request_id)
    reply = await fence(scripts, lease.request_id, max_attempts=3)
    assert (reply.answer, reply.status, reply.rest) == (Answer.SPENT, "running", [b"77"])
    assert await snapshot(redis, lease.request_id) == before
    assert (await append(scripts, lease, 2, *words("a"))).answer is Answer.OK, "its owner revives it"


async def test_hand_overs_do_not_spend_a_run(redis: Redis, scripts: Scripts) -> None:
    """PROTOCOL 4.4."""
    lease = await running(scripts)
    for attempt in range(2, 7):
        assert (await scripts.hand_over(lease, "handed_over")).answer is Answer.OK
        lease = await claim(scripts, lease.request_id, attempt)
    await put(redis, lease.request_id, deadline=1)
    assert (await fence(scripts, lease.request_id, max_attempts=2)).answer is Answer.OK


async def test_a_run_that_took_too_long_over_all_its_attempts_is_overdue(redis: Redis, scripts: Scripts) -> None:
    lease = await running(scripts)
    started_at = int(await field(redis, lease.request_id, "started_at"))
    await lose_worker(redis, scripts, lease.request_id)
    lease = await claim(scripts, lease.request_id, attempt=2)
    await put(redis, lease.request_id, deadline=88, started_at=started_at - 50_000)
    before = await snapshot(redis, lease.request_id)
    reply = await fence(scripts, lease.request_id, max_run_ms=50_000)
    assert (reply.answer, reply.status, reply.rest) == (Answer.OVERDUE, "running", [b"88"])
    assert await snapshot(redis, lease.request_id) == before
    assert (await fence(scripts, lease.request_id, max_run_ms=HOUR_MS)).answer is Answer.OK


async def test_nothing_is_fenced_on_a_primary_that_has_not_settled(redis: Redis, scripts: Scripts, here: str) -> None:
    """PROTOCOL 4.6: neither fenced, nor found spent or overdue."""
    lease = await running(scripts)
    await put(redis, lease.request_id, deadline=1)
    before = await snapshot(redis, lease.request_id)
    for max_attempts, max_run_ms in [(3, HOUR_MS), (1, HOUR_MS), (3, 0)]:
        reply = await fence(
            scripts, lease.request_id, max_attempts=max_attempts, max_run_ms=max_run_ms, replid=ELSEWHERE
        )
        assert (reply.answer, reply.status) == (Answer.UNSETTLED, "running")
    assert await snapshot(redis, lease.request_id) == before
    assert (await fence(scripts, lease.request_id, replid=here)).answer is Answer.OK


async def test_only_a_running_run_is_fenced(scripts: Scripts) -> None:
    reply = await fence(scripts, await queued(scripts))
    assert (reply.answer, reply.status) == (Answer.REFUSED, "queued")
    lease = await running(scripts)
    await append(scripts, lease, 2, FINAL)
    reply = await fence(scripts, lease.request_id)
    assert (reply.answer, reply.status) == (Answer.CLOSED, "completed")


async def test_an_owner_that_renews_before_the_reaper_comes_keeps_its_run(redis: Redis, scripts: Scripts) -> None:
    """PROTOCOL 4.5."""
    lease = await running(scripts)
    await put(redis, lease.request_id, deadline=1)
    assert (await append(scripts, lease, 2)).answer is Answer.DUP
    assert (await fence(scripts, lease.request_id)).answer is Answer.REFUSED


# -- hand over -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reason", ["handed_over", "data_lost"])
async def test_a_run_is_handed_over_for_its_next_attempt_which_says_why(
    redis: Redis, scripts: Scripts, reason: str
) -> None:
    lease = await running(scripts)
    await append(scripts, lease, 2, *words("a"))
    await put(redis, lease.request_id, fails=2, enqueues=4)
    reply = await scripts.hand_over(lease, reason)
    assert reply == (Answer.OK, EventId(lease.epoch, 2), "queued", [2])
    for name, value in [("status", "queued"), ("token", ""), ("fails", "2"), ("enqueues", "0")]:
        assert await field(redis, lease.request_id, name) == value
    second = await claim(scripts, lease.request_id, attempt=2)
    assert (second.reason, second.attempt) == (reason, 2)
    attempt = (await log.read_all(redis, lease.request_id))[-1]
    assert json.loads(attempt.data) == {"attempt": 2, "reason": reason, "resume_from": "0-1"}


async def test_a_hand_over_whose_reply_was_lost_is_repeated(redis: Redis, scripts: Scripts) -> None:
    lease = await running(scripts)
    first = await scripts.hand_over(lease, "handed_over")
    before = await snapshot(redis, lease.request_id)
    assert await scripts.hand_over(lease, "handed_over") == first
    assert await snapshot(redis, lease.request_id) == before
    await claim(scripts, lease.request_id, attempt=2)
    assert (await scripts.hand_over(lease, "handed_over")).answer is Answer.FENCED


async def test_who_has_handed_over_writes_nothing_more(redis: Redis, scripts: Scripts) -> None:
    lease = await running(scripts)
    await scripts.hand_over(lease, "handed_over")
    before = await snapshot(redis, lease.request_id)
    for entries in (words("a"), [FINAL], []):
        assert (await append(scripts, lease, 2, *entries)).answer is Answer.FENCED
    assert await snapshot(redis, lease.request_id) == before


@pytest.mark.parametrize("handed", [False, True])
async def test_only_the_owner_hands_over(redis: Redis, scripts: Scripts, handed: bool) -> None:
    lease = await running(scripts)
    if handed:
        await scripts.hand_over(lease, "handed_over")
    before = await snapshot(redis, lease.request_id)
    twin = Lease(**{**vars(lease), "token": "another"})
    older = Lease(**{**vars(lease), "epoch": lease.epoch - 1})
    for other in (twin, older):
        assert (await scripts.hand_over(other, "handed_over")).answer is Answer.FENCED
    assert await snapshot(redis, lease.request_id) == before


async def test_a_run_that_has_ended_is_not_handed_over(redis: Redis, scripts: Scripts) -> None:
    completed = await running(scripts)
    await append(scripts, completed, 2, FINAL)
    cancelled = await running(scripts)
    await cancel(scripts, cancelled.request_id)
    for lease, answer, status in [
        (completed, Answer.CLOSED, "completed"),
        (cancelled, Answer.FENCED, "cancelled"),
    ]:
        before = await snapshot(redis, lease.request_id)
        reply = await scripts.hand_over(lease, "handed_over")
        assert (reply.answer, reply.status) == (answer, status)
        assert await snapshot(redis, lease.request_id) == before


async def test_who_finds_the_log_below_what_he_stands_on_hands_over_above_his_own_epoch(
    redis: Redis, scripts: Scripts
) -> None:
    """PROTOCOL 2, LOST: the record was rolled back below his claim, and his epoch may be in a client's cursor."""
    first = await running(scripts, claimed_at_ms=now_ms() + HOUR_MS)
    await append(scripts, first, 2, *words("a", "b"), checkpoint=(EventId(first.epoch, 3), 1))
    await lose_worker(redis, scripts, first.request_id)
    second = await claim(scripts, first.request_id, attempt=2)
    before = {"epoch": str(first.epoch), "token": first.token, "attempt": "1", "status": "running"}
    await roll_back(redis, first.request_id, EventId(first.epoch, 2), **before, checkpoint_id="0-1", checkpoint="0")
    assert (await append(scripts, second, 1, second.opening)).answer is Answer.LOST
    reply = await scripts.hand_over(second, "data_lost")
    assert reply == (Answer.OK, EventId(first.epoch, 2), "queued", [3])
    assert await field(redis, first.request_id, "epoch") == str(second.epoch)
    for lease in (first, second):
        assert (await append(scripts, lease, 3, *words("x"))).answer is Answer.FENCED
    third = await claim(scripts, first.request_id, attempt=3)
    assert third.epoch == second.epoch + 1
    entries = await log.read_all(redis, first.request_id)
    check_log(entries, finished=False)
    assert json.loads(entries[-1].data) == {"attempt": 3, "reason": "data_lost", "resume_from": "0-1"}


async def test_a_run_that_is_handed_over_is_not_closed_for_the_lease_that_had_expired(
    redis: Redis, scripts: Scripts
) -> None:
    lease = await running(scripts)
    await put(redis, lease.request_id, deadline=1)
    spent = await fence(scripts, lease.request_id, max_attempts=1)
    assert spent.answer is Answer.SPENT
    assert (await scripts.hand_over(lease, "handed_over")).answer is Answer.OK
    reply = await close(scripts, lease.request_id, if_still=("deadline", spent.rest[0].decode()))
    assert (reply.answer, reply.status) == (Answer.REFUSED, "queued")


# -- requeue -------------------------------------------------------------------------------------------------


async def test_enqueues_are_counted_for_each_attempt(redis: Redis, scripts: Scripts) -> None:
    request_id = await queued(scripts)
    for times in (1, 2):
        reply = await scripts.requeue(request_id, 1, times - 1)
        assert (reply.answer, reply.status, reply.rest) == (Answer.OK, "queued", [times])
    lease = await claim(scripts, request_id)
    assert await field(redis, request_id, "enqueues") == "0"
    await scripts.hand_over(lease, "handed_over")
    assert (await scripts.requeue(request_id, 2, 0)).rest == [1]
    await claim(scripts, request_id, attempt=2)
    await lose_worker(redis, scripts, request_id)
    assert (await scripts.requeue(request_id, 3, 0)).rest == [1]


async def test_of_two_reapers_only_one_enqueues_again(redis: Redis, scripts: Scripts) -> None:
    request_id = await queued(scripts)
    assert (await scripts.requeue(request_id, 1, 0)).answer is Answer.OK
    before = await snapshot(redis, request_id)
    reply = await scripts.requeue(request_id, 1, 0)
    assert (reply.answer, reply.status) == (Answer.REFUSED, "queued")
    assert await snapshot(redis, request_id) == before


@pytest.mark.parametrize("attempt", [0, 2])
async def test_a_run_is_not_enqueued_for_another_attempt(redis: Redis, scripts: Scripts, attempt: int) -> None:
    request_id = await queued(scripts)
    assert (await scripts.requeue(request_id, attempt, 0)).answer is Answer.REFUSED
    assert await field(redis, request_id, "enqueues") == "0"


async def test_a_run_that_is_not_queued_is_not_enqueued_again(redis: Redis, scripts: Scripts) -> None:
    lease = await running(scripts)
    for attempt in (1, 2):
        reply = await scripts.requeue(lease.request_id, attempt, 0)
        assert (reply.answer, reply.status) == (Answer.REFUSED, "running")
    await append(scripts, lease, 2, FINAL)
    reply = await scripts.requeue(lease.request_id, 2, 0)
    assert (reply.answer, reply.status) == (Answer.CLOSED, "completed")
    assert await field(redis, lease.request_id, "enqueues") == "0"


# -- watch ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("claimed", [False, True])
async def test_who_watches_a_run_is_noted_and_nothing_else_changes(
    redis: Redis, scripts: Scripts, claimed: bool
) -> None:
    request_id = (await running(scripts)).request_id if claimed else await queued(scripts)
    record = await redis.hgetall(keys.run(request_id))  # type: ignore[misc]
    reply = await scripts.watch(request_id)
    assert (reply.answer, reply.status) == (Answer.OK, "running" if claimed else "queued")
    after = await redis.hgetall(keys.run(request_id))  # type: ignore[misc]
    assert abs(int(after.pop(b"watched_at")) - now_ms()) < 60_000
    assert after == record


async def test_a_run_that_has_ended_is_watched_without_a_trace(redis: Redis, scripts: Scripts) -> None:
    lease = await running(scripts)
    await cancel(scripts, lease.request_id)
    before = await snapshot(redis, lease.request_id)
    reply = await scripts.watch(lease.request_id)
    assert (reply.answer, reply.status) == (Answer.CLOSED, "cancelled")
    assert await snapshot(redis, lease.request_id) == before
    assert await redis.pttl(keys.run(lease.request_id)) > 0


async def test_watching_makes_no_record(redis: Redis, scripts: Scripts) -> None:
    missing, erased = new_request_id(), await queued(scripts)
    await scripts.erase(erased, tombstone_ms=RETENTION_MS)
    for request_id, record in [(missing, {}), (erased, {b"status": b"erased"})]:
        assert (await scripts.watch(request_id)).answer is Answer.GONE
        assert await redis.hgetall(keys.run(request_id)) == record  # type: ignore[misc]
    assert not await redis.exists(keys.run(missing))


# -- close ---------------------------------------------------------------------------------------------------


async def test_a_reaper_closes_a_run_only_if_nothing_has_happened_to_it_since(redis: Redis, scripts: Scripts) -> None:
    lease = await running(scripts)
    await put(redis, lease.request_id, deadline=1)
    spent = await fence(scripts, lease.request_id, max_attempts=1)
    deadline = spent.rest[0].decode()
    await append(scripts, lease, 2)
    before = await snapshot(redis, lease.request_id)
    reply = await close(scripts, lease.request_id, if_still=("deadline", deadline))
    assert (reply.answer, reply.status) == (Answer.REFUSED, "running")
    assert await snapshot(redis, lease.request_id) == before
    await put(redis, lease.request_id, deadline=deadline)
    reply = await close(scripts, lease.request_id, if_still=("deadline", deadline))
    assert (reply.answer, reply.status, reply.rest) == (Answer.OK, "failed", [1, str(EventId(lease.epoch, 1)).encode()])
    check_log(await log.read_all(redis, lease.request_id))


async def test_a_field_that_the_record_does_not_have_is_an_empty_one(redis: Redis, scripts: Scripts) -> None:
    request_id = await queued(scripts)
    assert (await close(scripts, request_id, if_still=("watched_at", "1"))).answer is Answer.REFUSED
    assert (await close(scripts, request_id, if_still=("watched_at", ""))).answer is Answer.OK


async def test_nothing_is_closed_on_a_primary_that_has_not_settled(redis: Redis, scripts: Scripts, here: str) -> None:
    lease = await running(scripts)
    before = await snapshot(redis, lease.request_id)
    reply = await close(scripts, lease.request_id, replid=ELSEWHERE)
    assert (reply.answer, reply.status) == (Answer.UNSETTLED, "running")
    assert await snapshot(redis, lease.request_id) == before
    assert (await close(scripts, lease.request_id, replid=here)).answer is Answer.OK


async def test_a_closing_that_is_repeated_tells_where_it_stands_whatever_has_changed(
    redis: Redis, scripts: Scripts
) -> None:
    """Its maker needs both to send its entries again; after a failover too, on a primary that has not settled."""
    lease = await running(scripts)
    await append(scripts, lease, 2, *words("a"))
    first = await close(scripts, lease.request_id, if_still=("attempt", "1"))
    assert first.rest == [1, str(EventId(lease.epoch, 2)).encode()]
    before = await snapshot(redis, lease.request_id)
    for replid, if_still in [("", ("", "")), (ELSEWHERE, ("attempt", "1")), ("", ("attempt", "9"))]:
        assert await close(scripts, lease.request_id, replid=replid, if_still=if_still) == first
    other = await close(scripts, lease.request_id, token="other")
    assert (other.answer, other.status) == (Answer.CLOSED, "failed")
    assert await snapshot(redis, lease.request_id) == before


async def test_a_closing_that_a_failover_took_is_sent_again_under_its_own_ids(redis: Redis, scripts: Scripts) -> None:
    """PROTOCOL 5.2; and asked once more, its script knows it."""
    lease = await running(scripts)
    await append(scripts, lease, 2, *words("a"))
    first = await close(scripts, lease.request_id)
    entries = await log.read_all(redis, lease.request_id)
    before = {"epoch": str(lease.epoch), "token": lease.token, "status": "running"}
    await roll_back(redis, lease.request_id, EventId(lease.epoch, 2), **before)
    closing = closing_lease(lease.request_id, first, "worker_lost")
    reply = await append(scripts, closing, 1, closing.opening, ("error", WORKER_LOST.json_data()), lease_ms=0)
    assert reply[:3] == (Answer.OK, first.end, "failed")
    assert await log.read_all(redis, lease.request_id) == entries
    assert await close(scripts, lease.request_id) == first


async def test_a_closing_by_a_reaper_is_published_and_the_worker_told(
    redis: Redis, redis_server: RedisServer, scripts: Scripts
) -> None:
    lease = await running(scripts)
    channel, control = channels(lease.request_id)
    with Ears(redis_server.url, channel, control) as ears:
        await close(scripts, lease.request_id)
        heard = ears.heard()
    assert [name for name, _ in heard] == [channel, control]
    assert heard[1][1] == b"failed"


# -- claim ---------------------------------------------------------------------------------------------------


async def test_nothing_is_claimed_on_a_primary_that_has_not_settled(redis: Redis, scripts: Scripts, here: str) -> None:
    request_id = await queued(scripts)
    before = await snapshot(redis, request_id)
    reply = await scripts.claim(request_id, 1, "mine", LEASE_MS, ELSEWHERE)
    assert isinstance(reply, Reply)
    assert reply[:3] == (Answer.UNSETTLED, EventId(0, 1), "queued")
    assert await snapshot(redis, request_id) == before
    assert isinstance(await scripts.claim(request_id, 1, "mine", LEASE_MS, here), Lease)


async def test_a_claim_that_was_granted_is_repeated_on_any_primary(redis: Redis, scripts: Scripts, here: str) -> None:
    """It opens nothing: the epoch is there."""
    request_id = await queued(scripts)
    first = await scripts.claim(request_id, 1, "mine", LEASE_MS, here)
    before = await snapshot(redis, request_id)
    again = await scripts.claim(request_id, 1, "mine", LEASE_MS, ELSEWHERE)
    assert isinstance(first, Lease)
    assert isinstance(again, Lease)
    assert {**vars(again), "now_ms": first.now_ms} == vars(first)
    assert await snapshot(redis, request_id) == before


async def test_what_is_known_without_waiting_is_answered_at_once(scripts: Scripts) -> None:
    """A job that is late, or of a run that has ended, does not wait until the primary has settled."""
    lease = await running(scripts)
    cancelled = await queued(scripts)
    await cancel(scripts, cancelled)
    for request_id, answer in [
        (lease.request_id, Answer.REFUSED),
        (cancelled, Answer.CLOSED),
        (new_request_id(), Answer.GONE),
    ]:
        reply = await scripts.claim(request_id, 1, "other", LEASE_MS, ELSEWHERE)
        assert isinstance(reply, Reply)
        assert reply.answer is answer


# -- the entry that opens an epoch ---------------------------------------------------------------------------


def closing_lease(request_id: str, reply: Reply, reason: AttemptReason, token: str = "reaper") -> Lease:
    """Under what the maker of a closing sends it again."""
    attempt, before = reply.rest
    return Lease(
        request_id=request_id,
        epoch=reply.end.epoch,
        token=token,
        attempt=attempt,
        reason=reason,
        resume_from=EventId.parse(before.decode()),
    )


async def test_a_worker_knows_the_entry_that_its_claim_wrote(redis: Redis, scripts: Scripts) -> None:
    """Byte for byte: its tail begins with it, and an id has one content."""
    lease = await running(scripts)
    for attempt, reason in enumerate(["worker_lost", "handed_over", "data_lost", "worker_lost"], 2):
        opening = (await log.read_all(redis, lease.request_id))[-1]
        assert (opening.type, opening.data) == lease.opening
        if reason == "worker_lost":
            await lose_worker(redis, scripts, lease.request_id)
        else:
            covered = EventId(lease.epoch, 2)
            await append(scripts, lease, 2, *words("a"), checkpoint=(covered, attempt))
            await scripts.hand_over(lease, reason)
        lease = await claim(scripts, lease.request_id, attempt, token="t")
        again = await claim(scripts, lease.request_id, attempt, token="t")
        assert again.opening == lease.opening
        assert lease.reason == reason


CLOSINGS: list[tuple[Event, AttemptReason]] = [
    (Cancelled(reason="client"), "cancelled"),
    (WORKER_LOST, "worker_lost"),
    (Error(code="timeout", message="late"), "timeout"),
    (Error(code="not_started", message="never"), "not_started"),
]


@pytest.mark.parametrize("claimed", [False, True])
@pytest.mark.parametrize(("event", "reason"), CLOSINGS, ids=[reason for _, reason in CLOSINGS])
async def test_who_closes_a_run_knows_the_entry_that_was_written_before_its_end(
    redis: Redis, scripts: Scripts, event: Event, reason: AttemptReason, claimed: bool
) -> None:
    request_id = (await running(scripts)).request_id if claimed else await queued(scripts)
    reply = await close(scripts, request_id, event=event, reason=reason)
    opening, end = (await log.read_all(redis, request_id))[-2:]
    assert (opening.type, opening.data) == closing_lease(request_id, reply, reason).opening
    assert (end.type, end.data) == (event.type, event.json_data())


# -- primaries -----------------------------------------------------------------------------------------------


async def test_the_first_primary_of_all_has_always_been_there(redis: Redis) -> None:
    """PROTOCOL 4.6: nobody waits on a server that is new."""
    [age] = await primary_ages(redis, ["a"])
    assert age == pytest.approx(now_ms(), abs=60_000)
    [again] = await primary_ages(redis, ["a"])
    assert again >= age


async def test_a_primary_that_comes_later_is_there_since_now_for_everybody(redis: Redis) -> None:
    await primary_ages(redis, ["a"])
    first, [old] = await primary_ages(redis, ["b"]), await primary_ages(redis, ["a"])
    assert 0 <= first[0] < 60_000
    assert old > 1_000_000_000
    await redis.hincrby(keys.PRIMARIES, "b", -10_000)  # type: ignore[misc]
    [later] = await primary_ages(redis, ["b"])
    assert first[0] + 10_000 <= later < 70_000


async def test_where_what_was_noted_is_lost_a_primary_that_comes_later_is_still_not_the_first(redis: Redis) -> None:
    """The queue's Redis came back empty, and then the runs' fails over."""
    await primary_ages(redis, ["a"])
    await redis.delete(keys.PRIMARIES)
    [found] = await primary_ages(redis, ["b"], first=False)
    [told] = await primary_ages(redis, ["b"])
    assert 0 <= found <= told < 60_000


async def test_all_shards_of_a_new_service_are_first(redis: Redis) -> None:
    ages = await primary_ages(redis, ["a", "b"])
    assert ages == pytest.approx([now_ms()] * 2, abs=60_000)
    known, fresh = await primary_ages(redis, ["b", "c"])
    assert known > 1_000_000_000 > fresh


async def test_primaries_that_nobody_has_seen_for_a_day_are_forgotten(redis: Redis) -> None:
    now, day = now_ms(), 86_400_000
    old = {f"old-{n}": str(now - day - 60_000) for n in range(990)}
    young = {f"young-{n}": str(now - day + 60_000) for n in range(9)}
    await redis.hset(keys.PRIMARIES, mapping=old | young)  # type: ignore[misc]
    await primary_ages(redis, ["old-0", "new-1"])
    assert await redis.hlen(keys.PRIMARIES) == 1000, "so few are kept"  # type: ignore[misc]
    await primary_ages(redis, ["old-0", "new-2"])
    left = {name.decode() for name in await redis.hkeys(keys.PRIMARIES)}  # type: ignore[misc]
    assert left == {"old-0", "new-1", "new-2", *young}
