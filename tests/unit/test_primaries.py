"""What a process knows of its primary: whether it has settled (PROTOCOL 4.6), whether leases mean anything (4.7), and
what a failover could still take (5.2). On real servers."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest
from redis.asyncio import Redis
from redis.exceptions import TimeoutError

from broker.runs import keys, primaries
from broker.runs.connections import connect, is_away
from broker.runs.primaries import Primaries
from broker.runs.scripts import Answer, Lease, Reply, Scripts
from tests.kit.clock import Clock
from tests.kit.pair import Pair
from tests.kit.redis_server import VERSIONS, RedisServer, server_of
from tests.kit.runs import LEASE_MS, field, queued

SETTLE = 0.6
ANY = "0" * 32
"""Any run: all of them live on the one primary."""


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(primaries, "SETTLE_SECONDS", SETTLE)
    monkeypatch.setattr(primaries, "FSYNC_SECONDS", 0)


@pytest.fixture(params=VERSIONS)
def server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[RedisServer]:
    made = server_of(request.param, tmp_path)
    try:
        yield made.start()
    finally:
        made.close()


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    made = Pair(tmp_path / "pair")
    try:
        yield made.start()
    finally:
        made.close()


class Looker:
    """Primaries as a process has them, which look when the test says so."""

    def __init__(self, url: str, *, replicated: bool = False) -> None:
        self.redis = connect(url, connections=3)
        self.primaries = Primaries(self.redis, self.redis, replicated=replicated)
        self.changes = 0
        self.primaries.on_change = self._changed

    def _changed(self) -> None:
        self.changes += 1

    async def __aenter__(self) -> Looker:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.redis.aclose(close_connection_pool=True)

    async def look(self) -> None:
        await self.primaries.look()

    async def until_it_answers(self) -> None:
        async with asyncio.timeout(10):
            while True:
                try:
                    return await self.look()
                except Exception as error:
                    if not is_away(error):
                        raise
                    await asyncio.sleep(0.02)

    async def waits(self) -> float:
        """Seconds until a new epoch may be opened."""
        began = asyncio.get_running_loop().time()
        await self.primaries.settled(ANY)
        return asyncio.get_running_loop().time() - began

    async def noted(self) -> dict[str, int]:
        """What all processes know: replid -> since, in milliseconds."""
        held = await self.redis.hgetall(keys.PRIMARIES)  # type: ignore[misc]
        return {replid.decode(): int(since) for replid, since in held.items()}

    async def replid(self) -> str:
        replid: str = (await self.redis.info("replication"))["master_replid"]
        return replid

    async def now_ms(self) -> int:
        seconds, micros = await self.redis.time()
        return int(seconds) * 1000 + int(micros) // 1000


def now() -> float:
    return asyncio.get_running_loop().time()


@pytest.fixture
async def looker(server: RedisServer) -> AsyncIterator[Looker]:
    async with Looker(server.url) as looker:
        yield looker


# -- new epochs (4.6) --------------------------------------------------------------------------------------------


async def test_on_an_empty_server_nobody_waits_and_it_is_noted_with_0(looker: Looker) -> None:
    assert await looker.waits() < SETTLE / 2
    assert await looker.noted() == {await looker.replid(): 0}


async def test_a_process_that_starts_on_a_quiet_server_waits_for_nothing(looker: Looker, server: RedisServer) -> None:
    await looker.redis.hset(keys.PRIMARIES, await looker.replid(), str(await looker.now_ms() - 60_000))  # type: ignore[misc]
    before = await looker.noted()
    assert await looker.waits() < SETTLE / 2
    assert await looker.noted() == before
    assert looker.changes == 0, "it has nothing that could have been lost"


async def test_who_finds_a_primary_that_nobody_knows_notes_it_and_all_wait_for_what_is_left(
    looker: Looker, server: RedisServer
) -> None:
    await looker.redis.hset(keys.PRIMARIES, "another", "0")  # type: ignore[misc]
    began = await looker.now_ms()
    await looker.look()
    since = (await looker.noted())[await looker.replid()]
    assert began <= since <= await looker.now_ms()
    await asyncio.sleep(SETTLE / 2)
    async with Looker(server.url) as other:
        waited = await other.waits()
        assert 0 < waited <= SETTLE / 2 + 0.05
        assert (await other.noted())[await other.replid()] == since
    assert await looker.waits() < 0.1


async def test_after_a_restart_new_epochs_wait_and_whoever_wrote_is_told(looker: Looker, server: RedisServer) -> None:
    await looker.look()
    before = await looker.replid()
    began = now()
    await asyncio.to_thread(server.restart)
    assert looker.changes == 0
    await looker.until_it_answers()
    assert (looker.changes, await looker.replid() != before) == (1, True)
    assert looker.primaries.settling(ANY)
    assert looker.primaries.changed_at(ANY) >= began
    assert await looker.waits() > SETTLE / 2
    assert not looker.primaries.settling(ANY)
    assert set(await looker.noted()) == {before, await looker.replid()}
    await looker.look()
    assert looker.changes == 1


async def test_after_a_promotion_new_epochs_wait(pair: Pair) -> None:
    async with Looker(pair.url) as looker:
        await looker.look()
        first = await looker.replid()
        await asyncio.to_thread(pair.until_synchronised)
        await pair.fail_over()
        await looker.until_it_answers()
        assert looker.changes == 1
        assert await looker.waits() > SETTLE / 2
        assert set(await looker.noted()) == {first, await looker.replid()}


async def test_a_server_that_stood_still_has_lost_nothing_and_nobody_waits(server: RedisServer) -> None:
    """But whoever wrote is told, for leases could not be renewed."""
    async with Looker(f"{server.url}?socket_timeout=0.3") as looker:
        await looker.look()
        server.pause()
        try:
            with pytest.raises(TimeoutError):
                await looker.look()
            assert looker.primaries.away
        finally:
            server.resume()
        resumed = now()
        await looker.until_it_answers()
        assert looker.primaries.calm_since(ANY) >= resumed
        assert not looker.primaries.away
        assert looker.changes == 1
        assert await looker.waits() < SETTLE / 2
        assert len(await looker.noted()) == 1


async def test_a_new_epoch_is_refused_on_a_primary_that_came_meanwhile_and_tried_again_when_that_has_settled(
    looker: Looker, server: RedisServer
) -> None:
    """The process has not noticed yet; the script has."""
    scripts = Scripts(looker.redis)
    request_id = await queued(scripts)
    await looker.look()
    await asyncio.to_thread(server.restart)
    answers: list[Answer] = []
    granted: list[Lease] = []

    async def claim(replid: str) -> Reply:
        answer = await scripts.claim(request_id, 1, secrets.token_hex(8), LEASE_MS, replid)
        if isinstance(answer, Lease):
            granted.append(answer)
            answer = Reply(Answer.OK, answer.resume_from, "running", [])
        answers.append(answer.answer)
        return answer

    began = now()
    await looker.redis.connection_pool.disconnect()
    reply = await looker.primaries.in_new_epoch(request_id, claim)
    assert (reply.answer, answers) == (Answer.OK, [Answer.UNSETTLED, Answer.OK])
    assert now() - began > SETTLE / 2
    assert await field(looker.redis, request_id, "status") == "running"
    assert granted[0].attempt == 1


async def test_who_waits_for_a_primary_to_settle_waits_longer_when_another_comes(
    looker: Looker, server: RedisServer
) -> None:
    await looker.look()
    await asyncio.to_thread(server.restart)
    await looker.until_it_answers()
    waiting = asyncio.create_task(looker.waits())
    await asyncio.sleep(SETTLE / 2)
    await asyncio.to_thread(server.restart)
    await looker.until_it_answers()
    await asyncio.sleep(SETTLE * 0.75)
    assert not waiting.done()
    assert await waiting > SETTLE


async def test_a_server_that_does_not_answer_keeps_everybody_waiting_with_its_error(
    looker: Looker, server: RedisServer
) -> None:
    server.kill()
    with pytest.raises(Exception) as failure:
        await looker.primaries.settled(ANY)
    assert is_away(failure.value)


async def test_a_replica_is_not_taken_for_the_primary(pair: Pair) -> None:
    async with Looker(pair.replica.url) as looker:
        with pytest.raises(Exception) as failure:
            await looker.look()
        assert is_away(failure.value)


# -- leases and clocks (4.7) -------------------------------------------------------------------------------------


async def test_leases_mean_nothing_before_the_first_look_and_after_each_break(
    looker: Looker, server: RedisServer
) -> None:
    assert looker.primaries.calm_since(ANY) >= now() - 0.1
    began = now()
    await looker.look()
    assert began <= (calm := looker.primaries.calm_since(ANY)) <= now()
    await asyncio.sleep(0.1)
    await looker.look()
    assert looker.primaries.calm_since(ANY) == calm
    looker.primaries.disturbed()
    assert looker.primaries.calm_since(ANY) > calm
    broken = now()
    await asyncio.to_thread(server.restart)
    await looker.until_it_answers()
    assert looker.primaries.calm_since(ANY) >= broken


async def test_a_primary_that_is_found_young_is_not_calm_longer_than_it_is_known(looker: Looker) -> None:
    """Another process noted it a moment ago: then there was a break, whoever starts now."""
    await looker.redis.hset(keys.PRIMARIES, "another", "0")  # type: ignore[misc]
    began = now()
    await looker.look()
    assert looker.primaries.calm_since(ANY) >= began


@pytest.mark.parametrize("seconds", [3600, -3600, 2, -2])
async def test_a_clock_that_is_set_is_a_break(tmp_path: Path, seconds: float) -> None:
    clock = Clock(tmp_path)
    server = RedisServer(tmp_path, prefix=clock.prefix)
    try:
        async with Looker(server.start().url) as looker:
            await looker.look()
            calm = looker.primaries.calm_since(ANY)
            clock.set(0.5)  # what a clock is drawn by
            await looker.look()
            assert looker.primaries.calm_since(ANY) == calm
            clock.set(0.5 + seconds)
            set_at = now()
            await looker.look()
            assert looker.primaries.calm_since(ANY) >= set_at
            known = looker.primaries.now_ms()
            assert known is not None
            assert abs(known - await looker.now_ms()) < 1000
            assert looker.changes == 0
    finally:
        server.close()


# -- what a failover could take (5.2) ----------------------------------------------------------------------------


async def until(condition: Callable[[], bool], looker: Looker) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.05)
            await looker.look()


async def test_without_a_replica_a_write_is_safe_after_a_time(looker: Looker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(primaries, "TAIL_SECONDS", 0.5)
    assert looker.primaries.covered(ANY) == float("-inf")
    await looker.look()
    written = now()
    assert not looker.primaries.replicated
    assert looker.primaries.covered(ANY) < written
    await until(lambda: looker.primaries.covered(ANY) > written, looker)
    assert now() - written >= 0.5


async def test_with_a_replica_a_write_is_safe_as_soon_as_that_has_it(pair: Pair) -> None:
    async with Looker(pair.url) as looker:
        await looker.look()
        assert looker.primaries.replicated
        pair.link.pause()
        await looker.redis.set("written", 1)
        written = now()
        for _ in range(10):
            await looker.look()
            await asyncio.sleep(0.02)
        assert looker.primaries.covered(ANY) < written
        pair.link.resume()
        await until(lambda: looker.primaries.covered(ANY) > written, looker)
        await asyncio.to_thread(pair.until_synchronised)
        assert pair.replica.ask("EXISTS", "written") == 1


async def test_what_the_new_primary_alone_has_is_not_safe_because_the_old_ones_replica_had_it(pair: Pair) -> None:
    async with Looker(pair.url) as looker:
        await looker.look()
        await until(lambda: looker.primaries.covered(ANY) > float("-inf"), looker)
        await pair.fail_over()
        await looker.until_it_answers()
        written = now()
        await looker.redis.set("written", 1)
        await asyncio.sleep(0.1)
        await looker.look()
        assert not looker.primaries.replicated
        assert looker.primaries.covered(ANY) < written
        await pair.rejoin()
        await until(lambda: looker.primaries.covered(ANY) > written, looker)


async def test_where_replicas_are_demanded_nothing_is_safe_without_one(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(primaries, "TAIL_SECONDS", 0.1)
    pair.replica.kill()
    async with Looker(pair.url, replicated=True) as looker:
        await looker.look()
        written = now()
        await asyncio.sleep(0.5)
        await looker.look()
        assert looker.primaries.replicated
        assert looker.primaries.covered(ANY) == float("-inf")
        await pair.rejoin()
        await until(lambda: looker.primaries.covered(ANY) > written, looker)


async def test_many_who_ask_at_once_share_one_look(looker: Looker, server: RedisServer) -> None:
    before = server.info("commandstats").get("cmdstat_info", {"calls": 0})["calls"]
    await asyncio.gather(*(looker.primaries.settled(ANY) for _ in range(50)))
    after = server.info("commandstats")["cmdstat_info"]["calls"]
    assert after - before <= 1 + 2, "one look, and the two questions of this test"


async def test_a_look_that_is_given_up_by_one_is_not_lost_for_the_others(looker: Looker, redis: Redis) -> None:
    one, other = asyncio.create_task(looker.look()), asyncio.create_task(looker.look())
    await asyncio.sleep(0)
    one.cancel()
    await other
    assert await looker.waits() < SETTLE / 2
