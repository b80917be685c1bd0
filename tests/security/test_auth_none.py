"""P19. BROKER_AUTH=none serves programs of this machine, and no web page that was not invited."""

from __future__ import annotations

import pytest

from broker.errors import Forbidden
from broker.gateway.auth import Principal, make_authenticator
from broker.ids import Owner
from tests.security.issuer import request, settings

LOCAL = Principal(Owner("local", "local"), frozenset(), None)
INVITED = "https://app.example.com"


async def call(*headers: tuple[str, str], method: str = "GET") -> Principal:
    authenticator = make_authenticator(settings(auth="none", cors_origins=(INVITED,)))
    try:
        return await authenticator(request(*headers, method=method))
    finally:
        await authenticator.close()


@pytest.mark.parametrize(
    "host",
    [
        "localhost",
        "LOCALHOST:8000",
        "localhost:8000",
        "127.0.0.1",
        "127.0.0.1:80",
        "127.8.9.10:1",
        "[::1]",
        "[::1]:8000",
    ],
)
async def test_a_program_that_names_a_loopback_host_is_the_one_local_owner(host: str) -> None:
    principal = await call(("Host", host))
    assert principal == LOCAL
    assert not principal.sees_tenant


@pytest.mark.parametrize(
    "host",
    [
        "",
        "evil.example",
        "evil.example:8000",
        "localhost.evil.example",
        "localhost.",
        "127.0.0.1.evil.example",
        "127.0.0.1.nip.io",
        "evil.example#localhost",
        "evil@localhost",
        "localhost:80@evil.example",
        "localhost:",
        "localhost:port",
        "localhost:٨٠".encode().decode("latin-1"),
        "localhost, evil.example",
        "localhost\n",
        " localhost",
        "0.0.0.0",
        "127.1",
        "2130706433",
        "127.0.0.256",
        "10.0.0.1",
        "128.0.0.1",
        "::1",
        "[::]",
        "[::2]",
        "[[::1]]",
        "[::ffff:10.0.0.1]",
    ],
)
async def test_any_other_host_is_forbidden_because_names_can_be_rebound_to_loopback(host: str) -> None:
    with pytest.raises(Forbidden):
        await call(("Host", host))


async def test_a_request_has_exactly_one_host() -> None:
    with pytest.raises(Forbidden):
        await call()
    with pytest.raises(Forbidden):
        await call(("Host", "localhost"), ("Host", "localhost"))


@pytest.mark.parametrize(
    ("host", "origin"),
    [
        ("localhost:8000", "http://localhost:8000"),
        ("localhost:8000", "https://localhost:8000"),
        ("127.0.0.1", "http://127.0.0.1"),
        ("[::1]:8000", "http://[::1]:8000"),
        ("localhost:8000", INVITED),
    ],
)
@pytest.mark.parametrize("site", ["same-origin", "cross-site", None])
@pytest.mark.parametrize("method", ["GET", "POST", "DELETE"])
async def test_pages_of_the_gateway_itself_and_invited_ones_may_call(
    host: str, origin: str, site: str | None, method: str
) -> None:
    fetch_metadata = [("Sec-Fetch-Site", site)] if site else []
    json = ("Content-Type", "application/json")
    assert await call(("Host", host), ("Origin", origin), json, *fetch_metadata, method=method) == LOCAL


@pytest.mark.parametrize(
    "origin",
    [
        "null",
        "",
        "https://evil.example",
        "http://localhost",
        "http://localhost:3000",
        "http://127.0.0.1:8000",
        "http://localhost:8000/",
        "http://localhost:8000.evil.example",
        "http://evil.example/http://localhost:8000",
        "ftp://localhost:8000",
        "localhost:8000",
        "HTTPS://APP.EXAMPLE.COM",
        "https://app.example.com.evil.example",
        "https://app.example.com:444",
        "http://app.example.com",
        "https://evil.example https://app.example.com",
    ],
)
@pytest.mark.parametrize("method", ["GET", "POST"])
async def test_pages_of_any_other_origin_are_forbidden(origin: str, method: str) -> None:
    with pytest.raises(Forbidden):
        await call(("Host", "localhost:8000"), ("Origin", origin), method=method)


async def test_a_good_origin_does_not_excuse_a_second_bad_one() -> None:
    with pytest.raises(Forbidden):
        await call(("Host", "localhost"), ("Origin", INVITED), ("Origin", "https://evil.example"))


@pytest.mark.parametrize(("site", "allowed"), [("cross-site", False), ("same-origin", True), ("none", True)])
async def test_without_an_origin_a_browser_is_refused_where_it_says_that_the_page_is_of_another_site(
    site: str, allowed: bool
) -> None:
    headers = ("Host", "localhost"), ("Sec-Fetch-Site", site)
    if allowed:
        assert await call(*headers) == LOCAL
    else:
        with pytest.raises(Forbidden):
            await call(*headers)


@pytest.mark.parametrize("method", ["POST", "DELETE", "PUT", "PATCH"])
@pytest.mark.parametrize(
    "content_type",
    [
        "text/plain",
        "TEXT/Plain",
        "text/plain; charset=utf-8",
        "text/plain;application/json",
        " text/plain ;x=y",
        "application/x-www-form-urlencoded",
        "multipart/form-data; boundary=x",
    ],
)
async def test_what_a_form_can_send_without_a_preflight_is_forbidden(method: str, content_type: str) -> None:
    with pytest.raises(Forbidden):
        await call(("Host", "localhost"), ("Content-Type", content_type), method=method)
    with pytest.raises(Forbidden):
        await call(
            ("Host", "localhost"), ("Content-Type", "application/json"), ("Content-Type", content_type), method=method
        )


@pytest.mark.parametrize("origin", ["http://localhost", INVITED])
async def test_a_page_that_may_call_may_name_its_json_as_it_likes(origin: str) -> None:
    """Its origin is known; without one it could be a form of any page."""
    headers = [("Host", "localhost"), ("Origin", origin), ("Content-Type", "text/plain;charset=UTF-8")]
    assert await call(*headers, method="POST") == LOCAL


@pytest.mark.parametrize("method", ["GET", "HEAD", "OPTIONS"])
async def test_methods_without_effects_may_have_any_content_type(method: str) -> None:
    assert await call(("Host", "localhost"), ("Content-Type", "text/plain"), method=method) == LOCAL


@pytest.mark.parametrize("headers", [[], [("Content-Type", "application/json")]])
async def test_programs_may_post_json_or_nothing(headers: list[tuple[str, str]]) -> None:
    assert await call(("Host", "localhost"), *headers, method="POST") == LOCAL
