"""P19. The keys of an issuer: which are used, when they are fetched, and what holds while the endpoint is not there."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from jwt.algorithms import RSAAlgorithm

from broker.errors import Unauthorized, Unavailable
from broker.gateway import jwks
from broker.gateway.auth import JwtAuthenticator, make_authenticator
from broker.gateway.jwks import Jwks
from tests.security.issuer import (
    EC_KEY,
    ED_KEY,
    OTHER_RSA_KEY,
    P384_KEY,
    RSA_KEY,
    Issuer,
    PrivateKey,
    bearer,
    claims,
    jwk,
    settings,
    sign,
)

ALL = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA")


@pytest.fixture
def issuer() -> Iterator[Issuer]:
    with Issuer([jwk(RSA_KEY, "rsa")]) as server:
        yield server


@asynccontextmanager
async def gateway(
    issuer: Issuer, algorithms: tuple[str, ...] = ("RS256", "ES256"), refresh: float = 300, retry: float = 5
) -> AsyncIterator[JwtAuthenticator]:
    """As `make_authenticator` makes it, with the times shortened."""
    values = settings(jwt_jwks_url=issuer.url, jwt_algorithms=algorithms)
    keys = Jwks(issuer.url, algorithms, refresh_seconds=refresh, retry_seconds=retry)
    authenticator = JwtAuthenticator(values, keys)
    try:
        yield authenticator
    finally:
        await authenticator.close()


def token(key: PrivateKey = RSA_KEY, algorithm: str = "RS256", kid: str | None = "rsa", **changes: Any) -> str:
    return sign(claims(**changes), key, algorithm, **({} if kid is None else {"kid": kid}))


async def eventually_refused(authenticator: JwtAuthenticator, text: str, within: float = 5) -> str:
    deadline = time.monotonic() + within
    while time.monotonic() < deadline:
        try:
            await authenticator(bearer(text))
        except Unauthorized as error:
            return error.detail
        await asyncio.sleep(0.01)
    pytest.fail("still accepted")


# Which keys are used


@pytest.mark.parametrize(
    ("key", "algorithm"),
    [
        (RSA_KEY, "RS256"),
        (RSA_KEY, "RS512"),
        (RSA_KEY, "PS256"),
        (RSA_KEY, "PS384"),
        (EC_KEY, "ES256"),
        (P384_KEY, "ES384"),
        (ED_KEY, "EdDSA"),
    ],
)
@pytest.mark.parametrize("members", [{}, {"use": "sig"}, {"key_ops": ["verify"]}, {"alg": True, "use": "sig"}])
async def test_a_key_verifies_the_algorithms_of_its_kind(
    issuer: Issuer, key: PrivateKey, algorithm: str, members: dict[str, Any]
) -> None:
    named = members | {"alg": algorithm} if "alg" in members else members
    issuer.keys = [jwk(key, "k", **named)]
    async with gateway(issuer, ALL) as authenticator:
        await authenticator(bearer(token(key, algorithm, "k")))


@pytest.mark.parametrize(
    ("key", "members", "algorithm"),
    [
        (RSA_KEY, {"use": "enc"}, "RS256"),
        (RSA_KEY, {"use": ["sig"]}, "RS256"),
        (RSA_KEY, {"key_ops": ["encrypt"]}, "RS256"),
        (RSA_KEY, {"key_ops": []}, "RS256"),
        (RSA_KEY, {"key_ops": "verify"}, "RS256"),
        (RSA_KEY, {"alg": "RS512"}, "RS256"),
        (RSA_KEY, {"alg": "RS256"}, "PS256"),
        (RSA_KEY, {"alg": "RSA-OAEP"}, "RS256"),
        (RSA_KEY, {"alg": "HS256"}, "RS256"),
        (RSA_KEY, {"alg": ["RS256"]}, "RS256"),
        (RSA_KEY, {"kty": "oct", "k": "c2VjcmV0"}, "RS256"),
        (RSA_KEY, {"kty": "EC"}, "RS256"),
        (RSA_KEY, {"n": 7}, "RS256"),
        (RSA_KEY, {"n": "AQAB"}, "RS256"),
        (RSA_KEY, {"d": "AQAB"}, "RS256"),
        (RSA_KEY, {"kid": 7}, "RS256"),
        (P384_KEY, {}, "ES256"),
        (EC_KEY, {"crv": "P-384"}, "ES256"),
        (EC_KEY, {"x": "AAAA"}, "ES256"),
        (EC_KEY, {"crv": ["P-256"]}, "ES256"),
    ],
)
async def test_a_key_that_is_not_for_this_use_is_not_used_and_costs_the_others_nothing(
    issuer: Issuer, key: PrivateKey, members: dict[str, Any], algorithm: str
) -> None:
    issuer.keys = [jwk(key, "k") | members, "no key", None, {}, jwk(OTHER_RSA_KEY, "good")]
    # A P-384 key cannot sign ES256 in PyJWT: any signature will do where the key must not be found.
    signing = EC_KEY if key is P384_KEY else key
    async with gateway(issuer, ALL) as authenticator:
        with pytest.raises(Unauthorized, match="kid"):
            await authenticator(bearer(token(signing, algorithm, "k")))
        await authenticator(bearer(token(OTHER_RSA_KEY, "RS256", "good")))


async def test_a_key_that_is_published_with_its_private_part_is_not_used(issuer: Issuer) -> None:
    private = RSAAlgorithm.to_jwk(RSA_KEY, as_dict=True) | {"kid": "rsa", "key_ops": ["sign", "verify"]}
    assert "d" in private
    issuer.keys = [private]
    async with gateway(issuer) as authenticator:
        with pytest.raises(Unauthorized, match="unknown key"):
            await authenticator(bearer(token()))


async def test_a_short_rsa_key_is_not_used(issuer: Issuer) -> None:
    short = rsa.generate_private_key(65537, 1024)
    issuer.keys = [jwk(short, "short")]
    with pytest.warns(UserWarning, match="below"):
        weak = token(short, kid="short")
    async with gateway(issuer) as authenticator:
        with pytest.raises(Unauthorized, match="unknown key"):
            await authenticator(bearer(weak))


async def test_a_symmetric_key_in_a_jwks_verifies_nothing(issuer: Issuer) -> None:
    secret = "published-secret-published-secret-published"
    issuer.keys = [{"kty": "oct", "k": "cHVibGlzaGVkLXNlY3JldC1wdWJsaXNoZWQtc2VjcmV0LXB1Ymxpc2hlZA", "kid": "k"}]
    values = settings(jwt_secret="another-secret-another-secret-another", jwt_jwks_url=issuer.url)
    authenticator = make_authenticator(values)
    with pytest.raises(Unauthorized, match="signature"):
        await authenticator(bearer(sign(claims(), secret, "HS256", kid="k")))
    await authenticator.close()


async def test_another_key_under_a_known_kid_is_refused(issuer: Issuer) -> None:
    async with gateway(issuer) as authenticator:
        with pytest.raises(Unauthorized, match="signature"):
            await authenticator(bearer(token(OTHER_RSA_KEY)))


async def test_a_kid_must_be_known_even_where_the_signature_is_good(issuer: Issuer) -> None:
    async with gateway(issuer) as authenticator:
        for kid in ("other", "RSA", "", "rsa "):
            with pytest.raises(Unauthorized, match="unknown key"):
                await authenticator(bearer(token(kid=kid)))


async def test_a_token_without_kid_needs_exactly_one_key_for_its_algorithm(issuer: Issuer) -> None:
    issuer.keys = [jwk(RSA_KEY, "rsa"), jwk(EC_KEY)]
    async with gateway(issuer, retry=0) as authenticator:
        await authenticator(bearer(token(kid=None)))
        await authenticator(bearer(token(EC_KEY, "ES256", None)))
        issuer.keys.append(jwk(OTHER_RSA_KEY, "rsa-2"))
        with pytest.raises(Unauthorized, match="unknown key"):
            await authenticator(bearer(token(kid="gone")))
        with pytest.raises(Unauthorized, match="names no key"):
            await authenticator(bearer(token(kid=None)))
        await authenticator(bearer(token(EC_KEY, "ES256", None)))
        issuer.keys = []
        with pytest.raises(Unauthorized, match="unknown key"):
            await authenticator(bearer(token(kid="gone")))
        with pytest.raises(Unauthorized, match="unknown key"):
            await authenticator(bearer(token(kid=None)))


# When they are fetched


async def test_nothing_is_fetched_before_a_token_needs_it(issuer: Issuer) -> None:
    async with gateway(issuer) as authenticator:
        with pytest.raises(Unauthorized):
            await authenticator(bearer("a.b.c"))
        with pytest.raises(Unauthorized):
            await authenticator(bearer(sign(claims(), kid="rsa")))
        assert issuer.fetches == 0
        await authenticator(bearer(token()))
        await authenticator(bearer(token(sub="bob")))
        assert issuer.fetches == 1


async def test_a_thousand_unknown_kids_are_one_fetch(issuer: Issuer) -> None:
    authenticator = make_authenticator(settings(jwt_jwks_url=issuer.url))
    strangers = [bearer(token(EC_KEY, "ES256", f"unknown-{number}")) for number in range(1000)]
    results = await asyncio.gather(*map(authenticator, strangers), return_exceptions=True)
    assert {type(result) for result in results} == {Unauthorized}
    assert issuer.fetches == 1
    await authenticator(bearer(token()))
    await asyncio.gather(*map(authenticator, strangers), return_exceptions=True)
    assert issuer.fetches == 1
    await authenticator.close()


async def test_later_unknown_kids_are_one_more_fetch_per_interval(issuer: Issuer) -> None:
    strangers = [bearer(token(kid=f"unknown-{n}")) for n in range(100)]
    async with gateway(issuer, retry=0.5) as authenticator:
        for fetches in (1, 2, 3):
            await asyncio.gather(*map(authenticator, strangers), return_exceptions=True)
            await asyncio.gather(*map(authenticator, strangers), return_exceptions=True)
            assert issuer.fetches == fetches
            await asyncio.sleep(0.6)


async def test_a_new_key_is_found_when_a_token_names_it(issuer: Issuer) -> None:
    async with gateway(issuer, retry=0) as authenticator:
        await authenticator(bearer(token()))
        issuer.keys.append(jwk(OTHER_RSA_KEY, "new"))
        await authenticator(bearer(token(OTHER_RSA_KEY, kid="new")))
        await authenticator(bearer(token()))
        assert issuer.fetches == 2


async def test_a_key_that_was_rotated_out_is_refused_after_the_refresh_also_for_known_tokens(issuer: Issuer) -> None:
    old, new = token(), token(OTHER_RSA_KEY, kid="new")
    async with gateway(issuer, refresh=0.2, retry=0) as authenticator:
        await authenticator(bearer(old))
        issuer.keys = [jwk(OTHER_RSA_KEY, "new")]
        assert "unknown key" in await eventually_refused(authenticator, old)
        await authenticator(bearer(new))


async def test_a_key_that_was_replaced_under_its_kid_is_refused_after_the_refresh(issuer: Issuer) -> None:
    async with gateway(issuer, refresh=0.2, retry=0) as authenticator:
        await authenticator(bearer(token()))
        issuer.keys = [jwk(OTHER_RSA_KEY, "rsa")]
        assert "signature" in await eventually_refused(authenticator, token())
        await authenticator(bearer(token(OTHER_RSA_KEY)))


async def test_an_empty_set_revokes_every_key(issuer: Issuer) -> None:
    async with gateway(issuer, refresh=0.2, retry=0) as authenticator:
        await authenticator(bearer(token()))
        issuer.keys = []
        assert "unknown key" in await eventually_refused(authenticator, token())


async def test_a_refresh_that_changes_nothing_keeps_the_verified_tokens(issuer: Issuer) -> None:
    async with gateway(issuer, refresh=0.05, retry=0) as authenticator:
        first = await authenticator(bearer(text := token()))
        while issuer.fetches < 4:
            assert await authenticator(bearer(text)) is first
            await asyncio.sleep(0.02)


async def test_keys_are_not_refreshed_before_their_time(issuer: Issuer) -> None:
    async with gateway(issuer, refresh=60, retry=0) as authenticator:
        for number in range(20):
            await authenticator(bearer(token(sub=f"user-{number}")))
        assert issuer.fetches == 1


# While the endpoint is not there


async def test_without_any_keys_the_answer_is_try_again_until_the_endpoint_is_there(issuer: Issuer) -> None:
    issuer.stop()
    async with gateway(issuer, retry=0.3) as authenticator:
        for _ in range(3):
            with pytest.raises(Unavailable, match="cannot be fetched"):
                await authenticator(bearer(token()))
        with pytest.raises(Unauthorized):
            await authenticator(bearer(sign(claims())))
        issuer.start()
        await asyncio.sleep(0.35)
        await authenticator(bearer(token()))
        assert issuer.fetches == 1


async def test_a_thousand_callers_wait_for_one_fetch_that_fails(issuer: Issuer) -> None:
    issuer.status, issuer.delay = 500, 0.2
    async with gateway(issuer) as authenticator:
        scope = bearer(token())
        results = await asyncio.gather(*(authenticator(scope) for _ in range(1000)), return_exceptions=True)
        assert {type(result) for result in results} == {Unavailable}
        assert issuer.fetches == 1


async def test_cached_keys_serve_while_the_endpoint_is_down(issuer: Issuer) -> None:
    async with gateway(issuer, refresh=0, retry=0) as authenticator:
        await authenticator(bearer(token()))
        issuer.stop()
        try:
            for number in range(20):
                await authenticator(bearer(token(sub=f"user-{number}")))
                await asyncio.sleep(0.01)
            with pytest.raises(Unauthorized, match="unknown key"):
                await authenticator(bearer(token(kid="new")))
        finally:
            issuer.start()
        issuer.keys.append(jwk(OTHER_RSA_KEY, "new"))
        await authenticator(bearer(token(OTHER_RSA_KEY, kid="new")))


async def test_callers_with_cached_keys_never_wait_for_a_slow_endpoint(issuer: Issuer) -> None:
    async with gateway(issuer, refresh=0, retry=0) as authenticator:
        await authenticator(bearer(known := token()))
        issuer.delay = 1
        stranger = asyncio.ensure_future(authenticator(bearer(token(kid="unknown"))))
        started = time.monotonic()
        for number in range(10):
            await authenticator(bearer(known))
            await authenticator(bearer(token(sub=f"user-{number}")))
            await asyncio.sleep(0)
        assert time.monotonic() - started < 0.5
        assert not stranger.done()
        await asyncio.sleep(0.2)
        assert issuer.fetches == 2
        with pytest.raises(Unauthorized):
            await stranger


async def test_a_caller_that_leaves_does_not_take_the_fetch_along(issuer: Issuer) -> None:
    issuer.delay = 0.3
    async with gateway(issuer) as authenticator:
        leaver = asyncio.ensure_future(authenticator(bearer(token())))
        stayer = asyncio.ensure_future(authenticator(bearer(token())))
        await asyncio.sleep(0.1)
        leaver.cancel()
        await stayer
        assert leaver.cancelled()
        assert issuer.fetches == 1


async def test_closing_ends_a_fetch_and_the_callers_that_wait_for_it(issuer: Issuer) -> None:
    issuer.delay = 1
    async with gateway(issuer) as authenticator:
        waiting = asyncio.ensure_future(authenticator(bearer(token())))
        await asyncio.sleep(0.1)
    with pytest.raises(Unavailable):
        await waiting
    with pytest.raises(Unavailable):
        await authenticator(bearer(token()))


BIG = json.dumps({"keys": [jwk(RSA_KEY, "rsa")], "padding": "x" * jwks.MAX_DOCUMENT_BYTES}).encode()


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (500, None),
        (404, None),
        (203, None),
        (200, b""),
        (200, b"<html>"),
        (200, b"\xff\xfe"),
        (200, b"[]"),
        (200, b"{}"),
        (200, b'{"keys": {}}'),
        (200, b"[" * 100_000),
        (200, BIG),
    ],
)
async def test_an_answer_that_is_no_jwks_leaves_the_keys_as_they_were(
    issuer: Issuer, status: int, body: bytes | None
) -> None:
    async with gateway(issuer, retry=0) as authenticator:
        issuer.status, issuer.body = status, body
        with pytest.raises(Unavailable):
            await authenticator(bearer(token()))
        issuer.status, issuer.body = 200, None
        await authenticator(bearer(token()))
        issuer.status, issuer.body = status, body
        with pytest.raises(Unauthorized, match="unknown key"):
            await authenticator(bearer(token(kid="new")))
        await authenticator(bearer(token(sub="bob")))


@pytest.mark.parametrize("status", [301, 302, 307, 308])
async def test_redirects_are_not_followed(issuer: Issuer, status: int) -> None:
    with Issuer([jwk(RSA_KEY, "rsa")]) as elsewhere:
        issuer.status, issuer.headers = status, {"Location": elsewhere.url}
        async with gateway(issuer) as authenticator:
            with pytest.raises(Unavailable):
                await authenticator(bearer(token()))
        assert elsewhere.fetches == 0


async def test_an_endpoint_that_trickles_is_given_up_in_time(issuer: Issuer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jwks, "FETCH_SECONDS", 0.5)
    issuer.trickle, issuer.body = 0.05, b" " * 40
    async with gateway(issuer) as authenticator:
        started = time.monotonic()
        with pytest.raises(Unavailable):
            await authenticator(bearer(token()))
        assert time.monotonic() - started < 1.5
