"""P20: only the owner sees or touches a run. A foreign run and a missing one answer alike, byte for byte.

The matrix is every route of the service times everyone who may call. A route that is not in ROWS fails the first
test: say there whom it serves, and the rest follows.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import httpx
import pytest

from broker.ids import new_request_id
from tests.conftest import Service
from tests.kit import raw
from tests.kit.http import Client, token
from tests.kit.processes import wait_for

Kind = Literal["public", "own", "run"]
"""public: for everyone, without a token. own: for every user, about what is his. run: about the run in its path, or in
its `query`."""


@dataclass(frozen=True, kw_only=True)
class Row:
    kind: Kind
    query: str = ""
    """What every call of it has."""
    body: dict[str, Any] | None = None
    variants: tuple[tuple[str, tuple[tuple[str, str], ...]], ...] = ()
    """More ways to call it: a query string and headers; `{rid}` and `{end}` are the run's."""
    changes: bool = False
    """Whether the owner's call changes the run, so that each needs one of its own."""
    answers: tuple[int, ...] = (200,)
    """To whom it serves."""
    problem: str = "application/problem+json"
    """The media type of its errors."""


CURSORS = (
    ("?last_event_id={rid}/{end}", ()),
    ("?last_event_id=0-1", ()),
    ("?lastEventId=nonsense", ()),
    ("", (("Last-Event-ID", "{end}"),)),
    ("", (("Last-Event-ID", "{rid}/{end}"),)),
    ("", (("Last-Event-ID", "999-999"),)),
)

