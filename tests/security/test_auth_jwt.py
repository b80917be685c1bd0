"""P19. Which bearer tokens are accepted, whose they are, and in which words all others are refused."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import jwt
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from starlette.types import Scope

from broker.errors import BrokerError, Forbidden, Invalid, Misconfigured, Unauthorized
from broker.gateway import auth
from broker.gateway.auth import Authenticator, JwtAuthenticator, Principal, make_authenticator, mint
from broker.ids import Owner
from tests.security.issuer import (
    EC_KEY,
    OTHER_RSA_KEY,
    RSA_KEY,
    SECRET,
    Issuer,
    bearer,
    claims,
    jwk,
    pem,
    request,
    settings,
    sign,
    sign_bytes,
)

HMAC = settings(jwt_secret=SECRET)
HEADER = {"alg": "HS256", "typ": "JWT"}


async def authenticate(scope: Scope, **values: Any) -> Principal:
    authenticator = make_authenticator(settings(**({"jwt_secret": SECRET} | values)))
    try:
        return await authenticator(scope)
    finally:
        await authenticator.close()


async def refusal(scope: Scope, **values: Any) -> str:
    with pytest.raises(Unauthorized) as caught:
        await authenticate(scope, **values)
    assert len(caught.value.detail) < 160
    for name, value in scope["headers"]:
        for part in value.decode("latin-1").replace(" ", ".").split("."):
            assert name != b"authorization" or len(part) < 8 or part not in caught.value.detail, "echoes the token"
    return caught.value.detail


# The header field


@pytest.mark.parametrize("scheme", ["Bearer ", "bearer ", "BEARER ", "Bearer   "])
async def test_a_bearer_token_is_accepted_however_the_scheme_is_written(scheme: str) -> None:
    principal = await authenticate(request(("Authorization", scheme + sign(claims()))))
    assert principal.owner == Owner(tenant="ada", subject="ada")


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda token: [], "Send a token"),
        (lambda token: [f"Bearer {token}", f"Bearer {token}"], "one Authorization header"),
        (lambda token: [f"Basic {token}"], "must be 'Bearer"),
        (lambda token: [f"Bearerx {token}"], "must be 'Bearer"),
        (lambda token: [f"Bearer{token}"], "must be 'Bearer"),
        (lambda token: [token], "must be 'Bearer"),
        (lambda token: ["Bearer"], "must be 'Bearer"),
        (lambda token: ["Bearer "], "must be 'Bearer"),
        (lambda token: [""], "must be 'Bearer"),
        (lambda token: [f"Bearer {token}, Bearer {token}"], "must be 'Bearer"),
        (lambda token: [f"Bearer {token} x"], "must be 'Bearer"),
        (lambda token: [f"Bearer\t{token}"], "must be 'Bearer"),
        (lambda token: ["Bearer garbage"], "not a signed JWT"),
        (lambda token: ["Bearer a.b"], "not a signed JWT"),
        (lambda token: ["Bearer a.b.c.d.e"], "not a signed JWT"),
        (lambda token: ["Bearer ..."], "not a signed JWT"),
        (lambda token: [f"Bearer {token}="], "not a signed JWT"),
        (lambda token: [f"Bearer {token}\u00e9"], "not a signed JWT"),
        (lambda token: [f"Bearer {token}\n"], "not a signed JWT"),
        (lambda token: [f'Bearer "{token}"'], "not a signed JWT"),
        (lambda token: [f"Bearer {token.rpartition('.')[0]}."], "not a signed JWT"),
        (lambda token: ["Bearer a.b.c"], "malformed"),
        (lambda token: ["Bearer YQ.YQ.YQ"], "malformed"),
        (lambda token: ["Bearer W10.W10.W10"], "malformed"),
    ],
)
async def test_a_header_that_is_not_one_bearer_token_is_refused(
    make: Callable[[str], list[str]], expected: str
) -> None:
    values = make(sign(claims()))
    assert expected in await refusal(request(*(("Authorization", value) for value in values)))


async def test_a_token_in_a_cookie_or_in_the_query_is_no_token() -> None:
    token = sign(claims())
    scope = request(("Cookie", f"access_token={token}"))
    scope["query_string"] = f"access_token={token}".encode()
    assert "Send a token" in await refusal(scope)


async def test_a_token_may_have_8_kib_and_not_more() -> None:
    long = sign(claims(padding="x" * 5900))
    assert len(long) <= 8192
    await authenticate(bearer(long))
    assert "longer than 8192" in await refusal(bearer(sign(claims(padding="x" * 6200))))


# The signature


async def test_the_secret_signs_with_the_configured_algorithms_only() -> None:
    await authenticate(bearer(sign(claims(), algorithm="HS512")), jwt_algorithms=("HS256", "HS512"))
    assert "(alg)" in await refusal(bearer(sign(claims(), algorithm="HS512")))
    assert "(alg)" in await refusal(bearer(sign(claims(), algorithm="HS256")), jwt_algorithms=("HS384",))


async def test_another_secret_is_refused() -> None:
    assert "signature" in await refusal(bearer(sign(claims(), "another-secret-of-sufficient-length!" * 2)))


@pytest.mark.parametrize("name", ["none", "None", "NONE", "nOnE", "", "HS256 ", "hs256", None, 7, ["HS256"], {}])
async def test_an_algorithm_that_is_not_configured_is_refused_whatever_the_signature(name: Any) -> None:
    payload = json.dumps(claims()).encode()
    assert "(alg)" in await refusal(bearer(sign_bytes({"alg": name, "typ": "JWT"}, payload)))
    assert "(alg)" in await refusal(bearer(sign_bytes({"alg": name}, payload).rpartition(".")[0] + ".AA"))


async def test_a_header_without_an_algorithm_is_refused() -> None:
    assert "(alg)" in await refusal(bearer(sign_bytes({"typ": "JWT"}, json.dumps(claims()).encode())))


async def test_an_unsigned_token_is_refused() -> None:
    unsigned = jwt.encode(claims(), "", algorithm="none")
    assert "not a signed JWT" in await refusal(bearer(unsigned))


@pytest.mark.parametrize("values", [{}, {"jwt_secret": None}, {"jwt_algorithms": ("RS256", "HS256")}])
async def test_a_public_key_is_never_an_hmac_secret(values: dict[str, Any]) -> None:
    """The classic confusion: alg=HS256, signed with the text of the RSA key that everybody can fetch."""
    with Issuer([jwk(RSA_KEY, "rsa")]) as issuer:
        # PyJWT refuses to sign with a PEM, so the attacker of this test signs by hand.
        handler = jwt.get_algorithm_by_name("HS256")
        for secret in (pem(RSA_KEY).encode(), json.dumps(jwk(RSA_KEY, "rsa")).encode(), b""):
            head = jwt.utils.base64url_encode(json.dumps(HEADER | {"kid": "rsa"}).encode())
            signed = head + b"." + jwt.utils.base64url_encode(json.dumps(claims()).encode())
            forged = signed + b"." + jwt.utils.base64url_encode(handler.sign(signed, secret))
            detail = await refusal(bearer(forged.decode()), jwt_jwks_url=issuer.url, **values)
            assert "signature" in detail or "(alg)" in detail
        assert issuer.fetches == 0


async def test_with_a_secret_and_a_jwks_each_kind_of_key_verifies_its_own_algorithms() -> None:
    with Issuer([jwk(RSA_KEY, "rsa"), jwk(EC_KEY, "ec")]) as issuer:
        both = {"jwt_jwks_url": issuer.url}
        await authenticate(bearer(sign(claims())), **both)
        await authenticate(bearer(sign(claims(), kid="rsa")), **both)
        await authenticate(bearer(sign(claims(), RSA_KEY, "RS256", kid="rsa")), **both)
        await authenticate(bearer(sign(claims(), EC_KEY, "ES256", kid="ec")), **both)
        assert "not for its algorithm" in await refusal(bearer(sign(claims(), EC_KEY, "ES256", kid="rsa")), **both)
        assert "signature" in await refusal(bearer(sign(claims(), OTHER_RSA_KEY, "RS256", kid="rsa")), **both)
        assert "(alg)" in await refusal(bearer(sign(claims(), RSA_KEY, "PS256", kid="rsa")), **both)


@pytest.mark.parametrize("crit", [["b64"], ["exp"], [], "b64", None])
async def test_critical_extensions_are_refused(crit: Any) -> None:
    token = sign_bytes(HEADER | {"crit": crit, "b64": True, "exp": 1}, json.dumps(claims()).encode())
    assert await refusal(bearer(token)) in (
        "The token is malformed.",
        "The token's header has critical extensions (crit); none is supported.",
    )


async def test_an_unencoded_payload_is_refused() -> None:
    await refusal(bearer(sign_bytes(HEADER | {"b64": False}, json.dumps(claims()).encode())))


async def test_keys_and_urls_of_keys_in_the_header_are_never_used() -> None:
    with Issuer([jwk(RSA_KEY, "rsa")]) as issuer, Issuer([jwk(OTHER_RSA_KEY, "rsa")]) as attacker:
        for header in (
            {"jku": attacker.url},
            {"x5u": attacker.url},
            {"jwk": jwk(OTHER_RSA_KEY, "rsa")},
            {"x5c": ["MIIB"]},
            {"kid": attacker.url, "jku": attacker.url},
        ):
            token = sign(claims(), OTHER_RSA_KEY, "RS256", **({"kid": "rsa"} | header))
            assert "sign" in await refusal(bearer(token), jwt_jwks_url=issuer.url)
            genuine = sign(claims(), RSA_KEY, "RS256", **(header | {"kid": "rsa"}))
            await authenticate(bearer(genuine), jwt_jwks_url=issuer.url)
        assert attacker.fetches == 0


@pytest.mark.parametrize("kid", [7, None, ["a"], {"a": 1}])
async def test_a_kid_that_is_not_a_string_is_refused(kid: Any) -> None:
    assert "malformed" in await refusal(bearer(sign_bytes(HEADER | {"kid": kid}, json.dumps(claims()).encode())))


# The claims


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"aud": "another"}, "(aud)"),
        ({"aud": None}, "'aud'"),
        ({"aud": ""}, "'aud'"),
        ({"aud": []}, "'aud'"),
        ({"aud": ["another"]}, "(aud)"),
        ({"aud": ["stream-broker", 7]}, "(aud)"),
        ({"aud": "stream-broker2"}, "(aud)"),
        ({"aud": "Stream-Broker"}, "(aud)"),
        ({"aud": {"stream-broker": 1}}, "(aud)"),
        ({"aud": 7}, "(aud)"),
        ({"iss": "another"}, "(iss)"),
        ({"iss": None}, "'iss'"),
        ({"iss": ""}, "(iss)"),
        ({"iss": "stream"}, "(iss)"),
        ({"iss": "stream-broker/"}, "(iss)"),
        ({"iss": "stream-broker.evil.example"}, "(iss)"),
        ({"iss": ["stream-broker"]}, "(iss)"),
        ({"iss": {"stream-broker": 1}}, "(iss)"),
        ({"iss": 7}, "(iss)"),
        ({"exp": None}, "'exp'"),
        ({"exp": 0}, "expired"),
        ({"exp": -1}, "expired"),
        ({"exp": "soon"}, "malformed"),
        ({"exp": "99999999999"}, "'exp'"),
        ({"exp": True}, "expired"),
        ({"exp": [1]}, "malformed"),
        ({"exp": 10**400}, "'exp'"),
        ({"exp": 1e300}, "'exp'"),
        ({"exp": float("inf")}, "malformed"),
        ({"exp": float("nan")}, "malformed"),
        ({"nbf": 99999999999}, "not valid yet"),
        ({"nbf": "0"}, "'nbf'"),
        ({"nbf": True}, "'nbf'"),
        ({"nbf": {}}, "malformed"),
        ({"iat": 99999999999}, "not valid yet"),
        ({"iat": "0"}, "'iat'"),
        ({"iat": []}, "malformed"),
        ({"sub": None}, "'sub'"),
        ({"sub": ""}, "'sub'"),
        ({"sub": 7}, "'sub'"),
        ({"sub": ["ada"]}, "'sub'"),
        ({"sub": "x" * 256}, "'sub'"),
        ({"sub": "ada\n"}, "'sub'"),
        ({"sub": "ada\x00"}, "'sub'"),
        ({"sub": "\ud800"}, "'sub'"),
        ({"tenant": ""}, "'tenant'"),
        ({"tenant": 7}, "'tenant'"),
        ({"tenant": ["acme"]}, "'tenant'"),
        ({"tenant": {"id": "acme"}}, "'tenant'"),
        ({"tenant": False}, "'tenant'"),
        ({"tenant": "x" * 256}, "'tenant'"),
        ({"scope": 7}, "'scope'"),
        ({"scope": {"broker:tenant": True}}, "'scope'"),
        ({"scopes": ["broker:tenant", 7]}, "'scopes'"),
        ({"scp": True}, "'scp'"),
    ],
)
async def test_a_claim_that_is_missing_or_wrong_is_refused_and_named(changes: dict[str, Any], expected: str) -> None:
    assert expected in await refusal(bearer(sign_bytes(HEADER, json.dumps(claims(**changes)).encode())))


@pytest.mark.parametrize("name", ["exp", "aud", "iss", "sub", "tenant"])
async def test_null_is_no_value(name: str) -> None:
    assert f"'{name}'" in await refusal(bearer(sign_bytes(HEADER, json.dumps(claims() | {name: None}).encode())))


@pytest.mark.parametrize(
    "payload", [b"", b"[]", b"7", b'"sub"', b"null", b"{", b"\xff", b"[" * 4000, b'{"exp":' + b"9" * 5000]
)
async def test_a_payload_that_is_no_object_is_refused(payload: bytes) -> None:
    assert await refusal(bearer(sign_bytes(HEADER, payload))) in (
        "The token is malformed.",
        "The token is not a signed JWT.",
    )


async def test_one_audience_of_several_is_enough() -> None:
    await authenticate(bearer(sign(claims(aud=["another", "stream-broker"]))))


async def test_audience_issuer_and_tenant_claim_are_settings() -> None:
    values = {"jwt_audience": "a", "jwt_issuer": "https://i", "jwt_tenant_claim": "https://i/org"}
    token = sign(claims(aud="a", iss="https://i", tenant="no") | {"https://i/org": "acme"})
    assert (await authenticate(bearer(token), **values)).owner == Owner("acme", "ada")


async def test_the_leeway_is_for_exp_nbf_and_iat_and_is_part_of_the_end() -> None:
    now = int(time.time())
    principal = await authenticate(bearer(sign(claims(exp=now - 5, nbf=now + 5, iat=now + 5))))
    assert principal.expires_at == now - 5 + 10
    assert "expired" in await refusal(bearer(sign(claims(exp=now - 11))))
    assert "not valid yet" in await refusal(bearer(sign(claims(nbf=now + 15))))
    assert "not valid yet" in await refusal(bearer(sign(claims(iat=now + 15))))
    assert "expired" in await refusal(bearer(sign(claims(exp=now - 1))), jwt_leeway_seconds=0)


async def test_a_fraction_of_a_second_is_not_added_to_the_end() -> None:
    exp = int(time.time()) + 60
    assert (await authenticate(bearer(sign(claims(exp=exp + 0.9))))).expires_at == exp + 10


@pytest.mark.parametrize(
    ("changes", "owner"),
    [
        ({}, Owner("ada", "ada")),
        ({"tenant": "acme"}, Owner("acme", "ada")),
        ({"sub": "x" * 255, "tenant": "y" * 255}, Owner("y" * 255, "x" * 255)),
        ({"sub": "auth0|Ada Lovelace <ada@example.com>"}, Owner(*["auth0|Ada Lovelace <ada@example.com>"] * 2)),
        ({"sub": "אדה", "tenant": "阿达"}, Owner("阿达", "אדה")),
    ],
)
async def test_the_owner_is_the_tenant_and_the_subject(changes: dict[str, Any], owner: Owner) -> None:
    assert (await authenticate(bearer(sign(claims(**changes))))).owner == owner


@pytest.mark.parametrize(
    ("changes", "scopes"),
    [
        ({}, set()),
        ({"scope": ""}, set()),
        ({"scope": "broker:tenant"}, {"broker:tenant"}),
        ({"scope": "openid  broker:tenant x"}, {"openid", "broker:tenant", "x"}),
        ({"scope": "broker:tenants xbroker:tenant"}, {"broker:tenants", "xbroker:tenant"}),
        ({"scopes": ["a", "broker:tenant"]}, {"a", "broker:tenant"}),
        ({"scopes": ["a broker:tenant"]}, {"a broker:tenant"}),
        ({"scp": ["broker:tenant"]}, {"broker:tenant"}),
        ({"scp": "a broker:tenant"}, {"a", "broker:tenant"}),
        ({"scope": "a", "scopes": ["b"], "scp": ["c"]}, {"a", "b", "c"}),
    ],
)
async def test_scopes_come_as_a_string_or_as_a_list(changes: dict[str, Any], scopes: set[str]) -> None:
    principal = await authenticate(bearer(sign(claims(**changes))))
    assert principal.scopes == scopes
    assert principal.sees_tenant == ("broker:tenant" in scopes)


# Remembered tokens


async def test_a_token_is_verified_once_and_still_ends_when_it_ends() -> None:
    authenticator = JwtAuthenticator(settings(jwt_secret=SECRET, jwt_leeway_seconds=0))
    scope = bearer(sign(claims(exp=int(time.time()) + 2)))
    first = await authenticator(scope)
    assert await authenticator(scope) is first
    assert first.expires_at is not None
    await asyncio.sleep(first.expires_at - time.time() + 0.01)
    with pytest.raises(Unauthorized, match="expired"):
        await authenticator(scope)


async def test_a_refusal_is_not_remembered() -> None:
    authenticator = JwtAuthenticator(settings(jwt_secret=SECRET, jwt_leeway_seconds=0))
    nbf = int(time.time()) + 2
    scope = bearer(sign(claims(nbf=nbf)))
    with pytest.raises(Unauthorized, match="not valid yet"):
        await authenticator(scope)
    await asyncio.sleep(nbf - time.time() + 0.01)
    await authenticator(scope)


async def test_only_so_many_tokens_are_remembered_and_the_idle_ones_go_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auth, "REMEMBERED_TOKENS", 3)
    authenticator = JwtAuthenticator(HMAC)
    scopes = [bearer(sign(claims(sub=f"user-{number}"))) for number in range(4)]
    first, second = [await authenticator(scope) for scope in scopes[:3]][:2]
    assert await authenticator(scopes[0]) is first
    await authenticator(scopes[3])
    assert await authenticator(scopes[0]) is first
    assert await authenticator(scopes[1]) is not second


async def test_a_storm_of_one_token_costs_little() -> None:
    with Issuer([jwk(EC_KEY, "ec")]) as issuer:
        authenticator = make_authenticator(settings(jwt_jwks_url=issuer.url))
        scope = bearer(sign(claims(), EC_KEY, "ES256", kid="ec"))
        await authenticator(scope)
        started = time.perf_counter()
        for _ in range(5000):
            await authenticator(scope)
        assert time.perf_counter() - started < 1
        assert issuer.fetches == 1
        await authenticator.close()


# The settings


@pytest.mark.parametrize(
    ("values", "variable"),
    [
        ({}, "BROKER_JWT_SECRET"),
        ({"jwt_secret": "short"}, "BROKER_JWT_SECRET"),
        ({"jwt_secret": "x" * 63, "jwt_algorithms": ("HS256", "HS512")}, "BROKER_JWT_SECRET"),
        ({"jwt_secret": pem(RSA_KEY)}, "BROKER_JWT_SECRET"),
        ({"jwt_secret": json.dumps(jwk(RSA_KEY))}, "BROKER_JWT_SECRET"),
        ({"jwt_secret": SECRET, "jwt_algorithms": ("none",)}, "BROKER_JWT_ALGORITHMS"),
        ({"jwt_secret": SECRET, "jwt_algorithms": ("HS256", "hs512")}, "BROKER_JWT_ALGORITHMS"),
        ({"jwt_secret": SECRET, "jwt_algorithms": ("RS256",)}, "BROKER_JWT_JWKS_URL"),
        ({"jwt_jwks_url": "https://i/jwks", "jwt_algorithms": ("HS256",)}, "BROKER_JWT_SECRET"),
        ({"jwt_jwks_url": "jwks.json"}, "BROKER_JWT_JWKS_URL"),
        ({"jwt_jwks_url": "file:///etc/passwd"}, "BROKER_JWT_JWKS_URL"),
    ],
)
def test_an_algorithm_without_a_fitting_key_is_a_mistake_in_the_settings(values: dict[str, Any], variable: str) -> None:
    with pytest.raises(Misconfigured, match=variable):
        make_authenticator(settings(**values))


# Minting


@pytest.mark.parametrize("algorithms", [(), ("HS384",), ("HS512", "HS256"), ("RS256", "HS256")])
async def test_a_minted_token_is_accepted_by_the_same_settings(algorithms: tuple[str, ...]) -> None:
    values = settings(
        jwt_secret=SECRET, jwt_algorithms=algorithms, jwt_jwks_url="https://i/jwks", jwt_tenant_claim="org"
    )
    token = mint(values, subject="ada", tenant="acme", ttl=60, scopes=["a", "broker:tenant"])
    expected = next((name for name in algorithms if name.startswith("HS")), "HS256")
    assert jwt.get_unverified_header(token)["alg"] == expected
    authenticator = make_authenticator(values)
    principal = await authenticator(bearer(token))
    assert principal.owner == Owner("acme", "ada")
    assert principal.sees_tenant
    assert principal.expires_at is not None
    assert 60 <= principal.expires_at - 10 - time.time() + 1 <= 62
    await authenticator.close()


def test_a_minted_token_says_when_it_was_issued_and_nothing_that_was_not_asked_for() -> None:
    payload = jwt.decode(mint(HMAC, subject="ada", ttl=60), options={"verify_signature": False})
    assert sorted(payload) == ["aud", "exp", "iat", "iss", "sub"]
    assert abs(payload["iat"] - time.time()) < 2


async def test_a_minted_token_may_be_over_already() -> None:
    assert "expired" in await refusal(bearer(mint(HMAC, subject="ada", ttl=-60)))


def test_minting_needs_a_secret_and_an_algorithm_for_it() -> None:
    with pytest.raises(Misconfigured, match="BROKER_JWT_SECRET"):
        mint(settings(jwt_jwks_url="https://i/jwks"), subject="ada", ttl=60)
    with pytest.raises(Misconfigured, match="BROKER_JWT_ALGORITHMS"):
        mint(settings(jwt_secret=SECRET, jwt_algorithms=("RS256",)), subject="ada", ttl=60)
    with pytest.raises(Misconfigured, match="BROKER_JWT_SECRET"):
        mint(settings(jwt_secret="short"), subject="ada", ttl=60)


@pytest.mark.parametrize(
    "values",
    [
        {"subject": ""},
        {"subject": "x" * 256},
        {"subject": "\ud800"},
        {"tenant": ""},
        {"ttl": float("inf")},
        {"ttl": float("nan")},
        {"ttl": 1e15},
    ],
)
def test_nothing_is_minted_that_would_be_refused(values: dict[str, Any]) -> None:
    good: dict[str, Any] = {"subject": "ada", "ttl": 60}
    with pytest.raises(Invalid):
        mint(HMAC, **(good | values))


# Whatever comes


Call = Callable[[Scope], Principal]


@pytest.fixture(scope="module")
def call() -> Iterator[Call]:
    """An authenticator with a secret and a JWKS, in one loop for all examples."""
    with Issuer([jwk(RSA_KEY, "rsa"), jwk(EC_KEY, "ec")]) as issuer, asyncio.Runner() as runner:
        authenticator: Authenticator = make_authenticator(settings(jwt_secret=SECRET, jwt_jwks_url=issuer.url))

        def run(scope: Scope) -> Principal:
            async def wait(result: Awaitable[Principal]) -> Principal:
                return await result

            return runner.run(wait(authenticator(scope)))

        yield run
        runner.run(authenticator.close())


def refused(call: Call, scope: Scope) -> None:
    try:
        principal = call(scope)
    except BrokerError as error:
        assert not isinstance(error, Forbidden)
    else:
        pytest.fail(f"accepted as {principal}")


GENUINE = [
    sign(claims(exp=int(time.time()) + 3600)),
    sign(claims(exp=int(time.time()) + 3600), RSA_KEY, "RS256", kid="rsa"),
    sign(claims(exp=int(time.time()) + 3600), EC_KEY, "ES256", kid="ec"),
]
scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
json_values = scalars | st.lists(scalars, max_size=3)
headers = st.fixed_dictionaries(
    {"alg": st.sampled_from(["HS256", "RS256", "ES256", "none"])},
    optional=dict.fromkeys(("kid", "crit", "b64", "jku", "jwk"), json_values),
)
parts = st.binary(max_size=60) | headers.map(lambda header: json.dumps(header).encode())
whatever = hypothesis_settings(max_examples=300)


def test_the_tokens_that_the_properties_corrupt_are_good_ones(call: Call) -> None:
    for token in GENUINE:
        assert call(bearer(token)).owner == Owner("ada", "ada")


@whatever
@given(value=st.binary(max_size=200), prefix=st.sampled_from([b"", b"Bearer ", b"bearer  "]))
def test_random_bytes_are_refused(call: Call, value: bytes, prefix: bytes) -> None:
    refused(call, {"type": "http", "method": "GET", "headers": [(b"authorization", prefix + value)]})


@whatever
@given(items=st.lists(parts, min_size=3, max_size=3))
def test_random_tokens_are_refused(call: Call, items: list[bytes]) -> None:
    refused(call, bearer(".".join(jwt.utils.base64url_encode(item).decode() for item in items)))


@whatever
@given(data=st.data())
def test_a_token_with_one_corruption_is_refused(call: Call, data: st.DataObject) -> None:
    token = data.draw(st.sampled_from(GENUINE))
    start = data.draw(st.integers(0, len(token)))
    end = min(len(token), start + data.draw(st.integers(0, 3)))
    text = data.draw(st.text(st.characters(max_codepoint=255), max_size=3))
    corrupted = token[:start] + text + token[end:]
    # Whitespace around the value of a header belongs to HTTP, not to the token.
    if corrupted.strip(" \t") != token:
        refused(call, bearer(corrupted))


@whatever
@given(
    changes=st.dictionaries(st.sampled_from(["exp", "aud", "iss", "sub", "nbf", "iat", "tenant", "scope"]), json_values)
)
def test_signed_tokens_with_any_claims_make_a_sound_principal_or_are_refused(
    call: Call, changes: dict[str, Any]
) -> None:
    token = sign_bytes(HEADER, json.dumps(claims() | changes).encode())
    try:
        principal = call(bearer(token))
    except Unauthorized:
        return
    assert principal.owner.subject.encode()
    assert principal.owner.tenant.encode()
    assert principal.expires_at is not None
    assert principal.expires_at > time.time()
