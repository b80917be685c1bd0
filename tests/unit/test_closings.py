"""What was closed or erased is there again after a failover that took it (PROTOCOL 5.2). On a real pair of servers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from broker.events import Cancelled, Entry, Error
from broker.runs import closings, log, primaries
from broker.runs.closings import Closings, Tail
from broker.runs.connections import NotReplicated, connect, is_away
from broker.runs.primaries import Primaries
from broker.runs.scripts import Answer, Lease, Reply, Scripts
from tests.kit.checker import check_log
from tests.kit.pair import Pair
from tests.kit.proxy import Proxy
from tests.kit.runs import FINAL, RETENTION_MS, append, claim, field, lose_worker, queued, running, words

SETTLE = 0.5
CLIENT = Cancelled(reason="client")
LOST = Error(code="worker_lost", message="The workers were lost.")


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(primaries, "SETTLE_SECONDS", SETTLE)
    monkeypatch.setattr(primaries, "POLL_SECONDS", 0.1)
    monkeypatch.setattr(primaries, "FSYNC_SECONDS", 0)
    monkeypatch.setattr(closings, "_TICK_SECONDS", 0.05)


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    made = Pair(tmp_path / "pair")
    try:
        yield made.start()
    finally:
        made.close()


class Closer:
    """A process that closes runs."""

    def __init__(self, pair: Pair, *, replicated: bool = False) -> None:
        self.pair = pair
        self.redis = connect(pair.url, connections=8)
        self.scripts = Scripts(self.redis)
        self.primaries = Primaries(self.redis, self.redis, replicated=replicated)
        self.closings = Closings(Scripts(self.redis, replicated=replicated), self.primaries, retention_ms=RETENTION_MS)
        self.lost: list[Lease] = []
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Closer:
        self._tasks = [asyncio.create_task(self.primaries.run()), asyncio.create_task(self.closings.run())]
        await self.primaries.look()
        return self

    async def __aexit__(self, *error: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.wait(self._tasks)
        await self.redis.aclose(close_connection_pool=True)

    async def running(self, *texts: str) -> Lease:
        """A run that is under way, on the replica too."""
        lease = await running(self.scripts)
        if texts:
            await append(self.scripts, lease, 2, *words(*texts))
        await asyncio.to_thread(self.pair.until_synchronised)
        return lease

    async def cancel(self, request_id: str) -> Reply:
        return await self.closings.close(request_id, CLIENT, "cancelled")

    def keep_end(self, lease: Lease, first: int, *entries: tuple[str, str], written_at: float | None = None) -> None:
        """What a worker does after the end of a run."""
        at = asyncio.get_running_loop().time() if written_at is None else written_at
        self.closings.keep_tail(Tail(lease, first, entries), at, self._on_lost)

    async def _on_lost(self, lease: Lease) -> None:
        self.lost.append(lease)

    async def log(self, request_id: str) -> list[Entry]:
        return await log.read_all(self.redis, request_id)

    async def status(self, request_id: str) -> str:
        return await field(self.redis, request_id, "status")

    async def until_status(self, request_id: str, status: str) -> None:
        async with asyncio.timeout(15):
            while True:
                try:
                    if await self.status(request_id) == status:
                        return
                except Exception as error:
                    if not is_away(error):
                        raise
                await asyncio.sleep(0.02)

    async def keeps_something(self) -> bool:
        """Whether a drain of half a second would have waited longer."""
        began = asyncio.get_running_loop().time()
        await self.closings.settle(0.5)
        return asyncio.get_running_loop().time() - began >= 0.5

    async def until_nothing_is_kept(self) -> None:
        began = asyncio.get_running_loop().time()
        await self.closings.settle(15)
        assert asyncio.get_running_loop().time() - began < 15


@pytest.fixture
async def closer(pair: Pair) -> AsyncIterator[Closer]:
    async with Closer(pair) as closer:
        yield closer


# -- cancels and closings by others ------------------------------------------------------------------------------


async def test_a_cancel_that_a_failover_took_is_there_again_under_its_own_ids(closer: Closer) -> None:
    lease = await closer.running("a", "b")
    closer.pair.link.pause()
    assert (await closer.cancel(lease.request_id)).answer is Answer.OK
    before = await closer.log(lease.request_id)
    await closer.pair.fail_over()
    assert await closer.status(lease.request_id) == "running"
    await closer.until_status(lease.request_id, "cancelled")
    assert await closer.log(lease.request_id) == before
    check_log(before)
    assert await closer.redis.ttl(f"sb:{{{lease.request_id}}}:log") > 0


async def test_a_cancel_that_stood_on_what_was_lost_too_is_made_anew_when_the_primary_has_settled(
    closer: Closer,
) -> None:
    lease = await closer.running("a")
    closer.pair.link.pause()
    await append(closer.scripts, lease, 3, *words("lost"))
    await closer.cancel(lease.request_id)
    lost = await closer.log(lease.request_id)
    await closer.pair.fail_over()
    began = asyncio.get_running_loop().time()
    await closer.until_status(lease.request_id, "cancelled")
    assert asyncio.get_running_loop().time() - began > SETTLE / 2
    entries = await closer.log(lease.request_id)
    check_log(entries)
    assert [entry.type for entry in entries] == ["start", "attempt", "token", "attempt", "cancelled"]
    assert entries[-1].id.epoch != lost[-1].id.epoch, "an id never has two contents"


async def test_a_cancel_whose_run_was_mended_and_written_on_voids_what_came_after_it(closer: Closer) -> None:
    """Its own ids come back, for readers have seen them; and it said where the run ended."""
    lease = await closer.running("a")
    closer.pair.link.pause()
    await closer.cancel(lease.request_id)
    cancelled = await closer.log(lease.request_id)
    closer.primaries.look = _never  # type: ignore[method-assign]
    await closer.pair.fail_over()
    await append(closer.scripts, lease, 3, *words("a writer that was faster"))
    del closer.primaries.look
    await closer.until_status(lease.request_id, "cancelled")
    entries = await closer.log(lease.request_id)
    check_log(entries)
    assert entries[-2:] == cancelled[-2:]


async def _never() -> None:
    """This process does not notice."""


async def test_what_closed_the_run_meanwhile_stands(closer: Closer) -> None:
    lease = await closer.running("a")
    closer.pair.link.pause()
    await closer.cancel(lease.request_id)
    closer.primaries.look = _never  # type: ignore[method-assign]
    await closer.pair.fail_over()
    await append(closer.scripts, lease, 3, FINAL)
    before = await closer.log(lease.request_id)
    del closer.primaries.look
    await closer.until_nothing_is_kept()
    assert await closer.log(lease.request_id) == before
    assert await closer.status(lease.request_id) == "completed"


async def test_a_closing_of_a_run_that_a_later_attempt_has_taken_is_made_anew(closer: Closer) -> None:
    """A reaper's, for example: its word was given."""
    lease = await closer.running("a")
    closer.pair.link.pause()
    reply = await closer.closings.close(lease.request_id, LOST, "worker_lost")
    assert reply.answer is Answer.OK
    closer.primaries.look = _never  # type: ignore[method-assign]
    await closer.pair.fail_over()
    attempt = await lose_worker(closer.redis, closer.scripts, lease.request_id)
    while (await claim(closer.scripts, lease.request_id, attempt)).epoch <= reply.end.epoch:
        attempt = await lose_worker(closer.redis, closer.scripts, lease.request_id)
    del closer.primaries.look
    await closer.until_status(lease.request_id, "failed")
    entries = await closer.log(lease.request_id)
    check_log(entries)
    assert entries[-1].id.epoch > reply.end.epoch