ROWS: dict[tuple[str, str], Row] = {
    ("GET", "/"): Row(kind="public"),
    ("GET", "/healthz"): Row(kind="public"),
    ("GET", "/readyz"): Row(kind="public"),
    ("GET", "/openapi.json"): Row(kind="public"),
    ("POST", "/api/v1/query"): Row(kind="own", body={"query": "mine"}, answers=(200, 202)),
    ("POST", "/api/v1/query/stream"): Row(kind="own", body={"query": "mine"}),
    ("GET", "/api/v1/runs"): Row(
        kind="own",
        variants=(
            ("?limit=500", ()),
            ("?session_id=a-session", ()),
            ("?status=completed", ()),
            ("?subject=owner", ()),
            ("?subject=owner&status=running&session_id=a-session", ()),
        ),
    ),
    ("GET", "/api/v1/runs/{request_id}"): Row(
        kind="run",
        answers=(200, 304, 400),
        variants=(
            ("?wait=1", ()),
            ("?wait=nonsense", ()),
            ("", (("Prefer", "wait=1"),)),
            ("", (("If-None-Match", '"{end}"'),)),
            ("", (("If-None-Match", "*"),)),
        ),
    ),
    ("DELETE", "/api/v1/runs/{request_id}"): Row(kind="run", changes=True, answers=(204,)),
    ("GET", "/api/v1/runs/{request_id}/stream"): Row(kind="run", answers=(200, 204, 400), variants=CURSORS),
    ("GET", "/api/v1/runs/{request_id}/events"): Row(
        kind="run",
        answers=(200, 400),
        variants=(("?limit=1", ()), ("?limit=0", ()), ("?cursor={end}", ()), ("?cursor=x", ())),
    ),
    ("POST", "/api/v1/runs/{request_id}/ticket"): Row(kind="run"),
    ("POST", "/api/v1/runs/{request_id}/cancel"): Row(kind="run", changes=True),
    ("POST", "/chat"): Row(kind="own", body={"message": "mine"}),
    ("POST", "/api/chat"): Row(kind="own", body={"message": "mine", "sessionId": "a-session", "userId": "owner"}),
    ("GET", "/chat"): Row(
        kind="own",
        answers=(200, 400, 404, 422),
        variants=(
            ("?prompt=mine", ()),
            ("?prompt=mine&session_id=a-session", ()),
            ("?prompt=mine&access_token=nonsense", ()),
            ("?prompt=mine&last_event_id=nonsense", ()),
            ("?prompt=mine", (("Last-Event-ID", f"{'0' * 32}/0-1"),)),
        ),
    ),
    ("POST", "/ai/chat"): Row(
        kind="own",
        body={
            "id": "a-session",
            "trigger": "submit-message",
            "messages": [{"id": "q", "role": "user", "parts": [{"type": "text", "text": "mine"}]}],
        },
    ),
    ("GET", "/ai/chat/{chat_id}/stream"): Row(
        kind="own", answers=(200, 204), variants=(("?startIndex=0", ()), ("?startIndex=-3", ()), ("?startIndex=9", ()))
    ),
    ("POST", "/ai/chat/{chat_id}/stop"): Row(kind="own", answers=(204,)),
    ("POST", "/api/v1/agent/stream"): Row(kind="own", body={"message": "mine"}),
    ("GET", "/api/v1/agent/stream/{request_id}"): Row(
        kind="run",
        answers=(200, 204, 400),
        variants=(
            ("?last_event_id=1", ()),
            ("?lastEventId=nonsense", ()),
            ("", (("Last-Event-ID", "1"),)),
            ("", (("Last-Event-ID", "999999"),)),
        ),
    ),
    ("GET", "/api/v1/stream"): Row(
        kind="run",
        query="?run={rid}",
        answers=(200, 400),
        variants=(("&run={rid}", ()), ("&session_id=a-session", ()), ("&last_event_id=0-1", ())),
    ),
    ("POST", "/v1/responses"): Row(kind="own", body={"model": "echo", "input": "mine"}, problem="application/json"),
    ("GET", "/v1/models"): Row(kind="own", problem="application/json"),
    ("GET", "/v1/responses/{request_id}"): Row(
        kind="run",
        answers=(200, 400),
        problem="application/json",
        variants=(
            ("?stream=true", ()),
            ("?stream=true&starting_after=3", ()),
            ("?stream=true&starting_after=nonsense", ()),
            *((query.replace("?", "?stream=true&"), headers) for query, headers in CURSORS),
        ),
    ),
    ("GET", "/v1/responses/{request_id}/input_items"): Row(kind="run", problem="application/json"),
    ("POST", "/v1/responses/{request_id}/cancel"): Row(kind="run", changes=True, problem="application/json"),
    ("DELETE", "/v1/responses/{request_id}"): Row(kind="run", changes=True, problem="application/json"),
}


@dataclass
class Caller:
    name: str
    headers: tuple[tuple[str, str], ...]
    known: bool = True
    """Whether the token is accepted at all."""


@dataclass
class Stage:
    """A tenant with an owner and a colleague, another tenant, and the owner's runs."""

    url: str
    tenant: str = field(default_factory=lambda: f"tenant-{secrets.token_hex(4)}")

    def bearer(self, subject: str, tenant: str | None = None, **claims: Any) -> tuple[tuple[str, str], ...]:
        made = token(f"{subject}@{self.tenant}", tenant=tenant or self.tenant, **claims)
        return (("Authorization", f"Bearer {made}"),)

    @property
    def owner(self) -> Caller:
        return Caller("owner", self.bearer("owner"))

    @property
    def strangers(self) -> list[Caller]:
        """Who must not see the run."""
        good = self.bearer("owner")[0][1]
        return [
            Caller("no token", (), known=False),
            Caller("expired", self.bearer("owner", ttl=-3600), known=False),
            Caller("garbage", (("Authorization", "Bearer garbage"),), known=False),
            Caller("wrong key", self.bearer("owner", secret="x" * 64), known=False),
            Caller("cut", (("Authorization", good[:-4]),), known=False),
            Caller("wrong scheme", (("Authorization", good.replace("Bearer", "Basic")),), known=False),
            Caller("same tenant", self.bearer("colleague")),
            Caller("same tenant, other scope", self.bearer("colleague", scope="broker:tenants tenant broker")),
            Caller("other tenant", self.bearer("owner", tenant="another")),
            Caller("other tenant, tenant scope", self.bearer("owner", tenant="another", scope="broker:tenant")),
            Caller("no tenant", (("Authorization", f"Bearer {token(f'owner@{self.tenant}')}"),)),
            Caller(
                "tenant by the owner's name", self.bearer("x", tenant=f"owner@{self.tenant}", scope="broker:tenant")
            ),
        ]

    @property
    def overseer(self) -> Caller:
        return Caller("same tenant, tenant scope", self.bearer("overseer", scope="openid broker:tenant"))

    def submit(self, state: str) -> dict[str, Any]:
        """A run of the owner's that is `finished`, `running` or `cancelled`."""
        with Client(self.url, None, headers=dict(self.owner.headers)) as client:
            query = f"{state} {secrets.token_hex(4)}"
            agent = {"agent": "echo"} if state == "finished" else {"agent": "slow", "parameters": {"seconds": 100}}
            request_id = client.submit(query, session_id="a-session", metadata={"secret": "pelican"}, **agent)
            if state == "cancelled":
                client.post(f"/api/v1/runs/{request_id}/cancel")
            if state != "running":
                return client.finished(request_id)
            wait_for(lambda: client.run(request_id)["answer"] is not None)
            return client.run(request_id)


