"""The command `broker`: help, one-line errors, exit codes, tokens, and several gateways on one port."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from broker import __version__
from broker.cli import cli
from tests.conftest import Launcher, Service
from tests.kit.command import broker, check_one_line, here
from tests.kit.http import Client
from tests.kit.processes import SECRET, Process, environment, wait_for
from tests.kit.redis_server import RedisServer, free_port

COMMANDS = [*cli.commands]


# Help and usage


def test_the_help_names_every_command() -> None:
    for run in (broker, here):
        done = run("--help")
        assert (done.returncode, done.stderr) == (0, "")
        for name in COMMANDS:
            assert re.search(rf"^  {name} +\w", done.stdout, re.MULTILINE), name


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_has_its_help(command: str) -> None:
    done = here(command, "-h")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("Usage:")
    assert "--help" in done.stdout


def test_the_help_needs_no_settings() -> None:
    for command in COMMANDS:
        assert here(command, "--help", lease_seconds="nonsense", jwt_secret=None).returncode == 0


def test_the_version_is_that_of_the_package() -> None:
    done = here("--version")
    assert (done.returncode, done.stdout.split()[-1]) == (0, __version__)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["nonsense"], "nonsense"),
        (["--nonsense"], "--nonsense"),
        (["serve", "--nonsense"], "--nonsense"),
        (["serve", "--port", "x"], "--port"),
        (["serve", "--port", "65536"], "--port"),
        (["serve", "--port", "-1"], "--port"),
        (["serve", "--processes", "0"], "--processes"),
        (["serve", "extra"], "extra"),
        (["worker", "extra"], "extra"),
        (["token"], "--sub"),
        (["token", "--sub", "a", "--ttl", "0"], "--ttl"),
        (["demo", "--docs", "/no/such/folder"], "/no/such/folder"),
        (["ask", "x", "--after", "5"], "--after"),
        (["ask", "x", "--param", "pace"], "--param"),
        (["runs", "--status", "gone"], "--status"),
        (["runs", "--limit", "0"], "--limit"),
        (["completion", "tcsh"], "tcsh"),
        (["cancel"], "REQUEST_ID"),
        (["cancel", "0" * 32, "abc"], "'abc' is not the id of a run, which has 32 digits"),
        (["tail", "0" * 31 + "A"], "is not the id of a run"),
        (["delete", "x\x1b[2J"], r"'x\x1b[2J'"),
        (["doctor", "--seconds", "1"], "--seconds"),
    ],
)
def test_wrong_usage_is_said_and_is_exit_code_2(arguments: list[str], named: str) -> None:
    done = here(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert "Traceback" not in done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("Error: ") and named in last


# Errors


@pytest.mark.parametrize("command", [["serve"], ["worker"], ["token", "--sub", "a"]])
def test_a_setting_that_is_wrong_is_one_line_that_names_it(command: list[str]) -> None:
    for run in (here, broker) if command == ["worker"] else (here,):
        line = check_one_line(run(*command, lease_seconds="soon"), 1)
        assert line.startswith("broker: BROKER_LEASE_SECONDS: ")


@pytest.mark.parametrize("processes", ["1", "2"])
def test_a_port_that_is_taken_is_one_line_that_names_it(processes: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        line = check_one_line(here("serve", "--port", str(port), "--processes", processes), 1)
        assert line == f"broker: cannot listen on 127.0.0.1:{port}: Address already in use"


@pytest.mark.parametrize("host", ["192.0.2.1"])
def test_an_address_that_is_not_ours_is_one_line_that_names_it(host: str) -> None:
    line = check_one_line(here("serve", "--host", host, "--port", str(free_port())), 1)
    assert line.startswith(f"broker: cannot listen on {host}:")


@pytest.mark.parametrize(
    ("agents", "named"),
    [
        ("a=no_such_module:f", "no_such_module"),
        ("a=tests.kit.agents:no_such_function", "no_such_function"),
        ("a=json:__name__", "__name__"),
        ("a=tests.integration.test_cli:raises_when_imported.x", "BROKER_AGENTS"),
    ],
)
def test_an_agent_that_cannot_be_loaded_is_one_line_that_names_it(agents: str, named: str) -> None:
    line = check_one_line(here("worker", agents=agents, default_agent="a"), 1)
    assert line.startswith("broker: BROKER_AGENTS: ")
    assert named in line


def test_the_debug_variable_shows_the_traceback() -> None:
    done = broker("token", "--sub", "a", jwt_secret=None, debug=1)
    assert done.returncode == 1
    assert "Traceback" in done.stderr


# Tokens


def authorized(service: Service, token: str) -> int:
    url = f"{service.gateways[0].url}/api/v1/runs"
    return httpx.get(url, headers={"Authorization": f"Bearer {token}"}, verify=False).status_code


def test_a_token_is_accepted_by_the_gateway_and_opens_its_subjects_runs(service: Service, subject: str) -> None:
    done = broker("token", "--sub", subject)
    assert (done.returncode, done.stderr) == (0, "")
    [token] = done.stdout.splitlines()
    assert authorized(service, token) == 200
    with service.client(subject) as client:
        request_id = client.submit("mine")
    mine = {"Authorization": f"Bearer {token}"}
    assert (
        httpx.get(f"{service.gateways[0].url}/api/v1/runs/{request_id}", headers=mine, verify=False).status_code == 200
    )
    others = {"Authorization": f"Bearer {here('token', '--sub', 'x').stdout.strip()}"}
    assert (
        httpx.get(f"{service.gateways[0].url}/api/v1/runs/{request_id}", headers=others, verify=False).status_code
        == 404
    )
    overseer = here("token", "--sub", "x", "--tenant", subject, "--scope", "other", "--scope", "broker:tenant")
    sees = {"Authorization": f"Bearer {overseer.stdout.strip()}"}
    assert (
        httpx.get(f"{service.gateways[0].url}/api/v1/runs/{request_id}", headers=sees, verify=False).status_code == 200
    )


def test_a_token_lives_as_long_as_it_was_told(service: Service) -> None:
    token = here("token", "--sub", "short", "--ttl", "1").stdout.strip()
    gateway = service.gateways[0]
    leeway = gateway.log_lines()[0]["settings"]["jwt_leeway_seconds"]
    assert authorized(service, token) == 200
    assert leeway == 10, "else this test waits for something else"
    import jwt

    claims = jwt.decode(token, SECRET, algorithms=["HS256"], audience="stream-broker")
    assert claims["exp"] - claims["iat"] in (1, 2)


@pytest.mark.parametrize(
    ("arguments", "settings", "named"),
    [
        (["--sub", "a"], {"jwt_secret": None}, "BROKER_JWT_SECRET"),
        (["--sub", "a"], {"jwt_secret": "short"}, "BROKER_JWT_SECRET"),
        (["--sub", "a"], {"jwt_algorithms": "RS256", "jwt_jwks_url": "https://a.example"}, "BROKER_JWT_ALGORITHMS"),
        (["--sub", ""], {}, "sub"),
        (["--sub", "a\nb"], {}, "sub"),
        (["--sub", "x" * 256], {}, "sub"),
        (["--sub", "a", "--tenant", ""], {}, "tenant"),
    ],
)
def test_a_token_that_no_gateway_would_accept_is_not_made(
    arguments: list[str], settings: dict[str, Any], named: str
) -> None:
    line = check_one_line(here("token", *arguments, **settings), 1)
    assert line.startswith("broker: ")
    assert named in line


# Processes


@pytest.fixture(scope="module")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    launcher = Launcher(tmp_path_factory.mktemp("cli"))
    try:
        yield launcher.redis()
    finally:
        launcher.close()


class Gateways(Process):
    """`broker serve --processes n`."""

    def __init__(self, redis: RedisServer, folder: Path, count: int) -> None:
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        command = ["serve", "--port", str(port), "--processes", str(count)]
        super().__init__(command, environment(redis.url), folder / "gateways.log")

    def children(self) -> dict[int, psutil.Process]:
        with contextlib.suppress(psutil.NoSuchProcess):
            return {child.pid: child for child in psutil.Process(self.pid).children()}
        return {}

    def ready(self) -> bool:
        assert self.popen.poll() is None, self.log_text()
        try:
            return httpx.get(f"{self.url}/readyz", headers={"Connection": "close"}, verify=False).status_code == 200
        except httpx.TransportError:
            return False

    def serving(self) -> set[int]:
        """Which of the processes have an open connection, of the forty that this opens."""
        with contextlib.ExitStack() as stack:
            for _ in range(40):
                client = stack.enter_context(httpx.Client(base_url=self.url, verify=False))
                assert client.get("/healthz").status_code == 200
            return {pid for pid, child in self.children().items() if has_connection(child, self.url)}


def has_connection(process: psutil.Process, url: str) -> bool:
    port = httpx.URL(url).port
    with contextlib.suppress(psutil.NoSuchProcess):
        return any(
            found.status == psutil.CONN_ESTABLISHED and found.laddr.port == port
            for found in process.net_connections("tcp")
        )
    return False


@pytest.fixture
def two(redis: RedisServer, tmp_path: Path) -> Iterator[Gateways]:
    gateways = Gateways(redis, tmp_path, 2)
    try:
        wait_for(lambda: gateways.ready() and len(gateways.children()) == 2, seconds=20)
        wait_for(lambda: len(gateways.logged("listening")) == 2)
        yield gateways
    finally:
        children = gateways.children()
        gateways.kill()
        for child in children.values():
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()


def test_two_gateways_share_a_port_and_end_together_on_sigterm(two: Gateways) -> None:
    children = set(two.children())
    wait_for(lambda: two.serving() == children)
    with Client(two.url) as client:
        assert client.submit("through one of them")
    assert two.stop() == 0
    assert not [pid for pid in children if psutil.pid_exists(pid)], "a child was left behind"
    assert len(two.logged("draining")) == 2


def test_a_gateway_of_two_that_dies_is_started_again_while_the_other_serves(two: Gateways) -> None:
    first, second = two.children()
    os.kill(first, signal.SIGKILL)
    for _ in range(30):
        assert two.ready()
        time.sleep(0.02)
    wait_for(lambda: len(two.children()) == 2 and first not in two.children())
    assert second in two.children()
    wait_for(lambda: two.serving() == set(two.children()))
    assert two.stop() == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("command", ["serve", "worker"])
def test_a_process_that_is_asked_to_end_exits_0(
    launch: Launcher, redis: RedisServer, command: str, number: signal.Signals
) -> None:
    process: Process = launch.gateway(redis.url) if command == "serve" else launch.worker(redis.url)
    process.signal(number)
    assert process.wait() == 0
    assert "Traceback" not in process.log_text()


@pytest.mark.parametrize("processes", ["1", "2"])
def test_a_key_that_is_missing_is_one_line_however_many_gateways_there_are(processes: str) -> None:
    run = broker if processes == "2" else here
    done = run("serve", "--port", str(free_port()), "--processes", processes, jwt_algorithms="RS256")
    assert check_one_line(done, 1).startswith("broker: BROKER_JWT_JWKS_URL")
