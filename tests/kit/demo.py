"""`broker demo` as a process, and what it prints."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

from tests.kit.processes import wait_for

DOCUMENT = """# Streams

A client resumes a stream with the header Last-Event-ID, in which it sends the last event id that it has seen.
The gateway answers with what the client missed, and sends nothing twice. A stream can be resumed any number of times.
"""


class Demo:
    """A demo, and everything that it started."""

    def __init__(self, directory: Path, port: int, *more: str, own_documents: bool = True, **variables: str) -> None:
        self.directory = directory
        self.url = f"http://127.0.0.1:{port}"
        options = ["--port", str(port), *more]
        if own_documents:
            documents = directory.parent / "documents"
            documents.mkdir(exist_ok=True)
            (documents / "streams.md").write_text(DOCUMENT)
            options += ["--docs", str(documents)]
        clean = {name: value for name, value in os.environ.items() if not name.startswith("BROKER_")}
        self._started: list[psutil.Process] = []
        self._out, self._err = (directory.parent / f"{name}-{time.monotonic_ns()}" for name in ("out", "err"))
        with self._out.open("wb") as out, self._err.open("wb") as err:
            self.popen = subprocess.Popen(
                [sys.executable, "-m", "broker", "demo", *options],
                env={**clean, "BROKER_DEMO_DIR": str(directory), **variables},
                stdout=out,
                stderr=err,
                cwd=directory.parent,
                # As a shell does: Ctrl-C is for this group.
                process_group=0,
            )

    def until_ready(self) -> Demo:
        def ready() -> bool:
            assert self.popen.poll() is None, self.errors
            return "Ctrl-C" in self.text

        wait_for(ready, seconds=60, every=0.05)
        self._started = psutil.Process(self.popen.pid).children(recursive=True)
        return self

    @property
    def text(self) -> str:
        return self._out.read_text()

    @property
    def errors(self) -> str:
        return self._err.read_text()

    @property
    def lines(self) -> list[str]:
        """The three to paste."""
        return [line for line in self.text.splitlines() if line.startswith("curl ")]

    @property
    def ask(self) -> str:
        """The lines to paste for the command line."""
        found = re.search(r"in another terminal:\n(.+?)\n\n", self.text, re.DOTALL)
        assert found is not None
        return found[1]

    @property
    def request_id(self) -> str:
        found = re.search(r"/runs/([0-9a-f]{32})/stream", self.text)
        assert found is not None
        return found[1]

    @property
    def middle(self) -> str:
        found = re.search(r"Last-Event-ID: (\S+)'", self.text)
        assert found is not None
        return found[1]

    def child(self, *words: str) -> psutil.Process:
        """Its process with all these in its command line."""

        def found() -> list[psutil.Process]:
            children = psutil.Process(self.popen.pid).children(recursive=True)
            return [child for child in children if all(word in " ".join(child.cmdline()) for word in words)]

        wait_for(lambda: len(found()) == 1)
        return found()[0]

    def interrupt(self, seconds: float = 20) -> int:
        """Ctrl-C. Returns the exit code."""
        os.killpg(self.popen.pid, signal.SIGINT)
        return self.popen.wait(seconds)

    def left_running(self) -> list[psutil.Process]:
        return psutil.wait_procs(self._started, timeout=0)[1]

    def close(self) -> None:
        if self.popen.poll() is None:
            self._started += psutil.Process(self.popen.pid).children(recursive=True)
            self.popen.terminate()
            try:
                self.popen.wait(20)
            except subprocess.TimeoutExpired:
                self.popen.kill()
                self.popen.wait()
        for process in self.left_running():
            process.kill()
