"""ask, tail, runs, show, cancel and delete against a real service, without a terminal: what scripts see."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.conftest import Launcher, Service
from tests.kit.command import Done, check_one_line, here
from tests.kit.http import Client, token
from tests.kit.processes import environment, wait_for

RID = re.compile(r"[0-9a-f]{32}")


class User:
    """A user of the command line, with the environment that users have."""

    def __init__(self, url: str, bearer: str) -> None:
        self.settings = {"url": url, "token": bearer}
        self._started: list[subprocess.Popen[bytes]] = []
        self.environment = environment("redis://127.0.0.1:1", **self.settings)
        self.environment.pop("PYTHONUNBUFFERED", None)

    def broker(self, *arguments: str) -> Done:
        return here(*arguments, **self.settings)

    def start(self, *arguments: str, second_seconds: float = 0.5, **options: Any) -> subprocess.Popen[bytes]:
        """`second_seconds` is how long a second Ctrl-C counts."""
        code = f"from broker.cli import interrupts, main; interrupts.SECOND_SECONDS = {second_seconds}; main()"
        command = [sys.executable, "-c", code, *arguments]
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        process = subprocess.Popen(command, env=self.environment, **{**pipes, **options})
        self._started.append(process)
        return process

    def close(self) -> None:
        for process in self._started:
            process.kill()
            process.communicate()

    def asked(self, query: str, *arguments: str) -> str:
        """Submits, and returns the run's id."""
        done = self.broker("ask", query, "--detach", *arguments)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()


@pytest.fixture
def user(service: Service, subject: str) -> Iterator[User]:
    made = User(service.gateways[0].url, token(subject))
    yield made
    made.close()


@pytest.fixture
def overseer(service: Service, subject: str) -> User:
    """Of the same tenant, which is the subject's own name where the token names none."""
    return User(service.gateways[0].url, token("overseer", tenant=subject, scope="broker:tenant"))


def until(process: subprocess.Popen[bytes], text: str) -> dict[str, Any]:
    """Reads events up to the one in which `text` is."""
    assert process.stdout is not None
    for line in iter(process.stdout.readline, b""):
        if text in line.decode():
            event: dict[str, Any] = json.loads(line)
            return event
    raise AssertionError(f"the stream has ended without {text!r}")


def script(*events: tuple[str, Any]) -> list[str]:
    return ["--agent", "plays", "--param", "script=" + json.dumps(events)]


# -- the plain answer ------------------------------------------------------------------------------------------------


def test_piped_output_is_the_answer_and_nothing_else(user: User) -> None:
    done = user.broker("ask", "one two three")
    assert (done.returncode, done.stdout, done.stderr) == (0, "one two three\n", "")


def test_progress_sources_and_tools_are_not_in_the_plain_answer(user: User) -> None:
    done = user.broker("ask", "x", "--agent", "speaks", "--param", 'texts=["first", "an answer"]')
    assert (done.returncode, done.stdout, done.stderr) == (0, "an answer\n", "")


def test_the_plain_answer_is_exactly_the_runs_answer(user: User, alice: Client) -> None:
    text = "\t two  lines\n\n日本語 \x1b[31m and \u2028 all\n"
    done = user.start("ask", "x", *script(("token", {"text": text})))
    out, err = done.communicate(timeout=30)
    assert (done.returncode, out, err) == (0, text.encode(), b"")


def test_a_query_is_read_from_a_pipe(user: User) -> None:
    for arguments in (["ask"], ["ask", "-"]):
        process = user.start(*arguments, stdin=subprocess.PIPE)
        out, err = process.communicate("from a pipe: é\n".encode(), timeout=30)
        assert (process.returncode, out, err) == (0, "from a pipe: é\n".encode(), b"")


def test_an_empty_pipe_is_no_query(user: User) -> None:
    process = user.start("ask")
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (2, b"")
    assert err.endswith(b"Error: Standard input is empty, so there is no query.\n")


def test_a_run_that_fails_is_exit_code_1_and_its_error_stands_on_standard_error(user: User) -> None:
    done = user.broker("ask", "x", "--agent", "misbehaves", "--param", "what=error")
    assert done.returncode == 1
    assert done.stdout == "before \n"
    assert done.stderr == "error no_quota: Come back tomorrow.\n"


