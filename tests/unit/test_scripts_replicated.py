"""PROTOCOL 5.3: with `durability=replicated` what a client is told of has reached a replica, or is not answered."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from redis.asyncio import Redis

from broker.ids import EventId, new_request_id
from broker.runs import log
from broker.runs.connections import NotReplicated, connect, is_away
from broker.runs.scripts import Answer, Lease, Reply, Scripts, claim_key
from tests.kit.checker import check_log
from tests.kit.processes import wait_for
from tests.kit.redis_server import VERSIONS, RedisServer, server_of
from tests.kit.runs import FINAL, LEASE_MS, RETENTION_MS, append, cancel, create, fence, queued, running, words


@dataclass
class Servers:
    primary: RedisServer
    replica: RedisServer

    def join(self) -> None:
        """The replica has all that was written before."""
        self.replica.replicate(self.primary.port)
        wait_for(lambda: self.replica.synchronised and self.primary.info("replication")["connected_slaves"] == 1)


@pytest.fixture(params=VERSIONS)
def servers(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Servers]:
    """Not joined yet."""
    started: list[RedisServer] = []
    try:
        for name in ("primary", "replica"):
            (tmp_path / name).mkdir()
            started.append(server_of(request.param, tmp_path / name).start())
        yield Servers(*started)
    finally:
        for server in started:
            server.close()


@pytest.fixture
async def redis(servers: Servers) -> AsyncIterator[Redis]:
    client = connect(servers.primary.url, connections=16)
    yield client
    await client.aclose(close_connection_pool=True)


@pytest.fixture
def scripts(redis: Redis) -> Scripts:
    return Scripts(redis, replicated=True)


@pytest.fixture
def fast(redis: Redis) -> Scripts:
    return Scripts(redis)


async def lasting(
    redis: Redis, scripts: Scripts, fast: Scripts, *, replicated: bool = True
) -> dict[str, Callable[[], Awaitable[object]]]:
    """Everything that somebody relies on, each on a run of its own; to be called as often as one likes."""
    created, claimed, erased = new_request_id(), await queued(fast), await queued(fast)
    completed, failed, cancelled = [await running(fast) for _ in range(3)]
    key, owner = f"sb:idem:{secrets.token_hex(8)}", new_request_id()

    async def take_key() -> object:
        return await claim_key(
            redis, key, replace=None, request_id=owner, digest="d", life_ms=60_000, replicated=replicated
        )

    return {
        "the claim of a key": take_key,
        "create": lambda: create(scripts, created),
        "claim": lambda: scripts.claim(claimed, 1, "t", LEASE_MS),
        "final": lambda: append(scripts, completed, 2, *words("a"), FINAL),
        "error": lambda: append(scripts, failed, 2, ("error", "{}")),
        "cancel": lambda: cancel(scripts, cancelled.request_id, "t"),
        "erase": lambda: scripts.erase(erased, tombstone_ms=RETENTION_MS),
    }


async def state(redis: Redis) -> dict[bytes, object]:
    """All that is stored, but for when leases expire: who repeats a claim is alive."""
    found: dict[bytes, object] = {}
    for name in await redis.keys("sb:*"):
        if name.endswith(b":run"):
            record = await redis.hgetall(name)  # type: ignore[misc]
            found[name] = {field: value for field, value in record.items() if field != b"deadline"}
        elif not name.endswith(b":wait"):
            found[name] = await redis.dump(name)
    return found


async def test_what_lasts_is_answered_only_when_a_replica_has_it(
    redis: Redis, servers: Servers, scripts: Scripts, fast: Scripts
) -> None:
    """The write stands nevertheless, and what is repeated when a replica has come is answered, though it then writes
    nothing new.
    """
    calls = await lasting(redis, scripts, fast)
    outcomes = await asyncio.gather(*(call() for call in calls.values()), return_exceptions=True)
    for name, outcome in zip(calls, outcomes, strict=True):
        assert isinstance(outcome, NotReplicated), f"{name}: {outcome!r}"
        assert is_away(outcome)
    written = await state(redis)
    servers.join()
    answers = dict(zip(calls, [await call() for call in calls.values()], strict=True))
    repeated = {name: reply.answer for name, reply in answers.items() if isinstance(reply, Reply)}
    assert repeated == {
        "create": Answer.EXISTS,
        "final": Answer.DUP,
        "error": Answer.DUP,
        "cancel": Answer.OK,
        "erase": Answer.GONE,
    }
    assert isinstance(answers["claim"], Lease)
    assert await state(redis) == written, "repeating it changes nothing"
    copy = connect(servers.replica.url, connections=2)
    try:
        assert await state(copy) == written
    finally:
        await copy.aclose(close_connection_pool=True)


async def test_a_replica_that_does_not_keep_up_is_not_counted(
    redis: Redis, servers: Servers, scripts: Scripts, fast: Scripts
) -> None:
    """It is connected, and answers WAIT on any connection that has written nothing."""
    lease = await running(fast)
    servers.join()
    servers.replica.pause()
    fresh = connect(servers.primary.url, connections=1)
    try:
        with pytest.raises(NotReplicated):
            await append(scripts, lease, 2, *words("a"), FINAL)
        with pytest.raises(NotReplicated):  # on a connection that has written nothing, by a script that has nothing to
            await append(Scripts(fresh, replicated=True), lease, 2, *words("a"), FINAL)
    finally:
        servers.replica.resume()
        await fresh.aclose(close_connection_pool=True)
    reply = await append(scripts, lease, 2, *words("a"), FINAL)
    assert reply[:3] == (Answer.DUP, EventId(lease.epoch, 3), "completed")
    check_log(await log.read_all(redis, lease.request_id))


async def test_what_can_be_repaired_does_not_wait(scripts: Scripts, fast: Scripts) -> None:
    """There is no replica: whoever waited for one would fail."""
    lease = await running(fast)
    assert (await append(scripts, lease, 2, *words("a"))).answer is Answer.OK
    assert (await append(scripts, lease, 3)).answer is Answer.DUP
    assert (await fence(scripts, lease.request_id)).answer is Answer.REFUSED
    assert (await scripts.hand_over(lease, "handed_over")).answer is Answer.OK
    assert (await scripts.requeue(lease.request_id, 2, 0)).answer is Answer.OK
    assert (await scripts.watch(lease.request_id)).answer is Answer.OK


async def test_with_a_replica_everything_is_answered_also_when_the_server_has_forgotten_the_scripts(
    redis: Redis, servers: Servers, scripts: Scripts, fast: Scripts
) -> None:
    calls = await lasting(redis, scripts, fast)
    servers.join()
    for name, call in calls.items():
        await redis.script_flush()
        answer = await call()
        if isinstance(answer, Reply):
            assert answer.answer in (Answer.OK, Answer.CREATED), name
    await asyncio.sleep(0.05)
    assert await redis.keys("*:wait") == [], "nothing is left of the waiting"


async def test_without_replication_nothing_waits(redis: Redis, fast: Scripts) -> None:
    for call in (await lasting(redis, fast, fast, replicated=False)).values():
        await call()
