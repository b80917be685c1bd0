"""P1: the same query while it runs, or the same Idempotency-Key within retention, is one run (PROTOCOL 3)."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from redis.asyncio import Redis

from broker.ids import Owner, new_request_id
from broker.runs import keys
from broker.runs.record import Submission
from broker.runs.scripts import Answer, IdempotencyClaim, Scripts, claim_key
from tests.conftest import Service
from tests.kit import sse
from tests.kit.checker import check_log, check_reader, entries_of
from tests.kit.http import Client
from tests.kit.scale import scaled

_numbers = itertools.count(1)
LIFE_MS = 3_600_000


def a_query() -> str:
    """One that no other test has."""
    return f"query {next(_numbers)}"


def body(query: str, seconds: float = 3, **fields: Any) -> dict[str, Any]:
    """A submit whose run goes on for some seconds."""
    return {"query": query, "agent": "sleeper", "parameters": {"seconds": seconds}, **fields}


def submit(client: Client, content: dict[str, Any], key: str | None = None, **headers: str) -> httpx.Response:
    if key is not None:
        headers["Idempotency-Key"] = key
    return client.post("/api/v1/query", json=content, headers=headers)


def accepted(response: httpx.Response) -> str:
    assert response.status_code in (200, 202), response.text
    request_id: str = response.json()["request_id"]
    return request_id


# Many at once


@pytest.mark.parametrize("by_key", [False, True], ids=["by query", "by Idempotency-Key"])
def test_fifty_parallel_submits_over_two_gateways_are_one_run_each(
    service: Service, subject: str, by_key: bool
) -> None:
    with service.client(subject) as one, service.client(subject, 1) as two, ThreadPoolExecutor(50) as pool:
        ids = []
        for n in range(scaled(200)):
            content, key = body(f"parallel {n}", seconds=1), f"key-{n}" if by_key else None
            replies = list(pool.map(lambda k, c=content, i=key: submit((one, two)[k % 2], c, i), range(50)))
            [request_id] = {accepted(reply) for reply in replies}
            assert sorted(reply.status_code for reply in replies) == [200] * 49 + [202]
            assert {reply.headers["Location"] for reply in replies} == {f"/api/v1/runs/{request_id}"}
            ids.append(request_id)
        assert len(set(ids)) == len(ids)
        for request_id in ids:
            assert one.finished(request_id)["status"] == "completed"
            assert len(service.worker.logged("run started", request_id=request_id)) == 1
        listed = one.get("/api/v1/runs", params={"limit": 500}).json()["runs"]
        assert sorted(run["request_id"] for run in listed) == sorted(ids)


def test_a_query_that_has_ended_and_is_sent_twenty_times_at_once_is_one_new_run(service: Service, subject: str) -> None:
    content = {"query": a_query(), "parameters": {"pause": 0.5}}
    with service.client(subject) as one, service.client(subject, 1) as two, ThreadPoolExecutor(20) as pool:
        first = accepted(submit(one, content))
        one.finished(first)
        replies = list(pool.map(lambda k: submit((one, two)[k % 2], content), range(20)))
        [second] = {accepted(reply) for reply in replies}
        assert second != first
        assert sorted(reply.status_code for reply in replies) == [200] * 19 + [202]


# What is the same query


def test_the_order_of_keys_white_space_and_forms_of_numbers_do_not_matter(alice: Client) -> None:
    query = a_query()
    forms = [
        f'{{"query":"{query}","agent":"sleeper","parameters":{{"seconds":3,"list":[1,{{"a":1,"b":2}}]}}}}',
        f'{{"agent":"sleeper","parameters":{{"list":[1.0,{{"b":2,"a":1}}],"seconds":3.0}},"query":"{query}"}}',
        f' {{ "parameters" :\n{{"seconds":3e0 ,\t"list": [ 1, {{"b":2,"a":1}} ] }} , "agent":"sleeper",'
        f'"query" : "\\u0071{query[1:]}" }}\r\n',
    ]
    replies = [
        alice.post("/api/v1/query", content=form, headers={"Content-Type": "application/json; charset=utf-8"})
        for form in forms
    ]
    assert [reply.status_code for reply in replies] == [202, 200, 200]
    assert len({accepted(reply) for reply in replies}) == 1


@pytest.mark.parametrize(
    "change",
    [
        {"query": "another"},
        {"agent": "slow"},
        {"parameters": {"seconds": 3, "more": None}},
        {"parameters": {"seconds": 3, "list": [2, 1]}},
        {"session_id": "a session"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_another_query_agent_parameter_or_session_is_another_run(alice: Client, change: dict[str, Any]) -> None:
    content = body(a_query())
    content["parameters"]["list"] = [1, 2]
    first, second = submit(alice, content), submit(alice, content | change)
    assert [first.status_code, second.status_code] == [202, 202]
    assert accepted(first) != accepted(second)


def test_metadata_is_not_part_of_the_query_and_the_first_is_kept(alice: Client) -> None:
    content = body(a_query())
    request_id = accepted(submit(alice, content | {"metadata": {"n": 1}}))
    assert accepted(submit(alice, content | {"metadata": {"n": 2}})) == request_id
    assert accepted(submit(alice, content)) == request_id
    assert alice.run(request_id)["metadata"] == {"n": 1}


def test_naming_the_default_agent_is_the_same_as_naming_none(alice: Client) -> None:
    content = {"query": a_query(), "parameters": {"pause": 1}}
    replies = [submit(alice, content | agent) for agent in ({}, {"agent": None}, {"agent": "echo"})]
    assert [reply.status_code for reply in replies] == [202, 200, 200]
    assert len({accepted(reply) for reply in replies}) == 1
    assert alice.run(accepted(replies[0]))["agent"] == "echo"


def test_a_run_that_is_joined_keeps_the_session_that_was_made_up_for_it(alice: Client, alice_elsewhere: Client) -> None:
    content = body(a_query())
    one, two = submit(alice, content).json(), submit(alice_elsewhere, content).json()
    assert one["session_id"] == two["session_id"] == alice.run(one["request_id"])["session_id"]


def test_two_owners_of_the_same_query_and_the_same_key_have_two_runs(service: Service, alice: Client) -> None:
    content = body(a_query())
    with service.client("somebody-else") as other:
        for key in (None, "a-shared-key"):
            assert accepted(submit(alice, content, key)) != accepted(submit(other, content, key))


# The Idempotency-Key


@pytest.mark.parametrize(
    "change",
    [
        {"query": "another"},
        {"agent": "slow"},
        {"parameters": {"seconds": 4}},
        {"session_id": "a session"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_key_with_another_body_is_refused(alice: Client, alice_elsewhere: Client, change: dict[str, Any]) -> None:
    content = body(a_query())
    key = f"key of {content['query']}"
    key = key.replace(" ", "-")
    request_id = accepted(submit(alice, content, key))
    for client in (alice, alice_elsewhere):
        refused = submit(client, content | change, key)
        assert (refused.status_code, refused.json()["code"]) == (422, "idempotency_key_reused")
        assert request_id not in refused.text
    assert accepted(submit(alice_elsewhere, content | {"metadata": {"n": 1}}, key)) == request_id


def test_a_key_names_its_run_also_after_the_end_of_it(alice: Client, alice_elsewhere: Client) -> None:
    content = {"query": a_query()}
    first = submit(alice, content, "for-ever")
    request_id = accepted(first)
    alice.finished(request_id)
    again = submit(alice_elsewhere, content, "for-ever")
    assert (again.status_code, accepted(again), again.json()["status"]) == (200, request_id, "completed")
    headers = {"Idempotency-Key": "for-ever"}
    with alice.stream("POST", "/api/v1/query/stream", json=content, headers=headers) as response:
        check_reader(entries_of(list(sse.read(response.iter_raw()))), alice.log(request_id))


def test_a_key_names_its_run_also_after_it_was_cancelled(alice: Client) -> None:
    content = body(a_query())
    request_id = accepted(submit(alice, content, "stopped"))
    alice.post(f"/api/v1/runs/{request_id}/cancel")
    again = submit(alice, content, "stopped")
    assert (again.status_code, accepted(again), again.json()["status"]) == (200, request_id, "cancelled")


def test_a_key_whose_run_was_erased_takes_a_new_one(alice: Client) -> None:
    content = {"query": a_query()}
    request_id = accepted(submit(alice, content, "erased"))
    alice.finished(request_id)
    assert alice.delete(f"/api/v1/runs/{request_id}").status_code == 204
    again = submit(alice, content, "erased")
    assert again.status_code == 202
    assert accepted(again) != request_id


def test_submits_by_key_and_by_query_do_not_meet(alice: Client) -> None:
    content = body(a_query())
    ids = {accepted(submit(alice, content, key)) for key in (None, "one", "two")}
    assert len(ids) == 3


@pytest.mark.parametrize("key", ["", "a key", "x" * 256, "schl\u00fcssel"])
def test_a_key_that_is_none_is_refused(alice: Client, key: str) -> None:
    headers = [(b"Idempotency-Key", key.encode("utf-8"))]
    response = alice.post("/api/v1/query", json=body(a_query()), headers=headers)
    assert (response.status_code, response.json()["code"]) == (400, "bad_request")


# After the end


def test_a_query_that_was_cancelled_starts_again_at_once(alice: Client, alice_elsewhere: Client) -> None:
    content = body(a_query())
    first = accepted(submit(alice, content))
    assert alice.post(f"/api/v1/runs/{first}/cancel").json()["status"] == "cancelled"
    second = submit(alice_elsewhere, content)
    assert second.status_code == 202
    assert accepted(second) != first
    assert accepted(submit(alice, content)) == accepted(second)


@pytest.mark.parametrize("agent", ["echo", "raises"])
def test_a_query_that_has_ended_starts_again(alice: Client, agent: str) -> None:
    content = {"query": a_query(), "agent": agent}
    first = accepted(submit(alice, content))
    alice.finished(first)
    second = submit(alice, content)
    assert (second.status_code, accepted(second) != first) == (202, True)


def test_a_query_whose_run_was_erased_in_the_middle_starts_again(alice: Client) -> None:
    content = body(a_query())
    first = accepted(submit(alice, content))
    alice.delete(f"/api/v1/runs/{first}")
    second = submit(alice, content)
    assert (second.status_code, accepted(second) != first) == (202, True)


def test_a_repeat_that_says_so_joins_a_run_that_has_just_completed(alice: Client, alice_elsewhere: Client) -> None:
    """PROTOCOL 3.5: the answer was lost on its way, and the SDK sends the request again."""
    content = {"query": a_query()}
    first = accepted(submit(alice, content))
    alice.finished(first)
    again = submit(alice_elsewhere, content, **{"x-stainless-retry-count": "1"})
    assert (again.status_code, accepted(again)) == (200, first)
    headers = {"x-stainless-retry-count": "2"}
    with alice.stream("POST", "/api/v1/query/stream", json=content, headers=headers) as response:
        check_reader(entries_of(list(sse.read(response.iter_raw()))), alice.log(first))
    for count in ("0", "-1", "one", "\u00b2"):
        fresh = submit(alice, content, **{"x-stainless-retry-count": count.encode("utf-8")})  # type: ignore[arg-type]
        assert (fresh.status_code, accepted(fresh) != first) == (202, True), count
        alice.finished(accepted(fresh))
        first = accepted(fresh)


@pytest.mark.parametrize("agent", ["raises", "sleeper"])
def test_a_repeat_joins_no_run_that_failed_or_was_cancelled(alice: Client, agent: str) -> None:
    content = {"query": a_query(), "agent": agent}
    first = accepted(submit(alice, content))
    if agent == "sleeper":
        alice.post(f"/api/v1/runs/{first}/cancel")
    assert alice.finished(first)["status"] in ("failed", "cancelled")
    again = submit(alice, content, **{"x-stainless-retry-count": "1"})
    assert (again.status_code, accepted(again) != first) == (202, True)


async def test_a_repeat_joins_a_run_that_completed_less_than_a_minute_ago_and_none_before(
    service: Service, alice: Client
) -> None:
    content = {"query": a_query()}
    first = accepted(submit(alice, content))
    alice.finished(first)
    async with Redis.from_url(service.redis.url) as redis:
        seconds, _ = await redis.time()
        for age, joins in ((50, True), (61, False)):
            await redis.hset(keys.run(first), "finished_at", str((seconds - age) * 1000))
            again = submit(alice, content, **{"x-stainless-retry-count": "1"})
            assert (accepted(again) == first) is joins, age


# Last-Event-ID on a route that submits (PROTOCOL 6.4)


def resume(client: Client, content: dict[str, Any], cursor: str) -> list[sse.Event]:
    headers = {"Last-Event-ID": cursor}
    with client.stream("POST", "/api/v1/query/stream", json=content, headers=headers) as response:
        assert response.status_code == 200, response.read()
        return list(sse.read(response.iter_raw()))


def test_the_same_request_with_its_last_id_resumes_that_run_also_when_it_has_ended(
    alice: Client, alice_elsewhere: Client
) -> None:
    content = {"query": "one two three four " + a_query()}
    events = alice.submit_and_read(**content)
    request_id = events[0].json["request_id"]
    assert all(event.id.startswith(f"{request_id}/") for event in events)
    log = alice.log(request_id)
    for n in range(len(events)):
        rest = resume(alice_elsewhere, content, events[n].id)
        check_reader(entries_of([*events[: n + 1], *rest]), log)
    assert [run["request_id"] for run in alice.get("/api/v1/runs").json()["runs"]] == [request_id]


def test_a_last_id_with_another_body_is_ignored_and_the_request_is_a_submit(alice: Client) -> None:
    events = alice.submit_and_read(a_query())
    others = resume(alice, {"query": a_query()}, events[-2].id)
    assert others[0].type == "start"
    assert others[0].json["request_id"] != events[0].json["request_id"]


def test_a_last_id_of_somebody_elses_run_is_ignored_and_the_request_is_a_submit(
    service: Service, alice: Client
) -> None:
    content = {"query": a_query()}
    with service.client("the-owner-of-a-run") as other:
        events = other.submit_and_read(**content)
    mine = resume(alice, content, events[-2].id)
    assert mine[0].json["request_id"] != events[0].json["request_id"]
    assert mine[-1].type == "final"


def test_a_last_id_of_an_erased_run_says_that_this_is_a_repeat(alice: Client) -> None:
    """The run that it names is gone, and the query's last run has just completed: nobody pays twice."""
    content = {"query": a_query()}
    erased = alice.submit_and_read(**content)
    alice.delete(f"/api/v1/runs/{erased[0].json['request_id']}")
    second = alice.submit_and_read(**content)
    assert resume(alice, content, erased[-2].id) == second


