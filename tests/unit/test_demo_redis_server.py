"""Which Redis the demo takes, how it starts one, and whose the data directory is."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

import pytest
import redis

from broker.demo import redis_server
from broker.demo.redis_server import Choice
from broker.errors import Misconfigured
from broker.settings import redact_url
from tests.kit.processes import wait_for
from tests.kit.redis_server import redis_binary

BESIDE = Path("/venv/bin/redis-server")
ON_PATH = {"redis-server": "/usr/bin/redis-server", "valkey-server": "/usr/bin/valkey-server"}


def choose(
    environment: dict[str, str] | None = None, *, on_path: tuple[str, ...] = (), broken: tuple[str, ...] = ()
) -> Choice:
    return redis_server.choose(
        environment or {},
        on_path=lambda name: ON_PATH[name] if name in on_path else None,
        beside_python=BESIDE,
        works=lambda binary: str(binary) not in broken,
    )


def test_a_redis_that_the_user_names_is_used_and_none_is_started() -> None:
    url = "redis://elsewhere:6379"
    assert choose({"BROKER_REDIS_URL": url}, on_path=("redis-server",)) == Choice(url=url)


def test_an_empty_variable_names_no_redis() -> None:
    assert choose({"BROKER_REDIS_URL": ""}, on_path=("redis-server",)).binary == Path("/usr/bin/redis-server")


@pytest.mark.parametrize("name", ["valkey-server", "redis-server"])
def test_a_server_on_path_comes_before_the_one_beside_python(name: str) -> None:
    assert choose(on_path=(name,)) == Choice(binary=Path(ON_PATH[name]))


def test_the_server_beside_python_comes_before_the_fake() -> None:
    assert choose() == Choice(binary=BESIDE)


def test_a_server_that_does_not_run_here_is_passed_over() -> None:
    both = ("valkey-server", "redis-server")
    assert choose(on_path=both, broken=("/usr/bin/valkey-server",)).binary == Path("/usr/bin/redis-server")


def test_without_any_server_there_is_the_fake() -> None:
    choice = choose(broken=(str(BESIDE),))
    assert choice == Choice()
    assert choice.is_fake


def test_the_fake_can_be_forced() -> None:
    environment = {"BROKER_DEMO_REDIS": "fakeredis", "BROKER_REDIS_URL": "redis://elsewhere"}
    assert choose(environment, on_path=("redis-server",)).is_fake


def test_the_server_beside_a_virtual_environments_python_is_found_without_following_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    binaries = tmp_path / "venv" / "bin"
    binaries.mkdir(parents=True)
    (binaries / "python").symlink_to(sys.executable)
    server = binaries / "redis-server"
    server.write_text("#!/bin/sh\n")
    server.chmod(0o755)
    for name in ("BROKER_REDIS_URL", "BROKER_DEMO_REDIS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(sys, "executable", str(binaries / "python"))
    assert redis_server.find() == Choice(binary=server)
    server.write_text("not a program")
    assert redis_server.find().is_fake


@pytest.fixture
def short() -> Iterator[Path]:
    """A directory whose path is short enough for a socket, also below a long temporary one."""
    folder = Path(tempfile.mkdtemp(prefix="sb", dir="/tmp"))
    yield folder
    shutil.rmtree(folder)


def _servers() -> list[str]:
    beside = Path(sys.executable).parent / "redis-server"
    return sorted({redis_binary(), *([str(beside)] if beside.exists() else [])})


@pytest.mark.parametrize("binary", _servers())
@pytest.mark.parametrize("name", ["plain", 'a [b] "c" \\ ünïcode % ?x=1#y*', "long" * 30])
def test_the_server_starts_on_its_configuration(binary: str, name: str, short: Path) -> None:
    server = redis_server.prepare(Path(binary), short / name)
    with (short / "log").open("wb") as log:
        process = subprocess.Popen(server.command, stdout=log, stderr=log)
    try:
        with redis.Redis.from_url(server.url) as client:
            wait_for(lambda: answers(client, process))
            wanted = {
                "appendonly": "yes",
                "appendfsync": "everysec",
                "maxmemory-policy": "noeviction",
                "save": "",
                "dir": str(short / name / "redis"),
                "protected-mode": "yes",
            }
            found = {key: client.config_get(key)[key] for key in wanted}
            client.set("key", "value")
            process.terminate()
            assert process.wait(10) == 0
    finally:
        process.kill()
        process.wait()
    assert found == wanted
    data = short / name / "redis"
    assert data.stat().st_mode & 0o777 == 0o700
    assert (data / "redis.conf").stat().st_mode & 0o777 == 0o600
    assert list(data.glob("appendonly*"))


def answers(client: redis.Redis, process: subprocess.Popen[bytes]) -> bool:
    assert process.poll() is None, "it did not start"
    try:
        return bool(client.ping())
    except redis.exceptions.ConnectionError:
        return False


def test_a_short_path_gets_a_socket_and_no_port(short: Path) -> None:
    server = redis_server.prepare(Path("redis-server"), short)
    text = (short / "redis" / "redis.conf").read_text()
    assert "port 0\n" in text
    assert unquote(server.url) == f"unix://{short}/redis/redis.sock"


def test_a_long_path_gets_a_port_on_loopback_with_a_password(tmp_path: Path) -> None:
    server = redis_server.prepare(Path("redis-server"), tmp_path / ("long" * 30))
    assert re.fullmatch(r"redis://:[0-9a-f]{32}@127\.0\.0\.1:\d+", server.url)
    assert re.fullmatch(r"redis://:\*\*\*@127\.0\.0\.1:\d+", redact_url(server.url))
    assert "bind 127.0.0.1\n" in (tmp_path / ("long" * 30) / "redis" / "redis.conf").read_text()


def test_a_directory_is_one_demos_at_a_time(tmp_path: Path) -> None:
    with redis_server.locked(tmp_path):
        refusal = pytest.raises(
            Misconfigured, match=rf"^{tmp_path} is in use by another demo \(process {os.getpid()}\)"
        )
        with refusal, redis_server.locked(tmp_path):
            pass
    with redis_server.locked(tmp_path):
        pass


def test_a_redis_that_outlived_its_demo_keeps_the_directory(tmp_path: Path) -> None:
    with redis_server.locked(tmp_path) as lock:
        orphan = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=[lock])
    try:
        ended = subprocess.Popen(["true"])
        ended.wait()
        (tmp_path / "lock").write_text(str(ended.pid))
        (tmp_path / "redis").mkdir()
        (tmp_path / "redis" / "redis.pid").write_text(f"{orphan.pid}\n")
        with (
            pytest.raises(Misconfigured, match=rf"the Redis of a demo that was killed \(process {orphan.pid}\)"),
            redis_server.locked(tmp_path),
        ):
            pass
    finally:
        orphan.communicate(b"\n")
    with redis_server.locked(tmp_path):
        pass


def test_a_directory_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(Misconfigured, match=f"cannot use {tmp_path}/file/demo"),
        redis_server.locked(tmp_path / "file/demo"),
    ):
        pass
