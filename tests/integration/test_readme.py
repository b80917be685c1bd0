"""What the README says to do, done: its blocks of code are taken from it."""

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

README = (Path(__file__).parents[2] / "README.md").read_text("utf-8")


def block(containing: str) -> str:
    blocks: list[str] = re.findall(r"```\w*\n(.*?)```", README, re.DOTALL)
    [found] = [text for text in blocks if containing in text]
    return found


@pytest.fixture(scope="module")
def demo() -> Iterator[Demo]:
    """With a model server, and the README's tool."""
    assert "OPENAI_BASE_URL=http://127.0.0.1:11434/v1 BROKER_MODEL=qwen3 broker demo\n" in README
    assert "`BROKER_TOOLS=my_tools`" in README
    with tempfile.TemporaryDirectory(prefix="sb", dir="/tmp") as folder, ModelStub() as model:
        (Path(folder) / "my_tools.py").write_text(block("@tool"))
        made = Demo(
            Path(folder) / ".demo",
            free_port(),
            own_documents=False,
            OPENAI_BASE_URL=model.url,
            BROKER_MODEL="qwen3",
            BROKER_TOOLS="my_tools",
        )
        yield made.until_ready()
        made.close()


def run(demo: Demo, *command: str) -> str:
    environment = {**os.environ, "BROKER_URL": demo.url, "OPENAI_API_KEY": "none"}
    done = subprocess.run([sys.executable, *command], env=environment, capture_output=True, check=True, timeout=60)
    return done.stdout.decode()


def test_a_model_server_answers_on_the_command_line(demo: Demo) -> None:
    assert 'broker ask "Why is the sky blue?"' in block("broker ask")
    answer = run(demo, "-m", "broker", "ask", "Why is the sky blue?")
    assert answer == "I am a stub, not a model.\nYou said: Why is the sky blue?\n"


def test_a_tool_of_ones_own_is_called(demo: Demo) -> None:
    assert len(block("@tool").splitlines()) <= 10
    answer = run(demo, "-m", "broker", "ask", 'How much room is there? [[tool=free_space {"path": "/tmp"}]]')
    assert re.search(r"A tool answered: \d+ GB", answer)


def test_the_python_client_reads_a_run(demo: Demo) -> None:
    printed = run(demo, "-c", block("from broker.client import Client"))
    assert "You said: How does a client resume a stream?" in printed
    assert re.search(r"^\d+-\d+ final$", printed, re.MULTILINE)


def test_the_openai_client_goes_on_where_it_was_cut(demo: Demo) -> None:
    snippet = block("from openai import OpenAI")
    assert "http://127.0.0.1:8000/v1" in snippet
    printed = run(demo, "-c", snippet.replace("http://127.0.0.1:8000", demo.url))
    assert printed == "I am a stub, not a model.\nYou said: Why is the sky blue?\n"


def test_the_doctor_finds_nothing_in_the_demo(demo: Demo) -> None:
    """Whose documents name the doctor, too."""
    said = run(demo, "-m", "broker", "doctor", "--url", demo.url, "--seconds", "3")
    assert "probe_agent" not in said
