"""PROTOCOL 5.3: what is answered under `durability=replicated` survives the loss of the primary at that moment; under
`fast` it may be lost with it."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest

from tests.conftest import Launcher
from tests.kit.api import Api
from tests.kit.checker import check_log, check_reader, entries_of
from tests.kit.http import Client
from tests.kit.pair import Pair
from tests.kit.scale import LONG

LEASE = 3.0
SETTINGS: dict[str, Any] = {
    "durability": "replicated",
    "heartbeat_seconds": 1,
    "lease_seconds": LEASE,
    "grace_seconds": 1,
}
LINK_SECONDS = 0.05
"""How far the replica is behind: enough to lose what does not wait for it."""


@pytest.fixture
def pair(launch: Launcher) -> Pair:
    return launch.pair()


@pytest.fixture
async def api(launch: Launcher, pair: Pair) -> AsyncIterator[Api]:
    async with Api(launch.gateway(pair.url, **SETTINGS).url) as api:
        yield api


@pytest.mark.parametrize("turn", range(20 if LONG else 1))
async def test_what_was_answered_is_there_when_the_primary_dies_at_that_moment(
    launch: Launcher, pair: Pair, api: Api, turn: int
) -> None:
    """The first answer after the failover must know of it: nothing was sent again by then."""
    seed = random.randrange(2**32)
    chance = random.Random(seed)
    launch.worker(pair.url, **SETTINGS)
    stopped, erased = [[await api.running(f"{what} {k}", "hangs") for k in range(3)] for what in "ab"]
    pair.link.delay(LINK_SECONDS)
    await asyncio.sleep(chance.uniform(0, 1))
    began = time.monotonic()
    submitting = [api.submit(f"submitted {k}") for k in range(chance.randint(1, 4))]
    cancelling, erasing = [api.cancel(run) for run in stopped], [api.erase(run) for run in erased]
    accepted, cancels, erasures = await asyncio.gather(
        asyncio.gather(*submitting), asyncio.gather(*cancelling), asyncio.gather(*erasing)
    )
    took = time.monotonic() - began
    await pair.fail_over()
    assert {reply.status_code for reply in cancels} == {200}
    assert {reply.status_code for reply in erasures} == {204}
    for request_id in accepted:
        assert (await api.poll(request_id)).status_code == 200
    for request_id, reply in zip(stopped, cancels, strict=True):
        run = (await api.poll(request_id)).json()
        assert (run["status"], run["last_event_id"]) == ("cancelled", reply.json()["last_event_id"])
    for request_id in erased:
        assert (await api.poll(request_id)).status_code == 404
    await pair.rejoin()
    for request_id in accepted:
        assert (await api.until(request_id, "completed", "failed"))["status"] == "completed"
    print(f"seed {seed}: {len(accepted) + len(cancels) + len(erasures)} answers, all after {took:.2f} s")


async def test_a_claim_and_an_end_survive_the_primary_as_well(launch: Launcher, pair: Pair, api: Api) -> None:
    """What the run says stands on both: it is not executed twice."""
    launch.worker(pair.url, **SETTINGS)
    pair.link.delay(LINK_SECONDS)
    request_id = await api.submit("go on", "tokens", count=100, pause=0.02)
    stream = await api.stream(request_id)
    await stream.until(lambda: len(stream.events) > 2)
    await pair.fail_over()
    run = await api.until(request_id, "completed", "failed")
    await stream.ended(10)
    assert (run["status"], run["attempt"]) == ("completed", 1)
    with Client(api.url) as client:
        log = await asyncio.to_thread(client.log, request_id)
    check_log(log)
    check_reader(entries_of(stream.events), log)


@pytest.mark.parametrize("how", ["silent", "dead"])
async def test_without_a_replica_nothing_is_promised_and_who_asks_is_told_soon(
    launch: Launcher, pair: Pair, api: Api, how: str
) -> None:
    """And what is under way goes on, for that can be repaired."""
    launch.worker(pair.url, **SETTINGS)
    stopped, erased, going = [await api.submit(f"{n}", "tokens", count=10_000, pause=0.05) for n in range(3)]
    for request_id in (stopped, erased, going):
        await api.until(request_id, "running")
    await asyncio.to_thread(pair.until_synchronised)
    (pair.link.pause if how == "silent" else pair.replica.kill)()
    began = time.monotonic()
    calls = [api.ask("POST", "query", json={"query": "later"}), api.cancel(stopped), api.erase(erased)]
    refused = await asyncio.gather(*calls)
    print(f"refused after {time.monotonic() - began:.2f} s")
    for reply in refused:
        assert (reply.status_code, reply.json()["code"]) == (503, "unavailable")
        assert "no replica" in reply.json()["detail"]
        assert reply.headers["retry-after"]
    before = (await api.poll(going)).json()["last_event_id"]
    async with asyncio.timeout(10):
        while (await api.poll(going)).json()["last_event_id"] == before:
            await asyncio.sleep(0.05)

    if how == "silent":
        pair.link.resume()
    else:
        await pair.rejoin()
    async with asyncio.timeout(20):
        while (reply := await api.ask("POST", "query", json={"query": "later"})).status_code == 503:
            await asyncio.sleep(0.1)
    assert reply.status_code == 202
    assert (await api.cancel(stopped)).json()["status"] == "cancelled"
    assert (await api.erase(erased)).status_code == 404, "it was done when it was refused"
    assert (await api.until(reply.json()["request_id"], "completed"))["attempt"] == 1
    assert (await api.cancel(going)).status_code == 200


async def test_a_worker_that_waits_for_a_replica_gives_its_runs_back_when_it_is_told_to_end(
    launch: Launcher, pair: Pair
) -> None:
    """Nobody was lost, so nothing is counted (PROTOCOL 4.4), however often."""
    async with Api(launch.gateway(pair.url).url) as api:  # which accepts without a replica
        pair.replica.kill()
        request_id = await api.submit("wait")
        for _ in range(2):
            worker = launch.worker(pair.url, **SETTINGS)
            await api.until(request_id, "running")
            assert await asyncio.to_thread(worker.stop, 20) == 0
            assert (await api.poll(request_id)).json()["status"] == "queued"
        assert pair.primary.ask("HGET", f"sb:{{{request_id}}}:run", "fails") is None
        await pair.rejoin()
        launch.worker(pair.url, **SETTINGS)
        assert (await api.until(request_id, "completed", "failed"))["status"] == "completed"


async def test_what_was_refused_for_want_of_a_replica_is_made_good_on_the_next_primary(
    launch: Launcher, pair: Pair, api: Api
) -> None:
    """A closing that may be made is kept, and repeated (5.3): the client need not ask again."""
    launch.worker(pair.url, **SETTINGS)
    stopped, erased = [await api.submit(f"{n}", "hangs") for n in range(2)]
    for request_id in (stopped, erased):
        await api.until(request_id, "running")
    await asyncio.to_thread(pair.until_synchronised)
    pair.link.pause()
    refused = await asyncio.gather(api.cancel(stopped), api.erase(erased))
    assert {reply.status_code for reply in refused} == {503}
    await pair.fail_over()
    await api.until(stopped, "cancelled")
    await api.until_gone(erased)


async def test_a_run_that_was_claimed_without_a_replica_waits_for_one_and_is_not_taken_for_lost(
    launch: Launcher, pair: Pair, api: Api
) -> None:
    """For much longer than a lease: else each worker in turn would lose it."""
    request_id = await api.submit("claimed too early")
    await asyncio.to_thread(pair.until_synchronised)
    pair.link.pause()
    workers = [launch.worker(pair.url, **SETTINGS) for _ in range(2)]
    await api.until(request_id, "running")
    await asyncio.sleep(2.5 * LEASE)
    pair.link.resume()
    run = await api.until(request_id, "completed", "failed")
    assert (run["status"], run["attempt"]) == ("completed", 1)
    assert not any(worker.logged("reaped") for worker in workers)


async def test_what_was_accepted_under_fast_may_be_lost_with_the_primary(launch: Launcher, pair: Pair) -> None:
    """It is then a run that does not exist; the README says so."""
    fast = {**SETTINGS, "durability": "fast"}
    async with Api(launch.gateway(pair.url, **fast).url) as api:
        kept = await api.submit("kept")
        await asyncio.to_thread(pair.until_synchronised)
        pair.link.pause()
        lost = await api.submit("lost")
        assert (await api.poll(lost)).status_code == 200
        stream = await api.stream(lost)
        await stream.until(lambda: len(stream.events) == 1)
        await pair.fail_over()
        assert (await api.poll(lost)).status_code == 404
        assert (await api.poll(kept)).status_code == 200
        await stream.ended(30)
        assert (stream.ending, stream.events[-1].json["code"]) == ("finished", "gone")
        launch.worker(pair.url, **fast)
        again = await api.submit("lost")
        assert (await api.until(again, "completed", "failed"))["status"] == "completed"
