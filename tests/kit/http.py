"""An HTTP client of the service; every JSON reply is checked against the service's own OpenAPI document."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from typing import Any

import httpx
import jsonschema
import jwt

from broker.events import Entry
from broker.ids import EventId
from tests.kit import sse
from tests.kit.processes import SECRET


def token(subject: str = "alice", *, ttl: float = 3600, secret: str = SECRET, **claims: Any) -> str:
    now = time.time()
    base = {"sub": subject, "aud": "stream-broker", "iss": "stream-broker", "iat": int(now), "exp": int(now + ttl)}
    return jwt.encode({**base, **claims}, secret, algorithm="HS256")


class Contract:
    """The OpenAPI document, and whether a reply keeps to it."""

    def __init__(self, document: dict[str, Any]) -> None:
        self.document = document
        self._paths = [
            (re.compile(re.sub(r"{\w+}", "[^/]+", path)), operations) for path, operations in document["paths"].items()
        ]

    def check(self, response: httpx.Response) -> None:
        operation = self._operation(response.request)
        if operation is None:
            schema = {"$ref": "#/components/schemas/Problem"}
            assert response.status_code in (404, 405), f"an undocumented {response.request.method} was answered"
        else:
            answers = operation["responses"]
            assert str(response.status_code) in answers, f"{response.status_code} is not documented: {list(answers)}"
            content = answers[str(response.status_code)].get("content")
            if content is None:
                assert response.content == b"", "a body where none is documented"
                return
            media_type = response.headers["content-type"].partition(";")[0]
            assert media_type in content, f"{media_type} is not documented: {list(content)}"
            schema = content[media_type]["schema"]
        if response.headers["content-type"].endswith("json"):
            jsonschema.Draft202012Validator(
                {**schema, "components": self.document["components"]},
                format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER,
            ).validate(response.json())

    def _operation(self, request: httpx.Request) -> dict[str, Any] | None:
        method = "get" if request.method == "HEAD" else request.method.lower()
        for pattern, operations in self._paths:
            if pattern.fullmatch(request.url.path) and method in operations:
                operation: dict[str, Any] = operations[method]
                return operation
        return None


_CONTRACTS: dict[str, Contract] = {}


class Client(httpx.Client):
    """One user's client of one gateway."""

    def __init__(self, url: str, subject: str | None = "alice", **options: Any) -> None:
        headers = {"Authorization": f"Bearer {token(subject)}"} if subject else {}
        super().__init__(
            base_url=url,
            headers={**headers, **options.pop("headers", {})},
            timeout=httpx.Timeout(30),
            verify=False,  # plain HTTP: the certificates need not be read
            event_hooks={"response": [self._check]},
            **options,
        )

    def _check(self, response: httpx.Response) -> None:
        origin = f"{response.request.url.scheme}://{response.request.url.netloc.decode()}"
        if origin not in _CONTRACTS:
            _CONTRACTS[origin] = Contract(httpx.get(f"{origin}/openapi.json", verify=False).json())
        if response.headers.get("content-type", "").startswith("text/event-stream"):
            assert response.status_code == 200
            return
        response.read()
        if response.request.method != "HEAD":
            _CONTRACTS[origin].check(response)

    def submit(self, query: str, **body: Any) -> str:
        """Returns the request_id."""
        response = self.post("/api/v1/query", json={"query": query, **body})
        assert response.status_code in (200, 202), response.text
        request_id: str = response.json()["request_id"]
        return request_id

    def run(self, request_id: str, wait: float | None = None) -> dict[str, Any]:
        response = self.get(f"/api/v1/runs/{request_id}", params={"wait": wait} if wait else {})
        assert response.status_code == 200, response.text
        body: dict[str, Any] = response.json()
        return body

    def finished(self, request_id: str, seconds: float = 30) -> dict[str, Any]:
        """The run when it has ended."""
        deadline = time.monotonic() + seconds
        while True:
            body = self.run(request_id, wait=5)
            if body["finished_at"] is not None:
                return body
            assert time.monotonic() < deadline, f"the run is still {body['status']}"

    def log(self, request_id: str) -> list[Entry]:
        """The whole log, by pages."""
        entries: list[Entry] = []
        params: dict[str, Any] = {"limit": 500}
        while True:
            page = self.get(f"/api/v1/runs/{request_id}/events", params=params).json()
            entries += [
                Entry(EventId.parse(row["id"]), row["type"], json.dumps(row["data"], separators=(",", ":")))
                for row in page["events"]
            ]
            if page["next"] is None:
                return entries
            params["cursor"] = page["next"]

    def events(self, request_id: str, after: str | None = None) -> Iterator[sse.Event]:
        """One connection's events."""
        headers = {"Last-Event-ID": after} if after else {}
        with self.stream("GET", f"/api/v1/runs/{request_id}/stream", headers=headers) as response:
            if response.status_code == 204:
                return
            assert response.status_code == 200, response.read()
            yield from sse.read(response.iter_raw())

    def submit_and_read(self, query: str, **body: Any) -> list[sse.Event]:
        with self.stream("POST", "/api/v1/query/stream", json={"query": query, **body}) as response:
            assert response.status_code == 200, response.read()
            return list(sse.read(response.iter_raw()))
