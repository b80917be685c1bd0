"""ask and tail in a real pseudo-terminal, against a real service: what a user sees, and the keys that a user types."""

from __future__ import annotations

import json
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.conftest import Launcher, Service
from tests.kit.http import Client, token
from tests.kit.processes import environment, wait_for
from tests.kit.terminal import CTRL_C, Terminal

Open = Callable[..., Terminal]


@pytest.fixture
def open_terminal() -> Iterator[Open]:
    """`broker` with these arguments, in a terminal of its own; `second_seconds` is how long a second Ctrl-C counts."""
    opened: list[Terminal] = []

    def opener(
        url: str, bearer: str, *arguments: str, columns: int = 80, second_seconds: float = 0.5, **variables: str
    ) -> Terminal:
        env = {**environment("redis://127.0.0.1:1", url=url, token=bearer), **variables}
        clean = {name: value for name, value in env.items() if name not in ("COLUMNS", "LINES", "FORCE_COLOR")}
        if not variables.get("NO_COLOR"):
            clean.pop("NO_COLOR", None)
        code = f"from broker.cli import interrupts, main; interrupts.SECOND_SECONDS = {second_seconds}; main()"
        terminal = Terminal([sys.executable, "-c", code, *arguments], clean, columns=columns)
        opened.append(terminal)
        return terminal

    yield opener
    for terminal in opened:
        terminal.close()


@pytest.fixture
def broker(service: Service, subject: str, open_terminal: Open) -> Open:
    """The same as the subject of this test, at the shared service."""

    def opener(*arguments: str, **options: Any) -> Terminal:
        return open_terminal(service.gateways[0].url, token(subject), *arguments, **options)

    return opener