@pytest.fixture(scope="module")
def stage(service: Service) -> Stage:
    return Stage(service.gateways[0].url)


@pytest.fixture(scope="module")
def runs(stage: Stage) -> Iterator[dict[str, dict[str, Any]]]:
    made = {state: stage.submit(state) for state in ("finished", "running", "cancelled")}
    yield made
    with Client(stage.url, None, headers=dict(stage.owner.headers)) as client:
        client.delete(f"/api/v1/runs/{made['running']['request_id']}")


def routes(url: str) -> dict[tuple[str, str], dict[str, Any]]:
    document = httpx.get(f"{url}/openapi.json", verify=False).json()
    return {
        (method.upper(), path): operation
        for path, operations in document["paths"].items()
        for method, operation in operations.items()
    }


def of_kind(kind: Kind) -> list[Any]:
    rows = [(method, path, row) for (method, path), row in ROWS.items() if row.kind == kind]
    rows += [("HEAD", path, row) for method, path, row in rows if method == "GET"]
    return [pytest.param(*row, id=f"{row[0]} {row[1]}") for row in rows]


def call(stage: Stage, caller: Caller, method: str, path: str, row: Row, *headers: tuple[str, str]) -> raw.Reply:
    body = json.dumps(row.body).encode() if row.body is not None else None
    typed = (("Content-Type", "application/json"),) if row.body is not None else ()
    return raw.ask(stage.url, method, path, *caller.headers, *headers, *typed, body=body)


def comparable(reply: raw.Reply) -> tuple[int, list[tuple[str, str]], bytes]:
    """All that a caller can see, but for the time and the id of this very reply."""
    return (
        reply.status,
        [(name, value) for name, value in reply.headers if name.lower() not in ("date", "x-request-id")],
        reply.body,
    )


def ways(path: str, row: Row, run: dict[str, Any]) -> Iterator[tuple[str, tuple[tuple[str, str], ...]]]:
    """The row's ways to ask for the run: path and headers."""
    names = {"{request_id}": run["request_id"], "{rid}": run["request_id"], "{end}": run["last_event_id"]}

    def fill(text: str) -> str:
        for name, value in names.items():
            text = text.replace(name, value)
        return text

    for query, headers in (("", ()), *row.variants):
        yield fill(path + row.query + query), tuple((name, fill(value)) for name, value in headers)


def test_every_route_of_the_service_has_a_row_here(stage: Stage) -> None:
    documented = routes(stage.url)
    assert set(documented) == set(ROWS)
    for (method, path), row in ROWS.items():
        assert (row.kind == "run") == ("{request_id}" in path or "{rid}" in row.query), f"{method} {path}"
        assert (row.kind == "public") == (documented[method, path].get("security") == []), f"{method} {path}"


