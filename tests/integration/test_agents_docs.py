"""What docs/agents.md and docs/models.md say to do, done: their blocks are taken from them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kit.demo import Demo
from tests.kit.model_stub import ModelStub
from tests.kit.redis_server import free_port

DOCS = Path(__file__).parents[2] / "docs"
AGENTS = (DOCS / "agents.md").read_text("utf-8")
MODELS = (DOCS / "models.md").read_text("utf-8")
WEEKDAY = '[[tool=opening_hours {"day": "Monday"}]]'


def block(page: str, containing: str) -> str:
    blocks: list[str] = re.findall(r"```\w*\n(.*?)```", page, re.DOTALL)
    [found] = [text for text in blocks if containing in text]
    return found


def exported(page: str, containing: str) -> dict[str, str]:
    """The variables of a block of `export`s."""
    lines = [line.partition("  #")[0].removeprefix("export ") for line in block(page, containing).splitlines()]
    return dict(pair.split("=", 1) for line in lines for pair in re.findall(r'\w+=(?:"[^"]*"|\S+)', line))


@pytest.fixture(scope="module")
def model() -> Iterator[ModelStub]:
    with ModelStub() as stub:
        yield stub


@pytest.fixture(scope="module")
def demo(model: ModelStub) -> Iterator[Demo]:
    """With both agents of the documentation, and its settings, but for where the model is."""
    helper, shop = exported(AGENTS, "=helper=my_agents:helper"), exported(AGENTS, "=shop=my_graph:shop")
    agents = f"{helper.pop('BROKER_AGENTS')},{shop.pop('BROKER_AGENTS')}"
    variables = {**helper, **shop, "BROKER_AGENTS": agents, "OPENAI_BASE_URL": model.url}
    with tempfile.TemporaryDirectory(prefix="sb", dir="/tmp") as folder:
        (Path(folder) / "my_agents.py").write_text(block(AGENTS, "function_tool"))
        (Path(folder) / "my_graph.py").write_text(block(AGENTS, "StateGraph"))
        made = Demo(Path(folder) / ".demo", free_port(), own_documents=True, **variables)
        yield made.until_ready()
        made.close()


def ask(demo: Demo, agent: str, question: str) -> str:
    environment = {**os.environ, "BROKER_URL": demo.url}
    command = [sys.executable, "-m", "broker", "ask", "--agent", agent, question]
    return subprocess.run(command, env=environment, capture_output=True, check=True, timeout=60).stdout.decode()


@pytest.mark.parametrize("agent", ["helper", "shop"])
def test_an_agent_of_another_library_answers_with_its_tool(demo: Demo, model: ModelStub, agent: str) -> None:
    told = ask(demo, agent, f"When do you open? I ask {agent}. {WEEKDAY}")
    assert "A tool answered: 9 to 18 h" in told
    asked = model.journal(f"I ask {agent}.")
    assert [entry["model"] for entry in asked] == ["qwen3", "qwen3"]
    assert asked[0]["messages"][0]["role"] == ("system" if agent == "helper" else "user")


@pytest.mark.parametrize("server", ["127.0.0.1:11434", "127.0.0.1:8000"], ids=["Ollama", "vLLM"])
def test_chat_answers_in_front_of_a_model_server(server: str) -> None:
    """By the variables of the documentation. `thinking` is reasoning as vLLM and Ollama have it in Chat Completions."""
    variables = exported(MODELS, server)
    assert variables["OPENAI_BASE_URL"].startswith(f"http://{server}/v1")
    with tempfile.TemporaryDirectory(prefix="sb", dir="/tmp") as folder, ModelStub() as stub:
        demo = Demo(
            Path(folder) / ".demo", free_port(), own_documents=True, **{**variables, "OPENAI_BASE_URL": stub.url}
        )
        try:
            demo.until_ready()
            environment = {**os.environ, "BROKER_URL": demo.url}
            command = [sys.executable, "-m", "broker", "ask", "--json", "hello [[thinking=let me see]] [[say=hi]]"]
            done = subprocess.run(command, env=environment, capture_output=True, check=True, timeout=60)
        finally:
            demo.close()
        answered = [entry for entry in stub.journal("hello [[") if entry["ended"] == "complete"]
        assert [(entry["path"], entry["model"]) for entry in answered] == [("/v1/chat/completions", "qwen3")]
    told = done.stdout.decode()
    assert '"type":"reasoning"' in told and '"hi"' in told
    assert '"completion_tokens":' in told.replace(" ", ""), "usage is asked for"
