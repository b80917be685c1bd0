"""The client of a Cluster: where commands go, what happens while slots move and nodes are away, and its pools."""

from __future__ import annotations

import asyncio
import random
import secrets
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from redis.exceptions import ClusterDownError, ConnectionError, RedisError, ResponseError, TryAgainError

from broker.runs import keys
from broker.runs.cluster import Cluster as Client
from broker.runs.connections import connect, is_away
from broker.runs.shards import read_with_time, shard_of, shards
from tests.kit.cluster import Cluster, slot_of
from tests.kit.redis_server import RedisServer
from tests.kit.waiting import until


@pytest.fixture(scope="module")
def shared_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path_factory.mktemp("cluster"), replicas=0)
    try:
        yield cluster.start()
    finally:
        cluster.close()


@pytest.fixture
async def cluster(shared_cluster: Cluster) -> Cluster:
    """Whole and empty; slots may have moved."""
    await shared_cluster.until_whole()
    for server in shared_cluster.servers:
        server.ask("FLUSHALL")
        server.ask("SCRIPT", "FLUSH")
    return shared_cluster


@pytest.fixture
async def redis(cluster: Cluster) -> AsyncIterator[Client]:
    made = client(cluster)
    yield made
    await made.aclose()


def client(cluster: Cluster, connections: int = 4, wait: float = 5) -> Client:
    made = connect(cluster.url, connections=connections, wait=wait)
    assert isinstance(made, Client)
    return made


def key_on(cluster: Cluster, server: RedisServer) -> str:
    return next(key for n in range(1000) if cluster.owner_of(key := f"key-{n}") is server)


def ours(server: RedisServer) -> int:
    with server.client() as admin:
        return sum(1 for row in admin.client_list() if row["name"] == "stream-broker")


# Where commands go


async def test_each_key_is_on_the_primary_of_its_slot(cluster: Cluster, redis: Client) -> None:
    await asyncio.gather(*(redis.set(f"key-{n}", n) for n in range(60)))
    for n in range(60):
        assert cluster.owner_of(f"key-{n}").ask("GET", f"key-{n}") == b"%d" % n
    assert await asyncio.gather(*(redis.get(f"key-{n}") for n in range(60))) == [b"%d" % n for n in range(60)]


async def test_a_pipeline_mixes_slots_and_answers_in_order(cluster: Cluster, redis: Client) -> None:
    async with redis.pipeline(transaction=False) as pipe:
        for n in range(60):
            pipe.set(f"key-{n}", n)
            pipe.incr(f"key-{n}")
            pipe.lpush(f"key-{n}", "no list")
        found = await pipe.execute(raise_on_error=False)
    assert found[::3] == [True] * 60
    assert found[1::3] == list(range(1, 61))
    assert all(isinstance(error, ResponseError) for error in found[2::3])
    async with redis.pipeline(transaction=False) as pipe:
        pipe.get("key-1")
        pipe.lpush("key-2", "no list")
        with pytest.raises(ResponseError, match="WRONGTYPE"):
            await pipe.execute()
        assert await pipe.execute() == []


async def test_a_command_without_a_key_goes_where_the_one_before_it_goes(cluster: Cluster, redis: Client) -> None:
    await redis.ping()
    for server in cluster.servers:
        server.ask("CONFIG", "RESETSTAT")
    async with redis.pipeline(transaction=False) as pipe:
        for count, server in enumerate(cluster.servers, 1):
            for _ in range(count):
                pipe.get(key_on(cluster, server))
                pipe.time()
        await pipe.execute()
    assert [calls(server, "time") for server in cluster.servers] == [1, 2, 3]
    async with redis.pipeline(transaction=False) as pipe:
        pipe.time()
        pipe.get("a")
        with pytest.raises(RedisError, match="has no key"):
            await pipe.execute()


async def test_a_record_is_read_with_the_time_of_its_server(cluster: Cluster, redis: Client) -> None:
    """Also while it is on its way to another one (PROTOCOL 6.2)."""
    runs = [f"{n:032x}" for n in range(30)]
    for run in runs:
        await redis.hset(keys.run(run), "status", run)  # type: ignore[misc]
    move = cluster.begin_move(slot_of(keys.run(runs[0])))
    move.keys()
    for server in cluster.servers:
        server.ask("CONFIG", "RESETSTAT")
    found = await read_with_time(redis, runs, ["status", "none"])
    assert [row for row, _ in found] == [[run.encode(), None] for run in runs]
    assert all(isinstance(now_ms, int) and now_ms > 1_600_000_000_000 for _, now_ms in found)
    for server in cluster.servers:
        mine = [run for run in runs if cluster.owner_of(keys.run(run)) is server]
        assert calls(server, "time") == len(mine) + (server is move.target), "one more, for the record between them"
    move.end()