@pytest.mark.parametrize("state", ["finished", "running", "cancelled"])
@pytest.mark.parametrize(("method", "path", "row"), of_kind("run"))
def test_a_foreign_run_answers_as_a_missing_one(
    stage: Stage, runs: dict[str, dict[str, Any]], method: str, path: str, row: Row, state: str
) -> None:
    foreign, missing = runs[state], {**runs[state], "request_id": new_request_id()}
    for caller in stage.strangers:
        asked = zip(ways(path, row, foreign), ways(path, row, missing), strict=True)
        for (theirs, theirs_headers), (nobodys, nobodys_headers) in asked:
            one = call(stage, caller, method, theirs, row, *theirs_headers)
            two = call(stage, caller, method, nobodys, row, *nobodys_headers)
            assert comparable(one) == comparable(two), caller.name
            assert one.status in ((404, 400) if caller.known else (401,)), caller.name
            for reply in (one, two):
                assert foreign["request_id"] not in str(reply.headers), "not even in X-Request-Id"
                assert len(reply.header("x-request-id") or "") == 32
                assert reply.header("content-type") == row.problem
    with Client(stage.url, None, headers=dict(stage.owner.headers)) as client:
        assert client.run(foreign["request_id"]) == foreign, "somebody has touched it"


@pytest.mark.parametrize(("method", "path", "row"), of_kind("run"))
def test_an_erased_run_answers_as_a_missing_one_to_its_owner_too(
    stage: Stage, method: str, path: str, row: Row
) -> None:
    run = stage.submit("finished")
    assert call(stage, stage.owner, "DELETE", f"/api/v1/runs/{run['request_id']}", Row(kind="run")).status == 204
    missing = {**run, "request_id": new_request_id()}
    for caller in (stage.owner, stage.overseer, *stage.strangers):
        asked = zip(ways(path, row, run), ways(path, row, missing), strict=True)
        for (erased, erased_headers), (nobodys, nobodys_headers) in asked:
            one = call(stage, caller, method, erased, row, *erased_headers)
            two = call(stage, caller, method, nobodys, row, *nobodys_headers)
            assert comparable(one) == comparable(two), caller.name


@pytest.mark.parametrize("state", ["finished", "cancelled"])
@pytest.mark.parametrize(("method", "path", "row"), of_kind("run"))
def test_the_owner_is_served_and_so_is_who_sees_the_whole_tenant(
    stage: Stage, runs: dict[str, dict[str, Any]], method: str, path: str, row: Row, state: str
) -> None:
    for caller in (stage.owner, stage.overseer):
        run = stage.submit(state) if row.changes else runs[state]
        for way, headers in ways(path, row, run):
            reply = call(stage, caller, method, way, row, *headers)
            assert reply.status in row.answers, f"{caller.name}: {way} {headers} {reply.body!r}"
            if row.changes:
                break


@pytest.mark.parametrize("run_id", ["0", "x" * 32, "0" * 31, "0" * 33, "A" * 32, "%00", "..", "resp_" + "0" * 32])
@pytest.mark.parametrize(("method", "path", "row"), of_kind("run"))
def test_what_cannot_be_a_run_answers_as_a_missing_one(
    stage: Stage, method: str, path: str, row: Row, run_id: str
) -> None:
    for caller in (stage.owner, *stage.strangers[:1]):
        one, two = (
            call(stage, caller, method, (path + row.query).replace("{request_id}", name).replace("{rid}", name), row)
            for name in (run_id, new_request_id())
        )
        assert comparable(one) == comparable(two)


