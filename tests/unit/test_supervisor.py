"""Several processes as one, with real processes and real signals."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.kit.processes import wait_for

_MAIN = """
import asyncio, json, sys
from pathlib import Path
from broker.supervisor import Program, Supervisor

options = json.loads(sys.argv[1])
programs = [Program(**{**p, "log": p.get("log") and Path(p["log"])}) for p in options.pop("programs")]

def died(program, code, again):
    print(program.name, code, again, flush=True)

sys.exit(asyncio.run(Supervisor(programs, on_death=died, **options).run()))
"""

# Writes down when it begins, what it hears, and how it ends.
_CHILD = """
import os, signal, sys, time

name, file, ends_after, stubborn = sys.argv[1], sys.argv[2], float(sys.argv[3]), sys.argv[4] == "stubborn"

def write(word):
    with open(file, "a") as out:
        out.write(f"{name} {word} {os.getpid()}\\n")

def heard(number, frame):
    write(signal.Signals(number).name)
    if not stubborn:
        time.sleep(ends_after if ends_after < 1 else 0)
        write("end")
        os._exit(0)

for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
    signal.signal(number, heard)
write("begin")
deadline = time.monotonic() + (ends_after if ends_after >= 1 else 60)
while time.monotonic() < deadline:
    time.sleep(0.05)
"""


class Supervised:
    """A process with a Supervisor, and what its children wrote down."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "journal"
        self.file.touch()
        self._popen: subprocess.Popen[str] | None = None

    def child(self, name: str, *, linger: float = 0, stubborn: bool = False, **fields: Any) -> dict[str, Any]:
        how = "stubborn" if stubborn else "obedient"
        command = [sys.executable, "-S", "-c", _CHILD, name, str(self.file), str(linger), how]
        return {"name": name, "command": command, **fields}

    def start(self, *programs: dict[str, Any], nohup: bool = False, **options: Any) -> Supervised:
        given = {"programs": programs, "stop_seconds": 10, "restart_seconds": [0.01], **options}
        command = [sys.executable, "-c", _MAIN, json.dumps(given)]
        if nohup:
            command = ["nohup", *command]
        self._popen = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        return self

    @property
    def popen(self) -> subprocess.Popen[str]:
        assert self._popen is not None
        return self._popen

    def journal(self, *words: str) -> list[str]:
        """`name word` of each entry, in order; only those with one of `words`, if there are some."""
        entries = [line.rsplit(" ", 1)[0] for line in self.file.read_text().splitlines()]
        return [entry for entry in entries if not words or entry.split()[1] in words]

    def pids(self, name: str) -> list[int]:
        lines = [line.split() for line in self.file.read_text().splitlines()]
        return [int(pid) for found, word, pid in lines if (found, word) == (name, "begin")]

    def until(self, *entries: str) -> Supervised:
        wait_for(lambda: set(entries) <= set(self.journal()))
        return self

    def signal(self, number: signal.Signals) -> None:
        self.popen.send_signal(number)

    def ended(self, seconds: float = 10) -> tuple[int, list[str]]:
        """(exit code, the deaths that it told)."""
        output = self.popen.communicate(timeout=seconds)[0]
        return self.popen.returncode, output.splitlines()

    def close(self) -> None:
        if self._popen is not None:
            children = psutil.Process(self._popen.pid).children() if self._popen.poll() is None else []
            self._popen.kill()
            self._popen.communicate()
            for child in children:
                child.kill()


@pytest.fixture
def supervised(tmp_path: Path) -> Iterator[Supervised]:
    made = Supervised(tmp_path)
    yield made
    made.close()


def test_a_child_that_dies_is_started_again_and_the_others_are_left_alone(supervised: Supervised) -> None:
    supervised.start(supervised.child("one"), supervised.child("two")).until("one begin", "two begin")
    os.kill(supervised.pids("one")[0], signal.SIGKILL)
    wait_for(lambda: len(supervised.pids("one")) == 2)
    supervised.signal(signal.SIGTERM)
    assert supervised.ended() == (0, ["one -9 True"])
    assert len(supervised.pids("two")) == 1


def test_a_child_that_keeps_dying_ends_everything_with_exit_code_1(supervised: Supervised) -> None:
    failing = {"name": "failing", "command": [sys.executable, "-S", "-c", "raise SystemExit(3)"]}
    supervised.start(supervised.child("good"), failing, restart_seconds=[0.2]).until("good begin")
    code, deaths = supervised.ended()
    assert code == 1
    assert deaths == [*["failing 3 True"] * 4, "failing 3 False"]
    assert supervised.journal() == ["good begin", "good SIGTERM", "good end"]


