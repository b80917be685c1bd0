"""Whether a server can do the work at all: its version, its latency, what it lets us do."""

from __future__ import annotations

import statistics

from broker.doctor.deployment import Deployment, Server
from broker.doctor.finding import Finding, error, note, ok, warning

OLDEST = (6, 2)
SLOW_MS = 5.0
TOO_SLOW_MS = 50.0
LEAST_PUBSUB_BYTES = 8 * 1024 * 1024
"""Of the output buffer of a gateway's subscription: it may fall behind by so much while it is busy."""
SHORT_TIMEOUT_SECONDS = 60


def judge_deployment(deployment: Deployment) -> list[Finding]:
    """Whether it answers. Where it does not, nothing else can be said of it."""
    if deployment.failure:
        return [
            error(
                "redis_unreachable",
                f"{deployment.title}, does not answer: {deployment.failure}",
                f"{_how_to_reach(deployment.failure)} What depends on it was not checked.",
            )
        ]
    return [
        error(
            "redis_unreachable",
            f"{name} of {deployment.title}, does not answer: {why}",
            f"{_how_to_reach(why)} Runs of its slots stand still meanwhile.",
        )
        for name, why in deployment.unreachable.items()
    ]


def _how_to_reach(failure: str) -> str:
    words = failure.lower()
    if "noperm" in words or "no permissions" in words:
        return (
            "The user may not even connect as we do: allow it what the message names (we need +client|setname, +ping "
            "and +time; behind Sentinels +role, on a Cluster +cluster|slots)."
        )
    if any(word in words for word in ("noauth", "wrongpass", "invalid username", "authentication")):
        return "The password or the user in BROKER_REDIS_URL or BROKER_QUEUE_REDIS_URL is not accepted."
    if "certificate" in words or "ssl" in words:
        return "TLS failed: check rediss:// and the ssl_… options of the URL (docs/settings.md)."
    if "loading" in words:
        return "It is reading its data from the disk: wait until it has."
    return "Check the URL, that it runs, and that nothing between blocks the port."


def judge_server(server: Server) -> list[Finding]:
    return [*_version(server), _latency(server), *_permissions(server), *_limits(server)]


def _version(server: Server) -> list[Finding]:
    if server.info is None:
        return []
    version = str(server.info.get("redis_version", "0"))
    product, shown = "Redis", version
    if valkey := server.info.get("valkey_version"):
        product, shown = "Valkey", str(valkey)
    if _numbers(version) < OLDEST:
        return [
            error(
                "redis_version",
                f"{server.name} is {product} {shown}, which is too old",
                "The service needs Redis 6.2 or later, or Valkey.",
            )
        ]
    return [ok("redis_version", f"{server.name} is {product} {shown}")]


def _numbers(version: str) -> tuple[int, int]:
    major, minor, *_ = [*version.split("."), "0", "0"]
    return (int(major) if major.isdigit() else 0, int(minor) if minor.isdigit() else 0)


def _latency(server: Server) -> Finding:
    median, most = statistics.median(server.pings_ms), max(server.pings_ms)
    said = f"{server.name} answers in {median:.1f} ms (median of {len(server.pings_ms)}; at most {most:.1f} ms)"
    advice = (
        "Each batch of events waits for one round trip, and a submit for several. Move gateways and workers to the "
        "network of Redis, and look for what slows it (SLOWLOG GET, LATENCY DOCTOR, a busy core)."
    )
    if median > TOO_SLOW_MS:
        return warning("redis_latency", said, advice)
    if median > SLOW_MS:
        return note("redis_latency", said, advice)
    return ok("redis_latency", said)


def _permissions(server: Server) -> list[Finding]:
    found = []
    if server.info is None:
        found.append(
            warning(
                "redis_permissions",
                f"{server.name} does not let us use INFO",
                "Without it a failover is not noticed, so that runs may lose events in one, nor is a full memory: "
                "allow the user +info. Version, memory, persistence and replicas were not checked.",
            )
        )
    if server.refused:
        found.append(
            error(
                "redis_permissions",
                f"{server.name} does not let us use: {', '.join(server.refused)}",
                "Allow the user these commands on the keys sb:* and arq:* and the channels sb:* "
                "(ACL SETUSER … ~sb:* ~arq:* &sb:* +…), and undo rename-command for them.",
            )
        )
    if server.unwritable:
        found.append(
            error(
                "redis_refuses_writes",
                f"{server.name} refuses writes: {server.unwritable}",
                "Until it takes them again, submits are answered with 503 and runs wait. OOM: raise maxmemory. "
                "MISCONF: its disk. NOREPLICAS: its replicas.",
            )
        )
    elif not server.refused and (server.info or {}).get("role") != "slave":
        found.append(ok("redis_permissions", f"{server.name} takes writes and lets us use all commands that we need"))
    return found


def _limits(server: Server) -> list[Finding]:
    if server.config is None:
        return [
            note(
                "redis_limits",
                f"{server.name} does not let us see its configuration (CONFIG GET), as most managed servers do",
                "What only it tells was not checked: appendfsync, min-replicas-to-write, client-output-buffer-limit, "
                "timeout.",
            )
        ]
    found = []
    limits = _pubsub_limits(server.config.get("client-output-buffer-limit", ""))
    if any(0 < limit < LEAST_PUBSUB_BYTES for limit in limits):
        shown = " ".join(map(str, limits))
        found.append(
            warning(
                "redis_pubsub_buffer",
                f"{server.name} cuts subscribers that are a little behind (client-output-buffer-limit pubsub {shown})",
                "A gateway that is cut reads what it missed from the log, which costs everybody time: use Redis' own "
                "default, pubsub 32mb 8mb 60, or more.",
            )
        )
    timeout = int(server.config.get("timeout", 0) or 0)
    if 0 < timeout < SHORT_TIMEOUT_SECONDS:
        found.append(
            note(
                "redis_timeout",
                f"{server.name} closes connections that are idle for {timeout} s",
                "Connections are opened again, which costs time after each pause: set timeout to 0, or to 300 or more.",
            )
        )
    return found


def _pubsub_limits(value: str) -> list[int]:
    """The hard and the soft limit in "normal 0 0 0 slave … pubsub 33554432 8388608 60"."""
    words = value.split()
    if "pubsub" not in words:
        return []
    at = words.index("pubsub")
    return [int(word) for word in words[at + 1 : at + 3]]
