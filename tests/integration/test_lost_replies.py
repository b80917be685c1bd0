"""P4: a lost reply is repeated under the same ids, and the log is exact. Real worker, real gateway, real Redis."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from tests.conftest import Launcher
from tests.kit.checker import check_log, check_reader, entries_of, surviving_text
from tests.kit.http import Client
from tests.kit.proxy import Proxy, calls
from tests.kit.scale import scaled


@dataclass
class Stage:
    """The worker's runs go through the proxy; its queue and the gateway do not."""

    client: Client
    proxy: Proxy


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    launcher = Launcher(tmp_path_factory.mktemp("lost"))
    try:
        server = launcher.redis()
        gateway = launcher.gateway(server.url)
        with Proxy(server.port) as proxy, Client(gateway.url) as client:
            worker = launcher.worker(proxy.url, queue_redis_url=server.url)
            client.finished(client.submit("the scripts are known to Redis from here on"))
            yield Stage(client, proxy)
            worker.stop()
    finally:
        launcher.close()


@pytest.fixture
def stage(made: Stage) -> Iterator[Stage]:
    yield made
    made.proxy.heal()


def check_exact(client: Client, request_id: str, text: str) -> None:
    log = client.log(request_id)
    check_log(log)
    assert surviving_text(log) == text
    assert [entry.type for entry in log[:2]] == ["start", "attempt"]
    assert [entry.type for entry in log[2:]] == ["token"] * (len(log) - 3) + ["final"]
    check_reader(entries_of(list(client.events(request_id))), log)


@pytest.mark.parametrize("before", [False, True], ids=["reply", "command"])
def test_with_every_third_append_lost_the_log_is_exact(stage: Stage, before: bool) -> None:
    """One event per append, nearly: the agent rests after each."""
    count = scaled(1_000)
    client, proxy = stage.client, stage.proxy
    proxy.swallow(calls("append"), every=3, before=before)
    request_id = client.submit("p4", agent="tokens", parameters={"count": count, "pause": 0.005})
    run = client.finished(request_id, seconds=120)
    assert run["status"] == "completed"
    assert proxy.swallowed >= count / 20
    check_exact(client, request_id, "".join(f"{n} " for n in range(count)))


def test_with_every_third_append_lost_a_burst_is_exact(stage: Stage) -> None:
    count = scaled(50_000) - 100
    client, proxy = stage.client, stage.proxy
    proxy.swallow(calls("append"), every=3)
    run = client.finished(client.submit("b", agent="burst", parameters={"count": count}), seconds=120)
    assert run["status"] == "completed"
    assert proxy.swallowed >= 3
    check_exact(client, run["request_id"], "x" * 10 * count)


def test_several_runs_at_once_with_lost_replies_do_not_mix(stage: Stage) -> None:
    client, proxy = stage.client, stage.proxy
    proxy.swallow(calls("append"), every=3)
    queries = [" ".join(f"{n}/{k}" for k in range(20)) for n in range(6)]
    runs = [client.submit(query, parameters={"pause": 0.003}) for query in queries]
    for request_id, query in zip(runs, queries, strict=True):
        assert client.finished(request_id, seconds=60)["answer"] == query
        check_exact(client, request_id, query + " ")
    assert proxy.swallowed >= 6


@pytest.mark.parametrize("before", [False, True], ids=["reply", "command"])
def test_a_claim_that_is_lost_is_repeated_and_the_run_has_one_attempt(stage: Stage, before: bool) -> None:
    client, proxy = stage.client, stage.proxy
    proxy.swallow(calls("claim"), every=2, before=before)
    runs = [client.submit(f"run {n}") for n in range(6)]
    for n, request_id in enumerate(runs):
        run = client.finished(request_id)
        assert (run["answer"], run["attempt"]) == (f"run {n}", 1)
        check_exact(client, request_id, f"run {n} ")
    assert proxy.swallowed >= 3


def test_a_slow_link_costs_time_and_nothing_else(stage: Stage) -> None:
    client, proxy = stage.client, stage.proxy
    proxy.delay(0.05)
    run = client.finished(client.submit("slow", agent="tokens", parameters={"count": 150, "pause": 0.002}))
    check_exact(client, run["request_id"], "".join(f"{n} " for n in range(150)))


def test_a_link_that_falls_silent_in_mid_run_is_given_up_and_made_anew(stage: Stage) -> None:
    """A black hole: no reset ever comes. The command's own timeout must end it."""
    client, proxy = stage.client, stage.proxy
    request_id = client.submit("silence", agent="tokens", parameters={"count": 200, "pause": 0.01})
    for event in client.events(request_id):
        if event.type == "token" and event.json["text"] == "20 ":
            break
    proxy.forget()
    assert client.finished(request_id, seconds=60)["status"] == "completed"
    check_exact(client, request_id, "".join(f"{n} " for n in range(200)))