async def test_what_needs_no_key_is_answered_by_whoever_can(cluster: Cluster, redis: Client) -> None:
    for number in range(3):
        port = [*(await redis.layout()).names][number][1]
        killed = next(server for server in cluster.servers if server.port == port)
        try:
            killed.kill()
            assert await redis.ping()
            assert len(await redis.time()) == 2
        finally:
            killed.start()


async def test_transactions_are_refused(redis: Client) -> None:
    with pytest.raises(RedisError, match="no transactions"):
        redis.pipeline()


async def test_each_shard_is_a_redis_of_its_own(cluster: Cluster, redis: Client) -> None:
    found = await shards(redis)
    assert {shard.name for shard in found} == {f"127.0.0.1:{server.port}" for server in cluster.servers}
    for shard in found:
        await shard.redis.ping()
        replid = (await shard.redis.info("replication"))["master_replid"]
        [server] = [server for server in cluster.servers if shard.name.endswith(f":{server.port}")]
        assert replid == server.info("replication")["master_replid"]
    for n in range(20):
        run = f"{n:032x}"
        assert shard_of(redis, run) == f"127.0.0.1:{cluster.owner_of(keys.run(run)).port}"


async def test_before_anything_was_asked_no_run_has_a_shard(cluster: Cluster) -> None:
    redis = client(cluster)
    assert shard_of(redis, "0" * 32) == ""
    await redis.aclose()


# Scripts


async def test_scripts_are_loaded_wherever_they_are_missing(cluster: Cluster, redis: Client) -> None:
    script = redis.register_script("return redis.call('INCR', KEYS[1])")
    names = [key_on(cluster, server) for server in cluster.servers]
    assert [await script(keys=[name]) for name in names] == [1, 1, 1]
    for server in cluster.servers:
        server.ask("SCRIPT", "FLUSH")
    assert [await script(keys=[name]) for name in names] == [2, 2, 2]


async def test_a_script_is_loaded_on_a_node_that_is_about_to_get_its_first_slot(tmp_path: Path) -> None:
    async with Cluster(tmp_path, shards=1, replicas=0, spares=1) as cluster:
        redis = client(cluster)
        script = redis.register_script("return redis.call('INCR', KEYS[1])")
        assert await script(keys=["a"]) == 1
        move = cluster.begin_move(slot_of("a"))
        move.keys()
        assert await script(keys=["a"]) == 2
        move.end()
        assert await script(keys=["a"]) == 3
        await redis.aclose()


async def test_a_silent_node_does_not_keep_a_script_from_the_others(cluster: Cluster, redis: Client) -> None:
    await redis.ping()
    silent, other, _ = cluster.servers
    script = redis.register_script("return redis.call('INCR', KEYS[1])")
    silent.pause()
    try:
        async with asyncio.timeout(4):  # a command waits five seconds for an answer
            assert await script(keys=[key_on_known(redis, other)]) == 1
    finally:
        silent.resume()


# Slots that move


async def test_keys_are_found_in_every_step_of_a_move(cluster: Cluster, redis: Client) -> None:
    """With other commands on all connections: ASKING counts only on the connection that the command is sent on."""
    stop = asyncio.Event()

    async def noise() -> None:
        while not stop.is_set():
            await redis.set(f"noise-{random.randrange(100)}", 1)

    async with asyncio.TaskGroup() as tasks:
        for _ in range(8):
            tasks.create_task(noise())
        for round_ in range(3):
            await asyncio.gather(*(redis.set(f"{{a}}{n}", n) for n in range(20)))
            move = await asyncio.to_thread(cluster.begin_move, slot_of("a"))
            await check_all(redis, round_)
            await asyncio.to_thread(move.keys, 10)  # half of them are there, half are here
            await check_all(redis, round_)
            assert await redis.set("{a}new", round_), "what is nowhere is made where the slot will be"
            await asyncio.to_thread(move.keys)
            await check_all(redis, round_)
            await asyncio.to_thread(move.end)
            await check_all(redis, round_)
            assert int(await redis.get("{a}new")) == round_
        stop.set()


async def check_all(redis: Client, round_: int) -> None:
    expected = [b"%d" % n for n in range(20)]
    assert await asyncio.gather(*(redis.get(f"{{a}}{n}") for n in range(20))) == expected
    async with redis.pipeline(transaction=False) as pipe:
        for n in range(20):
            pipe.get(f"{{a}}{n}")
            pipe.get(f"other-{n}")
        assert (await pipe.execute())[::2] == expected


