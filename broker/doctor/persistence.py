"""What is left of the runs after a crash or a power cut of the server."""

from __future__ import annotations

from broker.doctor.deployment import Server
from broker.doctor.finding import Finding, error, note, ok, warning

_TURN_ON = "CONFIG SET appendonly yes, and the same in its configuration file."


def judge_persistence(server: Server, *, holds_runs: bool) -> list[Finding]:
    if server.info is None:
        return []
    return [_files(server, holds_runs=holds_runs), *_failures(server)]


def _files(server: Server, *, holds_runs: bool) -> Finding:
    assert server.info is not None
    fsync = server.config.get("appendfsync", "") if server.config else ""
    if server.info.get("aof_enabled"):
        return _fsync(server.name, fsync)
    if not holds_runs:
        return note(
            "redis_persistence",
            f"{server.name}, which holds the queue, has no append-only file",
            f"The runs bring a lost queue back, but it takes them until their leases end. {_TURN_ON}",
        )
    if _snapshots(server):
        return warning(
            "redis_persistence",
            f"{server.name} has snapshots, but no append-only file: a crash loses the minutes since the last one",
            f"{_TURN_ON} With appendfsync everysec a power cut loses a second.",
        )
    if int(server.info.get("connected_slaves", 0)):
        return warning(
            "redis_persistence",
            f"{server.name} writes nothing to the disk; only its replicas outlive it",
            f"A primary that is restarted before a failover comes back empty, and so do its replicas then. {_TURN_ON}",
        )
    return error(
        "redis_persistence",
        f"{server.name} writes nothing to the disk: when it ends, all runs are gone",
        f"{_TURN_ON} With appendfsync everysec a power cut loses a second.",
    )


def _fsync(name: str, fsync: str) -> Finding:
    if fsync == "no":
        return warning(
            "redis_persistence",
            f"{name} has an append-only file that it never syncs: a power cut loses what the kernel had not written",
            "CONFIG SET appendfsync everysec.",
        )
    if fsync == "always":
        return note(
            "redis_persistence",
            f"{name} syncs its append-only file at every write",
            "Safe, and slow: each event waits for the disk. With everysec a power cut loses a second, which workers "
            "that live on repair.",
        )
    return ok("redis_persistence", f"{name} has an append-only file{f' (appendfsync {fsync})' if fsync else ''}")


def _snapshots(server: Server) -> bool:
    """Where the configuration is not shown: whether the last one was taken since the start."""
    assert server.info is not None
    if server.config is not None:
        return bool(server.config.get("save", "").strip())
    return int(server.info.get("rdb_last_bgsave_time_sec", -1)) >= 0


def _failures(server: Server) -> list[Finding]:
    assert server.info is not None
    info, found = server.info, []
    if info.get("aof_enabled") and info.get("aof_last_write_status", "ok") != "ok":
        found.append(
            error(
                "redis_disk",
                f"{server.name} could not write its append-only file",
                "Its disk is full or broken, and it refuses writes until that is mended: see its log.",
            )
        )
    if info.get("aof_last_bgrewrite_status", "ok") != "ok":
        found.append(
            warning(
                "redis_disk",
                f"{server.name} could not rewrite its append-only file",
                "The file grows for ever: see its log; often the memory or the disk does not suffice for a copy.",
            )
        )
    if info.get("rdb_last_bgsave_status", "ok") != "ok":
        config = server.config or {}
        stops = config.get("stop-writes-on-bgsave-error", "yes") == "yes" and config.get("save", "?").strip() != ""
        make = error if stops else warning
        found.append(
            make(
                "redis_disk",
                f"{server.name} could not write its last snapshot" + (", and refuses writes for it" if stops else ""),
                "See its log; often the memory or the disk does not suffice for a copy (vm.overcommit_memory).",
            )
        )
    return found