@pytest.mark.parametrize(("method", "path", "row"), of_kind("own"))
def test_what_is_about_ones_own_runs_needs_a_token_and_tells_nothing_of_others(
    stage: Stage, runs: dict[str, dict[str, Any]], method: str, path: str, row: Row
) -> None:
    ids = [run["request_id"].encode() for run in runs.values()]
    for caller in (*stage.strangers, stage.overseer):
        for query, headers in (("", ()), *row.variants):
            reply = call(stage, caller, method, path + query, row, *headers)
            assert reply.status in (row.answers if caller.known else (401,)), caller.name
            assert not any(request_id in reply.body for request_id in ids), caller.name
            assert b"pelican" not in reply.body


def test_a_cursor_leads_nobody_to_a_foreign_run(stage: Stage, runs: dict[str, dict[str, Any]]) -> None:
    """Where the run is in the cursor and not in the path."""
    row = Row(kind="own")
    for run in runs.values():
        for caller in stage.strangers:
            one, two = (
                call(stage, caller, "GET", "/chat?prompt=mine", row, ("Last-Event-ID", f"{request_id}/0-1"))
                for request_id in (run["request_id"], new_request_id())
            )
            assert comparable(one) == comparable(two), caller.name
            assert one.status == (404 if caller.known else 401), caller.name


def test_a_session_is_streamed_to_those_who_are_known_only(stage: Stage) -> None:
    """To these it is their own, and never ends."""
    for caller in stage.strangers:
        reply = call(stage, caller, "HEAD", "/api/v1/stream?session_id=a-session", Row(kind="own"))
        assert reply.status == (200 if caller.known else 401), caller.name


def test_the_owner_finds_the_runs_in_the_list(stage: Stage, runs: dict[str, dict[str, Any]]) -> None:
    """The counterpart of what the others do not find."""
    listed = call(stage, stage.owner, "GET", "/api/v1/runs?session_id=a-session&limit=500", Row(kind="own")).body
    assert all(run["request_id"].encode() in listed for run in runs.values())


ELSEWHERE = ("other tenant", "other tenant, tenant scope", "no tenant", "tenant by the owner's name")
"""In whose tenant somebody has the owner's name, who may have runs."""
QUERIES = ("", "&limit=500", "&session_id=a-session", "&status=completed", "&status=running", "&limit=0", "&cursor=x")


def test_the_runs_of_another_subject_are_as_those_of_one_who_has_none(
    stage: Stage, runs: dict[str, dict[str, Any]]
) -> None:
    """But for who sees the whole tenant, and the owner."""
    ids = [run["request_id"].encode() for run in runs.values()]
    row = Row(kind="own")

    def ask(caller: Caller, subject: str, query: str) -> raw.Reply:
        return call(stage, caller, "GET", f"/api/v1/runs?subject={subject}{query}", row)

    owner = f"owner@{stage.tenant}"
    for query in QUERIES:
        for caller in stage.strangers:
            theirs, nobodys = ask(caller, owner, query), ask(caller, f"nobody@{stage.tenant}", query)
            assert not any(request_id in theirs.body for request_id in ids), (caller.name, query)
            if caller.name in ELSEWHERE:
                continue
            assert comparable(theirs) == comparable(nobodys), (caller.name, query)
            refused = 400 if query in ("&limit=0", "&cursor=x") else 200
            assert theirs.status == (refused if caller.known else 401), (caller.name, query)
        for caller in (stage.owner, stage.overseer):
            listed = ask(caller, owner, query)
            shown = {name for name, run in runs.items() if run["request_id"].encode() in listed.body}
            expected = {"&status=completed": {"finished"}, "&status=running": {"running"}}.get(query, {*runs})
            assert shown == (expected if listed.status == 200 else set()), (caller.name, query)
    assert call(stage, stage.overseer, "GET", f"/api/v1/runs?subject=nobody@{stage.tenant}", row).json == {
        "runs": [],
        "next": None,
    }


