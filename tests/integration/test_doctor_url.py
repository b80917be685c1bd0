"""`broker doctor --url`: real gateways behind real proxies, good and bad ones."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from broker.doctor.finding import Finding, Severity
from broker.doctor.way import examine_way
from broker.settings import Settings
from tests.conftest import Launcher
from tests.kit import deploy, nginx
from tests.kit.command import broker, here
from tests.kit.containers import Container, nginx_command
from tests.kit.doctor import diagnosis, the
from tests.kit.http import Client, token
from tests.kit.model_stub import ModelStub
from tests.kit.processes import Gateway, Process, environment, wait_for
from tests.kit.redis_server import free_port
from tests.kit.whole_path import check_stream_and_poll

OK, NOTE, WARNING, ERROR = Severity
SECONDS = 4.0
HEARTBEAT = 2.0
"""What is told; gateways beat more often, for the machine may be busy."""
needs_nginx = pytest.mark.skipif(nginx.find() is None, reason="no nginx here")


@pytest.fixture(scope="module")
def launcher(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launcher]:
    launcher = Launcher(tmp_path_factory.mktemp("service"))
    try:
        yield launcher
    finally:
        launcher.close()


@pytest.fixture(scope="module")
def redis_url(launcher: Launcher) -> str:
    """With a worker."""
    url = launcher.redis().url
    launcher.worker(url)
    return url


@pytest.fixture(scope="module")
def gateway(launcher: Launcher, redis_url: str) -> Gateway:
    """With a heartbeat each second."""
    gateway = launcher.gateway(redis_url, heartbeat_seconds=HEARTBEAT / 2)
    with Client(gateway.url) as client:
        check_stream_and_poll(client)  # the worker takes runs
    return gateway


async def look(url: str, subject: str | None = "doctor", heartbeat: float = HEARTBEAT) -> list[Finding]:
    settings = Settings(heartbeat_seconds=heartbeat)
    return await examine_way(url, token(subject) if subject else None, seconds=SECONDS, settings=settings)


def complaints(findings: list[Finding]) -> dict[str, Severity]:
    return {finding.code: finding.severity for finding in findings if finding.severity > OK}


def runs_left(gateway: Gateway, subject: str = "doctor") -> int:
    with Client(gateway.url, subject) as client:
        return len(client.get("/api/v1/runs").json()["runs"])


@contextlib.contextmanager
def proxies(folder: Path, gateway: Gateway, rare: Gateway, ending: Gateway) -> Iterator[dict[str, str]]:
    """The URLs of proxies, most with one thing wrong."""
    ignoring = "proxy_ignore_headers X-Accel-Buffering;"
    gzip = "gzip on; gzip_types text/event-stream; gzip_min_length 1; gzip_proxied any;"
    public = "proxy_hide_header Cache-Control; add_header Cache-Control public;"
    kinds = {
        "plain": nginx.Nginx(folder / "plain", [gateway.port], buffering="on", http_version="1.0"),
        "buffers": nginx.Nginx(folder / "buffers", [gateway.port], buffering="on", http_version="1.0", extra=ignoring),
        "compresses": nginx.Nginx(folder / "compresses", [gateway.port], extra=gzip),
        "forgets": nginx.Nginx(folder / "forgets", [gateway.port], extra='proxy_set_header Last-Event-ID "";'),
        "caches": nginx.Nginx(folder / "caches", [gateway.port], extra=public),
        "cuts": nginx.Nginx(folder / "cuts", [rare.port], read_timeout="1s"),
        "ends": nginx.Nginx(folder / "ends", [ending.port], http_version="1.0"),
    }
    try:
        yield {name: each.until_ready().url for name, each in kinds.items()}
    finally:
        for each in kinds.values():
            each.close()


@pytest.fixture(scope="module")
def found(
    tmp_path_factory: pytest.TempPathFactory, launcher: Launcher, redis_url: str, gateway: Gateway
) -> dict[str, list[Finding]]:
    """What is found behind each; looked at all at once, for each takes seconds."""
    if nginx.find() is None:
        pytest.skip("no nginx here")
    rare = launcher.gateway(redis_url, heartbeat_seconds=30)
    ending = launcher.gateway(redis_url, max_stream_seconds=2)
    idle = launcher.gateway(launcher.redis().url)  # no worker is there

    async def look_at_all(urls: dict[str, str]) -> dict[str, list[Finding]]:
        urls = {**urls, "rare": rare.url, "ending": ending.url, "idle": idle.url}
        findings = await asyncio.gather(*(look(url, name) for name, url in urls.items()))
        return dict(zip(urls, findings, strict=True))

    with proxies(tmp_path_factory.mktemp("nginx"), gateway, rare, ending) as urls:
        return asyncio.run(look_at_all(urls))


def test_a_gateway_without_a_proxy_is_fine_and_nothing_is_left_behind(gateway: Gateway) -> None:
    arguments = ("--url", gateway.url, "--token", token("tidy"), "--seconds", str(SECONDS), "--json")
    findings = diagnosis(broker("doctor", *arguments, heartbeat_seconds=HEARTBEAT))
    assert complaints(findings) == {}
    codes = {finding.code for finding in findings}
    assert codes >= {"gateway_ready", "gateway_clock", "stream_headers", "stream_buffering", "stream_resume"}
    assert "heartbeats and" in the(findings, "stream_heartbeats").title
    assert runs_left(gateway, "tidy") == 0


def test_looking_costs_no_tokens_of_a_model(launcher: Launcher, monkeypatch: pytest.MonkeyPatch) -> None:
    with ModelStub() as stub:
        for name, value in stub.environment.items():
            monkeypatch.setenv(name, value)
        url = launcher.redis().url
        gateway = launcher.gateway(url, heartbeat_seconds=HEARTBEAT / 2)
        launcher.worker(url, model="m")
        findings = asyncio.run(look(gateway.url))
        assert complaints(findings) == {}
        assert "stream_resume" in {finding.code for finding in findings}
        assert stub.journal("") == []


def test_ctrl_c_leaves_nothing_behind_either(gateway: Gateway, tmp_path: Path) -> None:
    env = environment("redis://127.0.0.1:1") | {"BROKER_TOKEN": token("hasty")}
    process = Process(["doctor", "--url", gateway.url, "--seconds", "60"], env, tmp_path / "doctor.log")
    try:
        wait_for(lambda: runs_left(gateway, "hasty") == 2)
        process.signal(signal.SIGINT)
        assert process.wait() == 130
    finally:
        process.kill()
    assert runs_left(gateway, "hasty") == 0


@needs_nginx
async def test_the_projects_own_nginx_conf_is_fine(tmp_path: Path, gateway: Gateway) -> None:
    network = deploy.Network()
    conf = tmp_path / "nginx.conf"
    conf.write_text(deploy.nginx_conf(tmp_path, network.address("nginx"), lambda _: f"127.0.0.1:{gateway.port}"))
    url = f"http://{network.address('nginx')}:{deploy.directive('listen')[0].split()[0]}"
    process = Container(nginx_command(["nginx", "-g", "daemon off;"], conf), {}, tmp_path / "nginx.log")
    try:
        wait_for(lambda: nginx.readiness(url) == 200)
        assert complaints(await look(url)) == {}
    finally:
        process.ask()  # killed, it would leave its workers behind
        process.kill(after=5)


def test_a_plain_proxy_that_heeds_our_headers_is_fine(found: dict[str, list[Finding]]) -> None:
    assert complaints(found["plain"]) == {}


def test_a_proxy_that_buffers_is_found_with_the_setting_to_change(found: dict[str, list[Finding]]) -> None:
    finding = the(found["buffers"], "stream_buffering")
    assert finding.severity is ERROR
    assert "nginx" in finding.title and "proxy_buffering off" in finding.advice


def test_a_proxy_that_compresses_is_found(found: dict[str, list[Finding]]) -> None:
    finding = the(found["compresses"], "stream_compression")
    assert finding.severity is WARNING and "gzip" in finding.title


def test_a_proxy_that_drops_last_event_id_is_found(found: dict[str, list[Finding]]) -> None:
    assert complaints(found["forgets"]) == {"stream_resume": ERROR}


def test_a_proxy_that_lets_streams_be_cached_is_found(found: dict[str, list[Finding]]) -> None:
    assert complaints(found["caches"]) == {"stream_headers": WARNING}


def test_a_proxy_that_gives_less_time_than_passes_between_heartbeats_is_found(found: dict[str, list[Finding]]) -> None:
    finding = the(found["cuts"], "stream_cut")
    assert finding.severity is ERROR
    assert "proxy_read_timeout" in finding.advice and "nginx" in finding.title


def test_a_proxy_that_makes_a_proper_end_of_a_cut_is_found(found: dict[str, list[Finding]]) -> None:
    assert complaints(found["ends"]) == {"stream_cut": WARNING}


def test_heartbeats_that_are_rarer_than_they_should_be_are_found(found: dict[str, list[Finding]]) -> None:
    assert complaints(found["rare"]) == {"stream_heartbeats": WARNING}


def test_a_gateway_that_ends_its_streams_itself_is_no_fault(found: dict[str, list[Finding]]) -> None:
    assert complaints(found["ending"]) == {"stream_cut": NOTE}


def test_the_runs_of_all_probes_are_gone(found: dict[str, list[Finding]], gateway: Gateway) -> None:
    assert [runs_left(gateway, name) for name in found] == [0] * len(found)


def test_no_worker_is_found(found: dict[str, list[Finding]]) -> None:
    assert the(found["idle"], "probe_not_taken").severity is ERROR


async def test_a_token_that_is_missing_or_wrong_is_named(gateway: Gateway) -> None:
    missing = the(await look(gateway.url, None), "gateway_token")
    assert missing.severity is ERROR and "BROKER_TOKEN" in missing.advice
    [refused] = [f for f in await examine_way(gateway.url, "a.b.c", seconds=3, settings=Settings()) if f.severity > OK]
    assert (refused.code, refused.severity) == ("gateway_token", ERROR)


@pytest.mark.parametrize("characters", ["pelican.and.heron\n", "pelican and heron", "pélican.and.heron", "pelican\x07"])
def test_a_token_is_taken_as_all_commands_take_it_and_never_printed(gateway: Gateway, characters: str) -> None:
    """A file that a token is read from ends with a line feed."""
    done = here("doctor", "--url", gateway.url, "--json", token=characters)
    assert the(diagnosis(done), "gateway_token").severity is ERROR
    refused = "gateway refuses" if characters.isascii() and characters.endswith("\n") else "BROKER_TOKEN"
    assert refused in done.stdout
    assert "lican" not in done.stdout + done.stderr


def test_only_the_option_chooses_the_gateway_and_not_the_settings(gateway: Gateway) -> None:
    """BROKER_URL is exported for the other commands, often where the settings are too."""
    settings = {finding.code for finding in diagnosis(here("doctor", "--json", url=gateway.url))}
    assert "redis_unreachable" in settings
    nowhere = f"http://127.0.0.1:{free_port()}"
    for arguments in (("doctor", "--url", nowhere, "--json"), ("--url", nowhere, "doctor", "--json")):
        findings = diagnosis(here(*arguments, url=gateway.url))
        assert the(findings, "gateway_unreachable").severity is ERROR and nowhere in findings[0].title


async def test_a_gateway_without_its_redis_is_not_ready(launch: Launcher) -> None:
    gateway = launch.gateway(f"redis://127.0.0.1:{free_port()}", ready="/healthz")
    findings = await look(gateway.url)
    assert the(findings, "gateway_ready").severity is ERROR
    assert "not looked at" in the(findings, "stream_buffering").title


@needs_nginx
async def test_a_proxy_without_a_gateway_is_not_taken_for_one(tmp_path: Path) -> None:
    proxy = nginx.Nginx(tmp_path / "alone", [free_port()])
    try:
        wait_for(lambda: proxy.answer() == 502)
        finding = the(await look(proxy.url), "gateway_unreachable")
    finally:
        proxy.close()
    assert finding.severity is ERROR and "502" in finding.title


def test_what_a_server_says_cannot_control_the_terminal() -> None:
    """A problem document may hold anything."""
    evil = {"detail": "\x1b[2J\x1b]0;pwned\x07 gone"}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(503)
            self.end_headers()
            self.wfile.write(json.dumps(evil).encode())

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        done = here("--url", f"http://127.0.0.1:{server.server_port}", "doctor")
        server.shutdown()
    assert done.returncode == 2
    assert "gone" in done.stdout and "\x1b" not in done.stdout and "\x07" not in done.stdout


@pytest.mark.parametrize(
    "url",
    [
        "broker.example.com",
        "ftp://pelican:heron@x",
        "http://127.0.0.1:FREE",
        "http://127.0.0.1:x",
        "http://a..b",
        "http://[v1.x]",
    ],
)
async def test_a_url_without_a_gateway_is_one_error(url: str) -> None:
    finding = the(await look(url.replace("FREE", str(free_port()))), "gateway_unreachable")
    assert finding.severity is ERROR and finding.advice
    assert "heron" not in finding.title
