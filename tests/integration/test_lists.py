"""GET /runs: the owner's runs, newest first, in pages that lose nothing and show nothing twice."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from broker.ids import Owner
from broker.runs import keys
from tests.conftest import Launcher, Service
from tests.kit.http import Client
from tests.kit.processes import Gateway
from tests.kit.redis_server import RedisServer

LISTS = "/api/v1/runs"
RUNS = 120


def pages(client: Client, **params: Any) -> Iterator[list[dict[str, Any]]]:
    while True:
        response = client.get(LISTS, params=params)
        assert response.status_code == 200, response.text
        assert response.headers["Cache-Control"] == "no-store"
        body = response.json()
        yield body["runs"]
        if body["next"] is None:
            return
        params["cursor"] = body["next"]


def listed(client: Client, **params: Any) -> list[str]:
    return [run["request_id"] for page in pages(client, **params) for run in page]


class Place:
    def __init__(self, redis: RedisServer, gateways: list[Gateway]) -> None:
        self.redis = redis
        self.clients = [Client(gateway.url, "alice") for gateway in gateways]
        sessions = ["even", "odd"]

        def submit(n: int) -> str:
            return self.clients[n % 2].submit(f"run {n}", session_id=sessions[n % 2], metadata={"n": n})

        with ThreadPoolExecutor(12) as pool:
            first = [submit(n) for n in range(10)]
            many = list(pool.map(submit, range(10, RUNS - 10)))
            last = [submit(n) for n in range(RUNS - 10, RUNS)]
        self.ids = dict(enumerate([*first, *many, *last]))

    def tie(self) -> None:
        """As if all had been submitted within seven milliseconds."""
        with self.redis.client() as redis:
            for index in (
                keys.runs_of(Owner("alice", "alice")),
                *(keys.session_of(Owner("alice", "alice"), session) for session in ("even", "odd")),
            ):
                for n, member in enumerate(sorted(redis.zrange(index, 0, -1))):
                    redis.zadd(index, {member: 1_700_000_000_000 + n % 7})

    def close(self) -> None:
        for client in self.clients:
            client.close()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """Two gateways without a worker, and 120 queued runs."""
    launcher = Launcher(tmp_path_factory.mktemp("lists"))
    try:
        server = launcher.redis()
        made = Place(server, [launcher.gateway(server.url) for _ in range(2)])
        yield made
        made.close()
    finally:
        launcher.close()


@pytest.mark.parametrize("limit", [1, 7, 50, 60, 119, 120, 121, 500])
def test_pages_of_any_size_are_all_runs_once_each_newest_first(place: Place, limit: int) -> None:
    found: list[dict[str, Any]] = []
    for n, page in enumerate(pages(place.clients[0], limit=limit)):
        assert len(page) == min(limit, RUNS - n * limit) > 0
        found += page
    assert sorted(run["request_id"] for run in found) == sorted(place.ids.values())
    # Those of the middle were submitted in parallel, and each ten of the ends one after the other.
    for ten, those in ((found[:10], range(RUNS - 10, RUNS)), (found[-10:], range(10))):
        assert sorted(run["metadata"]["n"] for run in ten) == list(those)
        times = [run["created_at"] for run in ten]
        assert times == sorted(times, reverse=True)
    assert {run["status"] for run in found} == {"queued"}
    assert all("answer" not in run for run in found)


def test_the_default_page_has_fifty(place: Place) -> None:
    body = place.clients[0].get(LISTS).json()
    assert len(body["runs"]) == 50
    assert body["next"]


def test_each_page_may_come_from_another_gateway(place: Place) -> None:
    whole = listed(place.clients[0], limit=500)
    assert listed(place.clients[1], limit=500) == whole
    found, cursor = list[str](), None
    for n in range(RUNS):
        body = place.clients[n % 2].get(LISTS, params={"limit": 11, **({"cursor": cursor} if cursor else {})}).json()
        found += [run["request_id"] for run in body["runs"]]
        cursor = body["next"]
        if cursor is None:
            break
    assert found == whole


def test_a_session_lists_its_own_runs_only(place: Place) -> None:
    for rest, session in enumerate(("even", "odd")):
        mine = {request_id for n, request_id in place.ids.items() if n % 2 == rest}
        for limit in (1, 13, 500):
            found = listed(place.clients[0], limit=limit, session_id=session)
            assert len(found) == len(mine)
            assert set(found) == mine
        runs = place.clients[0].get(LISTS, params={"session_id": session}).json()["runs"]
        assert {run["session_id"] for run in runs} == {session}
    for nothing in ("neither", "Even", "even ", "*"):
        assert listed(place.clients[0], session_id=nothing) == []


def test_a_session_that_was_made_up_for_a_run_can_be_listed(place: Place) -> None:
    with Client(str(place.clients[0].base_url), "made-up") as client:
        request_id = client.submit("no session")
        session = client.run(request_id)["session_id"]
        assert listed(client, session_id=session) == [request_id]
        assert listed(client) == [request_id]


def test_a_status_and_a_session_are_both_looked_at(place: Place) -> None:
    assert listed(place.clients[0], status="queued", session_id="even", limit=7) == listed(
        place.clients[0], session_id="even"
    )
    assert listed(place.clients[0], status="running", session_id="even") == []


@pytest.mark.parametrize("status", ["", "Queued", "done", "queued,running", "erased"])
def test_a_status_that_no_run_can_have_is_refused_with_those_that_it_can(place: Place, status: str) -> None:
    response = place.clients[0].get(LISTS, params={"status": status})
    assert (response.status_code, response.json()["code"]) == (400, "bad_request")
    assert "queued, running, completed, failed, cancelled" in response.json()["detail"]


def test_ones_own_subject_is_ones_own_list(place: Place) -> None:
    assert listed(place.clients[0], subject="alice") == listed(place.clients[0])
    for other in ("bob", "", "Alice", "alice "):
        assert listed(place.clients[0], subject=other) == []


def test_somebody_elses_list_has_none_of_them(place: Place) -> None:
    with Client(str(place.clients[0].base_url), "bob") as bob:
        assert listed(bob) == []
        assert listed(bob, session_id="even") == []
        cursor = place.clients[0].get(LISTS, params={"limit": 10}).json()["next"]
        assert listed(bob, cursor=cursor) == []


def test_runs_that_come_while_somebody_pages_are_neither_shown_nor_push_others_out(place: Place) -> None:
    with Client(str(place.clients[0].base_url), "busy") as client:
        old = [client.submit(f"old {n}") for n in range(20)]
        found = list[str]()
        for n, page in enumerate(pages(client, limit=3)):
            found += [run["request_id"] for run in page]
            client.submit(f"new {n}")
        assert sorted(found) == sorted(old)


def test_runs_of_the_same_millisecond_are_all_there_once(place: Place) -> None:
    """Last of those that read `place`: it changes the times."""
    place.tie()
    whole = listed(place.clients[0], limit=500)
    assert sorted(whole) == sorted(place.ids.values())
    for limit in (1, 2, 5, 17, 18, 40):
        assert listed(place.clients[0], limit=limit) == whole, limit
    for session in ("even", "odd"):
        assert len(set(listed(place.clients[0], limit=4, session_id=session))) == RUNS // 2


def test_erased_runs_vanish_from_all_lists_and_pages_go_on_past_them(service: Service, alice: Client) -> None:
    ids = [alice.submit(f"erase {n}", session_id="s") for n in range(30)]
    for request_id in ids:
        alice.finished(request_id)
    gone = {*ids[3:18], ids[-1]}
    for request_id in gone:
        assert alice.delete(f"{LISTS}/{request_id}").status_code == 204
    kept = sorted(request_id for request_id in ids if request_id not in gone)
    for limit in (1, 4, 5, 30, 500):
        for session in ({}, {"session_id": "s"}):
            assert sorted(listed(alice, limit=limit, **session)) == kept, limit


def test_runs_whose_records_are_gone_vanish_from_the_lists(service: Service, alice: Client) -> None:
    """Expired, or never made: the index is written first, and the record is the authority."""
    ids = [alice.submit(f"expire {n}") for n in range(6)]
    for request_id in ids:
        alice.finished(request_id)
    with service.redis.client() as redis:
        redis.delete(keys.run(ids[2]), keys.log(ids[2]))
    assert sorted(listed(alice, limit=2)) == sorted({*ids} - {ids[2]})


def test_a_list_says_how_each_run_is_now(alice: Client) -> None:
    completed, failed = alice.submit("ends"), alice.submit("fails", agent="raises")
    running = alice.submit("goes on", agent="slow")
    for request_id in (completed, failed):
        alice.finished(request_id)
    next(alice.events(running, after="0-1"))
    found = {run["request_id"]: run for run in alice.get(LISTS).json()["runs"]}
    assert {found[name]["status"] for name in (completed, failed, running)} == {"completed", "failed", "running"}
    for status, name in (("completed", completed), ("failed", failed), ("running", running)):
        assert listed(alice, status=status) == listed(alice, status=status, limit=1) == [name]
    assert listed(alice, status="queued") == listed(alice, status="cancelled") == []
    for name in (completed, failed):
        run = alice.run(name)
        assert found[name] == {field: run[field] for field in found[name]}
    alice.post(f"{LISTS}/{running}/cancel")
    assert {run["status"] for run in alice.get(LISTS).json()["runs"]} == {"completed", "failed", "cancelled"}
