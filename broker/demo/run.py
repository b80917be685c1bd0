"""Everything on one machine, for trying it out: Redis, a gateway and a worker, and a few lines to paste."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shlex
import shutil
import signal
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import httpx

from broker import settings
from broker.client import AsyncClient
from broker.client.site import DEFAULT_URL
from broker.demo import redis_server
from broker.errors import Misconfigured, Unavailable
from broker.gateway.auth import mint
from broker.gateway.main import listen
from broker.settings import Settings
from broker.supervisor import Program, Supervisor
from worker.main import END_SECONDS

HOST = "127.0.0.1"
QUESTION = "How does a client resume a stream?"
PACE = 20
_READY_SECONDS = 60.0
_SAMPLE_SECONDS = 30
_TOKEN_SECONDS = 30 * 86400
_REPEAT_SECONDS = 5.0
_RESTART_SECONDS = (0.2, 0.5, 1.0)
"""Somebody is watching: what cannot start should be told soon."""


def run(port: int, docs: Path | None, *, model_stub: bool = False) -> int:
    """Until Ctrl-C. With `model_stub` there is a stand-in for a model server; where there is a model, `chat` is asked.

    Returns the exit code. Raises Misconfigured where it cannot start; nothing runs then.
    """
    directory = Path(os.environ.get("BROKER_DEMO_DIR") or ".demo").absolute()
    with contextlib.ExitStack() as stack:
        lock = stack.enter_context(redis_server.locked(directory))
        listener = stack.enter_context(contextlib.closing(listen(HOST, port)))
        (directory / ".gitignore").write_text("*\n")
        redis = redis_server.find()
        programs = [_redis(redis.binary, directory, lock)] if redis.binary else []
        if model_stub:
            models = stack.enter_context(contextlib.closing(listen(HOST, 0)))
            programs.append(_model_stub(models, directory))
        _set_defaults(redis, docs, directory)
        loaded = settings.load()
        loaded.check_serving(HOST)
        demo = Demo(
            url=f"http://{HOST}:{listener.getsockname()[1]}",
            token=_token(loaded),
            directory=directory,
            redis=str(redis.binary or settings.redact_url(loaded.redis_url)),
            fake=redis.is_fake,
            agent=loaded.default_agent,
            stub=model_stub,
        )
        programs += _ours(listener.fileno(), directory, together=redis.is_fake)
        for program in programs:
            assert program.log is not None
            program.log.write_bytes(b"")
        return asyncio.run(_main(demo, programs, stop_seconds=loaded.grace_seconds + END_SECONDS))


def _redis(binary: Path, directory: Path, lock: int) -> Program:
    """The processes find it by BROKER_REDIS_URL, which is set here."""
    server = redis_server.prepare(binary, directory)
    os.environ |= {"BROKER_REDIS_URL": server.url, "BROKER_QUEUE_REDIS_URL": ""}
    log = directory / "redis.log"
    return Program(name="redis", command=server.command, log=log, pass_fds=[lock], stop_last=True)


def _ours(listener: int, directory: Path, *, together: bool) -> list[Program]:
    """They accept from a socket that is open already: its port is nobody else's, also while a gateway restarts."""
    serve = ["--fd", str(listener)]
    if together:
        command = [sys.executable, "-m", "broker.demo.together", *serve]
        return [Program(name="broker", command=command, log=directory / "broker.log", pass_fds=[listener])]
    command = [sys.executable, "-m", "broker"]
    return [
        Program(
            name="gateway", command=[*command, "serve", *serve], log=directory / "gateway.log", pass_fds=[listener]
        ),
        Program(name="worker", command=[*command, "worker"], log=directory / "worker.log"),
    ]


def _model_stub(listener: socket.socket, directory: Path) -> Program:
    """What asks a model asks it, and nothing else: a key that the user has set is not sent, and costs nothing."""
    fd = listener.fileno()
    os.environ |= {"OPENAI_BASE_URL": f"http://{HOST}:{listener.getsockname()[1]}/v1", "OPENAI_API_KEY": "none"}
    os.environ["BROKER_MODEL"] = os.environ.get("BROKER_MODEL") or "stub"
    command = [sys.executable, "-m", "broker.model_stub", "--fd", str(fd)]
    return Program(name="model-stub", command=command, log=directory / "model-stub.log", pass_fds=[fd])


