"""Both Python clients against real gateways and a real worker; each test is one of both."""

from __future__ import annotations

import asyncio
import json
import re
import secrets
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from broker.client import AsyncClient, AsyncStream, Client, Received, RunFailed, Unknown
from broker.errors import BadCursor, Invalid, KeyReused, RunNotFound, TooLarge, Unauthorized
from broker.events import NATIVE, Entry, Event
from broker.fold import fold
from tests.conftest import Launcher, Service
from tests.kit import http
from tests.kit.checker import check_reader
from tests.kit.clients import CLIENTS, IDS, AnyClient
from tests.kit.http import token
from tests.kit.processes import wait_for
from tests.kit.resets import Resets
from tests.kit.waiting import until

DOCS = Path(__file__).parents[2] / "docs" / "client.md"
TEXTS = ["plain", "é\u2028\u0085😀", "\ud800", "data: x\n\nid: 9-9"]


@pytest.fixture(params=CLIENTS, ids=IDS)
def kind(request: pytest.FixtureRequest) -> type[AnyClient]:
    made: type[AnyClient] = request.param
    return made


@pytest.fixture
def client(kind: type[AnyClient], service: Service, subject: str) -> Iterator[AnyClient]:
    with kind(service.gateways[0].url, token(subject), longest_pause=0.05) as made:
        yield made


def as_entries(seen: list[Received]) -> list[Entry]:
    return [Entry(item.id, item.type, json.dumps(item.data, separators=(",", ":"))) for item in seen]


# -- the whole way ---------------------------------------------------------------------------------------------


def test_what_an_agent_says_arrives_as_typed_events(client: AnyClient, alice: http.Client) -> None:
    """Of every type, whatever its texts hold; and the poll says the same as the stream (P18, P23)."""
    following = client.ask("say it", agent="speaks", parameters={"texts": TEXTS})
    seen = list(following)
    assert {type(item.event) for item in seen} == {cls for cls in NATIVE if cls.type not in ("error", "cancelled")}
    assert not any(isinstance(item.event, Unknown) for item in seen)
    assert [item.event.model_dump() for item in seen] == [item.data for item in seen]  # they send every field
    log = alice.log(following.request_id)
    check_reader(as_entries(seen), log)
    assert as_entries(list(following.events)) == fold(log)
    run = client.result(following.request_id)
    assert (run.status, run.answer, run.finished) == ("completed", TEXTS[-1], True)
    assert following.answer == run.answer
    assert following.text == "".join(TEXTS)
    assert run.usage == {TEXTS[-1]: TEXTS[-1]}
    assert run.started_at is not None and run.finished_at is not None
    assert run.created_at <= run.started_at <= run.finished_at
    listed = list(client.events(following.request_id))
    assert [(item.id, item.type, item.event, item.void) for item in listed] == [
        (item.id, item.type, item.event, False) for item in seen
    ]


def test_a_stream_goes_on_after_any_event(client: AnyClient) -> None:
    following = client.ask("one two three four")
    seen = list(following)
    for n, received in enumerate(seen):
        rest = client.stream(following.request_id, after=received.id)
        assert list(rest) == seen[n + 1 :]
        assert rest.done
    with pytest.raises(BadCursor):
        client.stream(following.request_id, after="nonsense")


def test_a_failed_run_has_its_error(client: AnyClient) -> None:
    following = client.ask("fail", agent="raises")
    events = [item.event for item in following]
    with pytest.raises(RunFailed) as failed:
        following.raise_for_error()
    run = client.result(following.request_id)
    assert run.error is not None
    assert (run.status, run.error.code) == ("failed", "agent_failed")
    assert failed.value.code == "agent_failed"
    assert isinstance(events[-1], Event)
    assert following.answer == run.answer == "so far "


# -- submit ----------------------------------------------------------------------------------------------------


def test_the_same_query_joins_the_run_under_way(client: AnyClient) -> None:
    first = client.submit("join me", agent="hangs", session_id="s", metadata={"n": 1})
    again = client.submit("join me", agent="hangs", session_id="s", metadata={"n": 2})
    assert (first.joined, again.joined) == (False, True)
    assert (again.request_id, again.session_id) == (first.request_id, "s")
    assert client.result(first.request_id, wait=0).metadata == {"n": 1}
    client.cancel(first.request_id)
    assert client.submit("join me", agent="hangs", session_id="s").request_id != first.request_id


def test_a_key_is_one_run_and_one_query(client: AnyClient) -> None:
    key = secrets.token_hex(8)
    first = client.submit("by key", idempotency_key=key)
    client.result(first.request_id)
    again = client.submit("by key", idempotency_key=key)
    assert (again.request_id, again.joined, again.status) == (first.request_id, True, "completed")
    with pytest.raises(KeyReused):
        client.submit("another query", idempotency_key=key)


