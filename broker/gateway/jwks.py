"""The public keys of a token issuer: a JWKS (RFC 7517), cached, and kept while its endpoint is down."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import time
from collections.abc import Collection, Iterable
from typing import Any, NamedTuple

import httpx
import jwt

from broker.errors import Unauthorized, Unavailable
from broker.settings import redact_url

FETCH_SECONDS = 5.0
MAX_DOCUMENT_BYTES = 256 * 1024
MIN_RSA_BITS = 2048

logger = logging.getLogger(__name__)


class _Fit(NamedTuple):
    kty: str
    curves: tuple[str, ...] = ()


ASYMMETRIC = {
    **dict.fromkeys(("RS256", "RS384", "RS512", "PS256", "PS384", "PS512"), _Fit("RSA")),
    "ES256": _Fit("EC", ("P-256",)),
    "ES384": _Fit("EC", ("P-384",)),
    "ES512": _Fit("EC", ("P-521",)),
    "ES256K": _Fit("EC", ("secp256k1",)),
    "EdDSA": _Fit("OKP", ("Ed25519", "Ed448")),
}
"""The algorithms that a JWKS can serve, and what a key must be for each. HMAC is not among them."""


class Key(NamedTuple):
    kid: str | None
    algorithms: tuple[str, ...]
    """The accepted algorithms that this key fits; never empty."""
    public_key: Any


class Jwks:
    """Finds the key of a token. One fetch at a time, at most one per `retry_seconds`, whatever the tokens say."""

    def __init__(
        self, url: str, algorithms: Collection[str], *, refresh_seconds: float = 300, retry_seconds: float = 5
    ) -> None:
        self.generation = 0
        """Grows when the keys change: what was verified with the old ones must be verified again."""
        self._url = url
        self._algorithms = tuple(algorithms)
        self._refresh_seconds = refresh_seconds
        self._retry_seconds = retry_seconds
        self._document: list[Any] | None = None
        self._keys: list[Key] = []
        self._fetched = self._attempted = -math.inf
        self._fetching: asyncio.Task[None] | None = None
        # Made here because it loads the system's certificates: that takes milliseconds, and blocks.
        self._client = httpx.AsyncClient(timeout=FETCH_SECONDS, follow_redirects=False)

    async def find(self, algorithm: str, kid: str | None) -> Key:
        """Raises Unauthorized where no key fits, Unavailable where there have never been keys to look at."""
        self.refresh_if_old()
        key = self._match(algorithm, kid)
        if key is None:
            await self._fetched_anew()
            key = self._match(algorithm, kid)
        if self._document is None:
            raise Unavailable("The keys that verify tokens cannot be fetched. Try again.")
        if key is None:
            raise Unauthorized("The token was signed with an unknown key (kid).")
        return key

    def refresh_if_old(self) -> None:
        """Starts a refresh in the background. To be called at each use, also where `find` is not needed."""
        if self._document is not None and time.monotonic() - self._fetched >= self._refresh_seconds:
            self._start_fetch()

    async def close(self) -> None:
        if self._fetching is not None:
            self._fetching.cancel()
            await asyncio.wait([self._fetching])
        await self._client.aclose()

    def _match(self, algorithm: str, kid: str | None) -> Key | None:
        named = self._keys if kid is None else [key for key in self._keys if key.kid == kid]
        fitting = [key for key in named if algorithm in key.algorithms]
        if kid is None and len(fitting) > 1:
            raise Unauthorized("The token names no key (kid), and more than one fits.")
        if kid is not None and named and not fitting:
            raise Unauthorized("The token's key (kid) is not for its algorithm (alg).")
        return fitting[0] if fitting else None

    async def _fetched_anew(self) -> None:
        self._start_fetch()
        if self._fetching is not None:
            # wait(), unlike await, neither cancels the fetch with this request nor this request with the fetch.
            await asyncio.wait([self._fetching])

    def _start_fetch(self) -> None:
        now = time.monotonic()
        if self._fetching is None and not self._client.is_closed and now - self._attempted >= self._retry_seconds:
            self._attempted = now
            self._fetching = asyncio.create_task(self._fetch(), name="jwks-fetch")

    async def _fetch(self) -> None:
        try:
            # The client's timeout is per read, and would let a trickle last for ever; this one is for the whole.
            async with asyncio.timeout(FETCH_SECONDS):
                self._replace(await fetch(self._client, self._url))
        except NOT_FETCHED as error:
            logger.warning("JWKS %s not fetched: %s: %s", redact_url(self._url), type(error).__name__, error)
        finally:
            self._fetching = None

    def _replace(self, document: list[Any]) -> None:
        # An empty set is a set too: it revokes every key.
        self._fetched = time.monotonic()
        if document == self._document:
            return
        keys = usable(document, self._algorithms)
        logger.info("JWKS %s: %d of %d keys are usable", redact_url(self._url), len(keys), len(document))
        self._document, self._keys = document, keys
        self.generation += 1


NOT_FETCHED = (httpx.HTTPError, httpx.InvalidURL, TimeoutError, ValueError, RecursionError)
"""What `fetch` raises."""


async def fetch(client: httpx.AsyncClient, url: str) -> list[Any]:
    """The members of a JWKS, as they are; the caller limits the time."""
    # Identity, and the raw bytes: the limit would come too late for a compressed bomb.
    headers = {"Accept": "application/json", "Accept-Encoding": "identity"}
    async with client.stream("GET", url, headers=headers) as response:
        if response.status_code != 200:
            raise ValueError(f"status {response.status_code}")
        body = bytearray()
        async for chunk in response.aiter_raw():
            body += chunk
            if len(body) > MAX_DOCUMENT_BYTES:
                raise ValueError(f"more than {MAX_DOCUMENT_BYTES} bytes")
        return _parse(bytes(body))


def usable(document: Iterable[Any], accepted: Collection[str]) -> list[Key]:
    """The keys that verify tokens of the accepted algorithms."""
    return [key for key in (_load(jwk, accepted) for jwk in document) if key is not None]


def _parse(body: bytes) -> list[Any]:
    document = json.loads(body)
    keys = document.get("keys") if isinstance(document, dict) else None
    if not isinstance(keys, list):
        raise ValueError("not a JWKS")
    return keys


def _load(jwk: Any, accepted: Collection[str]) -> Key | None:
    """The key, or None where it is not ours to use: one bad key must not cost the others."""
    if not isinstance(jwk, dict) or not isinstance(jwk.get("kid", ""), str):
        return None
    algorithms = tuple(name for name in accepted if _fits(jwk, name))
    # A private key that is published verifies nothing: whoever reads the JWKS can sign with it.
    if not algorithms or "d" in jwk:
        return None
    try:
        public_key = jwt.PyJWK(jwk, algorithms[0]).key
    except Exception as error:
        logger.warning("JWKS: a key cannot be loaded: %s", type(error).__name__)
        return None
    if jwk["kty"] == "RSA" and public_key.key_size < MIN_RSA_BITS:
        logger.warning("JWKS: an RSA key of %d bits is too short, and not used", public_key.key_size)
        return None
    return Key(jwk.get("kid"), algorithms, public_key)


def _fits(jwk: dict[str, Any], algorithm: str) -> bool:
    fit = ASYMMETRIC[algorithm]
    operations = jwk.get("key_ops", ["verify"])
    return (
        jwk.get("kty") == fit.kty
        and (not fit.curves or jwk.get("crv") in fit.curves)
        and jwk.get("alg", algorithm) == algorithm
        and jwk.get("use", "sig") == "sig"
        and isinstance(operations, list)
        and "verify" in operations
    )
