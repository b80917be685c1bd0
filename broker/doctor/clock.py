"""Clocks: epochs and leases need servers that agree (PROTOCOL 1.3), tokens and certificates need us to agree."""

from __future__ import annotations

from collections.abc import Sequence

from broker.doctor.deployment import Server
from broker.doctor.finding import Finding, error, note, ok, warning

APART_MS = 2000.0
NOTED_MS = 500.0
GATEWAY_SECONDS = 3.0
"""`Date` has whole seconds."""
_ADVICE = "Run NTP (chrony, systemd-timesyncd) on every machine."


def judge_clocks(servers: Sequence[Server]) -> list[Finding]:
    found = [_against_ours(server) for server in servers]
    first, last = (pick(servers, key=lambda server: server.clock_ms) for pick in (min, max))
    apart = last.clock_ms - first.clock_ms - last.clock_error_ms - first.clock_error_ms
    if apart > APART_MS:
        found.append(
            error(
                "redis_clock",
                f"the clocks of {first.name} and {last.name} are {apart / 1000:.1f} s apart",
                f"After a failover between them an epoch may be given out twice. {_ADVICE}",
            )
        )
    return found


def _against_ours(server: Server) -> Finding:
    """What the way there and back may have taken does not count."""
    off = max(abs(server.clock_ms) - server.clock_error_ms, 0.0)
    direction = "ahead of" if server.clock_ms > 0 else "behind"
    said = f"the clock of {server.name} is {off / 1000:.1f} s {direction} ours"
    if off > APART_MS:
        return error(
            "redis_clock", said, f"Servers may be 2 s apart at most, or epochs may be given out twice. {_ADVICE}"
        )
    if off > NOTED_MS:
        return note("redis_clock", said, _ADVICE)
    return ok("redis_clock", f"the clock of {server.name} agrees with ours")


def judge_gateway_clock(ahead_seconds: float) -> Finding:
    """By the header Date: the gateway's time, or its proxy's, less ours."""
    if abs(ahead_seconds) <= GATEWAY_SECONDS:
        return ok("gateway_clock", "the clock of the gateway agrees with ours")
    direction = "ahead of" if ahead_seconds > 0 else "behind"
    return warning(
        "gateway_clock",
        f"the clock of the gateway, or of its proxy, is {abs(ahead_seconds):.0f} s {direction} ours",
        f"Tokens that are made on one machine may be refused on the other. {_ADVICE}",
    )