@pytest.mark.parametrize("agent", ["echo", "hangs"])
def test_a_submit_whose_answer_is_lost_is_still_one_run(
    kind: type[AnyClient], service: Service, subject: str, agent: str
) -> None:
    """P1: also where the run has completed before the client asks again."""
    budgets: list[int | None] = [0, 0]
    with (
        Resets([service.gateways[0].url], lambda: budgets.pop() if budgets else None) as proxy,
        kind(proxy.url, token(subject), longest_pause=0.05) as client,
    ):
        accepted = client.submit("only once", agent=agent)
        assert proxy.broken == 2
        assert accepted.joined
        assert [run.request_id for run in client.runs()] == [accepted.request_id]
        client.cancel(accepted.request_id)


# -- poll and stop ---------------------------------------------------------------------------------------------


def test_a_result_is_waited_for(client: AnyClient) -> None:
    accepted = client.submit("a while", agent="sleeper", parameters={"seconds": 1.5})
    assert client.result(accepted.request_id, wait=0).status in ("queued", "running")
    began = time.monotonic()
    assert client.result(accepted.request_id, wait=0.3).finished is False
    assert time.monotonic() - began >= 0.3
    run = client.result(accepted.request_id)
    assert (run.status, run.answer) == ("completed", "awake")
    assert client.result(accepted.request_id, wait=60).status == "completed"


def test_a_cancelled_run_keeps_what_it_had_and_ends_its_streams(client: AnyClient) -> None:
    following = client.ask("stop me", agent="slow")
    seen = []
    for received in following:
        seen.append(received.type)
        if received.type == "token":
            run = client.cancel(following.request_id)
            assert (run.status, run.answer) == ("cancelled", "begun ")
            assert client.cancel(following.request_id) == run
    assert seen == ["start", "attempt", "token", "attempt", "cancelled"]
    assert following.answer == "begun "


def test_an_erased_run_is_gone(client: AnyClient) -> None:
    accepted = client.submit("erase me")
    client.result(accepted.request_id)
    client.delete(accepted.request_id)
    for ask in (client.result, client.cancel, client.delete):
        with pytest.raises(RunNotFound):
            ask(accepted.request_id)
    with pytest.raises(RunNotFound):
        list(client.stream(accepted.request_id))
    with pytest.raises(RunNotFound):
        list(client.events(accepted.request_id))


# -- lists -----------------------------------------------------------------------------------------------------


def test_runs_are_listed_newest_first_by_session_status_and_number(client: AnyClient) -> None:
    ids = [client.submit(f"run {n}", session_id=f"s{n % 2}").request_id for n in range(6)]
    for request_id in ids:
        client.result(request_id)
    stopped = client.submit("stopped", agent="hangs", session_id="s0").request_id
    client.cancel(stopped)
    whole = [stopped, *reversed(ids)]
    assert [run.request_id for run in client.runs()] == whole
    assert [run.request_id for run in client.runs(limit=3)] == whole[:3]
    assert [run.request_id for run in client.runs(session_id="s0")] == [stopped, *reversed(ids[::2])]
    assert [run.request_id for run in client.runs(status="cancelled")] == [stopped]
    assert [run.request_id for run in client.runs(status="completed", session_id="s1")] == ids[::-1][::2]
    assert list(client.runs(limit=0)) == []