def _set_defaults(redis: redis_server.Choice, docs: Path | None, directory: Path) -> None:
    """In the environment, which the processes inherit. What the user has set there stays."""
    if redis.is_fake:
        os.environ |= {"BROKER_REDIS_URL": redis_server.FAKE_URL, "BROKER_QUEUE_REDIS_URL": ""}
    if not any(os.environ.get(f"BROKER_{name}") for name in ("AUTH", "JWT_SECRET", "JWT_JWKS_URL")):
        os.environ["BROKER_AUTH"] = "none"
    if docs is not None or not os.environ.get("BROKER_DOCS"):
        os.environ["BROKER_DOCS"] = str(docs.absolute() if docs is not None else _documentation(directory))
    if os.environ.get("BROKER_MODEL"):
        os.environ["BROKER_DEFAULT_AGENT"] = os.environ.get("BROKER_DEFAULT_AGENT") or "chat"
    # Ctrl-C should not take half a minute. No load balancer has to hear of it first, and runs go on at the next start.
    for name, seconds in (("BROKER_DRAIN_DELAY_SECONDS", "0"), ("BROKER_GRACE_SECONDS", "2")):
        os.environ[name] = os.environ.get(name) or seconds


def _documentation(directory: Path) -> Path:
    """The project's README and docs/, without the rest of the project: a copy of them. Else the current directory."""
    project = Path(__file__).resolve().parents[2]
    if not (project / "README.md").is_file() or not (project / "pyproject.toml").is_file():
        return Path.cwd()
    copy = directory / "documents"
    shutil.rmtree(copy, ignore_errors=True)
    copy.mkdir()
    shutil.copy2(project / "README.md", copy)
    if (project / "docs").is_dir():
        shutil.copytree(project / "docs", copy / "docs")
    return copy


def _token(loaded: Settings) -> str | None:
    if loaded.auth == "none":
        return None
    if loaded.jwt_secret is None:
        raise Misconfigured("The demo signs a token for its own requests: set BROKER_JWT_SECRET, or BROKER_AUTH=none.")
    return mint(loaded, subject="demo", ttl=_TOKEN_SECONDS)


@dataclass(frozen=True, kw_only=True)
class Demo:
    """What the user is told about."""

    url: str
    token: str | None
    directory: Path
    redis: str
    fake: bool
    agent: str
    """The one that is asked by default."""
    stub: bool
    """Whether the model is the stand-in."""

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.token}"} if self.token else {}


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A run, and an event id from its middle."""

    request_id: str
    middle: str


async def _main(demo: Demo, programs: Sequence[Program], *, stop_seconds: float) -> int:
    errors = Errors([program for program in programs if program.name != "redis"])
    supervisor = Supervisor(programs, stop_seconds=stop_seconds, restart_seconds=_RESTART_SECONDS, on_death=errors.died)
    introducing = asyncio.create_task(_introduce(demo, supervisor))
    following = asyncio.create_task(errors.follow())
    code = await supervisor.run()
    following.cancel()
    errors.show()
    introducing.cancel()
    _say("Stopped." if demo.fake else f"Stopped. The runs are in {demo.directory}: the next start has them.")
    return code


async def _introduce(demo: Demo, supervisor: Supervisor) -> None:
    """Prints the lines to paste once they work. Without success it says why, and stops everything."""
    try:
        await _ready(demo.url)
        async with AsyncClient(demo.url, demo.token or "") as client:
            sample = await _run_sample(client)
    except Exception as error:  # whatever it is, nothing may be left running
        if not supervisor.stopping:
            _say(f"broker: the demo's first run failed: {str(error) or repr(error)}", error=True)
            supervisor.stop(failed=True)
        return
    _say(introduction(demo, sample))


async def _ready(url: str) -> None:
    """Raises Unavailable, with the gateway's own words, when it is not ready in time."""
    reason = "the gateway does not answer"
    try:
        async with asyncio.timeout(_READY_SECONDS), httpx.AsyncClient(trust_env=False) as client:
            while True:
                with contextlib.suppress(httpx.TransportError):
                    answer = await client.get(f"{url}/readyz")
                    if answer.status_code == 200:
                        return
                    reason = answer.json()["detail"]
                await asyncio.sleep(0.1)
    except TimeoutError:
        raise Unavailable(f"not ready after {_READY_SECONDS:.0f} seconds: {reason}") from None


