"""The load tools in C: compiled when they are needed, run as processes, their one line of JSON as a value."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any, Self, TypeVar, cast

_T = TypeVar("_T")


class ToolFailed(Exception):
    """A load tool could not be built, or ended without its result."""


@cache
def build(name: str) -> Path:
    """The program made from `<name>.c`, which is compiled once for each content."""
    source = Path(__file__).with_name(f"{name}.c")
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise ToolFailed("no C compiler: the load tools are written in C")
    digest = hashlib.sha256(source.read_bytes()).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / f"stream-broker-bench-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise ToolFailed(f"{folder} belongs to somebody else")
    program = folder / f"{name}-{digest}"
    if not program.exists():
        unfinished = folder / f"{name}-{os.getpid()}"
        done = subprocess.run([compiler, "-O2", "-o", unfinished, source], capture_output=True, text=True, check=False)
        if done.returncode:
            raise ToolFailed(done.stderr)
        unfinished.rename(program)
    return program


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """What sse_load saw."""

    connections: int
    answered: int
    done: int
    failed: int
    error: str
    events: int
    messages: int
    comments: int
    least_messages: int
    least_comments: int
    gaps: int
    repeated: int
    ready_s: float
    last_s: float
    span_s: float
    p50_ms: float
    p99_ms: float
    first_p50_ms: float
    first_p99_ms: float
    complete_p50_ms: float
    complete_p99_ms: float
    cpu_s: float

    @property
    def everything(self) -> bool:
        """Whether every connection got all, once and in order."""
        return self.done == self.connections and not self.gaps and not self.repeated


@dataclass(frozen=True, kw_only=True)
class Published:
    """What sse_pub did."""

    sent: int
    replies: int
    errors: int
    error: str
    seconds: float
    late_ms: float
    cpu_s: float


class Load:
    """A running sse_load."""

    def __init__(self, folder: Path, url: str, *options: object, headers: Sequence[str] = ()) -> None:
        self._ready = folder / f"ready-{time.monotonic_ns()}"
        command = [str(build("sse_load")), "--url", url, "--ready-file", str(self._ready), *map(str, options)]
        for header in headers:
            command += ["--header", header]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.communicate()

    @property
    def pid(self) -> int:
        return self._process.pid

    def until_ready(self, seconds: float) -> bool:
        """Waits until every connection was answered."""
        deadline = time.monotonic() + seconds
        while not self._ready.exists() and self._process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        return self._ready.exists()

    def result(self, seconds: float) -> Loaded:
        """What it saw, when it is done or has been given `seconds` more."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(seconds)
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
        return _parse(Loaded, self._process.communicate()[0])


def publish(redis_port: int, command: Sequence[str], *options: object) -> Published:
    """Runs sse_pub to its end."""
    tool = [str(build("sse_pub")), "--redis", f"127.0.0.1:{redis_port}", *map(str, options), "--", *command]
    done = subprocess.run(tool, stdout=subprocess.PIPE, text=True, check=False)
    published = _parse(Published, done.stdout)
    if published.errors:
        raise ToolFailed(f"Redis refused {published.errors} of {published.sent} commands: {published.error}")
    return published


def _parse(kind: type[_T], text: str) -> _T:
    try:
        values: dict[str, Any] = json.loads(text)
    except ValueError:
        raise ToolFailed(f"a load tool ended without a result: {text!r}") from None
    return kind(**{field.name: values[field.name] for field in fields(cast(Any, kind))})