class Play:
    """A run whose script waits for the test at its gates."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._gates = 0
        self._script: list[tuple[str, Any]] = []

    def then(self, kind: str, **data: Any) -> Play:
        self._script.append((kind, data))
        return self

    def gate(self) -> Play:
        self._gates += 1
        self._script.append(("until", str(self._folder / f"gate-{self._gates}")))
        return self

    def open(self, number: int) -> None:
        (self._folder / f"gate-{number}").touch()

    @property
    def options(self) -> Sequence[str]:
        return ("--agent", "plays", "--param", "script=" + json.dumps(self._script))


@pytest.fixture
def play(tmp_path: Path) -> Play:
    return Play(tmp_path)


# -- as it comes -----------------------------------------------------------------------------------------------------


def test_tokens_appear_as_they_come(broker: Open, play: Play) -> None:
    play.then("token", text="one ").gate().then("token", text="two ").gate().then("token", text="three")
    terminal = broker("ask", "x", *play.options)
    terminal.shows("one")
    assert "two" not in terminal.text
    play.open(1)
    terminal.shows("one two")
    assert "three" not in terminal.text
    play.open(2)
    assert terminal.wait() == 0
    assert terminal.text.splitlines()[0] == "one two three"


def test_progress_is_a_bar_that_vanishes(broker: Open, play: Play) -> None:
    play.then("progress", percent=25, message="Searching").gate().then("progress", percent=75).gate()
    play.then("token", text="found")
    terminal = broker("ask", "x", *play.options)
    terminal.shows(" 25 % Searching")
    play.open(1)
    terminal.shows(" 75 %")
    assert "Searching" not in terminal.text
    play.open(2)
    assert terminal.wait() == 0
    assert "%" not in terminal.text
    assert len([line for line in terminal.erased if "%" in line]) == 2
    assert terminal.text.splitlines()[0] == "found"


def test_without_a_worker_it_says_that_it_waits_for_one(launch: Launcher, open_terminal: Open, play: Play) -> None:
    redis = launch.redis()
    gateway = launch.gateway(redis.url)
    play.gate().then("token", text="done")
    terminal = open_terminal(gateway.url, token(), "ask", "x", *play.options)
    terminal.shows("waiting for a worker…")
    launch.worker(redis.url)
    terminal.shows("running…")
    play.open(1)
    assert terminal.wait() == 0
    assert terminal.text.splitlines()[0] == "done"


def test_everything_that_an_agent_says_has_its_place(broker: Open, play: Play) -> None:
    item = {"title": "Streams", "path": "docs/streams.md", "line": 12, "score": 0.9}
    play.then("message", text="Searching the documents.")
    play.then("sources", stage="discovered", count=20, items=[item])
    play.then("sources", stage="analyzed", count=1, items=[item])
    play.then("reasoning", text="let me think")
    play.then("tool_call", id="1", tool="search", args={"q": "streams"}).gate()
    play.then("tool_result", id="1", tool="search", result={"hits": 1})
    play.then("token", text="The answer [1].")
    play.then("final", citations=[{"number": 1, **item}], usage={"total_tokens": 12})
    terminal = broker("ask", "x", *play.options)
    terminal.shows("→ search(q=streams)")
    play.open(1)
    assert terminal.wait() == 0
    lines = terminal.text.splitlines()
    assert lines[:3] == ["Searching the documents.", "discovered: 20 sources", "analyzed: 1 source"]
    assert lines[3].split() == ["source", "where", "score"]
    assert lines[4].split() == ["Streams", "docs/streams.md:12", "0.9"]
    assert lines[6:8] == ["let me think", ""]
    assert re.fullmatch(r'← search( [\d.]+ s)? \{"hits": 1\}', lines[9])
    assert lines[10:14] == ["", "The answer [1].", "", "[1] Streams  docs/streams.md:12"]
    assert re.fullmatch(r"completed · total tokens 12 · broker show [0-9a-f]{32}", lines[15])
    assert terminal.display.styles("let me think") == {"2"}
    assert terminal.display.styles("The answer") == {""}


def test_an_error_is_red_and_is_exit_code_1(broker: Open) -> None:
    terminal = broker("ask", "x", "--agent", "misbehaves", "--param", "what=error")
    assert terminal.wait() == 1
    assert terminal.text.splitlines() == ["before", "", "error no_quota: Come back tomorrow."]
    assert terminal.display.styles("no_quota") == {"1;31"}


def test_what_a_model_writes_cannot_control_the_terminal(broker: Open, play: Play) -> None:
    """The terminal of this test raises for every sequence that is not ours."""
    evil = "\x1b]0;title\x07\x1b[2J\x9b31m\x08\r"
    play.then("token", text=f"so {evil} it is").then("message", text=evil).then("progress", percent=1, message=evil)
    play.then("tool_call", id="1", tool=evil, args={evil: evil}).then("error", code=evil, message=evil)
    terminal = broker("ask", "x", *play.options)
    assert terminal.wait() == 1
    assert r"so \x1b]0;title\x07\x1b[2J\x9b31m\x08 it is" in terminal.text


def test_the_query_can_be_missing_only_where_something_is_piped_in(broker: Open) -> None:
    terminal = broker("ask")
    assert terminal.wait() == 2
    assert "Missing argument 'QUERY'" in terminal.text


# -- Ctrl-C ----------------------------------------------------------------------------------------------------------


def detached(terminal: Terminal) -> list[str]:
    """The arguments of the command that is said to come back."""
    terminal.shows("Ctrl-C again cancels it.")
    found = re.search(r"Come back with: broker (.+)$", terminal.text, re.MULTILINE)
    assert found is not None
    return found[1].split()


def test_ctrl_c_detaches_and_the_printed_command_goes_on_exactly_there(broker: Open, play: Play, alice: Client) -> None:
    play.then("token", text="one ").then("token", text="two ").gate().then("token", text="three ")
    play.then("token", text="four")
    terminal = broker("ask", "x", *play.options)
    terminal.shows("one two")
    terminal.type(CTRL_C)
    back = detached(terminal)
    assert terminal.wait() == 130
    assert terminal.text.splitlines()[0].removesuffix("^C") == "one two "
    assert alice.run(back[1])["status"] == "running"
    play.open(1)
    again = broker(*back)
    assert again.wait() == 0
    assert again.text.splitlines()[0] == "three four"
    assert alice.run(back[1])["answer"] == "one two three four"


def test_ctrl_c_while_there_is_a_bar_leaves_a_clean_terminal(broker: Open, play: Play) -> None:
    play.then("progress", percent=25, message="Searching").gate()
    terminal = broker("ask", "x", *play.options)
    terminal.shows("25 %")
    terminal.type(CTRL_C)
    detached(terminal)
    assert terminal.wait() == 130
    assert terminal.text.startswith("Detached, and the run goes on.")
    play.open(1)


def test_what_the_terminal_wrote_for_ctrl_c_does_not_stay_at_the_beginning_of_a_line(broker: Open, play: Play) -> None:
    play.then("token", text="a line\n").gate()
    terminal = broker("ask", "x", *play.options)
    terminal.shows("a line")
    terminal.type(CTRL_C)
    detached(terminal)
    assert terminal.wait() == 130
    assert terminal.text.splitlines()[1].startswith("Detached, and the run goes on.")
    play.open(1)


def test_ctrl_c_twice_cancels(broker: Open, alice: Client) -> None:
    terminal = broker("ask", "x", "--agent", "hangs", second_seconds=60)
    terminal.shows("waiting")
    terminal.type(CTRL_C)
    request_id = detached(terminal)[1]
    terminal.type(CTRL_C)
    assert terminal.wait() == 3
    assert terminal.text.splitlines()[-1].endswith("cancelled")
    assert alice.run(request_id)["status"] == "cancelled"


def test_ctrl_c_before_the_broker_has_answered_says_that_the_run_may_be_there(
    launch: Launcher, open_terminal: Open
) -> None:
    gateway = launch.gateway(launch.redis().url)
    gateway.signal(signal.SIGSTOP)
    terminal = open_terminal(gateway.url, token(), "ask", "x")
    wait_for(lambda: bool(psutil.Process(terminal.popen.pid).net_connections("tcp")))
    terminal.type(CTRL_C)
    assert terminal.wait() == 130
    assert "Interrupted before the broker answered; it may have the query: broker runs" in terminal.text


# -- the connection --------------------------------------------------------------------------------------------------


def test_when_the_gateway_dies_it_says_so_and_goes_on_exactly_where_it_was(
    launch: Launcher, open_terminal: Open, play: Play
) -> None:
    redis = launch.redis()
    gateway = launch.gateway(redis.url)
    launch.worker(redis.url)
    play.then("token", text="one ").then("token", text="tw").gate()
    play.then("token", text="o ").then("token", text="three")
    terminal = open_terminal(gateway.url, token(), "ask", "x", *play.options)
    terminal.shows("one tw")
    gateway.kill()
    terminal.shows("connection lost, reconnecting…")
    play.open(1)
    time.sleep(2.5)  # longer than the first pause: it finds nobody more than once, and says so once
    launch.gateway(redis.url, port=gateway.port)
    assert terminal.wait(60) == 0
    lines = terminal.text.splitlines()
    assert lines[:2] == ["one tw", "connection lost, reconnecting…"]
    assert re.fullmatch(r"connected again after [\d.]+ s", lines[2])
    assert lines[3] == "o three"
    assert terminal.text.count("connection lost") == 1


def test_when_the_worker_dies_it_says_what_is_void_and_the_answer_starts_anew(
    launch: Launcher, open_terminal: Open
) -> None:
    redis = launch.redis()
    gateway = launch.gateway(redis.url)
    worker = launch.worker(redis.url, lease_seconds=1)
    options = ["--agent", "steps", "--param", "count=6", "--param", "pause=0.2"]
    terminal = open_terminal(gateway.url, token(), "ask", "x", *options)
    terminal.shows("1:1")
    worker.kill()
    launch.worker(redis.url, lease_seconds=1)
    assert terminal.wait(60) == 0
    text = " ".join(terminal.text.split())
    assert "attempt 2: its worker was lost; what came after 0-1 is void." in text
    answer = text.partition("The answer starts anew:")[2].partition("completed")[0]
    assert answer.split() == [f"2:{n}" for n in range(6)]


# -- terminals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", [20, 40])
def test_a_narrow_terminal_shows_everything(broker: Open, play: Play, columns: int) -> None:
    item = {"title": "A title that is rather long", "path": "docs/streams.md", "line": 12}
    play.then("progress", percent=25, message="Searching in all of the documents").gate()
    play.then("sources", stage="analyzed", count=1, items=[item])
    play.then("tool_call", id="1", tool="search", args={"query": "a rather long query, which does not fit"})
    play.then("token", text="An answer that does not fit into one row, 日本語 and all.")
    terminal = broker("ask", "x", *play.options, columns=columns)
    terminal.shows(" 25 %")
    assert len(terminal.display.rows) == 1
    play.open(1)
    assert terminal.wait() == 0
    assert "An answer that does not fit into one row, 日本語 and all." in terminal.text.splitlines()
    assert "A title that" in terminal.text
    [call] = [line for line in terminal.text.splitlines() if line.startswith("→")]
    assert call.endswith("…")


def test_a_window_may_change_its_size(broker: Open, play: Play) -> None:
    play.then("progress", percent=25).gate().then("tool_call", id="1", tool="t", args={"q": "x" * 200})
    play.then("token", text="done")
    terminal = broker("ask", "x", *play.options, columns=80)
    terminal.shows(" 25 %")
    terminal.resize(40)
    play.open(1)
    assert terminal.wait() == 0
    [call] = [line for line in terminal.text.splitlines() if line.startswith("→")]
    assert len(call) == 40


def test_no_color_is_respected(broker: Open) -> None:
    terminal = broker("ask", "x", "--agent", "misbehaves", "--param", "what=error", NO_COLOR="1")
    assert terminal.wait() == 1
    assert "error no_quota" in terminal.text
    assert not re.search(rb"\x1b\[[\d;]*3[0-7]", terminal.raw)


def test_a_dumb_terminal_gets_plain_text(broker: Open, play: Play) -> None:
    play.then("progress", percent=25).then("reasoning", text="hm").then("token", text="done")
    play.then("error", code="c", message="m")
    terminal = broker("ask", "x", *play.options, TERM="dumb")
    assert terminal.wait() == 1
    assert b"\x1b" not in terminal.raw
    assert terminal.text.splitlines() == ["hm", "", "done", "", "error c: m"]


def test_without_utf_8_nothing_fails(broker: Open, play: Play) -> None:
    play.then("progress", percent=50).then("token", text="日本 é").then("tool_call", id="1", tool="t", args={"q": "日"})
    terminal = broker("ask", "x", *play.options, LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    assert terminal.wait() == 0
    assert terminal.text.splitlines()[:3] == ["?? ?", "", "> t(q=?)"]


# -- other commands --------------------------------------------------------------------------------------------------


def test_runs_and_their_ids_fit_a_narrow_terminal(broker: Open) -> None:
    assert broker("ask", "x", "--session", "mine").wait() == 0
    terminal = broker("runs", columns=40)
    assert terminal.wait() == 0
    [first, second] = terminal.text.splitlines()
    assert re.fullmatch("[0-9a-f]{32}", first)
    assert second.split()[0] == "completed"


@pytest.mark.parametrize("columns", [100, 30])
def test_show_has_everything_in_color_and_cuts_no_word_of_the_answer(
    broker: Open, play: Play, alice: Client, columns: int
) -> None:
    answer = "a line that is longer than the window is wide [1], which the terminal itself wraps: " * 2
    citation = {"number": 1, "title": "Streams " * 20, "path": "docs/a.md", "line": 3}
    play.then("token", text=answer).then("final", citations=[citation], usage={"total_tokens": 7})
    asked = broker("ask", "x", "--detach", *play.options)
    assert asked.wait() == 0
    request_id = asked.text.split()[0]
    alice.finished(request_id)
    terminal = broker("show", request_id, columns=columns)
    assert terminal.wait() == 0
    assert terminal.display.styles("completed") == {"32"}
    assert terminal.display.styles("events") == {"2"}
    lines = terminal.text.splitlines()
    assert re.search(r"^usage: total_tokens +7$", terminal.text, re.MULTILINE)
    assert answer.rstrip() in lines
    assert lines[-1].startswith("[1] Streams") and lines[-1].endswith("…") and len(lines[-1]) == columns
    assert [line for line in lines if len(line) > columns] == [answer.rstrip()]


def test_erasing_a_subjects_runs_asks_first(broker: Open, subject: str, alice: Client) -> None:
    assert broker("ask", "x").wait() == 0
    refused = broker("delete", "--subject", subject)
    refused.shows(f"Erase 1 run of {subject}, for good? [y/N]")
    refused.type("n\n")
    assert refused.wait() == 1
    assert refused.text.splitlines()[-1] == "Nothing was erased."
    assert len(alice.get("/api/v1/runs").json()["runs"]) == 1
    agreed = broker("delete", "--subject", subject)
    agreed.shows("[y/N]")
    agreed.type("y\n")
    assert agreed.wait() == 0
    assert agreed.text.splitlines()[-1] == f"1 run of {subject} erased"
    assert alice.get("/api/v1/runs").json()["runs"] == []
