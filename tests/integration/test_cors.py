"""Web pages of the configured origins may call, see every header that they need, and no other page may."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest

from tests.conftest import Launcher, Service
from tests.kit.http import Client, token
from tests.kit.processes import Gateway

APP, OTHER = "https://app.example.com", "http://localhost:3000"
STRANGERS = ["https://evil.example", "https://app.example.com.evil.example", "http://app.example.com", "null", "*"]
RUN = "/api/v1/runs/" + "0" * 32
ROUTES = [
    ("POST", "/api/v1/query"),
    ("POST", "/api/v1/query/stream"),
    ("GET", "/api/v1/runs"),
    ("GET", RUN),
    ("DELETE", RUN),
    ("GET", f"{RUN}/stream"),
    ("GET", f"{RUN}/events"),
    ("POST", f"{RUN}/cancel"),
    ("POST", "/v1/responses"),
    ("POST", "/chat"),
    ("GET", "/chat?prompt=x"),
    ("POST", "/api/chat"),
    ("POST", "/api/v1/agent/stream"),
]
SENT = "authorization, content-type, idempotency-key, if-none-match, last-event-id, prefer"
READ = {"content-location", "etag", "location", "preference-applied", "retry-after", "x-request-id"}


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    launcher = Launcher(tmp_path_factory.mktemp("cors"))
    try:
        server = launcher.redis()
        launcher.worker(server.url)
        yield launcher.gateway(server.url, cors_origins=f"{APP}, {OTHER}")
    finally:
        launcher.close()


def preflight(url: str, path: str, origin: str, method: str, headers: str = SENT) -> httpx.Response:
    asked = {"Origin": origin, "Access-Control-Request-Method": method, "Access-Control-Request-Headers": headers}
    with httpx.Client(verify=False) as client:
        return client.options(url + path, headers=asked)


def names(value: str) -> set[str]:
    return {name.strip().lower() for name in value.split(",")}


@pytest.mark.parametrize("origin", [APP, OTHER])
@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_a_page_of_a_configured_origin_may_send_every_request_with_its_headers(
    gateway: Gateway, method: str, path: str, origin: str
) -> None:
    response = preflight(gateway.url, path, origin, method)
    assert response.status_code == 200
    assert response.headers["Access-Control-Allow-Origin"] == origin
    assert method in names_upper(response.headers["Access-Control-Allow-Methods"])
    assert names(SENT) <= names(response.headers["Access-Control-Allow-Headers"])
    assert int(response.headers["Access-Control-Max-Age"]) >= 60
    assert "origin" in names(response.headers["Vary"])


def names_upper(value: str) -> set[str]:
    return {name.upper() for name in names(value)}


@pytest.mark.parametrize("origin", STRANGERS)
def test_a_page_of_another_origin_may_send_nothing(gateway: Gateway, origin: str) -> None:
    for method, path in ROUTES:
        response = preflight(gateway.url, path, origin, method)
        assert response.status_code == 400
        assert "Access-Control-Allow-Origin" not in response.headers


def test_openais_sdk_in_a_page_may_say_what_it_is(gateway: Gateway) -> None:
    said = ("arch", "lang", "os", "package-version", "retry-count", "runtime", "runtime-version", "timeout")
    headers = ", ".join(["authorization", "content-type", *(f"x-stainless-{name}" for name in said)])
    assert preflight(gateway.url, "/v1/responses", APP, "POST", headers).status_code == 200


@pytest.mark.parametrize(("method", "headers"), [("PATCH", ""), ("PUT", ""), ("GET", "x-evil")])
def test_methods_and_headers_that_nobody_needs_are_not_allowed(gateway: Gateway, method: str, headers: str) -> None:
    assert preflight(gateway.url, "/api/v1/runs", APP, method, headers).status_code == 400


def check_readable(response: httpx.Response) -> None:
    assert response.headers["Access-Control-Allow-Origin"] == APP
    assert names(response.headers["Access-Control-Expose-Headers"]) >= READ
    assert "origin" in names(response.headers["Vary"])
    assert "Access-Control-Allow-Credentials" not in response.headers, "tokens are no cookies"


def test_a_page_reads_answers_streams_and_errors(gateway: Gateway) -> None:
    """An error that the page may not read is a network error to it."""
    with Client(gateway.url, headers={"Origin": APP}) as client:
        accepted = client.post("/api/v1/query", json={"query": "x"})
        request_id = accepted.json()["request_id"]
        client.finished(request_id)
        run = f"/api/v1/runs/{request_id}"
        stranger = {"Authorization": f"Bearer {token(ttl=-60)}"}
        last = client.run(request_id)["last_event_id"]
        replies = [
            (202, accepted),
            (200, client.get(run)),
            (304, client.get(run, headers={"If-None-Match": f'"{last}"'})),
            (200, client.get(f"{run}/stream")),
            (204, client.get(f"{run}/stream", headers={"Last-Event-ID": last})),
            (200, client.post("/api/v1/query/stream", json={"query": "y"})),
            (200, client.head(run)),
            (401, client.get(run, headers=stranger)),
            (404, client.get(RUN)),
            (404, client.get("/nothing")),
            (405, client.put(run)),
            (400, client.get(run, params={"wait": "x"})),
            (413, client.post("/api/v1/query", content=b"x" * 300_000, headers={"Content-Type": "application/json"})),
            (415, client.post("/api/v1/query", content=b"x")),
            (422, client.post("/api/v1/query", json={})),
            (204, client.delete(run)),
        ]
        for status, response in replies:
            assert response.status_code == status
            check_readable(response)


def test_a_page_of_another_origin_reads_nothing(gateway: Gateway) -> None:
    for origin in STRANGERS:
        with Client(gateway.url, headers={"Origin": origin}) as client:
            for response in (client.get("/api/v1/runs"), client.get("/nothing"), client.get(f"{RUN}/stream")):
                assert "Access-Control-Allow-Origin" not in response.headers


def test_without_the_setting_no_page_may_call(service: Service) -> None:
    url = service.gateways[0].url
    for origin in (APP, url):
        response = preflight(url, "/api/v1/query", origin, "POST")
        assert (response.status_code, response.json()["code"]) == (405, "method_not_allowed")
        response = httpx.get(f"{url}/api/v1/runs", headers={"Origin": origin}, verify=False)
        assert not [name for name in response.headers if name.lower().startswith("access-control")]