def test_a_submit_cannot_reach_a_foreign_run_by_its_name_or_its_key(stage: Stage) -> None:
    """With the very body of the run, its cursor and its Idempotency-Key, others start a run of their own."""
    body = {"query": f"shared {secrets.token_hex(4)}", "session_id": "a-session"}
    row = Row(kind="own", body=body)
    key = ("Idempotency-Key", secrets.token_hex(8))
    mine = call(stage, stage.owner, "POST", "/api/v1/query/stream", row, key)
    request_id = mine.header("content-location").split("/")[4]  # type: ignore[union-attr]
    for caller in [caller for caller in stage.strangers if caller.known]:
        for theirs in (request_id, new_request_id()):
            cursor = ("Last-Event-ID", f"{theirs}/0-1")
            reply = call(stage, caller, "POST", "/api/v1/query/stream", row, cursor)
            assert reply.status == 200
            assert request_id.encode() not in reply.body, caller.name
    for caller in [caller for caller in (*stage.strangers, stage.overseer) if caller.known]:
        reply = call(stage, caller, "POST", "/api/v1/query", row, key)
        assert reply.status in (200, 202)
        assert reply.json["request_id"] != request_id, caller.name


def test_a_foreign_chat_and_a_foreign_run_are_as_a_chat_in_which_nothing_runs(
    stage: Stage, runs: dict[str, dict[str, Any]]
) -> None:
    """A chat's name leads to one's own session of that name, or to a run that one may see."""
    row, ways_in = Row(kind="own"), ("", "?startIndex=0", "?startIndex=2", "?startIndex=-1")
    theirs = [f"s-{run['request_id']}" for run in runs.values()] + [run["request_id"] for run in runs.values()]
    for caller in stage.strangers:
        for chat in ("a-session", *theirs):
            asked = [("GET", f"/stream{way}") for way in ways_in] + [("POST", "/stop")]
            for method, rest in asked:
                one = call(stage, caller, method, f"/ai/chat/{chat}{rest}", row)
                two = call(stage, caller, method, f"/ai/chat/{new_request_id()}{rest}", row)
                assert comparable(one) == comparable(two), (caller.name, chat, rest)
                assert one.status in ((200, 204) if caller.known else (401,)), (caller.name, chat, rest)
    with Client(stage.url, None, headers=dict(stage.owner.headers)) as client:
        assert client.run(runs["running"]["request_id"]) == runs["running"], "somebody has stopped it"


def test_a_chat_goes_on_for_its_owner_and_a_run_for_who_sees_the_whole_tenant(
    stage: Stage, runs: dict[str, dict[str, Any]]
) -> None:
    """The counterpart of what the others do not find."""
    finished = runs["finished"]["request_id"]
    for caller, chat, found in (
        (stage.owner, finished, True),
        (stage.overseer, finished, True),
        (stage.owner, new_request_id(), False),
    ):
        reply = call(stage, caller, "GET", f"/ai/chat/{chat}/stream?startIndex=0", Row(kind="own"))
        assert (reply.header("x-workflow-run-id") == chat) is found
        assert (b'"messageId"' in reply.body) is found


@pytest.mark.parametrize(("method", "path", "row"), of_kind("public"))
def test_a_public_route_is_the_same_for_everyone(stage: Stage, method: str, path: str, row: Row) -> None:
    answers = [
        comparable(call(stage, caller, method, path, row)) for caller in (stage.owner, stage.overseer, *stage.strangers)
    ]
    assert answers[0][0] == 200
    assert all(answer == answers[0] for answer in answers)


@pytest.mark.parametrize("path", sorted({path for _, path in ROWS}))
def test_a_method_that_a_path_does_not_take_tells_nothing_of_its_run(
    stage: Stage, runs: dict[str, dict[str, Any]], path: str
) -> None:
    takes = {method for method, other in ROWS if other == path}
    for method in {"GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE"} - takes:
        seen = [
            comparable(call(stage, caller, method, path.replace("{request_id}", request_id), Row(kind="run")))
            for caller in (stage.owner, *stage.strangers)
            for request_id in (runs["finished"]["request_id"], new_request_id(), "x")
        ]
        assert seen[0][0] == 405
        assert all(reply == seen[0] for reply in seen)