def test_a_run_that_is_cancelled_is_exit_code_3(user: User) -> None:
    request_id = user.asked("x", "--agent", "hangs")
    process = user.start("tail", request_id)
    assert user.broker("cancel", request_id).stdout == f"{request_id} cancelled\n"
    _, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (3, b"cancelled\n")


def test_after_a_rewind_the_plain_answer_is_that_of_the_last_attempt(
    launch: Launcher, request: pytest.FixtureRequest
) -> None:
    redis = launch.redis()
    gateway = launch.gateway(redis.url)
    worker = launch.worker(redis.url, lease_seconds=1)
    user = User(gateway.url, token())
    request.addfinalizer(user.close)
    process = user.start("ask", "x", "--agent", "steps", "--param", "count=8", "--param", "pause=0.2", "--json")
    until(process, '"1:1 "')
    [run] = [json.loads(line) for line in user.broker("runs", "--json").stdout.splitlines()]
    plain = user.start("tail", run["request_id"])
    worker.kill()
    launch.worker(redis.url, lease_seconds=1)
    out, err = plain.communicate(timeout=60)
    assert (out.decode(), err) == ("".join(f"2:{n} " for n in range(8)) + "\n", b"")
    process.communicate(timeout=60)
    shown = json.loads(user.broker("show", run["request_id"], "--json").stdout)
    first, second = shown["account"]["attempts"]
    assert (first["reason"], second["reason"]) == ("started", "worker_lost")
    assert shown["account"]["void"] == first["void"]
    assert first["void"]["token_events"] >= 2
    assert second["void"]["token_events"] == 0
    text = user.broker("show", run["request_id"]).stdout
    assert f"of which {first['void']['token_events']} pieces of text: the cost of retries" in text
    assert re.search(r"^attempt 2 \(worker_lost\): began after \d", text, re.MULTILINE)


def test_a_pipe_that_is_closed_ends_the_command_without_a_word(user: User) -> None:
    request_id = user.asked("x", "--agent", "tokens", "--param", "count=3000", "--param", "pause=0.001")
    process = user.start("tail", request_id, "--json")
    assert process.stdout is not None
    assert json.loads(process.stdout.readline())["type"] == "start"
    process.stdout.close()
    assert process.stderr is not None
    assert process.stderr.read() == b""
    assert process.wait(30) == 141


def test_an_output_that_takes_nothing_is_one_line(user: User) -> None:
    with Path("/dev/full").open("wb") as full:
        process = user.start("ask", "x", stdout=full)
        _, err = process.communicate(timeout=30)
    assert process.returncode == 1
    assert err.decode().splitlines() == ["broker: [Errno 28] No space left on device"]


def test_without_utf_8_the_answer_has_what_the_encoding_has(user: User) -> None:
    user.environment |= {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    process = user.start("ask", "x", *script(("token", {"text": "日 é a…"})))
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err) == (0, b"? ? a~\n", b"")