async def test_keys_on_both_sides_of_a_move_are_asked_for_again(cluster: Cluster, redis: Client) -> None:
    await redis.set("{a}1", 1)
    await redis.set("{a}2", 1)
    move = cluster.begin_move(slot_of("a"))
    move.keys(1)
    with pytest.raises(TryAgainError) as caught:
        await redis.mget("{a}1", "{a}2")
    assert is_away(caught.value)
    move.end()
    assert await redis.mget("{a}1", "{a}2") == [b"1", b"1"]


async def test_a_wait_for_replicas_that_speaks_of_another_node_is_no_answer(cluster: Cluster, redis: Client) -> None:
    """The first command is executed here, the second one there: nobody knows whether the first one is replicated."""
    await redis.set("{a}1", 1)
    move = cluster.begin_move(slot_of("a"))
    async with redis.pipeline(transaction=False) as pipe:
        pipe.incr("{a}1")
        pipe.set("{a}2", 1)
        pipe.execute_command("WAIT", 0, 100)
        count, done, wait = await pipe.execute(raise_on_error=False)
    assert (count, done) == (2, True)
    assert isinstance(wait, TryAgainError)
    move.keys()
    async with redis.pipeline(transaction=False) as pipe:
        pipe.incr("{a}1")
        pipe.set("{a}2", 1)
        pipe.execute_command("WAIT", 0, 100)
        assert await pipe.execute() == [3, True, 0], "all of it went there"
    move.end()


async def test_a_client_that_knows_an_old_layout_learns_the_new_one(cluster: Cluster, redis: Client) -> None:
    slots = random.sample(range(16384), 20)
    await redis.ping()
    for slot in slots:
        await cluster.move_slot(slot)
    owners = {slot: cluster.owner(slot).port for slot in slots}
    await redis.get(next(key for n in range(100_000) if slot_of(key := f"key-{n}") == slots[0]))

    async def known() -> bool:
        return {slot: redis.known.owner(slot)[1] for slot in slots} == owners

    await until(known)


# Nodes that are away


async def test_a_node_that_is_away_fails_only_what_it_was_to_do(cluster: Cluster, redis: Client) -> None:
    names = [key_on(cluster, server) for server in cluster.servers]
    for name in names:
        await redis.set(name, 1)
    cluster.servers[0].kill()
    try:
        async with redis.pipeline(transaction=False) as pipe:
            for name in names:
                pipe.get(name)
            first, *rest = await pipe.execute(raise_on_error=False)
            assert isinstance(first, Exception) and is_away(first)
            assert rest == [b"1", b"1"]
            for name in names:
                pipe.get(name)
            with pytest.raises(ConnectionError):
                await pipe.execute()
        with pytest.raises(ConnectionError):
            await redis.get(names[0])
    finally:
        cluster.servers[0].start()

    async def back() -> bool:
        try:
            return bool(await redis.set(names[0], 1))
        except Exception as error:
            assert is_away(error), error
            return False

    await until(back)


async def test_a_cluster_that_is_down_is_away(cluster: Cluster, redis: Client) -> None:
    name = key_on(cluster, cluster.servers[1])
    await redis.set(name, 1)
    cluster.servers[0].kill()
    try:

        async def down() -> bool:
            try:
                await redis.set(name, 1)
                return False
            except Exception as error:
                assert is_away(error), error
                return "CLUSTERDOWN" in repr(error) or "cluster is down" in str(error)

        await until(down)
    finally:
        cluster.servers[0].start()
        await cluster.until_whole()


async def test_a_slot_that_nobody_has_fails_only_what_needs_it(tmp_path: Path) -> None:
    whole = Cluster(tmp_path, "--cluster-require-full-coverage", "no", shards=1, replicas=0)
    async with whole as cluster:
        redis = client(cluster)
        cluster.servers[0].ask("CLUSTER", "DELSLOTS", slot_of("a"))
        for _ in range(2):
            assert await redis.set("b", 1)
            with pytest.raises(ClusterDownError) as caught:
                await redis.get("a")
            assert is_away(caught.value)
            async with redis.pipeline(transaction=False) as pipe:
                pipe.get("a")
                pipe.get("b")
                missing, found = await pipe.execute(raise_on_error=False)
            assert isinstance(missing, ClusterDownError)
            assert found == b"1"
        await asyncio.sleep(0.5)  # nobody asks for the layout any more
        cluster.servers[0].ask("CLUSTER", "ADDSLOTS", slot_of("a"))

        async def back() -> bool:
            try:
                return await redis.get("a") is None
            except ClusterDownError:
                return False

        await until(back)
        await redis.aclose()


async def test_nodes_that_are_gone_are_no_matter_where_one_is_left_to_ask(cluster: Cluster) -> None:
    nodes = cluster.url.removeprefix("redis+cluster://").split(",")
    redis = connect(f"redis+cluster://127.0.0.1:1,127.0.0.1:2,{nodes[2]}", connections=1)
    assert await redis.set("a", 1)
    await redis.aclose()