@pytest.mark.parametrize("cursor", ["5-1", "0-0", "nonsense", "x/5-1", "5-1/5-1"])
def test_a_short_or_malformed_cursor_is_refused_where_a_submit_could_be_meant(alice: Client, cursor: str) -> None:
    response = alice.post("/api/v1/query/stream", json={"query": a_query()}, headers={"Last-Event-ID": cursor})
    assert (response.status_code, response.json()["code"]) == (400, "bad_cursor")
    assert alice.get("/api/v1/runs").json()["runs"] == []


# A submit that was cut between its steps is finished by whoever comes next


class Halves:
    """The first steps of a submit, done by a gateway that then died."""

    def __init__(self, redis: Redis, subject: str, content: dict[str, Any], key: str | None) -> None:
        self.redis = redis
        self.owner = Owner(subject, subject)
        self.submission = Submission(query=content["query"], agent=content["agent"], parameters=content["parameters"])
        self.digest = self.submission.digest()
        self.key = keys.idempotency(self.owner, "query" if key is None else "key", key or self.digest)

    async def claim(self) -> IdempotencyClaim:
        request_id = new_request_id()
        claim = await claim_key(
            self.redis, self.key, replace=None, request_id=request_id, digest=self.digest, life_ms=LIFE_MS
        )
        assert claim.request_id == request_id
        return claim

    async def create(self, claim: IdempotencyClaim) -> Answer:
        session_id = f"s-{claim.request_id}"
        start = json.dumps({"request_id": claim.request_id, "session_id": session_id})
        fields = self.submission.fields(self.owner, session_id, self.digest, self.key)
        return (await Scripts(self.redis).create(claim.request_id, claim.claimed_at_ms, start, fields)).answer


