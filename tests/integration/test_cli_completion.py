"""`broker completion`: the scripts, loaded by the shells themselves where they are there."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kit.command import here
from tests.kit.processes import environment


@pytest.fixture
def path(tmp_path: Path) -> str:
    """A PATH with our command."""
    command = tmp_path / "broker"
    command.write_text(
        f'#!/bin/sh\nexec "{sys.executable}" -m broker "$@"\n'.replace("-m broker", f"{tmp_path}/main.py")
    )
    (tmp_path / "main.py").write_text("import sys\nsys.argv[0] = 'broker'\nfrom broker.cli import main\nmain()\n")
    command.chmod(0o755)
    return f"{tmp_path}:{os.environ['PATH']}"


def completed(path: str, *words: str) -> list[str]:
    """What bash offers for the last of the words."""
    code = """
eval "$(broker completion bash)"
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMPREPLY=()
_broker_completion broker
printf '%s\\n' "${COMPREPLY[@]}"
"""
    env = environment("redis://127.0.0.1:1") | {"PATH": path, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        ["bash", "--noprofile", "--norc", "-c", code, "bash", *words],
        env=env,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stderr == ""
    return done.stdout.split()


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (["broker", "to"], {"token"}),
        (["broker", "ask", "--det"], {"--detach"}),
        (["broker", "runs", "--status", "c"], {"completed", "cancelled"}),
        (["broker", "completion", ""], {"bash", "zsh", "fish"}),
    ],
)
def test_a_real_bash_completes_commands_options_and_values(path: str, words: list[str], offered: set[str]) -> None:
    assert set(completed(path, *words)) == offered


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_each_script_is_one_that_its_shell_can_read(shell: str) -> None:
    done = here("completion", shell)
    assert (done.returncode, done.stderr) == (0, "")
    assert "_BROKER_COMPLETE" in done.stdout
    if shutil.which(shell) is not None:
        read = subprocess.run([shell, "-n"], input=done.stdout, capture_output=True, text=True, timeout=30, check=False)
        assert (read.returncode, read.stderr) == (0, "")