async def _run_sample(client: AsyncClient) -> Sample:
    """The built-in agent without a model, which costs nothing, whatever the default agent is."""
    accepted = await client.submit(QUESTION, agent="research", parameters={"model": False})
    await client.result(accepted.request_id, wait=_SAMPLE_SECONDS)
    ids = [event.id async for event in client.events(accepted.request_id)]
    return Sample(request_id=accepted.request_id, middle=str(ids[len(ids) // 2]))


def introduction(demo: Demo, sample: Sample) -> str:
    submit: dict[str, Any] = {"query": f"{QUESTION} [[pace={PACE}]]" if demo.stub else QUESTION}
    parameters = {} if demo.agent == "chat" else {"pace": PACE}
    if parameters:
        submit["parameters"] = parameters
    run = f"/api/v1/runs/{sample.request_id}"
    posted = ["-H", "Content-Type: application/json", "-d", json.dumps(submit)]
    parts = [
        f"The broker runs on {demo.url}",
        "Ask it, in another terminal:",
        _ask(demo, submit["query"], parameters),
        "Over HTTP: submit a query, and watch its answer come:",
        _curl(demo, "-N", "/api/v1/query/stream", *posted),
        f"Resume a run after event {sample.middle}, as a client that was cut off would:",
        _curl(demo, "-N", f"{run}/stream", "-H", f"Last-Event-ID: {sample.middle}"),
        "Poll that run:",
        _curl(demo, "-sS", run),
        f"Redis is {demo.redis}. Data and logs are in {demo.directory}. Ctrl-C stops everything.",
    ]
    if demo.stub:
        parts[0] += (
            ".\nIts model is a stub, not a model: it repeats what it is told. BROKER_MODEL, OPENAI_BASE_URL and "
            "OPENAI_API_KEY\nname a real one, without --model-stub. The stub takes directives: see docs/agents.md."
        )
    if demo.fake:
        parts[-1] = (
            "WARNING: no redis-server was found, so gateway, worker and a fake Redis share one process, and no run "
            f"outlives it.\nInstall Redis or Valkey for the real thing. Logs are in {demo.directory}. "
            "Ctrl-C stops everything."
        )
    return "\n" + "\n".join(f"{part}\n" if number % 2 == 0 else part for number, part in enumerate(parts))


def _ask(demo: Demo, query: str, parameters: dict[str, Any]) -> str:
    """`broker ask`, and before it what it has to be told by the environment."""
    variables = {"BROKER_URL": demo.url if demo.url != DEFAULT_URL else None, "BROKER_TOKEN": demo.token}
    exports = [f"{name}={shlex.quote(value)}" for name, value in variables.items() if value]
    command = ["broker"] if shutil.which("broker") else [sys.executable, "-m", "broker"]
    options = [part for name, value in parameters.items() for part in ("--param", f"{name}={json.dumps(value)}")]
    ask = shlex.join([*command, "ask", query, *options])
    return "\n".join([f"export {' '.join(exports)}", ask] if exports else [ask])


def _curl(demo: Demo, option: str, path: str, *more: str) -> str:
    headers = [part for name, value in demo.headers.items() for part in ("-H", f"{name}: {value}")]
    return shlex.join(["curl", option, demo.url + path, *headers, *more])


class Errors:
    """Shows on the terminal what goes wrong in the processes, a line each; the rest stays in their logs."""

    def __init__(self, programs: Sequence[Program]) -> None:
        self._logs = {program.name: program.log for program in programs if program.log is not None}
        self._read = dict.fromkeys(self._logs, 0)
        self._shown: dict[str, float] = {}

    async def follow(self) -> None:
        while True:
            await asyncio.sleep(0.25)
            self.show()

    def show(self) -> None:
        for name, path in self._logs.items():
            with contextlib.suppress(OSError), path.open("rb") as file:
                file.seek(self._read[name])
                for line in file:
                    if not line.endswith(b"\n"):
                        break
                    self._read[name] += len(line)
                    if text := worth_showing(line.decode("utf-8", "replace").rstrip()):
                        self._show(f"{name}: {text}")

    def _show(self, text: str) -> None:
        """What repeats itself is shown now and then."""
        now = time.monotonic()
        if now - self._shown.get(text, -_REPEAT_SECONDS) >= _REPEAT_SECONDS:
            self._shown[text] = now
            _say(text, error=True)

    def died(self, program: Program, code: int, again: bool) -> None:
        """A Supervisor's `on_death`."""
        self.show()
        if program.name not in self._logs and program.log is not None:
            for line in program.log.read_text("utf-8", "replace").splitlines()[-3:]:
                _say(f"{program.name}: {line}", error=True)
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        then = "it is started again" if again else "that was once too often, and the demo ends"
        _say(f"broker: {program.name} {how}; {then}. Its log: {program.log}", error=True)


def worth_showing(line: str) -> str:
    """Errors, and what is not a log line of ours, such as an agent's print. Of a traceback, its last line."""
    try:
        entry = json.loads(line)
        if entry["level"] not in ("ERROR", "CRITICAL"):
            return ""
        cause = (entry.get("exc_info") or "").rstrip().rpartition("\n")[2]
        return f"{entry['message']}: {cause}" if cause else str(entry["message"])
    except (ValueError, TypeError, KeyError):
        return "" if line.startswith((" ", "\t", "Traceback (")) else line


def _say(text: str, *, error: bool = False) -> None:
    # The terminal may be gone: what runs then still has to be stopped in order.
    with contextlib.suppress(OSError):
        click.echo(text, err=error)
