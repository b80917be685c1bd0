"""Findings of `broker doctor`, and facts to judge."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from broker.doctor.deployment import Deployment, Server
from broker.doctor.finding import Finding, Severity
from tests.kit.command import Done

ROOT = Path(__file__).parents[2]
SOUND_INFO = {
    "redis_version": "7.2.4",
    "role": "master",
    "connected_slaves": 0,
    "maxmemory": 1024 * 1024 * 1024,
    "maxmemory_policy": "noeviction",
    "used_memory": 1024 * 1024,
    "aof_enabled": 1,
    "aof_last_write_status": "ok",
    "aof_last_bgrewrite_status": "ok",
    "rdb_last_bgsave_status": "ok",
}
SOUND_CONFIG = {
    "appendfsync": "everysec",
    "save": "",
    "stop-writes-on-bgsave-error": "yes",
    "min-replicas-to-write": "0",
    "maxmemory-policy": "noeviction",
    "client-output-buffer-limit": "normal 0 0 0 slave 268435456 67108864 60 pubsub 33554432 8388608 60",
    "timeout": "0",
}


def server(*, info: dict[str, Any] | None = None, config: dict[str, str] | None = None, **facts: Any) -> Server:
    """A sound server, but for what is given."""
    sound: dict[str, Any] = {
        "name": "redis:6379",
        "info": {**SOUND_INFO, **(info or {})},
        "config": {**SOUND_CONFIG, **(config or {})},
        "pings_ms": (0.2, 0.1, 0.3),
        "clock_ms": 1.0,
        "clock_error_ms": 0.1,
    }
    return Server(**{**sound, **facts})


def deployment(*servers: Server, **facts: Any) -> Deployment:
    return Deployment(
        **{"title": "The Redis of the runs, redis://redis:6379", "kind": "server", "servers": servers, **facts}
    )


def replica(**facts: Any) -> dict[str, Any]:
    """As INFO has it, by its name there."""
    return {"connected_slaves": 1, "slave0": {"ip": "10.0.0.2", "port": 6379, "state": "online", "lag": 0, **facts}}


def worst(findings: Iterable[Finding]) -> Severity:
    return max((finding.severity for finding in findings), default=Severity.OK)


def the(findings: Iterable[Finding], code: str) -> Finding:
    """The only finding of this code that is not ok, or else the only one."""
    found = [finding for finding in findings if finding.code == code]
    [one] = [finding for finding in found if finding.severity is not Severity.OK] or found
    return one


def diagnosis(done: Done) -> list[Finding]:
    """What `broker doctor --json` has printed; its exit code must fit."""
    printed = json.loads(done.stdout)
    assert printed["exit_code"] == done.returncode, done.stderr
    return [
        Finding(code=row["code"], severity=Severity[row["severity"].upper()], title=row["title"], advice=row["advice"])
        for row in printed["findings"]
    ]


def documented() -> dict[str, set[str]]:
    """Each code with a row in the tables of docs/doctor.md, and what its last column says that it may be."""
    rows = re.findall(r"(?m)^\| `(\w+)` \|.*\|(.*)\|$", (ROOT / "docs" / "doctor.md").read_text("utf-8"))
    return {code: {word.lower() for word in re.findall(r"(?i)\b(?:note|warning|error)\b", said)} for code, said in rows}


def in_source() -> dict[str, set[str]]:
    """Each code that the checks name, and what they make of it beside ok: note, warning, error."""
    found: dict[str, set[str]] = {}
    for path in [*(ROOT / "broker" / "doctor").glob("*.py"), ROOT / "broker" / "cli" / "doctor.py"]:
        for made, code in re.findall(r'\b(ok|note|warning|error|make)\(\s*"(\w+)"', path.read_text("utf-8")):
            severities = found.setdefault(code, set())
            severities |= {"make": {"warning", "error"}, "ok": set()}.get(made, {made})
    return found
