"""Who calls: a JWT's subject, or, with BROKER_AUTH=none, whoever is on this machine and is not a web page."""

from __future__ import annotations

import hashlib
import math
import re
import time
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, Protocol
from urllib.parse import parse_qs, urlsplit

import jwt
from jwt.exceptions import InvalidSubjectError
from starlette.types import Scope

from broker.errors import Forbidden, Invalid, Misconfigured, Unauthorized
from broker.gateway.jwks import ASYMMETRIC, Jwks
from broker.ids import Owner
from broker.settings import Settings, is_loopback

MAX_TOKEN_BYTES = 8 * 1024
MAX_NAME_CHARACTERS = 255
REMEMBERED_TOKENS = 4096
SEES_TENANT = "broker:tenant"

_HMAC = ("HS256", "HS384", "HS512")
_REQUIRED = ("exp", "aud", "iss", "sub")
_YEAR_9999 = 253402300799
_BEARER = re.compile(rb"bearer +([^ ]+)", re.IGNORECASE)
_COMPACT_JWS = re.compile(rb"[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+")
_HOST = re.compile(r"(localhost|[0-9.]+|\[::1\])(:[0-9]{1,5})?", re.IGNORECASE | re.ASCII)
_SENT_WITHOUT_PREFLIGHT = ("application/x-www-form-urlencoded", "multipart/form-data", "text/plain")


class Principal(NamedTuple):
    """Who calls, and what the credentials allow."""

    owner: Owner
    scopes: frozenset[str]
    expires_at: float | None
    """Unix seconds, the leeway included; None where credentials do not end."""
    ticket_for: str | None = None
    """The only run that may be read, by whoever has a ticket for it."""

    @property
    def sees_tenant(self) -> bool:
        return SEES_TENANT in self.scopes


class Authenticator(Protocol):
    """Takes the ASGI scope of an HTTP request. Raises Unauthorized, Forbidden or Unavailable."""

    async def __call__(self, scope: Scope) -> Principal: ...

    async def close(self) -> None: ...


def make_authenticator(settings: Settings) -> Authenticator:
    """Raises Misconfigured where an accepted algorithm is unknown, or has no key."""
    if settings.auth == "none":
        return LoopbackAuthenticator(settings.cors_origins)
    if not settings.algorithms:
        raise Misconfigured("BROKER_AUTH=jwt needs a key: set BROKER_JWT_SECRET or BROKER_JWT_JWKS_URL.")
    for name in settings.algorithms:
        if name not in _HMAC and name not in ASYMMETRIC:
            raise Misconfigured(f"BROKER_JWT_ALGORITHMS: {name!r} is not one of {', '.join((*_HMAC, *ASYMMETRIC))}.")
    asymmetric = [name for name in settings.algorithms if name in ASYMMETRIC]
    if not asymmetric:
        return JwtAuthenticator(settings)
    url = urlsplit(settings.jwt_jwks_url or "")
    if url.scheme not in ("http", "https") or not url.netloc:
        raise Misconfigured(f"BROKER_JWT_JWKS_URL must be an http or https URL for {', '.join(asymmetric)}.")
    return JwtAuthenticator(settings, Jwks(url.geturl(), asymmetric))


def mint(settings: Settings, *, subject: str, tenant: str | None = None, ttl: float, scopes: Iterable[str] = ()) -> str:
    """A token that a gateway with the same settings accepts for `ttl` seconds, or up to one more.

    Raises Misconfigured without a secret, Invalid for a name or a time that the gateway would refuse.
    """
    if settings.jwt_secret is None:
        raise Misconfigured("Set BROKER_JWT_SECRET: tokens are signed with it.")
    algorithm = next((name for name in settings.algorithms if name in _HMAC), None)
    if algorithm is None:
        raise Misconfigured("BROKER_JWT_ALGORITHMS has none of HS256, HS384 and HS512 to sign with BROKER_JWT_SECRET.")
    if not math.isfinite(ttl):
        raise Invalid("The time to live must be a number of seconds.")
    now = time.time()
    claims: dict[str, Any] = {
        "iss": settings.jwt_issuer,
        "aud": settings.jwt_audience,
        "sub": subject,
        "iat": int(now),
        "exp": math.ceil(now + ttl),
    }
    if tenant is not None:
        claims[settings.jwt_tenant_claim] = tenant
    if scope := " ".join(scopes):
        claims["scope"] = scope
    try:
        _principal(claims, settings)
    except Unauthorized as error:
        raise Invalid(error.detail) from None
    return jwt.encode(claims, _secret(settings), algorithm=algorithm)


