"""Clients in JavaScript, as they come from npm: a Node process that a test drives, call by call (tests/clients/js)."""

from __future__ import annotations

import contextlib
import itertools
import json
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.kit.needs import JAVASCRIPT, needs_javascript

Seen = dict[str, Any]


class Refused(Exception):
    """What the client threw: `kind` is its class, `fields` are {name, message, status, code, type, param}."""

    def __init__(self, error: dict[str, Any]) -> None:
        super().__init__(f"{error['class']}: {error.get('message')}")
        self.kind: str = error["class"]
        self.fields = error

    def __getitem__(self, name: str) -> Any:
        return self.fields.get(name)


class Call:
    """What one call saw, and what it returned; both come while the test does something else."""

    def __init__(self, name: str, changed: threading.Condition) -> None:
        self.name = name
        self.seen: list[Seen] = []
        self._changed = changed
        self._looked = 0
        self._answer: dict[str, Any] | None = None

    def heard(self, line: dict[str, Any]) -> None:
        if "seen" in line:
            self.seen.append(line["seen"])
        else:
            self._answer = line

    def until(self, condition: Callable[[Seen], bool], seconds: float = 20) -> Seen:
        """The first thing for which it holds, of those that no earlier `until` has looked at."""
        deadline = time.monotonic() + seconds
        with self._changed:
            while True:
                for seen in self.seen[self._looked :]:
                    self._looked += 1
                    if condition(seen):
                        return seen
                assert self._answer is None, f"{self.name} has ended with {self._answer}, and saw {self.seen}"
                left = deadline - time.monotonic()
                assert left > 0, f"waited {seconds} s in vain for {self.name}, which saw {self.seen}"
                self._changed.wait(left)

    @property
    def ended(self) -> bool:
        return self._answer is not None

    def result(self, seconds: float = 30) -> Any:
        """What the call returned. Raises Refused where it threw."""
        with self._changed:
            assert self._changed.wait_for(lambda: self.ended, seconds), f"{self.name} goes on, and saw {self.seen}"
        assert self._answer is not None
        if "error" in self._answer:
            raise Refused(self._answer["error"])
        return self._answer["value"]


class Driven:
    """A process that does what it is told, a line of JSON for each call. A context manager, which ends it."""

    def __init__(
        self, log: Path, command: Sequence[str], *, folder: Path, env: Mapping[str, str] | None = None
    ) -> None:
        self._log = log
        with log.open("ab") as file:
            self._process = subprocess.Popen(
                command, cwd=folder, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=file
            )
        self._changed = threading.Condition()
        self._calls: dict[int, Call] = {}
        self._numbers = itertools.count(1)
        self._reader = threading.Thread(target=self._read, name=log.stem, daemon=True)
        self._reader.start()

    def start(self, name: str, /, **arguments: Any) -> Call:
        """A call that goes on while the test does something else."""
        assert self._process.poll() is None, self._log.read_text("utf-8")
        number = next(self._numbers)
        call = self._calls[number] = Call(name, self._changed)
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"id": number, "call": name, **arguments}).encode() + b"\n")
        self._process.stdin.flush()
        return call

    def call(self, name: str, /, **arguments: Any) -> Any:
        """A call to its end."""
        return self.start(name, **arguments).result()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for text in self._process.stdout:
            line = json.loads(text)
            with self._changed:
                self._calls[line["id"]].heard(line)
                self._changed.notify_all()
        with self._changed:
            for call in self._calls.values():
                if not call.ended:
                    call.heard({"error": {"class": "Ended", "message": self._log.read_text("utf-8")}})
            self._changed.notify_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.kill()
        self._process.wait()
        self._reader.join()
        self._process.stdout.close()
        with contextlib.suppress(BrokenPipeError):  # what it did not read
            self._process.stdin.close()


class Node(Driven):
    """A script of tests/clients/js."""

    def __init__(self, folder: Path, script: str, *arguments: str) -> None:
        log = folder / f"{script}-{'-'.join(arguments)}.log"
        super().__init__(log, [needs_javascript(), script, *arguments], folder=JAVASCRIPT)
