"""`chat` among killed workers and gateways: P6, P8, P13, P18 and P23 for runs with tools, reasoning, long answers."""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Launcher
from tests.kit.checker import check_reader, entries_of, surviving_text
from tests.kit.fleet import Fleet, attempts, reasons
from tests.kit.http import Client
from tests.kit.load import Load, Plan
from tests.kit.model_stub import ModelStub
from tests.kit.processes import Gateway, Worker, wait_for
from tests.kit.scale import LONG, scaled

LEASE = 1.5
HEARTBEAT = 0.5
MODEL: dict[str, Any] = {"model": "stub", "tools": "tests.kit.tools", "lease_seconds": LEASE}


@pytest.fixture(scope="module")
def stub() -> Iterator[ModelStub]:
    with ModelStub() as stub, pytest.MonkeyPatch.context() as patched:
        for name, value in stub.environment.items():
            patched.setenv(name, value)
        yield stub


@pytest.fixture(scope="module")
def fleet(stub: ModelStub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    launcher = Launcher(tmp_path_factory.mktemp("chat"))
    try:
        server = launcher.redis()
        gateway = launcher.gateway(server.url, heartbeat_seconds=HEARTBEAT, lease_seconds=LEASE)
        with Client(gateway.url) as client, server.client() as direct:
            yield Fleet(server, client, direct)
    finally:
        launcher.close()


def note(path: Path, line: str, seconds: float = 0) -> str:
    return f"[[tool=note {json.dumps({'path': str(path), 'line': line, 'seconds': seconds})}]]"


def types(fleet: Fleet, request_id: str) -> Counter[str]:
    return Counter(entry.type for entry in fleet.client.log(request_id))


@pytest.fixture
def workers(fleet: Fleet, launch: Launcher) -> list[Worker]:
    return [launch.worker(fleet.redis.url, **MODEL) for _ in range(2)]


def kill_its_worker(fleet: Fleet, workers: list[Worker], request_id: str) -> None:
    """The other one goes on with the run, and ends it."""
    [worker] = [worker for worker in workers if worker.logged("run started", request_id=request_id)]
    worker.kill()
    fleet.until_ended([request_id])


def test_a_tool_that_had_ended_is_not_called_again_by_the_next_attempt(
    fleet: Fleet, stub: ModelStub, workers: list[Worker], launch: Launcher
) -> None:
    """The worker dies in the middle of a round: one tool has ended, the other has not."""
    notes = launch.folder / "notes"
    query = f"{launch.folder} [[reasoning=hm]] [[say=Let me see.]] {note(notes, 'ended')} {note(notes, 'under way', 2)}"
    with ThreadPoolExecutor(2) as pool:
        request_id = fleet.client.submit(query, agent="chat")
        readers = [pool.submit(lambda: list(fleet.client.events(request_id))) for _ in range(2)]
        wait_for(lambda: types(fleet, request_id)["tool_result"] == 1)
        kill_its_worker(fleet, workers, request_id)
        run, log = fleet.ended(request_id)
        for reader in readers:
            check_reader(entries_of(reader.result()), log)
    assert Counter(notes.read_text().splitlines()) == {"ended": 1, "under way": 2}
    assert reasons(log) == ["started", "worker_lost"]
    assert attempts(log)[1].resume_from != "0-1"
    assert types(fleet, request_id)["tool_call"] == types(fleet, request_id)["tool_result"] == 2
    assert (run["status"], run["answer"]) == ("completed", "Let me see.\n\nLet me see.")
    asked = stub.journal(str(launch.folder))
    assert len(asked) == run["usage"]["rounds"] == 2, "the first round is not asked, nor counted, again"
    assert sorted(m["content"] for m in asked[1]["messages"] if m["role"] == "tool") == [
        "noted ended",
        "noted under way",
    ]
    assert run["usage"]["completion_tokens"] > 4, "what the first attempt has used is counted"


def test_a_drained_worker_hands_a_conversation_over_and_waits_for_no_tool(
    fleet: Fleet, workers: list[Worker], launch: Launcher
) -> None:
    """A thread of a tool cannot be ended; the worker ends all the same."""
    notes = launch.folder / "notes"
    request_id = fleet.client.submit(f"{note(notes, 'ended')} {note(notes, 'under way', 60)}", agent="chat")
    wait_for(lambda: types(fleet, request_id)["tool_result"] == 1)
    [worker] = [worker for worker in workers if worker.logged("run started", request_id=request_id)]
    assert worker.stop(seconds=20) == 0
    fleet.until_ended([request_id])
    run, log = fleet.ended(request_id)
    assert run["status"] == "completed" and reasons(log) == ["started", "handed_over"]
    assert Counter(notes.read_text().splitlines()) == {"ended": 1, "under way": 2}
    assert [line["tool"] for line in worker.log_lines() if "left behind" in line["message"]] == ["note"]


def test_a_worker_that_dies_in_the_answer_costs_the_answer_and_no_tool(
    fleet: Fleet, stub: ModelStub, workers: list[Worker], launch: Launcher
) -> None:
    notes = launch.folder / "notes"
    request_id = fleet.client.submit(
        f"{launch.folder} {note(notes, 'a')} {note(notes, 'b')} [[tokens=300]] [[pace=150]]", agent="chat"
    )
    wait_for(lambda: types(fleet, request_id)["token"] > 50)
    kill_its_worker(fleet, workers, request_id)
    run, log = fleet.ended(request_id)
    assert run["answer"] == surviving_text(log) == " ".join(f"w{n}" for n in range(1, 301))
    assert sorted(notes.read_text().splitlines()) == ["a", "b"]
    assert len(stub.journal(str(launch.folder))) == 3 and run["usage"]["rounds"] == 2
    checkpoint = attempts(log)[1].resume_from
    assert [entry.type for entry in log if str(entry.id) == checkpoint] == ["tool_result"]


def test_a_tool_that_takes_its_time_is_bridged_by_heartbeats_that_nobody_sees(fleet: Fleet, launch: Launcher) -> None:
    """P13: bytes at least every heartbeat while a tool and a model are silent, and no event more."""
    launch.worker(fleet.redis.url, **MODEL)
    query = f"{launch.folder} {note(launch.folder / 'notes', 'slow', 3 * HEARTBEAT)} [[reasoning=so]] [[say=done]]"
    request_id = fleet.client.submit(query, agent="chat")
    body = b""
    with fleet.client.stream("GET", f"/api/v1/runs/{request_id}/stream") as response:
        for data in response.iter_raw():
            body += data
    beats = [line for line in body.split(b"\n") if line.startswith(b": heartbeat ")]
    assert len(beats) >= 2
    _, log = fleet.ended(request_id)
    check_reader(entries_of(list(fleet.client.events(request_id))), log)


TOKENS = scaled(100_000)
SECONDS = 20 if LONG else 4
"""For which the model speaks."""
RUNS = 4
TEXT = 'é 日本 😀 "quoted" \\ data: x\n\nid: 9-9\r\n\u2028\u0085'


@pytest.mark.timeout(400)
async def test_while_gateways_are_killed_every_client_sees_each_run_of_a_model_once(
    stub: ModelStub, launch: Launcher
) -> None:
    """P8, P9, P18, P23: with tools, with reasoning, and with an answer of TOKENS."""
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    server = launch.redis()

    def start(port: int | None = None) -> Gateway:
        return launch.gateway(server.url, port=port, heartbeat_seconds=1)

    gateways = [await asyncio.to_thread(start) for _ in range(2)]
    await asyncio.to_thread(launch.worker, server.url, **MODEL)
    repeat = f"[[tool=repeat {json.dumps({'text': TEXT})}]]"

    def body(n: int) -> dict[str, Any]:
        ask = f"run {n} {launch.folder} [[reasoning=.{TEXT}.]] {repeat} {note(launch.folder / 'notes', str(n), 0.3)}"
        return {"query": f"{ask} [[tokens={TOKENS}]] [[pace={TOKENS / SECONDS}]]", "agent": "chat"}

    plan = Plan(runs=RUNS, readers=2, body=body, torn=0, slow=0.1, hurry=15, limit=300)
    async with Load(
        [gateway.url for gateway in gateways], server.url, plan, chance=chance, folder=launch.folder
    ) as load:
        killed = 0
        while not load.done:
            await asyncio.sleep(0.5 + chance.random())
            at = killed % len(gateways)
            load.history.fault("gateway killed", url=gateways[at].url)
            gateways[at].kill()
            gateways[at] = await asyncio.to_thread(start, gateways[at].port)
            killed += 1
        evidence = await load.finish()
    print(f"seed {seed}: {evidence}, {load.history.cut_streams} streams hit")
    answer = " ".join(f"w{n}" for n in range(1, TOKENS + 1))
    evidence.texts = dict.fromkeys(load.runs.values(), answer)
    assert evidence.violations() == []
    assert len(evidence.logs) == RUNS and load.history.cut_streams and evidence.rewinds == 0
    for request_id, log in evidence.logs.items():
        run = evidence.polls[request_id]
        assert run is not None and run["status"] == "completed" and run["answer"] == answer
        said = "".join(json.loads(entry.data)["text"] for entry in log if entry.type == "reasoning")
        assert said == f".{TEXT}." * 2
        results = [json.loads(entry.data)["result"] for entry in log if entry.type == "tool_result"]
        assert TEXT in results and len(results) == 2
    assert len((launch.folder / "notes").read_text().splitlines()) == RUNS
    assert not LONG or max(len(log) for log in evidence.logs.values()) < 50_000
