"""Whether tokens can be verified, and nobody else can make them."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

import httpx

from broker.doctor.finding import Finding, error, note, ok, warning
from broker.errors import Misconfigured
from broker.gateway.auth import make_authenticator
from broker.gateway.jwks import ASYMMETRIC, FETCH_SECONDS, NOT_FETCHED, fetch, usable
from broker.settings import Settings, is_loopback, redact_url
from broker.words import count, reason

LEAST_VARIETY = 12
"""Different characters of a secret: a random one of 32 bytes has more, also in hex (16 kinds)."""


@dataclass(frozen=True, kw_only=True)
class Auth:
    """What the settings say, without the secret."""

    none: bool = False
    refused: str = ""
    """Why a gateway would not start; '' where it would."""
    algorithms: Sequence[str] = ()
    secret_variety: int | None = None
    """How many different characters the secret has; None where there is none."""
    jwks: Jwks | None = None


@dataclass(frozen=True, kw_only=True)
class Jwks:
    url: str
    """Redacted."""
    is_private: bool
    """Whether nobody can change it on its way: https, or this machine."""
    failure: str = ""
    """Why it could not be fetched."""
    keys: int = 0
    algorithms: Sequence[str] = ()
    """The accepted algorithms for which it has a key."""
    needed: Sequence[str] = ()
    """The accepted algorithms that need one."""


async def look_at_auth(settings: Settings) -> Auth:
    if settings.auth == "none":
        return Auth(none=True)
    try:
        settings.check_serving("127.0.0.1")
        authenticator = make_authenticator(settings)
    except Misconfigured as failure:
        return Auth(refused=failure.detail)
    await authenticator.close()
    secret = settings.jwt_secret.get_secret_value() if settings.jwt_secret else None
    return Auth(
        algorithms=settings.algorithms,
        secret_variety=None if secret is None else len(set(secret)),
        jwks=await _look_at_jwks(settings.jwt_jwks_url, settings.algorithms) if settings.jwt_jwks_url else None,
    )


async def _look_at_jwks(url: str, accepted: Sequence[str]) -> Jwks:
    needed = [name for name in accepted if name in ASYMMETRIC]
    parts = urlsplit(url)
    redacted, is_private = redact_url(url), parts.scheme == "https" or is_loopback(parts.hostname or "")
    try:
        async with httpx.AsyncClient(timeout=FETCH_SECONDS) as client, asyncio.timeout(FETCH_SECONDS):
            keys = usable(await fetch(client, url), needed)
    except NOT_FETCHED as failure:
        told = reason(failure).replace(url, redacted)
        return Jwks(url=redacted, is_private=is_private, failure=told, needed=needed)
    fitting = {name for key in keys for name in key.algorithms}
    return Jwks(
        url=redacted,
        is_private=is_private,
        keys=len(keys),
        algorithms=[name for name in needed if name in fitting],
        needed=needed,
    )


def judge_auth(auth: Auth) -> list[Finding]:
    if auth.none:
        return [
            warning(
                "auth",
                "BROKER_AUTH=none: whoever is on this machine is the one owner of all runs",
                "Fine for trying things out: gateways then serve loopback only. Else set BROKER_JWT_SECRET or "
                "BROKER_JWT_JWKS_URL.",
            )
        ]
    if auth.refused:
        return [error("auth", f"a gateway would not start: {auth.refused}", "Set what the message names.")]
    found = [ok("auth", f"tokens are verified by {', '.join(auth.algorithms)}")]
    if auth.secret_variety is not None and auth.secret_variety < LEAST_VARIETY:
        found.append(
            warning(
                "auth_secret",
                f"BROKER_JWT_SECRET has only {auth.secret_variety} different characters, so it is not random",
                "Whoever guesses it can be anybody. Make one with: "
                "python3 -c 'import secrets; print(secrets.token_urlsafe(48))'",
            )
        )
    if auth.jwks is not None:
        found += _judge_jwks(auth.jwks)
    return found


def _judge_jwks(jwks: Jwks) -> list[Finding]:
    found = []
    if not jwks.needed:
        return [
            note(
                "auth_jwks",
                "BROKER_JWT_JWKS_URL is set, but BROKER_JWT_ALGORITHMS has none that needs it",
                "Add RS256 or ES256, or leave the URL out.",
            )
        ]
    if not jwks.is_private:
        found.append(
            warning(
                "auth_jwks",
                f"the keys at {jwks.url} come over plain http",
                "Whoever is on the way can put in a key of their own, and be anybody. Use https.",
            )
        )
    if jwks.failure:
        return [
            *found,
            error(
                "auth_jwks",
                f"the keys at {jwks.url} cannot be fetched: {jwks.failure}",
                "Gateways answer 503 to everybody until they have fetched them once: check BROKER_JWT_JWKS_URL, and "
                "that this machine may connect to it.",
            ),
        ]
    missing = [name for name in jwks.needed if name not in jwks.algorithms]
    if not jwks.keys:
        found.append(
            error(
                "auth_jwks",
                f"the JWKS at {jwks.url} has no key for {', '.join(missing)}",
                "Every token is refused. Check BROKER_JWT_ALGORITHMS, and kty, crv, alg and use of the keys; RSA keys "
                "need 2048 bits.",
            )
        )
    elif missing:
        found.append(
            note(
                "auth_jwks",
                f"the JWKS at {jwks.url} has no key for {', '.join(missing)}",
                "Tokens of that kind are refused. Leave it out of BROKER_JWT_ALGORITHMS if nobody uses it.",
            )
        )
    else:
        keys = count(jwks.keys, "key")
        found.append(ok("auth_jwks", f"the JWKS at {jwks.url} has {keys} for {', '.join(jwks.algorithms)}"))
    return found
