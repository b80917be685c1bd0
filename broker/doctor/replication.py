"""Whether somebody can take over from a primary, and what would be lost then."""

from __future__ import annotations

from typing import Any, Literal

from broker.doctor.deployment import Deployment, Server
from broker.doctor.finding import Finding, error, note, ok, warning
from broker.words import count

LATE_SECONDS = 10
LEAST_SENTINELS = 3

Durability = Literal["fast", "replicated"]


def judge_replication(server: Server, deployment: Deployment, durability: Durability) -> list[Finding]:
    if server.info is None:
        return []
    if server.info.get("role") == "slave":
        return [
            error(
                "redis_role",
                f"{server.name} is a replica and takes no writes",
                "Name the primary in the URL, or use redis+sentinel:// or redis+cluster://, which find it.",
            )
        ]
    replicas = [value for name, value in server.info.items() if _is_replica(name, value)]
    if not replicas:
        return [_alone(server, deployment, durability)]
    return [*_late(server, replicas), *_split_brain(server, replicas), *_confirming(server, durability)]


def _is_replica(name: str, value: Any) -> bool:
    return name.startswith("slave") and isinstance(value, dict) and "state" in value


def _alone(server: Server, deployment: Deployment, durability: Durability) -> Finding:
    if durability == "replicated" and deployment.holds_runs:
        return error(
            "redis_replicas",
            f"{server.name} has no replica, but BROKER_DURABILITY=replicated waits for one: every submit is a 503",
            "Start a replica, or set BROKER_DURABILITY=fast.",
        )
    if deployment.kind != "server":
        return warning(
            "redis_replicas",
            f"{server.name} has no replica: there is nothing to fail over to",
            "Start a replica of it.",
        )
    return note(
        "redis_replicas",
        f"{server.name} has no replica",
        "While it is away everything waits. Where that may not be: a replica and Sentinels (docs/settings.md).",
    )


def _late(server: Server, replicas: list[dict[str, Any]]) -> list[Finding]:
    found = []
    for replica in replicas:
        name = f"the replica {replica.get('ip')}:{replica.get('port')}"
        if replica["state"] != "online":
            found.append(
                warning(
                    "redis_replicas",
                    f"{name} of {server.name} is not ready: {replica['state']}",
                    "It is copying the data, or cannot: see its log and master_link_status there.",
                )
            )
        elif int(replica.get("lag", 0)) > LATE_SECONDS:
            found.append(
                warning(
                    "redis_replicas",
                    f"{name} of {server.name} was last heard of {replica['lag']} s ago",
                    "What is written meanwhile would be lost in a failover: look at the network and at its load.",
                )
            )
    if not found:
        found.append(ok("redis_replicas", f"{server.name} has {count(len(replicas), 'replica')}, up to date"))
    return found


def _split_brain(server: Server, replicas: list[dict[str, Any]]) -> list[Finding]:
    if server.config is None:
        return []
    needed = int(server.config.get("min-replicas-to-write", 0) or 0)
    if needed == 0:
        return [
            warning(
                "redis_split_brain",
                f"{server.name} takes writes also when it has lost its replicas (min-replicas-to-write 0)",
                "Cut off from the others, it goes on as a second primary, and what it took is lost when it comes back. "
                "CONFIG SET min-replicas-to-write 1 and min-replicas-max-lag 10, on its replicas too.",
            )
        ]
    good = int((server.info or {}).get("min_slaves_good_slaves", len(replicas)))
    if good < needed:
        return [
            error(
                "redis_split_brain",
                f"{server.name} needs {needed} replicas to take writes and has {good} that keep up",
                "It refuses writes until they are back: start them, or lower min-replicas-to-write.",
            )
        ]
    return [
        ok("redis_split_brain", f"{server.name} stops writing without its replicas (min-replicas-to-write {needed})")
    ]


def _confirming(server: Server, durability: Durability) -> list[Finding]:
    if durability != "replicated" or server.confirmed or server.unwritable or "WAIT" in server.refused:
        return []
    return [
        error(
            "redis_replicas",
            f"no replica of {server.name} confirmed a write within a second, but BROKER_DURABILITY=replicated waits",
            "Every submit is a 503 meanwhile. Look at the replicas' load and links, or set BROKER_DURABILITY=fast.",
        )
    ]


def judge_sentinels(deployment: Deployment) -> list[Finding]:
    if deployment.kind != "sentinel":
        return []
    found = [
        warning(
            "redis_sentinels",
            f"the Sentinel {name} does not say where the primary is: {opinion.failure}",
            "Start it, or take it out of the URL; without a majority there is no failover.",
        )
        for name, opinion in deployment.sentinels.items()
        if opinion.failure
    ]
    answers = {opinion.primary for opinion in deployment.sentinels.values() if not opinion.failure}
    if len(answers) > 1:
        found.append(
            warning(
                "redis_sentinels",
                f"the Sentinels disagree where the primary is: {', '.join(sorted(answers))}",
                "A failover is under way, or they have lost each other: ask each for SENTINEL MASTERS.",
            )
        )
    if len(deployment.sentinels) < LEAST_SENTINELS:
        found.append(
            warning(
                "redis_sentinels",
                f"the URL names {len(deployment.sentinels)} of the Sentinels",
                "Name at least three, on machines of their own: two cannot agree when one is away.",
            )
        )
    return found or [ok("redis_sentinels", f"all {len(deployment.sentinels)} Sentinels agree where the primary is")]


def judge_cluster(deployment: Deployment) -> list[Finding]:
    if deployment.kind != "cluster" or deployment.failure:
        return []
    if deployment.uncovered_slots:
        return [
            error(
                "redis_slots",
                f"{deployment.uncovered_slots} slots of the Cluster have no primary",
                "Runs in them cannot be started nor read: see redis-cli --cluster check.",
            )
        ]
    return [
        ok(
            "redis_slots",
            f"all slots of the Cluster are on its {len(deployment.servers) + len(deployment.unreachable)} primaries",
        )
    ]