async def test_a_closing_of_a_queued_run_is_there_again(closer: Closer) -> None:
    request_id = await queued(closer.scripts)
    await asyncio.to_thread(closer.pair.until_synchronised)
    closer.pair.link.pause()
    await closer.cancel(request_id)
    await closer.pair.fail_over()
    await closer.until_status(request_id, "cancelled")
    check_log(await closer.log(request_id))


async def test_a_closing_whose_run_was_lost_with_it_is_forgotten(closer: Closer) -> None:
    """durability=fast: an accepted run can be lost together with the primary (5.3)."""
    closer.pair.link.pause()
    lease = await running(closer.scripts)
    await closer.cancel(lease.request_id)
    await closer.pair.fail_over()
    await closer.until_nothing_is_kept()
    assert await closer.status(lease.request_id) == ""


async def test_a_closing_under_a_condition_that_no_longer_held_is_not_made_later(closer: Closer) -> None:
    lease = await closer.running("a")
    reply = await closer.closings.close(lease.request_id, LOST, "worker_lost", if_still=("deadline", "1"))
    assert reply.answer is Answer.REFUSED
    await closer.pair.fail_over()
    await closer.until_nothing_is_kept()
    assert await closer.status(lease.request_id) == "running"


async def test_two_failovers_that_follow_each_other_take_nothing(closer: Closer) -> None:
    """The second one takes what the first one's repair has written."""
    mended, anew = await closer.running("a"), await closer.running("a")
    closer.pair.link.pause()
    await append(closer.scripts, anew, 3, *words("lost"))
    for lease in (mended, anew):
        await closer.cancel(lease.request_id)
    await closer.pair.fail_over()
    await closer.pair.rejoin()
    closer.pair.link.pause()
    for lease in (mended, anew):
        await closer.until_status(lease.request_id, "cancelled")
    await asyncio.sleep(SETTLE)
    await closer.pair.fail_over()
    for lease in (mended, anew):
        await closer.until_status(lease.request_id, "cancelled")
        check_log(await closer.log(lease.request_id))