@pytest.fixture(params=[None, "a-key-cut-short"], ids=["by query", "by Idempotency-Key"])
def key(request: pytest.FixtureRequest) -> Iterator[str | None]:
    yield request.param


def finishes(client: Client, request_id: str) -> None:
    assert client.finished(request_id)["status"] == "completed"
    log = client.log(request_id)
    check_log(log)
    assert json.loads(log[0].data)["request_id"] == request_id


async def test_a_key_that_was_claimed_without_a_record_gets_its_run_from_the_next_submit(
    service: Service, alice: Client, alice_elsewhere: Client, subject: str, key: str | None
) -> None:
    content = body(a_query(), seconds=0.2)
    async with Redis.from_url(service.redis.url) as redis:
        claim = await Halves(redis, subject, content, key).claim()
    reply = submit(alice, content, key)
    assert (reply.status_code, accepted(reply)) == (202, claim.request_id)
    assert accepted(submit(alice_elsewhere, content, key)) == claim.request_id
    finishes(alice, claim.request_id)


async def test_a_record_that_was_never_enqueued_is_enqueued_by_the_next_submit(
    service: Service, alice: Client, subject: str, key: str | None
) -> None:
    content = body(a_query(), seconds=0.2)
    async with Redis.from_url(service.redis.url) as redis:
        halves = Halves(redis, subject, content, key)
        claim = await halves.claim()
        assert await halves.create(claim) is Answer.CREATED
    assert alice.run(claim.request_id)["status"] == "queued"
    reply = submit(alice, content, key)
    assert (reply.status_code, accepted(reply)) == (200, claim.request_id)
    finishes(alice, claim.request_id)
    assert len(service.worker.logged("run started", request_id=claim.request_id)) == 1


