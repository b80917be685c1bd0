"""The command `broker`, run to its end."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from broker.cli import main
from tests.kit.processes import environment

NOWHERE = "redis://127.0.0.1:1"
Done = subprocess.CompletedProcess[str]


def broker(*arguments: str, **settings: Any) -> Done:
    """As a process of its own, as users run it."""
    env = environment(**{"redis_url": NOWHERE, **settings})
    command = [sys.executable, "-m", "broker", *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=30, check=False)


def here(*arguments: str, **settings: Any) -> Done:
    """Inside this process, which is quicker: for commands that end before they begin to serve."""
    out, err = io.StringIO(), io.StringIO()
    with _restored(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        os.environ.clear()
        os.environ.update(environment(**{"redis_url": NOWHERE, **settings}))
        sys.argv = ["broker", *arguments]
        with pytest.raises(SystemExit) as ended:
            main()
            sys.exit(0)
    code = ended.value.code
    assert code is None or isinstance(code, int)
    return Done([], code or 0, out.getvalue(), err.getvalue())


@contextlib.contextmanager
def _restored() -> Iterator[None]:
    """Whatever the command changes in its process."""
    environ, argv, path = dict(os.environ), sys.argv, list(sys.path)
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(environ)
        sys.argv, sys.path[:] = argv, path
        root.handlers[:] = handlers
        root.setLevel(level)


def check_one_line(done: Done, code: int = 1) -> str:
    """An error is one line of plain text, beside the log."""
    lines = [line for line in done.stderr.splitlines() if not line.startswith("{")]
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert len(lines) == 1, done.stderr
    return lines[0]