@pytest.mark.parametrize("again", [True, False])
async def test_what_waited_for_a_primary_to_settle_is_kept_from_when_it_was_made(
    closer: Closer, monkeypatch: pytest.MonkeyPatch, again: bool
) -> None:
    """What the replica had before that is no proof."""
    monkeypatch.setattr(primaries, "SETTLE_SECONDS", 3)
    lease = await closer.running("a")
    closer.pair.link.pause()
    await append(closer.scripts, lease, 3, *words("lost"))
    if again:
        await closer.cancel(lease.request_id)
    await closer.pair.fail_over()
    if not again:
        await closer.until_status(lease.request_id, "running")
        cancelling = asyncio.create_task(closer.cancel(lease.request_id))
    await closer.pair.rejoin()
    joined = asyncio.get_running_loop().time()
    async with asyncio.timeout(10):
        while closer.primaries.covered(lease.request_id) < joined:
            await asyncio.sleep(0.02)
    closer.pair.link.pause()
    assert await closer.status(lease.request_id) == "running", "this test was too slow to test anything"
    await closer.until_status(lease.request_id, "cancelled")
    if not again:
        await cancelling
    await asyncio.sleep(0.3)
    await closer.pair.fail_over()
    await closer.until_status(lease.request_id, "cancelled")


async def test_the_word_of_an_old_primary_that_comes_late_is_not_relied_on(pair: Pair) -> None:
    """It stood still with the cancel in its socket, was replaced, and then answered."""
    async with Closer(pair) as closer:
        lease = await closer.running("a")
        with Proxy(pair.primary.port, raw=True) as way:
            slow = connect(way.url, connections=2)
            closings = Closings(Scripts(slow), closer.primaries, retention_ms=RETENTION_MS)
            keeping = asyncio.create_task(closings.run())
            await slow.ping()
            pair.primary.pause()
            cancelling = asyncio.create_task(closings.close(lease.request_id, CLIENT, "cancelled"))
            await asyncio.sleep(0.1)
            began = asyncio.get_running_loop().time()
            pair.replica.promote()
            await asyncio.to_thread(pair.address.point_to, pair.replica.port)
            async with asyncio.timeout(10):
                while closer.primaries.changed_at(lease.request_id) < began:
                    await asyncio.sleep(0.02)
            pair.primary.resume()
            assert (await cancelling).answer is Answer.OK
            assert await closer.status(lease.request_id) == "running"
            await asyncio.to_thread(way.point_to, pair.replica.port)
            await closer.until_status(lease.request_id, "cancelled")
            keeping.cancel()
            await asyncio.wait([keeping])
            await slow.aclose(close_connection_pool=True)


# -- ends that workers wrote -------------------------------------------------------------------------------------


async def test_a_completion_that_a_failover_took_is_there_again_under_its_own_ids(closer: Closer) -> None:
    lease = await closer.running("a")
    closer.pair.link.pause()
    end = [*words("b", "c"), FINAL]
    await append(closer.scripts, lease, 3, *end)
    closer.keep_end(lease, 3, *end)
    before = await closer.log(lease.request_id)
    await closer.pair.fail_over()
    await closer.until_status(lease.request_id, "completed")
    assert await closer.log(lease.request_id) == before
    assert await field(closer.redis, lease.request_id, "result") == FINAL[1]