@pytest.mark.parametrize("closed", ["0<&-", "1>&-", "2>&-", "0<&- 1>&- 2>&-"])
def test_a_standard_stream_may_be_closed(user: User, closed: str) -> None:
    command = [sys.executable, "-m", "broker", "ask", "hello"]
    shell = ["sh", "-c", f'exec "$@" {closed}', "sh", *command]
    done = subprocess.run(shell, env=user.environment, capture_output=True, timeout=30, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout == (b"" if "1>&-" in closed else b"hello\n")


# -- JSON ------------------------------------------------------------------------------------------------------------


def test_json_is_the_log_one_event_a_line(user: User, alice: Client) -> None:
    done = user.broker("ask", "x", "--agent", "varied", "--param", "count=40", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    got = [json.loads(line) for line in done.stdout.splitlines()]
    request_id = got[0]["data"]["request_id"]
    assert [(event["id"], event["type"], event["data"]) for event in got] == [
        (str(entry.id), entry.type, json.loads(entry.data)) for entry in alice.log(request_id)
    ]
    assert all(event.keys() == {"id", "type", "data"} for event in got)


def test_json_comes_as_the_events_come(user: User, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    events = (("token", {"text": "one"}), ("until", str(gate)), ("token", {"text": "two"}))
    process = user.start("ask", "x", "--json", *script(*events))
    until(process, '"one"')
    gate.touch()
    out, _ = process.communicate(timeout=30)
    assert [json.loads(line)["type"] for line in out.splitlines()] == ["token", "final"]
    assert process.returncode == 0


def test_after_an_event_comes_what_follows_it(user: User) -> None:
    request_id = user.asked("a b c d")
    whole = user.broker("tail", request_id, "--json").stdout.splitlines()
    for at in range(len(whole) - 1):
        after = json.loads(whole[at])["id"]
        done = user.broker("tail", request_id, "--json", "--after", after)
        assert (done.returncode, done.stdout.splitlines()) == (0, whole[at + 1 :])


def test_after_the_end_comes_nothing_and_the_exit_code_is_the_runs(user: User) -> None:
    request_id = user.asked("x", "--agent", "misbehaves", "--param", "what=error")
    last = json.loads(user.broker("tail", request_id, "--json").stdout.splitlines()[-1])["id"]
    done = user.broker("tail", request_id, "--json", "--after", last)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"Nothing follows {last}: the run is failed.\n"


# -- ask -------------------------------------------------------------------------------------------------------------


def test_detached_it_prints_the_id_and_the_run_goes_on(user: User, alice: Client) -> None:
    done = user.broker("ask", "x", "--detach", "--session", "mine", "--agent", "echo")
    assert (done.returncode, done.stderr) == (0, "")
    assert RID.fullmatch(done.stdout.strip())
    run = alice.finished(done.stdout.strip())
    assert (run["status"], run["session_id"], run["agent"]) == ("completed", "mine", "echo")


def test_detached_as_json_it_prints_what_was_accepted(user: User) -> None:
    done = user.broker("ask", "x", "--detach", "--json", "--session", "s", "--agent", "hangs")
    accepted = json.loads(done.stdout)
    assert (accepted["session_id"], accepted["joined"]) == ("s", False)
    again = json.loads(user.broker("ask", "x", "--detach", "--json", "--session", "s", "--agent", "hangs").stdout)
    assert (again["request_id"], again["joined"]) == (accepted["request_id"], True)
    user.broker("cancel", accepted["request_id"])


def test_parameters_reach_the_agent_as_what_they_are(user: User) -> None:
    parameters = ["n=3", "on=true", "name=bob", 'list=["a", 1]', "odd=1.2.3"]
    options = [part for parameter in parameters for part in ("--param", parameter)]
    done = user.broker("ask", "x", "--agent", "about", "--json", *options)
    [about] = [event["data"]["value"] for event in map(json.loads, done.stdout.splitlines()) if event["type"] == "data"]
    assert about["parameters"] == {"n": 3, "on": True, "name": "bob", "list": ["a", 1], "odd": "1.2.3"}


def test_an_idempotency_key_gives_the_run_that_it_has_started(user: User) -> None:
    first = user.asked("x", "--idempotency-key", "k1")
    assert user.broker("tail", first).returncode == 0
    assert user.asked("x", "--idempotency-key", "k1") == first
    assert user.asked("x", "--idempotency-key", "k2") != first


def test_asked_again_after_an_event_it_joins_the_run_under_way(user: User, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    texts: list[tuple[str, Any]] = [("token", {"text": text}) for text in ("one", "two", "three")]
    play = script(*texts[:2], ("until", str(gate)), texts[2])
    first = user.start("ask", "x", "--json", *play)
    seen = until(first, '"one"')
    second = user.start("ask", "x", "--json", "--after", seen["id"], *play)
    assert second.stdout is not None
    assert json.loads(second.stdout.readline())["data"] == {"text": "two"}
    gate.touch()
    out, err = second.communicate(timeout=30)
    assert [json.loads(line)["type"] for line in out.splitlines()] == ["token", "final"]
    assert err == b""
    first.communicate(timeout=30)


def test_a_cursor_of_a_run_that_has_ended_is_not_that_of_a_new_one(user: User) -> None:
    done = user.broker("ask", "new", "--json", "--after", "5-1")
    assert done.returncode == 0
    assert json.loads(done.stdout.splitlines()[0])["type"] == "start"
    assert done.stderr == "No run of this query was under way: this is a new one, from its beginning.\n"


# -- Ctrl-C without a terminal ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("json_option", [["--json"], []])
def test_sigint_detaches_and_says_how_to_come_back(user: User, alice: Client, json_option: list[str]) -> None:
    request_id = user.asked("x", "--agent", "hangs")
    process = user.start("tail", request_id, *json_option)
    if json_option:
        until(process, "waiting")
    else:
        wait_for(lambda: has_connection(process))
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    last = alice.run(request_id)["last_event_id"]
    after = f" --after {last}" if json_option else ""
    assert err.decode().splitlines()[0] == (
        f"Detached, and the run goes on. Come back with: broker tail {request_id}{after}"
    )
    assert alice.run(request_id)["status"] == "running"
    user.broker("cancel", request_id)


@pytest.mark.parametrize("json_option", [["--json"], []])
def test_a_second_sigint_cancels(user: User, alice: Client, json_option: list[str]) -> None:
    request_id = user.asked("x", "--agent", "hangs")
    process = user.start("tail", request_id, *json_option, second_seconds=60)
    if json_option:
        until(process, "waiting")
    else:
        wait_for(lambda: has_connection(process))
    process.send_signal(signal.SIGINT)
    assert process.stderr is not None
    assert process.stderr.readline().startswith(b"Detached")
    assert process.stderr.readline() == b"Ctrl-C again cancels it.\n"
    assert alice.run(request_id)["status"] == "running"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (3, b"cancelled\n")
    assert alice.run(request_id)["status"] == "cancelled"


def has_connection(process: subprocess.Popen[bytes]) -> bool:
    """Whether it has come so far."""
    return bool(psutil.Process(process.pid).net_connections("tcp"))


# -- runs, show, cancel, delete --------------------------------------------------------------------------------------


def test_runs_are_listed_newest_first_by_status_and_session(user: User) -> None:
    ended = [user.asked(f"q{n}", "--session", f"s{n}") for n in range(3)]
    for request_id in ended:
        assert user.broker("tail", request_id).returncode == 0
    runs = user.asked("x", "--agent", "hangs")

    def ids(*options: str) -> list[str]:
        done = user.broker("runs", "--json", *options)
        assert (done.returncode, done.stderr) == (0, "")
        return [json.loads(line)["request_id"] for line in done.stdout.splitlines()]

    assert ids() == [runs, *reversed(ended)]
    assert ids("--limit", "2") == [runs, ended[2]]
    assert ids("--session", "s1") == [ended[1]]
    assert ids("--status", "completed") == list(reversed(ended))
    assert ids("--status", "completed", "--limit", "1") == [ended[2]]
    table = user.broker("runs").stdout.splitlines()
    assert table[0].split() == ["run", "status", "created", "took", "agent", "session"]
    assert [line.split()[0] for line in table[1:]] == ids()
    assert "s1" in table[3]
    user.broker("cancel", runs)


def test_without_runs_it_says_so(user: User) -> None:
    done = user.broker("runs")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "There are no such runs.\n")


def test_show_tells_everything_of_a_run(user: User) -> None:
    events = (
        ("token", {"text": "the answer"}),
        (
            "final",
            {
                "citations": [{"number": 1, "title": "Streams", "path": "docs/a.md", "line": 3}],
                "usage": {"total_tokens": 7, "model": "m"},
            },
        ),
    )
    request_id = user.asked("x", "--session", "mine", *script(*events))
    user.broker("tail", request_id)
    done = user.broker("show", request_id)
    assert (done.returncode, done.stderr) == (0, "")
    facts = dict(re.findall(r"^(\S[\w: ]*?)  +(\S.*?) *$", done.stdout, re.MULTILINE))
    assert facts["run"] == request_id
    assert facts["status"] == "completed"
    assert facts["session"] == "mine"
    assert facts["agent"] == "plays"
    assert facts["usage: total_tokens"] == "7"
    assert facts["events"] == "3 events, of which 1 piece of text"
    assert facts["queued"].endswith(" s")
    assert facts["running"].endswith(" s")
    assert "void" not in facts
    assert re.search(r"^attempt 1 \(started\): began after [\d.]+ s, lasted [\d.]+ s, 2 events$", done.stdout, re.M)
    assert "\nthe answer\n" in done.stdout
    assert "[1] Streams  docs/a.md:3" in done.stdout


def test_show_of_a_run_that_failed_has_its_error(user: User) -> None:
    request_id = user.asked("x", "--agent", "misbehaves", "--param", "what=error")
    user.broker("tail", request_id)
    assert re.search(r"^error +no_quota: Come back tomorrow\.", user.broker("show", request_id).stdout, re.M)


def test_show_as_json_is_the_run_and_its_account(user: User, alice: Client) -> None:
    request_id = user.asked("a b")
    user.broker("tail", request_id)
    shown = json.loads(user.broker("show", request_id, "--json").stdout)
    run = alice.run(request_id)
    assert {name: shown[name] for name in ("request_id", "status", "answer", "usage", "last_event_id")} == {
        name: run[name] for name in ("request_id", "status", "answer", "usage", "last_event_id")
    }
    assert shown["account"]["total"] == {"events": 4, "token_events": 2}
    assert shown["account"]["attempts"][0]["reason"] == "started"


def test_what_a_model_wrote_cannot_control_the_terminal_from_show(user: User) -> None:
    request_id = user.asked("x", *script(("token", {"text": "\x1b[2Jgone"})), "--session", "a\x9bb")
    user.broker("tail", request_id)
    out = user.broker("show", request_id).stdout
    assert "\x1b" not in out
    assert r"\x1b[2Jgone" in out
    assert r"a\x9bb" in out
    assert "\x9b" not in user.broker("runs").stdout


def test_text_that_utf_8_does_not_have_can_be_listed_and_shown(user: User, alice: Client) -> None:
    body = json.dumps({"query": "x", "metadata": {"b": "\ud800"}})
    sent = alice.post("/api/v1/query", content=body, headers={"Content-Type": "application/json"})
    request_id = sent.json()["request_id"]
    for arguments in (["runs"], ["runs", "--json"], ["show", request_id], ["show", request_id, "--json"]):
        process = user.start(*arguments)
        out, err = process.communicate(timeout=30)
        assert (process.returncode, err) == (0, b""), arguments
        assert request_id.encode() in out


def test_cancel_stops_each_and_says_what_had_ended(user: User) -> None:
    ended, runs = user.asked("x"), user.asked("x", "--agent", "hangs")
    user.broker("tail", ended)
    missing = "0" * 32
    done = user.broker("cancel", ended, missing, runs)
    assert done.returncode == 1
    assert done.stdout.splitlines() == [f"{ended} completed", f"{runs} cancelled"]
    assert done.stderr.startswith(f"broker: {missing}: There is no such run. ")


def test_delete_erases_runs(user: User) -> None:
    one, two = user.asked("one"), user.asked("two")
    done = user.broker("delete", one)
    assert (done.returncode, done.stdout) == (0, f"{one} erased\n")
    assert user.broker("show", one).returncode == 1
    assert user.broker("show", two).returncode == 0


def test_all_runs_of_a_subject_are_erased_by_whom_the_tenant_allows_it(
    user: User, overseer: User, subject: str, alice: Client
) -> None:
    gone = [user.asked(f"q{n}") for n in range(3)]
    for request_id in gone:
        user.broker("tail", request_id)
    asked = overseer.broker("delete", "--subject", subject)
    assert asked.returncode == 2
    assert f"Erase 3 runs of {subject}, for good?" in asked.stderr
    assert len(user.broker("runs", "--json").stdout.splitlines()) == 3
    done = overseer.broker("delete", "--subject", subject, "--yes")
    assert (done.returncode, done.stdout) == (0, f"3 runs of {subject} erased\n")
    assert [alice.get(f"/api/v1/runs/{request_id}").status_code for request_id in gone] == [404] * 3
    assert "There are no runs of" in overseer.broker("delete", "--subject", subject, "--yes").stderr


def test_others_have_no_runs_of_a_subject_to_erase(service: Service, user: User, subject: str) -> None:
    mine = user.asked("x")
    other = User(service.gateways[0].url, token("somebody-else"))
    done = other.broker("delete", "--subject", subject, "--yes")
    assert (done.returncode, done.stdout) == (0, "")
    assert done.stderr == f"There are no runs of {subject} that this token may see.\n"
    assert user.broker("show", mine).returncode == 0


@pytest.mark.parametrize("arguments", [[], ["0" * 32, "--subject", "x"]])
def test_delete_takes_runs_or_a_subject(user: User, arguments: list[str]) -> None:
    done = user.broker("delete", *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.endswith("Error: Name runs, or a --subject.\n")


# -- the way there ---------------------------------------------------------------------------------------------------


@pytest.fixture
def nowhere() -> Iterator[str]:
    """A port where nothing listens, and nothing will."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{taken.getsockname()[1]}"


def test_a_broker_that_does_not_answer_is_one_line_with_its_url(nowhere: str) -> None:
    line = check_one_line(here("runs", url=nowhere))
    assert line.startswith(f"broker: {nowhere} does not answer: ")
    assert line.endswith("Where it is, say --url or BROKER_URL; `broker demo` starts one.")


@pytest.mark.parametrize(
    "command", [["ask", "x"], ["tail", "0" * 32], ["runs"], ["show", "0" * 32], ["cancel", "0" * 32]]
)
def test_a_token_that_is_missing_is_one_line_that_says_how_to_get_one(service: Service, command: list[str]) -> None:
    done = here(*command, url=service.gateways[0].url)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("broker: ")
    assert "Set BROKER_TOKEN to a token that is valid now; `broker token --sub NAME` prints one" in done.stderr


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_a_run_that_cannot_be_followed_at_all_is_one_line(service: Service, user: User, options: list[str]) -> None:
    request_id = user.asked("x", "--agent", "hangs")
    check_one_line(here("tail", request_id, *options, url=service.gateways[0].url))
    user.broker("delete", request_id)
    line = check_one_line(user.broker("tail", request_id, *options))
    assert line.startswith("broker: There is no such run.")


def test_a_run_that_is_erased_meanwhile_is_one_line(user: User) -> None:
    request_id = user.asked("x", "--agent", "hangs")
    process = user.start("tail", request_id, "--json")
    until(process, "waiting")
    user.broker("delete", request_id)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 1
    [line] = err.decode().splitlines()
    assert line.startswith(f"broker: Run {request_id} no longer exists")


def test_an_agent_that_is_not_there_is_one_line_with_those_that_are(user: User) -> None:
    line = check_one_line(user.broker("ask", "x", "--agent", "nobody"))
    assert line.startswith("broker: agent: Unknown agent; this service has: ")
    assert "echo" in line


def test_a_run_that_is_not_there_is_one_line_that_says_where_to_look(user: User) -> None:
    line = check_one_line(user.broker("show", "0" * 32))
    assert line == ("broker: There is no such run. It may be another's, erased or expired: `broker runs` lists yours.")


def test_options_win_over_variables_and_may_stand_before_the_command(user: User, nowhere: str) -> None:
    url, bearer = user.settings["url"], user.settings["token"]
    for arguments in (
        ["runs", "--url", url, "--token", bearer],
        ["--url", url, "--token", bearer, "runs"],
        ["--url", nowhere, "--token", "x", "runs", "--url", url, "--token", bearer],
    ):
        done = here(*arguments, url=nowhere, token="nonsense")
        assert (done.returncode, done.stderr) == (0, "There are no such runs.\n"), arguments


def test_a_stream_that_cannot_go_on_says_how_to_come_back(service: Service, subject: str) -> None:
    user = User(service.gateways[0].url, token(subject, ttl=2 - 10))
    request_id = User(service.gateways[0].url, token(subject)).asked("x", "--agent", "hangs")
    done = user.broker("tail", request_id, "--json")
    assert done.returncode == 1
    back, error = done.stderr.splitlines()
    assert back.startswith(f"Come back with: broker tail {request_id} --after ")
    assert "BROKER_TOKEN" in error
    User(service.gateways[0].url, token(subject)).broker("cancel", request_id)


# -- what it costs ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [["--help"], ["completion", "fish"]])
def test_help_and_completion_load_no_library_but_clicks(arguments: list[str]) -> None:
    assert loaded(arguments) == set()


def test_the_client_side_loads_no_server_and_no_redis(user: User) -> None:
    assert loaded(["ask", "x"], user.environment) == {"httpx", "pydantic"}


def loaded(arguments: list[str], env: dict[str, str] | None = None) -> set[str]:
    """Which of the heavy libraries the command has loaded, without a terminal."""
    code = (
        "import sys, broker.cli\n"
        f"sys.argv = ['broker', *{arguments!r}]\n"
        "try:\n broker.cli.main()\nexcept SystemExit: pass\n"
        "print(*sys.modules, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=30, check=True)
    heavy = {"starlette", "uvicorn", "redis", "arq", "openai", "jwt", "fakeredis", "pydantic_settings", "uvloop"}
    return set(done.stderr.split()) & (heavy | {"httpx", "pydantic"})