async def test_a_claim_that_made_no_run_within_a_minute_is_stale_for_everybody(
    service: Service, alice: Client, alice_elsewhere: Client, subject: str, key: str | None
) -> None:
    content = body(a_query(), seconds=0.2)
    async with Redis.from_url(service.redis.url) as redis:
        halves = Halves(redis, subject, content, key)
        fresh = await halves.claim()
        old = fresh._replace(claimed_at_ms=fresh.claimed_at_ms - 61_000)
        await redis.set(halves.key, str(old))
        replies = [submit(client, content, key) for client in (alice, alice_elsewhere)]
        assert [reply.status_code for reply in replies] == [202, 200]
        [request_id] = {accepted(reply) for reply in replies}
        assert request_id != old.request_id
        # The gateway that was thought dead wakes up and goes on.
        assert await halves.create(old) is Answer.STALE
    assert alice.get(f"/api/v1/runs/{old.request_id}").status_code == 404
    listed = alice.get("/api/v1/runs").json()["runs"]
    assert [run["request_id"] for run in listed] == [request_id]
    finishes(alice, request_id)


async def test_fifty_submits_that_meet_a_half_done_one_are_that_run(
    service: Service, subject: str, key: str | None
) -> None:
    content = body(a_query(), seconds=1)
    async with Redis.from_url(service.redis.url) as redis:
        claim = await Halves(redis, subject, content, key).claim()
    with service.client(subject) as one, service.client(subject, 1) as two, ThreadPoolExecutor(50) as pool:
        replies = list(pool.map(lambda k: submit((one, two)[k % 2], content, key), range(50)))
        assert {accepted(reply) for reply in replies} == {claim.request_id}
        assert sorted(reply.status_code for reply in replies) == [200] * 49 + [202]
        finishes(one, claim.request_id)
    assert len(service.worker.logged("run started", request_id=claim.request_id)) == 1