async def test_a_completion_is_back_before_anybody_may_open_a_new_epoch(closer: Closer) -> None:
    lease = await closer.running("a")
    closer.pair.link.pause()
    await append(closer.scripts, lease, 3, FINAL)
    closer.keep_end(lease, 3, FINAL)
    await closer.pair.fail_over()
    reply = await closer.cancel(lease.request_id)
    assert (reply.answer, reply.status) == (Answer.CLOSED, "completed")


async def test_an_end_of_many_entries_is_sent_again_in_parts(closer: Closer) -> None:
    lease = await closer.running()
    closer.pair.link.pause()
    tail = [*words(*(f"{n} " for n in range(700))), FINAL]
    for first in range(0, len(tail), 250):
        await append(closer.scripts, lease, 2 + first, *tail[first : first + 250], kept_from=2)
    closer.keep_end(lease, 2, *tail)
    before = await closer.log(lease.request_id)
    await closer.pair.fail_over()
    await closer.until_status(lease.request_id, "completed")
    assert await closer.log(lease.request_id) == before


async def test_an_end_whose_claim_was_lost_as_well_is_there_again(closer: Closer) -> None:
    request_id = await queued(closer.scripts)
    await asyncio.to_thread(closer.pair.until_synchronised)
    closer.pair.link.pause()
    lease = await claim(closer.scripts, request_id)
    await append(closer.scripts, lease, 2, FINAL)
    closer.keep_end(lease, 1, lease.opening, FINAL)
    before = await closer.log(request_id)
    await closer.pair.fail_over()
    await closer.until_status(request_id, "completed")
    assert await closer.log(request_id) == before


async def test_an_end_that_stands_on_more_than_was_kept_is_reported_as_lost(closer: Closer) -> None:
    lease = await closer.running("a")
    closer.pair.link.pause()
    await append(closer.scripts, lease, 3, *words("not kept"), FINAL)
    closer.keep_end(lease, 4, FINAL)
    await closer.pair.fail_over()
    async with asyncio.timeout(10):
        while not closer.lost:
            await asyncio.sleep(0.02)
    assert closer.lost == [lease]
    await closer.until_nothing_is_kept()
    assert await closer.status(lease.request_id) == "running"


async def test_an_end_that_was_written_before_the_failover_and_kept_after_it_is_sent_again(closer: Closer) -> None:
    """Between both the agent has closed, which may take some seconds."""
    lease = await closer.running("a")
    closer.pair.link.pause()
    await append(closer.scripts, lease, 3, FINAL)
    written_at = asyncio.get_running_loop().time()
    await closer.pair.fail_over()
    async with asyncio.timeout(10):
        while closer.primaries.changed_at(lease.request_id) < written_at:
            await asyncio.sleep(0.02)
    closer.keep_end(lease, 3, FINAL, written_at=written_at)
    await closer.until_status(lease.request_id, "completed")


# -- erasures ----------------------------------------------------------------------------------------------------


async def test_an_erasure_that_a_failover_took_is_made_again(closer: Closer) -> None:
    lease = await closer.running("a")
    closer.pair.link.pause()
    assert (await closer.closings.erase(lease.request_id)).answer is Answer.OK
    await closer.pair.fail_over()
    assert await closer.status(lease.request_id) == "running"
    await closer.until_status(lease.request_id, "erased")
    assert await closer.log(lease.request_id) == []
    assert await closer.redis.hlen(f"sb:{{{lease.request_id}}}:run") == 1  # type: ignore[misc]


async def test_a_run_that_was_cancelled_and_then_erased_stays_erased(closer: Closer) -> None:
    lease = await closer.running("a")
    closer.pair.link.pause()
    await closer.cancel(lease.request_id)
    await closer.closings.erase(lease.request_id)
    await closer.pair.fail_over()
    await closer.until_nothing_is_kept()
    assert await closer.status(lease.request_id) == "erased"


# -- how long ----------------------------------------------------------------------------------------------------


async def test_it_is_kept_until_the_replica_has_it(closer: Closer) -> None:
    lease = await closer.running("a")
    closer.pair.link.pause()
    await closer.cancel(lease.request_id)
    assert await closer.keeps_something()
    closer.pair.link.resume()
    await closer.until_nothing_is_kept()
    await closer.pair.fail_over()
    assert await closer.status(lease.request_id) == "cancelled"