@pytest.mark.parametrize("answer", ["", "cluster support disabled"])
async def test_where_no_node_tells_the_layout_the_error_says_why(redis_server: RedisServer, answer: str) -> None:
    port = redis_server.port if answer else 1
    redis = connect(f"redis+cluster://127.0.0.1:{port}", connections=1)
    for work in (redis.ping, lambda: redis.get("a"), lambda: shards(redis)):
        with pytest.raises(ConnectionError, match=f"127.0.0.1:{port}: .*{answer}") as caught:
            await work()
        assert is_away(caught.value)
    await redis.aclose()


async def test_a_wrong_password_is_told(tmp_path: Path) -> None:
    async with Cluster(tmp_path, shards=1, replicas=0, password="pelican") as cluster:
        redis = connect(cluster.url.replace("pelican", "heron"), connections=1)
        with pytest.raises(ConnectionError, match="invalid username-password") as caught:
            await redis.ping()
        assert "heron" not in str(caught.value)
        await redis.aclose()


# Pools


async def test_two_connections_to_each_node_serve_twenty_users(cluster: Cluster) -> None:
    redis = client(cluster, connections=2, wait=30)
    most = dict.fromkeys(cluster.servers, 0)

    async def use(n: int) -> int:
        for k in range(5):
            await redis.set(f"key-{n}", k)
            async with redis.pipeline(transaction=False) as pipe:
                for m in range(10):
                    pipe.get(f"key-{m}")
                await pipe.execute()
            await redis.execute_command("BLPOP", f"none-{n}", "0.01")
        for server in cluster.servers:
            most[server] = max(most[server], ours(server))
        return n

    async with asyncio.timeout(60):
        assert await asyncio.gather(*(use(n) for n in range(20))) == list(range(20))
    await redis.aclose()
    assert all(1 <= count <= 3 for count in most.values()), "two, and for a moment one that asks for the layout"


async def test_who_waits_too_long_for_a_connection_is_told_that_redis_is_away(cluster: Cluster) -> None:
    redis = client(cluster, connections=1, wait=0.2)
    hog = asyncio.create_task(redis.execute_command("BLPOP", "{a}none", "1.5"))
    await asyncio.sleep(0.1)
    other = key_on(cluster, next(server for server in cluster.servers if server is not cluster.owner_of("a")))
    assert await redis.set(other, 1), "the other nodes have connections of their own"
    with pytest.raises(ConnectionError) as caught:
        await redis.get("{a}1")
    assert is_away(caught.value)
    await hog
    assert await redis.set("{a}1", 1)
    await redis.aclose()


async def test_pools_are_whole_again_after_their_users_were_cancelled_anywhere(cluster: Cluster) -> None:
    seed = secrets.randbits(32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    redis = client(cluster, connections=2, wait=30)

    async def use(n: int) -> None:
        for k in range(1000):
            await redis.set(f"key-{n}", k)
            async with redis.pipeline(transaction=False) as pipe:
                for m in range(10):
                    pipe.get(f"key-{m}")
                await pipe.execute()

    async with asyncio.timeout(60):
        for _ in range(4):
            move = await asyncio.to_thread(cluster.begin_move, slot_of(f"key-{rng.randrange(20)}"))
            tasks = [asyncio.create_task(use(n)) for n in range(20)]
            for task in rng.sample(tasks, 20):
                await asyncio.sleep(rng.random() / 50)
                task.cancel()
            await asyncio.to_thread(move.end)
            results = await asyncio.gather(*tasks, return_exceptions=True)
            assert all(isinstance(result, asyncio.CancelledError) for result in results), results
            await asyncio.gather(*(redis.set(f"key-{n}", n) for n in range(20)))
            assert await asyncio.gather(*(redis.get(f"key-{n}") for n in range(20))) == [b"%d" % n for n in range(20)]
    await redis.aclose()


async def test_closing_leaves_no_connection_behind(cluster: Cluster) -> None:
    before = [ours(server) for server in cluster.servers]
    redis = client(cluster)
    await asyncio.gather(*(redis.set(f"key-{n}", n) for n in range(60)))
    redis.suspect()
    await redis.aclose()

    async def closed() -> bool:
        return [ours(server) for server in cluster.servers] == before

    await until(closed)


def calls(server: RedisServer, command: str) -> int:
    stats = server.info("commandstats")
    return int(stats.get(f"cmdstat_{command}", {"calls": 0})["calls"])


def key_on_known(redis: Client, server: RedisServer) -> str:
    """By what the client knows: nobody is asked."""
    return next(key for n in range(1000) if redis.known.owner(slot_of(key := f"key-{n}"))[1] == server.port)