def test_a_program_that_is_not_there_ends_everything_with_exit_code_1(supervised: Supervised) -> None:
    missing = {"name": "missing", "command": ["/no/such/program"]}
    supervised.start(supervised.child("good"), missing, restart_seconds=[0.2])
    code, deaths = supervised.ended()
    assert (code, deaths[-1]) == (1, "missing 127 False")
    assert not psutil.pid_exists(supervised.pids("good")[0])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_reaches_the_children_as_sigterm_once(supervised: Supervised, number: signal.Signals) -> None:
    supervised.start(supervised.child("one", linger=0.3), supervised.child("two")).until("one begin", "two begin")
    supervised.signal(number)
    assert supervised.ended() == (0, [])
    assert sorted(supervised.journal("SIGTERM", "SIGINT", "SIGHUP")) == ["one SIGTERM", "two SIGTERM"]
    assert sorted(supervised.journal("end")) == ["one end", "two end"]


def test_under_nohup_the_end_of_the_terminal_is_not_heard(supervised: Supervised) -> None:
    supervised.start(supervised.child("one"), nohup=True).until("one begin")
    supervised.signal(signal.SIGHUP)
    time.sleep(0.3)
    assert supervised.popen.poll() is None
    supervised.signal(signal.SIGTERM)
    assert supervised.ended() == (0, [])


def test_a_terminal_that_is_closed_is_heard_twice_and_kills_nothing(supervised: Supervised) -> None:
    supervised.start(supervised.child("one", linger=0.5), supervised.child("last", stop_last=True))
    supervised.until("one begin", "last begin").signal(signal.SIGHUP)
    supervised.until("one SIGTERM").signal(signal.SIGHUP)
    assert supervised.ended() == (0, [])
    assert supervised.journal("end") == ["one end", "last end"]


def test_a_second_signal_kills(supervised: Supervised) -> None:
    supervised.start(supervised.child("deaf", stubborn=True), supervised.child("last", stop_last=True))
    supervised.until("deaf begin", "last begin").signal(signal.SIGTERM)
    supervised.until("deaf SIGTERM")
    assert supervised.popen.poll() is None
    supervised.signal(signal.SIGTERM)
    assert supervised.ended(5) == (0, [])
    for name in ("deaf", "last"):
        assert not psutil.pid_exists(supervised.pids(name)[0])


def test_a_child_that_does_not_end_is_killed_in_time(supervised: Supervised) -> None:
    supervised.start(supervised.child("deaf", stubborn=True), stop_seconds=0.5).until("deaf begin")
    supervised.signal(signal.SIGTERM)
    assert supervised.ended(5) == (0, [])
    assert not psutil.pid_exists(supervised.pids("deaf")[0])


def test_what_is_stopped_last_hears_of_it_when_the_others_have_ended(supervised: Supervised) -> None:
    supervised.start(
        supervised.child("redis", stop_last=True), supervised.child("one", linger=0.5), supervised.child("two")
    ).until("redis begin", "one begin", "two begin")
    supervised.signal(signal.SIGINT)
    assert supervised.ended() == (0, [])
    assert supervised.journal("SIGTERM", "end")[-2:] == ["redis SIGTERM", "redis end"]
    assert len(supervised.journal("end")) == 3


def test_what_is_stopped_last_is_still_restarted_while_the_others_end(supervised: Supervised) -> None:
    supervised.start(supervised.child("redis", stop_last=True), supervised.child("one", linger=0.9))
    supervised.until("redis begin", "one begin").signal(signal.SIGTERM)
    supervised.until("one SIGTERM")
    os.kill(supervised.pids("redis")[0], signal.SIGKILL)
    assert supervised.ended() == (0, ["redis -9 True"])
    assert len(supervised.pids("redis")) == 2
    assert supervised.journal("end") == ["one end", "redis end"]


def test_a_child_is_in_a_process_group_of_its_own_and_hears_no_ctrl_c(supervised: Supervised) -> None:
    supervised.start(supervised.child("one")).until("one begin")
    child = supervised.pids("one")[0]
    assert os.getpgid(child) == child != os.getpgid(supervised.popen.pid)
    supervised.signal(signal.SIGTERM)
    assert supervised.ended() == (0, [])


def test_a_childs_output_is_appended_to_its_log(supervised: Supervised, tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("before\n")
    program = "import sys; print('out'); print('err', file=sys.stderr); sys.exit(1)"
    supervised.start({"name": "one", "command": [sys.executable, "-S", "-c", program], "log": str(log)})
    assert supervised.ended()[0] == 1
    assert sorted(log.read_text().split()) == ["before", *["err"] * 5, *["out"] * 5]