class JwtAuthenticator:
    """Bearer tokens. The algorithm picks the kind of key: HS… only the secret, all others only the JWKS."""

    def __init__(self, settings: Settings, jwks: Jwks | None = None) -> None:
        self._settings = settings
        self._jwks = jwks
        self._hmac = tuple(name for name in settings.algorithms if name in _HMAC)
        self._secret = _secret(settings) if self._hmac else b""
        # After a restart of a gateway thousands of clients return with few tokens: a signature is checked once.
        self._verified: OrderedDict[bytes, Principal] = OrderedDict()
        self._generation = 0

    async def __call__(self, scope: Scope) -> Principal:
        token = _bearer_token(scope)
        digest = hashlib.sha256(token).digest()
        if self._jwks is not None:
            self._jwks.refresh_if_old()
        principal = self._recall(digest)
        if principal is None:
            principal = await self._verify(token)
            self._remember(digest, principal)
        return principal

    async def close(self) -> None:
        if self._jwks is not None:
            await self._jwks.close()

    def _recall(self, digest: bytes) -> Principal | None:
        self._forget_old_keys()
        principal = self._verified.get(digest)
        if principal is None:
            return None
        if principal.expires_at is not None and principal.expires_at <= time.time():
            del self._verified[digest]
            return None
        self._verified.move_to_end(digest)
        return principal

    def _remember(self, digest: bytes, principal: Principal) -> None:
        self._forget_old_keys()
        self._verified[digest] = principal
        if len(self._verified) > REMEMBERED_TOKENS:
            self._verified.popitem(last=False)

    def _forget_old_keys(self) -> None:
        if self._jwks is not None and self._jwks.generation != self._generation:
            self._verified.clear()
            self._generation = self._jwks.generation

    async def _verify(self, token: bytes) -> Principal:
        algorithm, kid = self._header(token)
        key: Any
        if algorithm in self._hmac:
            key, algorithms = self._secret, self._hmac
        elif self._jwks is not None:
            _, algorithms, key = await self._jwks.find(algorithm, kid)
        else:
            raise Unauthorized("The token's algorithm (alg) is not accepted here.")
        return _principal(self._claims(token, key, algorithms), self._settings)

    def _header(self, token: bytes) -> tuple[str, str | None]:
        """`alg` and `kid`. Nothing else of the header is used; above all no key and no URL of one."""
        try:
            header = jwt.get_unverified_header(token)
        except (jwt.PyJWTError, ValueError, RecursionError) as error:
            raise _refusal(error) from None
        algorithm = header.get("alg")
        if not isinstance(algorithm, str) or algorithm not in self._settings.algorithms:
            raise Unauthorized("The token's algorithm (alg) is not accepted here.")
        if "crit" in header:
            raise Unauthorized("The token's header has critical extensions (crit); none is supported.")
        return algorithm, header.get("kid")

    def _claims(self, token: bytes, key: Any, algorithms: Iterable[str]) -> dict[str, Any]:
        try:
            return jwt.decode(
                token,
                key,
                algorithms=list(algorithms),
                audience=self._settings.jwt_audience,
                issuer=[self._settings.jwt_issuer],  # a list: PyJWT 2.10.0 takes any part of a string (CVE-2024-53861)
                leeway=self._settings.jwt_leeway_seconds,
                options={"require": list(_REQUIRED)},
            )
        except (jwt.PyJWTError, ValueError, TypeError, OverflowError, RecursionError) as error:
            raise _refusal(error) from None


class LoopbackAuthenticator:
    """BROKER_AUTH=none: everyone is one owner, except web pages, which can reach loopback too.

    `Host` stops a page whose name was rebound to 127.0.0.1; `Origin`, `Sec-Fetch-Site` and the content types of forms
    stop one that just sends requests here. Programs send neither `Origin` nor `Sec-Fetch-Site`. Who sends an `Origin`
    that may call may send any content type: AI SDK's WorkflowChatTransport sends its JSON as text/plain.
    """

    def __init__(self, cors_origins: Iterable[str] = ()) -> None:
        self._cors_origins = frozenset(cors_origins)
        self._principal = Principal(Owner("local", "local"), frozenset(), None)

    async def __call__(self, scope: Scope) -> Principal:
        host = _loopback_host(scope)
        origins = _values(scope, b"origin")
        if any(origin not in (f"http://{host}", f"https://{host}", *self._cors_origins) for origin in origins):
            raise Forbidden("Web pages of this origin may not call. BROKER_CORS_ORIGINS lists those that may.")
        if not origins and "cross-site" in _values(scope, b"sec-fetch-site"):
            raise Forbidden("Web pages of other sites may not call.")
        if not origins and scope["method"] not in ("GET", "HEAD", "OPTIONS"):
            types = [value.partition(";")[0].strip().lower() for value in _values(scope, b"content-type")]
            if any(name in _SENT_WITHOUT_PREFLIGHT for name in types):
                raise Forbidden("Forms may not call: the Content-Type must be application/json.")
        return self._principal

    async def close(self) -> None:
        pass


