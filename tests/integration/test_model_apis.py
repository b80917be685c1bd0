"""The same run by either API of a model server: from the model to the client it is the same."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import Launcher
from tests.kit.checker import check_log
from tests.kit.http import Client
from tests.kit.model_stub import ModelStub

CORPUS = Path(__file__).parents[1] / "corpus"
QUERY = 'green tea [[reasoning=hm hm]] [[tool=search_documents {"query": "green tea"}]] [[say=I look.]] [[cached=3]]'


@pytest.fixture(scope="module")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, list[tuple[str, object]]]]:
    """What a run of `chat` said, by the API that its worker uses; `older` is a server that has no Responses."""
    found: dict[str, list[tuple[str, object]]] = {}
    for name, api, options in (
        ("completions", "completions", ()),
        ("responses", "responses", ()),
        ("older", "auto", ("--no-responses",)),
    ):
        launcher = Launcher(tmp_path_factory.mktemp(name))
        try:
            with ModelStub(*options) as stub, pytest.MonkeyPatch.context() as patched:
                for variable, value in stub.environment.items():
                    patched.setenv(variable, value)
                server = launcher.redis()
                gateway = launcher.gateway(server.url)
                launcher.worker(server.url, docs=CORPUS, model="m", model_api=api)
                with Client(gateway.url) as client:
                    request_id = client.submit(QUERY, agent="chat")
                    client.finished(request_id)
                    log = client.log(request_id)
                check_log(log)
                found[name] = _told([(entry.type, json.loads(entry.data)) for entry in log])
        finally:
            launcher.close()
    yield found


def _told(events: list[tuple[str, dict[str, object]]]) -> list[tuple[str, object]]:
    """Without what differs from run to run; neighbouring pieces of text are one, since how many there are is chance."""
    told: list[tuple[str, object]] = []
    for kind, data in events:
        kept = {name: value for name, value in data.items() if name not in ("id", "request_id", "session_id")}
        if told and kind in ("token", "reasoning") and told[-1][0] == kind:
            told[-1] = (kind, str(told[-1][1]) + str(data["text"]))
        else:
            told.append((kind, data["text"] if kind in ("token", "reasoning") else kept))
    return told


def test_a_run_with_tools_and_reasoning_has_all_of_its_parts(logs: dict[str, list[tuple[str, object]]]) -> None:
    kinds = [kind for kind, _ in logs["responses"]]
    assert kinds == [
        "start",
        "attempt",
        "reasoning",
        "token",
        "tool_call",
        "tool_result",
        "reasoning",
        "token",
        "final",
    ]


@pytest.mark.parametrize("name", ["completions", "older"])
def test_either_api_gives_the_same_run(logs: dict[str, list[tuple[str, object]]], name: str) -> None:
    assert logs[name] == logs["responses"]