async def test_without_a_replica_a_drain_waits_until_it_is_on_the_disk(
    closer: Closer, monkeypatch: pytest.MonkeyPatch
) -> None:
    lease = await closer.running("a")
    closer.pair.replica.kill()
    async with asyncio.timeout(10):
        while closer.primaries.replicated:
            await asyncio.sleep(0.02)
    monkeypatch.setattr(closings, "UNREPLICATED_SECONDS", 0.3)
    began = asyncio.get_running_loop().time()
    await closer.cancel(lease.request_id)
    await closer.closings.settle(10)
    assert 0.3 <= asyncio.get_running_loop().time() - began < 10
    monkeypatch.setattr(closings, "UNREPLICATED_SECONDS", 60)
    assert await closer.keeps_something(), "it is kept on, for a power cut"


async def test_a_drain_waits_for_what_must_be_sent_again(closer: Closer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Redis is away: nobody knows what it will have lost."""
    monkeypatch.setattr(closings, "UNREPLICATED_SECONDS", 0.1)
    lease = await closer.running("a")
    closer.pair.replica.kill()
    async with asyncio.timeout(10):
        while closer.primaries.replicated:
            await asyncio.sleep(0.02)
    await closer.cancel(lease.request_id)
    await asyncio.sleep(0.2)
    closer.pair.primary.kill()
    async with asyncio.timeout(10):
        while not closer.primaries.away:
            await asyncio.sleep(0.02)
    assert await closer.keeps_something()
    closer.pair.primary.start()
    await closer.until_nothing_is_kept()
    assert await closer.status(lease.request_id) == "cancelled"


async def test_what_does_not_fit_into_memory_is_let_go_the_oldest_first(
    closer: Closer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(closings, "KEPT_BYTES", 5_000)
    leases = [await closer.running("a") for _ in range(8)]
    closer.pair.link.pause()
    for lease in leases:
        await closer.cancel(lease.request_id)
    await closer.pair.fail_over()
    await closer.until_status(leases[-1].request_id, "cancelled")
    await closer.until_nothing_is_kept()
    statuses = [await closer.status(lease.request_id) for lease in leases]
    kept = statuses.count("cancelled")
    assert 0 < kept < 8
    assert statuses == ["running"] * (8 - kept) + ["cancelled"] * kept


async def test_one_that_must_wait_holds_up_no_other(closer: Closer) -> None:
    """A new epoch waits for the primary; what goes back under its own ids does not."""
    waiting = [await closer.running("a") for _ in range(40)]
    ended = await closer.running("a")
    closer.pair.link.pause()
    for lease in waiting:
        await append(closer.scripts, lease, 3, *words("lost"))
        await closer.cancel(lease.request_id)
    await append(closer.scripts, ended, 3, FINAL)
    closer.keep_end(ended, 3, FINAL)
    await closer.pair.fail_over()
    await closer.until_status(ended.request_id, "completed")
    assert await closer.status(waiting[0].request_id) == "running"
    for lease in waiting:
        await closer.until_status(lease.request_id, "cancelled")


# -- durability=replicated (5.3) ---------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["cancel", "erase"])
async def test_what_no_replica_has_is_not_confirmed_but_kept_and_repeated_until_one_has_it(
    pair: Pair, what: str
) -> None:
    async with Closer(pair, replicated=True) as closer:
        lease = await closer.running("a")
        pair.link.pause()
        with pytest.raises(NotReplicated):
            await (closer.cancel if what == "cancel" else closer.closings.erase)(lease.request_id)
        assert await closer.status(lease.request_id) == ("cancelled" if what == "cancel" else "erased")
        assert await closer.keeps_something()
        await pair.fail_over()
        assert await closer.status(lease.request_id) == "running"
        await closer.until_status(lease.request_id, "cancelled" if what == "cancel" else "erased")
        assert await closer.keeps_something(), "for the new primary has no replica yet"
        await pair.rejoin()
        await closer.until_nothing_is_kept()


async def test_a_closing_that_was_refused_unconfirmed_is_not_made_later(pair: Pair) -> None:
    """The answer was lost in the waiting: what is repeated has the condition still."""
    async with Closer(pair, replicated=True) as closer:
        lease = await closer.running("a")
        pair.link.pause()
        with pytest.raises(NotReplicated):
            await closer.closings.close(lease.request_id, LOST, "worker_lost", if_still=("deadline", "1"))
        pair.link.resume()
        await closer.until_nothing_is_kept()
        assert await closer.status(lease.request_id) == "running"
