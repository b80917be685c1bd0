"""Whether a gateway answers at a URL, is ready, and takes our token."""

from __future__ import annotations

import time
from dataclasses import dataclass
from email.utils import parsedate_to_datetime

import httpx

from broker.doctor.finding import Finding, error, ok
from broker.words import reason


@dataclass(frozen=True, kw_only=True)
class Answer:
    """To one request. `status` is None where none came."""

    status: int | None
    body: str = ""
    failure: str = ""
    """Why no answer came."""
    ahead_seconds: float | None = None
    """The header Date less our clock."""
    server: str = ""
    """The header Server."""


@dataclass(frozen=True, kw_only=True)
class Health:
    health: Answer
    ready: Answer


async def look_at_gateway(client: httpx.AsyncClient) -> Health:
    health = await ask(client, "healthz")
    return Health(health=health, ready=health if health.status is None else await ask(client, "readyz"))


async def ask(client: httpx.AsyncClient, path: str) -> Answer:
    try:
        response = await client.get(path)
    except (httpx.HTTPError, httpx.InvalidURL) as failure:
        return Answer(status=None, failure=reason(failure))
    return Answer(
        status=response.status_code,
        body=said(response),
        ahead_seconds=_ahead(response.headers.get("date", "")),
        server=response.headers.get("server", ""),
    )


def said(response: httpx.Response) -> str:
    """The detail of a problem document, the status of a healthy gateway, else the beginning of the body."""
    try:
        body = response.json()
        text = body.get("detail") or body.get("status")
    except (ValueError, AttributeError):
        text = None
    return str(text or " ".join(response.text.split())[:80])


def _ahead(date: str) -> float | None:
    """Its fraction is unknown: half a second on average."""
    try:
        return parsedate_to_datetime(date).timestamp() + 0.5 - time.time()
    except (ValueError, TypeError):
        return None


def judge_gateway(url: str, found: Health) -> list[Finding]:
    """The first error means that nothing else can be looked at."""
    health, ready = found.health, found.ready
    if health.status is None:
        return [
            error(
                "gateway_unreachable",
                f"{url} does not answer: {health.failure}",
                "Check the URL and its certificate, that the gateway or its proxy runs, and what is between.",
            )
        ]
    if health.status != 200 or health.body != "ok":
        by = f" (by {health.server})" if health.server else ""
        return [
            error(
                "gateway_unreachable",
                f"{url}/healthz answers {health.status}{by}, not as a gateway: {health.body or 'nothing'}",
                "A 502, 503 or 504 is a proxy that reaches no gateway. Else this is not the gateway's base URL, or the "
                "proxy does not pass /healthz on.",
            )
        ]
    if ready.status != 200:
        return [
            error(
                "gateway_ready",
                f"{url} is not ready: {ready.body or ready.failure}",
                "It cannot reach its Redis, or is about to end: run broker doctor where its settings are.",
            )
        ]
    return [ok("gateway_ready", f"{url} answers and is ready")]


def judge_refusal(status: int, detail: str, *, has_token: bool) -> Finding:
    """A submit that was not accepted."""
    if status == 401 and not has_token:
        return error(
            "gateway_token",
            "the gateway asks for a token",
            "Set BROKER_TOKEN, or use --token. Where BROKER_JWT_SECRET is set: broker token --sub doctor.",
        )
    if status in (401, 403):
        return error(
            "gateway_token",
            f"the gateway refuses the request: {detail}",
            "Check the token's exp, iss, aud and key against BROKER_JWT_…, and that the proxy passes Authorization on.",
        )
    return error(
        "gateway_submit",
        f"the gateway does not take a run: {status}, {detail}",
        "503: its Redis. 404 or 405: the proxy passes /api/v1 on to something else. Else see the gateway's log.",
    )