def with_query_token(scope: Scope) -> Scope:
    """The request as if its `?access_token=` had come in the header (RFC 6750, 2.3). Raises Unauthorized for both."""
    tokens = parse_qs(scope["query_string"].decode("latin-1")).get("access_token", [])
    if not tokens:
        return scope
    if len(tokens) > 1 or _values(scope, b"authorization"):
        raise Unauthorized("Send one token only: in the Authorization header, or as access_token.")
    header = (b"authorization", b"Bearer " + tokens[0].encode("utf-8", "replace"))
    return {**scope, "headers": [*scope["headers"], header]}


def _secret(settings: Settings) -> bytes:
    """Raises Misconfigured where there is none, it is short, or it is no secret at all but a public key."""
    settings.check_secret()
    secret = settings.jwt_secret.get_secret_value().encode() if settings.jwt_secret else b""
    try:
        jwt.get_algorithm_by_name("HS256").prepare_key(secret)
    except jwt.InvalidKeyError:
        raise Misconfigured("BROKER_JWT_SECRET looks like a key of another kind (PEM, SSH or JWK).") from None
    return secret


def _bearer_token(scope: Scope) -> bytes:
    values = [value for name, value in scope["headers"] if name == b"authorization"]
    if not values:
        raise Unauthorized("Send a token: 'Authorization: Bearer <token>'.")
    if len(values) > 1:
        raise Unauthorized("Send one Authorization header only.")
    match = _BEARER.fullmatch(values[0].strip(b" \t"))
    if match is None:
        raise Unauthorized("The Authorization header must be 'Bearer <token>'.")
    token: bytes = match[1]
    if len(token) > MAX_TOKEN_BYTES:
        raise Unauthorized(f"The token is longer than {MAX_TOKEN_BYTES} bytes.")
    if not _COMPACT_JWS.fullmatch(token):
        raise Unauthorized("The token is not a signed JWT.")
    return token


def _refusal(error: Exception) -> Unauthorized:
    """In our words: PyJWT's own may quote the token."""
    match error:
        case jwt.MissingRequiredClaimError(claim=claim) if claim in _REQUIRED:
            return Unauthorized(f"The token has no '{claim}' claim.")
        case jwt.ExpiredSignatureError():
            return Unauthorized("The token has expired.")
        case jwt.ImmatureSignatureError():
            return Unauthorized("The token is not valid yet (nbf or iat).")
        case jwt.InvalidAudienceError():
            return Unauthorized("The token is for another audience (aud).")
        case jwt.InvalidIssuerError():
            return Unauthorized("The token is from another issuer (iss).")
        case InvalidSubjectError():
            return Unauthorized("The token's 'sub' claim must be a string.")
        case jwt.InvalidSignatureError():
            return Unauthorized("The token's signature is wrong.")
        case _:
            return Unauthorized("The token is malformed.")


def _principal(claims: Mapping[str, Any], settings: Settings) -> Principal:
    """What PyJWT leaves open: it takes "3", 3.9 and true for times, and any string for a subject."""
    for name in ("exp", "nbf", "iat"):
        value = claims.get(name, 0)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value > _YEAR_9999:
            raise Unauthorized(f"The token's '{name}' claim must be a time in seconds since 1970.")
    subject = _name(claims, "sub")
    tenant = _name(claims, settings.jwt_tenant_claim) if settings.jwt_tenant_claim in claims else subject
    # PyJWT cuts the fraction off, and a stream must end when the token would be refused.
    expires_at = int(claims["exp"]) + settings.jwt_leeway_seconds
    return Principal(Owner(tenant, subject), _scopes(claims), expires_at)


def _name(claims: Mapping[str, Any], claim: str) -> str:
    value = claims[claim]
    # Printable also excludes lone surrogates, which JSON can carry and UTF-8, so Redis, cannot.
    if not isinstance(value, str) or not 0 < len(value) <= MAX_NAME_CHARACTERS or not value.isprintable():
        raise Unauthorized(f"The token's '{claim}' claim must be 1 to {MAX_NAME_CHARACTERS} printable characters.")
    return value


def _scopes(claims: Mapping[str, Any]) -> frozenset[str]:
    """`scope` is RFC 8693's string; issuers also send `scopes` and `scp`, as a list or as a string."""
    found: set[str] = set()
    for name in ("scope", "scopes", "scp"):
        value = claims.get(name)
        items = value.split() if isinstance(value, str) else [] if value is None else value
        if not isinstance(items, list) or not all(isinstance(item, str) for item in items):
            raise Unauthorized(f"The token's '{name}' claim must be a string or a list of strings.")
        found.update(items)
    return frozenset(found)


def _values(scope: Scope, name: bytes) -> list[str]:
    return [value.decode("latin-1") for key, value in scope["headers"] if key == name]


def _loopback_host(scope: Scope) -> str:
    hosts = _values(scope, b"host")
    match = _HOST.fullmatch(hosts[0]) if len(hosts) == 1 else None
    if match is None or not is_loopback(match[1].lower()):
        raise Forbidden("Without authentication the Host must be localhost, 127.0.0.1 or [::1].")
    return hosts[0]
