"""Which server is asked: the openai SDK's own variables say so."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from broker.errors import Misconfigured
from broker.settings import Settings
from worker.models import open_model
from worker.models.model import ModelError, Options
from worker.models.provider import OPENAI, PLACEHOLDER_KEY, OpenAIModel, Server


def server(monkeypatch: pytest.MonkeyPatch, base_url: str = "", key: str = "", **settings: Any) -> Server:
    monkeypatch.setenv("OPENAI_BASE_URL", base_url)
    monkeypatch.setenv("OPENAI_API_KEY", key)
    model = open_model(Settings(model="m", **settings))
    assert isinstance(model, OpenAIModel)
    return model.server


def test_the_variables_of_the_sdk_name_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    found = server(monkeypatch, "http://127.0.0.1:1/v1", "sk-1", model_stall_seconds=5, model_api="completions")
    assert (found.base_url, found.key, found.stall_seconds, found.api) == (
        "http://127.0.0.1:1/v1",
        "sk-1",
        5,
        "completions",
    )
    assert not found.is_openai
    assert "sk-1" not in repr(found)


def test_without_a_base_url_it_is_openai(monkeypatch: pytest.MonkeyPatch) -> None:
    found = server(monkeypatch, key="sk-1")
    assert (found.base_url, found.is_openai) == (OPENAI, True)


def test_a_server_of_ones_own_needs_no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    assert server(monkeypatch, "http://127.0.0.1:1/v1").key == PLACEHOLDER_KEY


@pytest.mark.parametrize(
    "url",
    ["localhost:11434/v1", "x", "http://", "http://[::1/v1", "ftp://h/v1", "http://h:99999/v1", "http://h/\x01", "/v1"],
)
def test_what_is_no_url_of_a_server_refuses_to_start(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    with pytest.raises(Misconfigured, match="OPENAI_BASE_URL"):
        server(monkeypatch, url)


@pytest.mark.parametrize("key", ["clé", "a\nb", "\udc80"])
def test_a_key_that_no_header_can_carry_refuses_to_start(monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    with pytest.raises(Misconfigured, match="OPENAI_API_KEY") as refused:
        server(monkeypatch, "http://[::1]:1/v1", key)
    assert key not in str(refused.value)


async def test_openai_needs_one(monkeypatch: pytest.MonkeyPatch) -> None:
    assert server(monkeypatch).key is None
    with pytest.raises(ModelError) as caught:
        async for _ in open_model(Settings(model="m")).stream([], [], Options(model="m", deadline=0)):
            pass
    assert caught.value.code == "model_not_configured"


def test_all_agents_share_one_client(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:1/v1")
    assert open_model(Settings(model="m")) is open_model(Settings(model="m", history_tokens=5))
    assert open_model(Settings(model="m")) is not open_model(Settings(model="m", model_stall_seconds=5))


def test_a_worker_without_a_model_does_not_load_the_sdk() -> None:
    script = "import sys, worker.main, worker.agents; from broker.settings import Settings\n"
    script += "worker.agents.load(Settings()); assert 'openai' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
