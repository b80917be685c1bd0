"""BROKER_AUTH=none over HTTP: programs of this machine, and no web page. tests/security/test_auth_none.py has the
rules; here they are on the wire, on every route. And: which combinations do not start."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.conftest import Launcher
from tests.kit import raw
from tests.kit.command import broker, check_one_line
from tests.kit.http import Client
from tests.kit.processes import Gateway
from tests.kit.redis_server import free_port

JSON = ("Content-Type", "application/json")
RUN = "/api/v1/runs/" + "0" * 32
ROUTES = [
    ("POST", "/api/v1/query", 415),
    ("POST", "/api/v1/query/stream", 415),
    ("GET", "/api/v1/runs", 200),
    ("GET", RUN, 404),
    ("DELETE", RUN, 404),
    ("GET", f"{RUN}/stream", 404),
    ("GET", f"{RUN}/events", 404),
    ("POST", f"{RUN}/cancel", 404),
]
"""And what a program gets that sends no body."""


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    launcher = Launcher(tmp_path_factory.mktemp("none"))
    try:
        server = launcher.redis()
        launcher.worker(server.url, auth="none", jwt_secret=None)
        yield launcher.gateway(server.url, auth="none", jwt_secret=None, cors_origins="https://app.example.com")
    finally:
        launcher.close()


def hosts(gateway: Gateway) -> list[str]:
    return [f"127.0.0.1:{gateway.port}", f"localhost:{gateway.port}", f"[::1]:{gateway.port}", "localhost"]


def test_a_program_needs_no_token_and_has_the_whole_api(gateway: Gateway) -> None:
    with Client(gateway.url, None) as client:
        events = client.submit_and_read("no token")
        request_id = events[0].json["request_id"]
        assert events[-1].json["answer"] == "no token"
        assert client.get("/api/v1/runs").json()["runs"][0]["request_id"] == request_id
        assert client.delete(f"/api/v1/runs/{request_id}").status_code == 204


def test_a_token_is_neither_needed_nor_looked_at(gateway: Gateway) -> None:
    for header in ((), (("Authorization", "Bearer garbage"),)):
        assert raw.ask(gateway.url, "GET", "/api/v1/runs", *header).status == 200


@pytest.mark.parametrize(("method", "path", "status"), ROUTES)
def test_every_route_serves_loopback_names(gateway: Gateway, method: str, path: str, status: int) -> None:
    for host in hosts(gateway):
        assert raw.ask(gateway.url, method, path, host=host).status == status


@pytest.mark.parametrize(("method", "path", "status"), ROUTES)
def test_no_route_serves_a_page_whose_name_was_rebound_to_loopback(
    gateway: Gateway, method: str, path: str, status: int
) -> None:
    for host in (
        "evil.example",
        f"evil.example:{gateway.port}",
        "127.0.0.1.nip.io",
        "0.0.0.0",
        "localhost.evil.example",
    ):
        reply = raw.ask(gateway.url, method, path, JSON, host=host, body=b'{"query":"x"}')
        assert (reply.status, reply.json["code"]) == (403, "forbidden")


@pytest.mark.parametrize(("method", "path", "status"), ROUTES)
def test_no_route_serves_a_page_of_another_origin(gateway: Gateway, method: str, path: str, status: int) -> None:
    for origin in ("https://evil.example", "null", "http://localhost:1", f"http://evil.example:{gateway.port}"):
        reply = raw.ask(gateway.url, method, path, JSON, ("Origin", origin), body=b'{"query":"x"}')
        assert (reply.status, reply.json["code"]) == (403, "forbidden")
        assert reply.header("access-control-allow-origin") is None
    reply = raw.ask(gateway.url, method, path, JSON, ("Sec-Fetch-Site", "cross-site"), body=b'{"query":"x"}')
    assert (reply.status, reply.json["code"]) == (403, "forbidden")


def test_its_own_console_and_configured_origins_may_call(gateway: Gateway) -> None:
    own = f"http://127.0.0.1:{gateway.port}"
    for origin in (own, "https://app.example.com"):
        reply = raw.ask(gateway.url, "POST", "/api/v1/query", JSON, ("Origin", origin), body=b'{"query":"page"}')
        assert reply.status in (200, 202)


@pytest.mark.parametrize(("method", "path"), [(method, path) for method, path, _ in ROUTES if method != "GET"])
def test_what_a_form_can_send_is_forbidden_on_every_route_that_changes_something(
    gateway: Gateway, method: str, path: str
) -> None:
    for content_type in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"):
        reply = raw.ask(gateway.url, method, path, ("Content-Type", content_type), body=b'{"query":"x"}')
        assert (reply.status, reply.json["code"]) == (403, "forbidden")


def test_what_is_public_is_public_under_any_name(gateway: Gateway) -> None:
    for path in ("/healthz", "/readyz", "/openapi.json", "/"):
        assert raw.ask(gateway.url, "GET", path, host="evil.example").status == 200


# What does not start


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_without_authentication_nothing_but_loopback_is_served(host: str) -> None:
    line = check_one_line(broker("serve", "--host", host, "--port", str(free_port()), auth="none", jwt_secret=None))
    assert line.startswith("broker: BROKER_AUTH=none serves loopback only")
    assert host in line


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"jwt_secret": None}, "BROKER_JWT_SECRET or BROKER_JWT_JWKS_URL"),
        ({"jwt_secret": "a-short-one"}, "BROKER_JWT_SECRET must have at least 32 bytes"),
        ({"jwt_algorithms": "HS512"}, "BROKER_JWT_SECRET must have at least 64 bytes"),
        ({"jwt_algorithms": "none"}, "BROKER_JWT_ALGORITHMS"),
        ({"jwt_algorithms": "RS256"}, "BROKER_JWT_JWKS_URL"),
        ({"jwt_secret": "-----BEGIN PUBLIC KEY-----\nMCowBQYDK2VwAyEA\n-----END PUBLIC KEY-----"}, "BROKER_JWT_SECRET"),
        ({"jwt_jwks_url": "file:///etc/passwd", "jwt_secret": None}, "BROKER_JWT_JWKS_URL"),
        ({"auth": "off"}, "BROKER_AUTH"),
    ],
)
def test_jwt_without_a_good_key_does_not_start(settings: dict[str, Any], named: str) -> None:
    done = broker("serve", "--port", str(free_port()), **settings)
    line = check_one_line(done)
    assert line.startswith("broker: ")
    assert named in line
    assert str(settings.get("jwt_secret") or "-----") not in done.stderr
    for line in done.stderr.splitlines():
        if line.startswith("{"):
            json.loads(line)
