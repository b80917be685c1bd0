"""A gateway and the way to it, looked at from a client's place."""

from __future__ import annotations

import asyncio

import httpx

from broker.client import transport
from broker.client.site import site
from broker.doctor.clock import judge_gateway_clock
from broker.doctor.finding import Finding, Severity, error, note
from broker.doctor.gateway import judge_gateway, judge_refusal, look_at_gateway
from broker.doctor.probe import Arrival, Recording, Refused, probe
from broker.doctor.stream import judge_flow, judge_head, judge_idle, judge_resume
from broker.errors import Misconfigured
from broker.settings import Settings
from broker.words import reason

WORDS_PER_SECOND = 2.5
ANSWER_SECONDS = 10.0
TAKEN_SECONDS = 3.0
"""Within which a worker takes a run, unless it is busy."""


async def examine_way(url: str, token: str | None, *, seconds: float, settings: Settings) -> list[Finding]:
    """Takes a little more than `seconds`. Never raises for what it finds. A `token` of None is BROKER_TOKEN."""
    try:
        where = site(url, token, timeout=ANSWER_SECONDS, patience=0, longest_pause=0)
        options = transport.options(where)
    except Misconfigured as failure:
        return [error("gateway_unreachable", failure.detail, "Give its base URL, such as https://broker.example.com.")]
    try:
        headers = where.headers()
    except Misconfigured as failure:
        return [error("gateway_token", failure.detail, "Look for blanks, line feeds and quotation marks around it.")]
    timeout = httpx.Timeout(ANSWER_SECONDS, read=seconds + ANSWER_SECONDS)
    async with httpx.AsyncClient(**options, base_url=f"{where.url}/", headers=headers, timeout=timeout) as client:
        health = await look_at_gateway(client)
        found = judge_gateway(where.url, health)
        if any(finding.severity is Severity.ERROR for finding in found):
            return [*found, note("stream_buffering", "streams were not looked at: there is no gateway that is ready")]
        if health.health.ahead_seconds is not None:
            found.append(judge_gateway_clock(health.health.ahead_seconds))
        try:
            found += await _look_at_streams(client, seconds=seconds, heartbeat=settings.heartbeat_seconds)
        except Refused as refused:
            found.append(judge_refusal(refused.status, str(refused), has_token="Authorization" in headers))
        except (httpx.HTTPError, ValueError, KeyError) as failure:
            found.append(
                error(
                    "gateway_submit",
                    f"a request in the middle of the probe failed: {reason(failure)}",
                    "See the logs of the proxy and the gateway, and try again.",
                )
            )
    return found


async def _look_at_streams(client: httpx.AsyncClient, *, seconds: float, heartbeat: float) -> list[Finding]:
    """Raises Refused, httpx.HTTPError, and ValueError or KeyError for answers that are none of a gateway."""
    async with probe(client, pace=WORDS_PER_SECOND) as talking, probe(client, pace=1 / (seconds + 60)) as silent:
        idling = asyncio.create_task(silent.watch(seconds=seconds))
        try:
            flow = await talking.watch(seconds=seconds + TAKEN_SECONDS, polling=True)
            log = await talking.log()
            found = _judge_talking(flow, log)
            if flow.finished and flow.status == 200 and len(log) > 2:
                middle = len(log) // 2
                resumed = await talking.watch(seconds=ANSWER_SECONDS, after=log[middle].id)
                found += judge_resume(resumed, log, middle)
            idle = await idling
        finally:
            idling.cancel()
            await asyncio.wait([idling])
    held_back = any(finding.code == "stream_buffering" and finding.severity is Severity.ERROR for finding in found)
    if idle.status != 200 and not held_back:
        return [*found, *judge_head(idle)]
    told = {finding.code for finding in found}
    idling_found = judge_idle(idle, heartbeat=heartbeat, held_back=held_back)
    return [*found, *(finding for finding in idling_found if finding.code != "stream_cut" or "stream_cut" not in told)]


def _judge_talking(flow: Recording, log: list[Arrival]) -> list[Finding]:
    found = judge_head(flow)
    return found if flow.status != 200 else [*found, *judge_flow(flow, log)]