def test_a_list_of_many_pages_is_whole(client: AnyClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("broker.client.calls.PAGE", 2)
    monkeypatch.setattr("broker.client.calls.MAX_PAGE", 3)
    ids = [client.submit(f"run {n}").request_id for n in range(7)]
    assert [run.request_id for run in client.runs()] == ids[::-1]
    assert [run.request_id for run in client.runs(limit=5)] == ids[:1:-1]
    client.result(ids[0])
    assert [item.type for item in client.events(ids[0])] == ["start", "attempt", "token", "token", "final"]


def test_another_subjects_runs_are_for_who_sees_the_tenant(kind: type[AnyClient], service: Service) -> None:
    tenant, url = f"tenant-{secrets.token_hex(4)}", service.gateways[0].url
    with (
        kind(url, token("bob", tenant=tenant)) as bob,
        kind(url, token("eve", tenant=tenant)) as eve,
        kind(url, token("root", tenant=tenant, scope="broker:tenant")) as root,
    ):
        accepted = bob.submit("mine")
        assert [run.request_id for run in root.runs(subject="bob")] == [accepted.request_id]
        assert [run.request_id for run in bob.runs(subject="bob")] == [accepted.request_id]
        assert list(eve.runs(subject="bob")) == list(root.runs(subject="eve")) == list(root.runs()) == []


# -- refusals --------------------------------------------------------------------------------------------------


def test_what_the_service_refuses_is_an_error_that_says_what_to_mend(client: AnyClient) -> None:
    with pytest.raises(Invalid, match=r"this service has: .*echo") as refused:
        client.submit("why?", agent="nobody")
    assert [field["field"] for field in refused.value.errors] == ["agent"]
    with pytest.raises(Invalid):
        client.submit("")
    with pytest.raises(TooLarge):
        client.submit("x" * 5_000_000)
    with pytest.raises(RunNotFound):
        client.result("0" * 32)
    with pytest.raises(RunNotFound):
        client.result("../../healthz")


def test_a_token_that_is_not_accepted_is_told_at_once(kind: type[AnyClient], service: Service) -> None:
    for bad in (token("x", ttl=-3600), "garbage", None):
        with kind(service.gateways[0].url, bad) as client:
            for ask in (lambda: client.submit("why?"), lambda: list(client.runs())):
                with pytest.raises(Unauthorized):
                    ask()


def test_a_stream_ends_with_its_token(kind: type[AnyClient], service: Service, launch: Launcher) -> None:
    """P21: the gateway cuts it, and the reconnect is refused; with another token it goes on where it was."""
    gateway = launch.gateway(service.redis.url, jwt_leeway_seconds=0)
    tokens = [token("p21", ttl=2), token("p21", ttl=-5)]
    fresh = token("p21")
    with kind(gateway.url, fresh) as owner:
        request_id = owner.submit("longer than the token", agent="quiet", parameters={"pause": 0.9}).request_id
    given = iter(tokens)
    with kind(gateway.url, lambda: next(given, fresh), longest_pause=0.05) as client:
        following = client.stream(request_id)
        with pytest.raises(Unauthorized):
            list(following)
        assert not following.done
        assert [item.type for item in following][-1] == "final"
        assert following.text == "0 1 "


# -- asyncio ---------------------------------------------------------------------------------------------------


async def test_one_client_follows_more_runs_than_a_pool_usually_has_connections(service: Service, subject: str) -> None:
    count = 120
    async with AsyncClient(service.gateways[0].url, token(subject)) as client:
        request_id = (await client.submit("for all", agent="hangs")).request_id
        streams = [client.stream(request_id) for _ in range(count)]

        async def types(stream: AsyncStream) -> list[str]:
            return [received.type async for received in stream]

        reading = asyncio.gather(*(types(stream) for stream in streams))
        await until(lambda: all(stream.text for stream in streams), seconds=60)
        await client.cancel(request_id)
        assert await reading == [["start", "attempt", "token", "attempt", "cancelled"]] * count


async def test_a_task_that_is_cancelled_leaves_no_connection(service: Service, subject: str) -> None:
    async with AsyncClient(service.gateways[0].url, token(subject)) as client:
        accepted = await client.submit("cancelled task", agent="hangs")
        following = client.stream(accepted.request_id)

        async def read() -> None:
            async for _ in following:
                pass

        task = asyncio.create_task(read())
        await until(lambda: following.text != "")
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        path = f"/api/v1/runs/{accepted.request_id}/stream"
        await until(lambda: bool(service.gateways[0].logged("access", path=path)))
        await client.cancel(accepted.request_id)
        assert [item.type async for item in following] == ["attempt", "cancelled"], "it goes on where it was"


def test_threads_may_share_a_client(service: Service, subject: str) -> None:
    from concurrent.futures import ThreadPoolExecutor

    with Client(service.gateways[0].url, token(subject)) as client, ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda n: list(client.ask(f"thread {n}"))[-1].data["answer"], range(16)))
    assert answers == [f"thread {n}" for n in range(16)]


# -- the manual ------------------------------------------------------------------------------------------------

EXAMPLES = re.findall(r"^```python\n(.*?)^```$", DOCS.read_text("utf-8"), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_each_example_of_the_manual_runs(
    service: Service, subject: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: int
) -> None:
    monkeypatch.setenv("BROKER_URL", service.gateways[0].url)
    monkeypatch.setenv("BROKER_TOKEN", token(subject))
    exec(compile(EXAMPLES[number], f"{DOCS.name}, example {number + 1}", "exec"), {"__name__": "__main__"})
    wait_for(lambda: capsys.readouterr().out != "", seconds=1)


def test_there_are_examples() -> None:
    assert len(EXAMPLES) == DOCS.read_text("utf-8").count("```python") >= 4
