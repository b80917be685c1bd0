"""The OpenAPI document: valid, complete, and the same everywhere. That replies keep to it, tests/kit/http.py checks."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import httpx
import jsonschema
import pytest
from openapi_spec_validator import OpenAPIV31SpecValidator, validate
from pydantic import BaseModel

from broker.gateway import openapi
from broker.gateway.app import make_app, route_table
from broker.settings import Settings
from tests.conftest import Service
from tests.kit import raw
from tests.kit.http import Client, Contract, token


@pytest.fixture(scope="module")
def document(service: Service) -> dict[str, Any]:
    response = httpx.get(f"{service.gateways[0].url}/openapi.json", verify=False)
    assert response.headers["content-type"] == "application/json"
    found: dict[str, Any] = response.json()
    return found


def operations(document: dict[str, Any]) -> list[tuple[str, str, dict[str, Any]]]:
    return [
        (method.upper(), path, operation)
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    ]


def test_the_document_is_valid_openapi_3_1(document: dict[str, Any]) -> None:
    assert document["openapi"].startswith("3.1.")
    validate(document, cls=OpenAPIV31SpecValidator)
    for schema in document["components"]["schemas"].values():
        jsonschema.Draft202012Validator.check_schema(schema)


def test_it_has_every_route_of_the_application_and_no_other(document: dict[str, Any]) -> None:
    settings = Settings(auth="none")
    table = route_table(make_app(settings).state.gateway)
    rows = {(route.method, route.path) for route in table}
    assert len(rows) == len(table), "two rows for one route"
    assert {(method, path) for method, path, _ in operations(document)} == rows


def test_each_body_is_described_as_what_its_route_takes(document: dict[str, Any]) -> None:
    needed = {
        path: document["components"]["schemas"][
            operation["requestBody"]["content"]["application/json"]["schema"]["$ref"].rpartition("/")[2]
        ].get("required", [])
        for method, path, operation in operations(document)
        if "requestBody" in operation and method == "POST"
    }
    assert (needed["/api/v1/query"], needed["/chat"], needed["/ai/chat"]) == (["query"], ["message"], ["messages"])


def test_two_models_cannot_have_one_name() -> None:
    [route, *_] = [route for route in route_table(make_app(Settings(auth="none")).state.gateway) if route.body]
    assert route.body is not None
    other = type(route.body.__name__, (BaseModel,), {"__module__": __name__})
    with pytest.raises(ValueError, match=f"both have a model {other.__name__}"):
        openapi.document([route, replace(route, body=other)])


def test_both_gateways_serve_the_same_document(service: Service, document: dict[str, Any]) -> None:
    assert httpx.get(f"{service.gateways[1].url}/openapi.json", verify=False).json() == document


def test_each_operation_has_its_name_its_parameters_and_its_security(document: dict[str, Any]) -> None:
    found = operations(document)
    names = [operation["operationId"] for _, _, operation in found]
    assert len(set(names)) == len(names)
    assert document["security"] == [{"bearer": []}]
    for method, path, operation in found:
        in_path = {item["name"] for item in operation["parameters"] if item["in"] == "path"}
        assert in_path == set(re.findall(r"{(\w+)}", path)), path
        assert operation["summary"]
        assert ("requestBody" in operation) == (method == "POST" and "{" not in path), f"{method} {path}"
        public = path in ("/", "/healthz", "/readyz", "/openapi.json")
        assert (operation.get("security") == []) is public, path


PROBLEM = ("application/problem+json", {"$ref": "#/components/schemas/Problem"})
ERRORS = {
    "/v1/": ("application/json", {"$ref": "#/components/schemas/ErrorBody"}),
    "/ai/chat": ("text/plain", {"type": "string"}),
}
"""The dialects that tell errors in another form than the native API, by the beginning of their paths."""


def test_each_error_of_each_operation_is_a_problem_document_or_its_dialects_own(document: dict[str, Any]) -> None:
    for method, path, operation in operations(document):
        answers = operation["responses"]
        errors = {status for status in answers if status >= "400"}
        assert "500" in errors
        if operation.get("security") != []:
            assert {"400", "401", "403", "503"} <= errors, f"{method} {path}"
        if "{request_id}" in path:
            assert "404" in errors
        if "requestBody" in operation:
            assert {"413", "415", "422"} <= errors
        own = next((form for prefix, form in ERRORS.items() if path.startswith(prefix)), PROBLEM)
        for status in errors:
            [(media_type, content)] = answers[status]["content"].items()
            assert (media_type, content["schema"]) == (PROBLEM if status == "500" else own)
        assert all(answer["description"] for answer in answers.values())


def test_every_documented_path_is_there(service: Service, document: dict[str, Any]) -> None:
    auth = ("Authorization", f"Bearer {token()}")
    for method, path, _ in operations(document):
        reply = raw.ask(service.gateways[0].url, method, path.replace("{request_id}", "0" * 32), auth)
        assert reply.status not in (405, 500), f"{method} {path}"
        assert reply.status != 404 or b'"run_not_found"' in reply.body, f"{method} {path}"


def test_a_body_that_the_document_allows_is_accepted_and_one_that_it_forbids_is_not(
    alice: Client, document: dict[str, Any]
) -> None:
    operation = document["paths"]["/api/v1/query"]["post"]
    schema = operation["requestBody"]["content"]["application/json"]["schema"]
    check = jsonschema.Draft202012Validator({**schema, "components": document["components"]})
    bodies: list[Any] = [
        {"query": "x"},
        {"query": "x", "agent": None, "session_id": None},
        {"query": "x", "agent": "echo", "session_id": "s", "parameters": {"a": [1]}, "metadata": {"b": None}},
        {"query": ""},
        {"query": 1},
        {"query": None},
        {"query": "x", "more": 1},
        {"query": "x", "session_id": ""},
        {"query": "x", "session_id": "y" * 255},
        {"query": "x", "session_id": "y" * 256},
        {"query": "x", "metadata": []},
        {"query": "x", "parameters": None},
        {},
        [],
        "x",
        None,
    ]
    for body in bodies:
        status = alice.post("/api/v1/query", json=body).status_code
        assert (status in (200, 202)) is check.is_valid(body), body


@pytest.mark.parametrize(
    ("status", "media_type", "content"),
    [
        (418, "application/json", b"{}"),
        (200, "text/html", b"<p>"),
        (200, "application/json", b"{}"),
        (200, "application/json", b'{"runs":[],"next":1}'),
        (200, "application/json", b'{"runs":[{}],"next":null}'),
        (401, "application/json", b"{}"),
        (401, "application/problem+json", b'{"code":"x"}'),
    ],
)
def test_a_reply_that_breaks_the_document_is_noticed(
    document: dict[str, Any], status: int, media_type: str, content: bytes
) -> None:
    """The check of all replies in all tests can fail."""
    request = httpx.Request("GET", "http://test/api/v1/runs")
    headers = {"content-type": media_type}
    with pytest.raises((AssertionError, jsonschema.ValidationError)):
        Contract(document).check(httpx.Response(status, headers=headers, content=content, request=request))
