"""A server that evicts deletes runs; one that is full refuses them."""

from __future__ import annotations

from broker.doctor.deployment import Server
from broker.doctor.finding import Finding, error, note, ok, warning
from broker.runs.memory import memory_of

MUCH = 0.8
_MIB = 1024 * 1024


def judge_memory(server: Server) -> list[Finding]:
    if server.info is None:
        return []
    return [_policy(server), _room(server)]


def _policy(server: Server) -> Finding:
    assert server.info is not None
    policy, limit = server.info.get("maxmemory_policy", "noeviction"), int(server.info.get("maxmemory", 0))
    if policy == "noeviction":
        return ok("redis_eviction", f"{server.name} evicts nothing (maxmemory-policy noeviction)")
    advice = "CONFIG SET maxmemory-policy noeviction, and the same in its configuration file or parameter group."
    if limit:
        return error(
            "redis_eviction",
            f"{server.name} deletes keys when its memory is full (maxmemory-policy {policy}): runs that were accepted "
            "vanish, also while they are under way",
            advice,
        )
    return warning(
        "redis_eviction",
        f"{server.name} would delete keys if it had a maxmemory (maxmemory-policy {policy})",
        advice,
    )


def _room(server: Server) -> Finding:
    assert server.info is not None
    limit, used = int(server.info.get("maxmemory", 0)), int(server.info.get("used_memory", 0))
    if not limit:
        return note(
            "redis_memory",
            f"{server.name} uses {_size(used)} and has no maxmemory",
            "Without one it grows until the machine has no memory left, and is killed. Set maxmemory below what the "
            "machine has: a full Redis refuses submits, and loses nothing.",
        )
    said = f"{server.name} uses {_size(used)} of {_size(limit)} ({used / limit:.0%})"
    advice = (
        "When it is full, runs wait and submits are refused. Raise maxmemory, keep finished runs for a shorter time "
        "(BROKER_RETENTION_SECONDS), or delete some (broker delete)."
    )
    if memory_of(server.info).full:
        return error("redis_memory", f"{said}: it is full", advice)
    if used > MUCH * limit:
        return warning("redis_memory", said, advice)
    return ok("redis_memory", said)


def _size(count: int) -> str:
    return f"{count / _MIB:,.1f} MiB" if count < 1024 * _MIB else f"{count / _MIB / 1024:,.1f} GiB"
