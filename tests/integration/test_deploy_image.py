"""deploy/Dockerfile without a container engine: what it copies is enough, and what it installs runs as it says."""

from __future__ import annotations

import fnmatch
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from tests.conftest import Launcher
from tests.kit import deploy
from tests.kit.containers import inherited
from tests.kit.http import Client
from tests.kit.processes import SECRET, Process, wait_for
from tests.kit.redis_server import free_port

NEVER = (".git/config", ".venv/bin/python", ".env", ".demo/redis/appendonly.aof", "deploy/compose.yaml", "tests/x.py")


def in_context(path: str) -> bool:
    """Whether .dockerignore lets a file into the build: the last pattern that fits it, or one of its folders, says."""
    included = True
    folders = ["/".join(path.split("/")[: n + 1]) for n in range(path.count("/") + 1)]
    for line in (deploy.ROOT / ".dockerignore").read_text("utf-8").splitlines():
        pattern = line.removeprefix("!")
        if line.startswith("#") or not line:
            continue
        patterns = [pattern, "*/" + pattern.removeprefix("**/")] if pattern.startswith("**/") else [pattern]
        if any(fnmatch.fnmatchcase(part, one) for part in folders for one in patterns):
            included = line.startswith("!")
    return included


def copied() -> list[list[str]]:
    """What the build stage copies from the context: [[source, …, target], …]."""
    return [shlex.split(words) for name, words in deploy.image() if name == "COPY" and not words.startswith("--from")]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project, installed from nothing but what the Dockerfile copies. Readable for every user."""
    folder = tmp_path_factory.mktemp("image")
    context, target = folder / "src", folder / "site-packages"
    for *sources, where in copied():
        for source in sources:
            origin = deploy.ROOT / source
            files = [path for path in origin.rglob("*") if path.is_file()] if origin.is_dir() else [origin]
            for file in files:
                name = str(file.relative_to(deploy.ROOT))
                if in_context(name):
                    goal = context / where / (file.relative_to(origin) if origin.is_dir() else file.name)
                    goal.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(file, goal)
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    env = inherited() | {"PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    subprocess.run([*command, "--target", str(target), str(context)], check=True, env=env)
    for path in (target, *target.parents):
        if path.is_relative_to(folder.parents[1]):
            path.chmod(path.stat().st_mode | 0o055)
    return target


def test_nothing_but_the_project_gets_into_the_image() -> None:
    for sources in (words[:-1] for words in copied()):
        for source in sources:
            assert in_context(source), source
            assert (deploy.ROOT / source).exists(), source
    for path in NEVER:
        assert not in_context(path), path
    assert not in_context("broker/runs/__pycache__/keys.cpython-312.pyc")
    assert in_context("broker/runs/lua/append.lua")


def test_what_is_copied_is_all_that_is_needed(installed: Path) -> None:
    for package in ("broker", "worker"):
        for file in (deploy.ROOT / package).rglob("*"):
            if file.is_file() and "__pycache__" not in file.parts:
                assert (installed / file.relative_to(deploy.ROOT)).is_file(), file
    assert not (installed / "tests").exists()
    done = broker(installed, "--version")
    assert done.returncode == 0, done.stderr


def broker(installed: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "broker", *arguments]
    env = inherited() | {"PYTHONPATH": str(installed)}
    return subprocess.run(command, env=env, cwd="/", capture_output=True, text=True, timeout=30, check=False)


# -- as the user of the image, on a read-only file system ----------------------------------------------------

# As readOnlyRootFilesystem, allowPrivilegeEscalation: false and capabilities: drop: [ALL] have it.
_CONFINED = """
mount -o remount,bind,ro / && mount -t tmpfs -o ro tmpfs "$TMPDIR" &&
exec setpriv --reuid $0 --regid $0 --clear-groups --no-new-privs --bounding-set=-all --inh-caps=-all -- "$@"
"""


def confined(user: int, *command: str) -> list[str]:
    """The command as that user, without any right, on a file system that cannot be written to."""
    return ["unshare", "--mount", "sh", "-c", _CONFINED, str(user), *command]


def can_run_as(user: int, folder: Path) -> bool:
    """Not where this Python is in a folder that others may not read, nor without namespaces."""
    command = confined(user, sys.executable, "-c", "import redis")
    env = inherited() | {"TMPDIR": str(folder)}
    return subprocess.run(command, env=env, cwd="/", capture_output=True, check=False).returncode == 0


class Confined(Process):
    """A process of the installed project, confined as a container would be."""

    def __init__(self, user: int, arguments: list[str], env: dict[str, str], log: Path) -> None:
        # Coverage would want to write files.
        clean = {name: value for name, value in inherited().items() if not name.startswith("COVERAGE")}
        command = confined(user, sys.executable, "-m", "broker", *arguments)
        self.log_path = log
        with log.open("ab") as file:
            self.popen = subprocess.Popen(command, env=clean | env, stdout=file, stderr=file, cwd="/")


@pytest.mark.skipif(os.getuid() != 0 or not shutil.which("setpriv"), reason="only root can take rights away")
def test_gateway_and_worker_need_no_rights_and_write_no_file(installed: Path, launch: Launcher) -> None:
    tmp = launch.folder / "tmp"
    tmp.mkdir()
    user = next((user for user in (image_user(), 0) if can_run_as(user, tmp)), None)
    if user is None:
        pytest.skip("no namespaces here")
    print(f"as user {user}")
    port = free_port()
    env = {
        "BROKER_REDIS_URL": launch.redis().url,
        "BROKER_JWT_SECRET": SECRET,
        "BROKER_DRAIN_DELAY_SECONDS": "0.1",
        "PYTHONPATH": str(installed),
        "TMPDIR": str(tmp),
    }
    commands = {"gateway": ["serve", "--port", str(port)], "worker": ["worker"]}
    processes = {role: Confined(user, args, env, launch.folder / f"{role}.log") for role, args in commands.items()}
    try:
        wait_for(lambda: answers(processes["gateway"], port), seconds=20)
        wait_for(lambda: bool(processes["worker"].logged("worker started")), seconds=20)
        for process in processes.values():
            status = Path(f"/proc/{process.pid}/status").read_text()
            assert f"Uid:\t{user}\t" in status
            assert "CapEff:\t0000000000000000" in status
            assert read_only_root(process.pid)
        with Client(f"http://127.0.0.1:{port}") as client:
            assert client.finished(client.submit("anything"))["status"] == "completed"
            assert "<html" in client.get("/").text
        for process in processes.values():
            assert process.stop() == 0
            assert not [line for line in process.log_lines() if line["level"] in ("ERROR", "WARNING")]
    finally:
        for process in processes.values():
            process.kill()


def image_user() -> int:
    return int(deploy.instruction("USER").split(":")[0])


def read_only_root(pid: int) -> bool:
    fields = [line.split() for line in Path(f"/proc/{pid}/mountinfo").read_text().splitlines()]
    return all("ro" in options.split(",") for _, _, _, _, point, options, *_ in fields if point == "/")


def answers(process: Process, port: int) -> bool:
    assert process.popen.poll() is None, process.log_text()
    try:
        return httpx.get(f"http://127.0.0.1:{port}/readyz", verify=False).status_code == 200
    except httpx.TransportError:
        return False


# -- the health check ----------------------------------------------------------------------------------------


def test_the_images_health_check_tells_a_gateway_that_answers_from_one_that_does_not(launch: Launcher) -> None:
    """Also one without Redis, which must not be restarted for it."""
    gateway = launch.gateway("redis://127.0.0.1:1", ready="/healthz")
    assert httpx.get(gateway.url + "/readyz", verify=False).status_code == 503
    assert health_check(gateway.port) == 0
    gateway.signal(signal.SIGSTOP)
    assert health_check(gateway.port) != 0
    gateway.signal(signal.SIGCONT)
    gateway.stop()
    assert health_check(gateway.port) != 0


def health_check(port: int) -> int:
    options, _, command = deploy.instruction("HEALTHCHECK").partition("CMD ")
    python, *arguments = [part.replace(":8000'", f":{port}'") for part in json.loads(command)]
    assert python == "python"
    limit = deploy.seconds(dict(option[2:].split("=") for option in options.split())["timeout"])
    # A proxy for the outside is none of its business.
    env = inherited() | {"http_proxy": "http://127.0.0.1:1", "HTTP_PROXY": "http://127.0.0.1:1"}
    done = subprocess.run([sys.executable, *arguments], env=env, capture_output=True, timeout=limit + 15, check=False)
    return done.returncode
