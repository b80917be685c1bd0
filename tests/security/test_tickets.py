"""Tickets: they let who has one read one run's stream for a while, at any gateway, and nothing else (P20, P21)."""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import httpx
import jwt
import pytest

from broker.errors import NotConfigured, Unauthorized
from broker.gateway.auth import Principal
from broker.gateway.tickets import Tickets
from broker.ids import Owner, new_request_id
from tests.conftest import Launcher, Service
from tests.kit import raw, sse
from tests.kit.checker import check_reader, entries_of
from tests.kit.eventsource import Stream
from tests.kit.http import Client, token
from tests.kit.processes import SECRET
from tests.security.issuer import RSA_KEY, Issuer, claims, jwk, settings, sign, sign_bytes

KEY, OTHER_KEY = (secrets.token_urlsafe(48) for _ in range(2))
FOR_EVER = Principal(Owner("t", "s"), frozenset(), None)


def derived(secret: str) -> bytes:
    """The key that only a gateway has, or who knows its secret."""
    return hmac.digest(secret.encode(), b"stream-broker ticket 1", hashlib.sha256)


@dataclass
class Mine:
    """A finished run, and a ticket for it."""

    client: Client
    url: str
    request_id: str
    ticket: str

    def read(self, ticket: str, request_id: str | None = None, *headers: tuple[str, str]) -> raw.Reply:
        path = f"/api/v1/runs/{request_id or self.request_id}/stream?ticket={ticket}"
        return raw.ask(self.url, "GET", path, *headers)


@pytest.fixture(scope="module")
def mine(service: Service) -> Iterator[Mine]:
    subject = f"ticket-{secrets.token_hex(4)}"
    with service.client(subject) as client:
        request_id = client.submit("three words here")
        client.finished(request_id)
        ticket = client.post(f"/api/v1/runs/{request_id}/ticket").json()["ticket"]
        yield Mine(client, service.gateways[1].url, request_id, ticket)


def test_a_ticket_reads_its_runs_stream_at_another_gateway_without_a_token(mine: Mine) -> None:
    response = mine.client.post(f"/api/v1/runs/{mine.request_id}/ticket")
    assert (response.headers["cache-control"], response.headers["referrer-policy"]) == ("no-store", "no-referrer")
    body = response.json()
    assert body["stream"] == f"/api/v1/runs/{mine.request_id}/stream?ticket={body['ticket']}"
    left = datetime.fromisoformat(body["expires_at"]).timestamp() - time.time()
    assert 500 < left <= 601
    answer = httpx.get(mine.url + body["stream"], verify=False)
    assert answer.status_code == 200
    log = mine.client.log(mine.request_id)
    check_reader(entries_of(sse.parse(answer.content)), log)
    part = httpx.get(mine.url + body["stream"], headers={"Last-Event-ID": str(log[1].id)}, verify=False)
    check_reader(entries_of(sse.parse(part.content)), log[2:])
    assert httpx.get(f"{mine.url}{body['stream']}&last_event_id={log[-1].id}", verify=False).status_code == 204


def test_a_ticket_reads_the_runs_stream_in_the_agent_dialect_too(mine: Mine) -> None:
    path = f"/api/v1/agent/stream/{mine.request_id}"
    assert raw.ask(mine.url, "GET", path).status == 401
    answer = raw.ask(mine.url, "GET", f"{path}?ticket={mine.ticket}")
    assert answer.status == 200
    assert b"three " in answer.body


def altered(text: str, **changes: Any) -> str:
    """The same signature over other claims."""
    head, payload, signature = text.split(".")
    changed = json.loads(jwt.utils.base64url_decode(payload)) | changes
    return f"{head}.{jwt.utils.base64url_encode(json.dumps(changed).encode()).decode()}.{signature}"


def forged(mine: Mine, key: str | bytes = derived(SECRET), **changes: Any) -> str:
    """A ticket's claims with some changed, a None takes the claim away; signed with `key`."""
    good = {"aud": "stream-broker/ticket", "run": mine.request_id, "exp": int(time.time()) + 60}
    return jwt.encode({name: value for name, value in (good | changes).items() if value is not None}, key)


def of_another(mine: Mine) -> str:
    other = mine.client.submit("another one")
    text: str = mine.client.post(f"/api/v1/runs/{other}/ticket").json()["ticket"]
    return text


BAD: dict[str, Callable[[Mine], str]] = {
    "empty": lambda mine: "",
    "garbage": lambda mine: "garbage",
    "not base64": lambda mine: "a.b.c",
    "cut": lambda mine: mine.ticket[:-3],
    "with more behind it": lambda mine: mine.ticket + ".x",
    "of another run": of_another,
    "for another run, the signature kept": lambda mine: altered(mine.ticket, run=new_request_id()),
    "longer, the signature kept": lambda mine: altered(mine.ticket, exp=int(time.time()) + 9999),
    "expired": lambda mine: forged(mine, exp=int(time.time()) - 1),
    "without an end": lambda mine: forged(mine, exp=None),
    "with an end that is none": lambda mine: forged(mine, exp="for ever"),
    "without a run": lambda mine: forged(mine, run=None),
    "for several runs": lambda mine: forged(mine, run=[mine.request_id]),
    "for any run": lambda mine: forged(mine, run="*"),
    "without an audience": lambda mine: forged(mine, aud=None),
    "for the audience of tokens": lambda mine: forged(mine, aud="stream-broker"),
    "for another audience": lambda mine: forged(mine, aud="another"),
    "under another key": lambda mine: forged(mine, OTHER_KEY),
    "under the secret of tokens itself": lambda mine: forged(mine, SECRET),
    "by another hash": lambda mine: sign_bytes(
        {"alg": "HS512", "typ": "JWT"},
        json.dumps(claims(aud="stream-broker/ticket", run=mine.request_id)).encode(),
        derived(SECRET),
        "HS512",
    ),
    "without a signature": lambda mine: jwt.encode(claims(aud="stream-broker/ticket", run=mine.request_id), "", "none"),
    "alg none, with a signature": lambda mine: sign_bytes(
        {"alg": "none", "typ": "JWT"},
        json.dumps(claims(aud="stream-broker/ticket", run=mine.request_id)).encode(),
        derived(SECRET),
    ),
    "a token of the owner's": lambda mine: str(mine.client.headers["authorization"]).removeprefix("Bearer "),
    "a token that names the run": lambda mine: token("x", aud=["stream-broker", "stream-broker/ticket"], run="x"),
    "8 KiB": lambda mine: forged(mine, more="x" * 8000),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_ticket_is_refused_whether_the_run_is_there_or_not_and_with_a_good_token_too(
    mine: Mine, name: str
) -> None:
    text = BAD[name](mine)
    good = ("Authorization", mine.client.headers["authorization"])
    replies = [mine.read(text), mine.read(text, None, good), mine.read(text, new_request_id())]
    for reply in replies[: 2 if name == "expired" else 3]:
        assert (reply.status, reply.json["code"]) == (401, "unauthorized"), reply.body
        assert reply.header("content-type") == "application/problem+json"
        assert len(text) < 8 or text not in str(reply), "echoes the ticket"
        assert mine.request_id not in str(reply)


def test_a_forgery_with_nothing_changed_would_be_good(mine: Mine) -> None:
    """So what the table changes is what is refused."""
    assert mine.read(forged(mine)).status == 200


def test_a_ticket_opens_nothing_else(mine: Mine) -> None:
    """Neither in its place, nor as a bearer token."""
    run, bearer = f"/api/v1/runs/{mine.request_id}", ("Authorization", f"Bearer {mine.ticket}")
    assert mine.read(mine.ticket, mine.client.submit("another of the owner's")).status == 401
    document = httpx.get(f"{mine.url}/openapi.json", verify=False).json()
    takes = {
        (method.upper(), path)
        for path, operations in document["paths"].items()
        for method, operation in operations.items()
        if "ticket" in [parameter["name"] for parameter in operation["parameters"]]
    }
    assert takes == {("GET", "/api/v1/runs/{request_id}/stream"), ("GET", "/api/v1/agent/stream/{request_id}")}
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            if operation.get("security") == []:
                continue
            target = path.replace("{request_id}", mine.request_id)
            tries = [(target, (bearer,))] + [(f"{target}?ticket={mine.ticket}&run={mine.request_id}", ())] * (
                (method.upper(), path) not in takes
            )
            for where, headers in tries:
                reply = raw.ask(mine.url, method.upper(), where, *headers)
                assert reply.status == 401, f"{method} {where}"
    assert mine.client.get(run).status_code == 200, "it is still there"


def test_a_ticket_of_a_run_that_was_erased_finds_nothing(mine: Mine) -> None:
    request_id = mine.client.submit("to be erased")
    ticket = mine.client.post(f"/api/v1/runs/{request_id}/ticket").json()["ticket"]
    assert mine.client.delete(f"/api/v1/runs/{request_id}").status_code == 204
    assert mine.read(ticket, request_id).status == 404
    assert mine.client.post(f"/api/v1/runs/{request_id}/ticket").status_code == 404


def test_no_ticket_outlives_the_token_that_it_was_made_with(service: Service, mine: Mine) -> None:
    claimed = jwt.decode(str(mine.client.headers["authorization"])[7:], options={"verify_signature": False})
    short = {"Authorization": f"Bearer {token(claimed['sub'], ttl=30)}"}
    response = httpx.post(f"{mine.url}/api/v1/runs/{mine.request_id}/ticket", headers=short, verify=False)
    left = datetime.fromisoformat(response.json()["expires_at"]).timestamp() - time.time()
    assert 20 < left <= 30 + 10 + 1, "the leeway included"


def test_tickets_are_in_no_log(service: Service, mine: Mine) -> None:
    mine.read(mine.ticket)
    mine.read("x" * 300)
    for gateway in service.gateways:
        assert mine.ticket not in gateway.log_text()
        assert "x" * 300 not in gateway.log_text()
    assert service.gateways[1].logged("access", path=f"/api/v1/runs/{mine.request_id}/stream")


async def test_a_stream_ends_when_its_ticket_does_and_the_ticket_is_good_until_then(launch: Launcher) -> None:
    """P21. An EventSource comes again with the same URL."""
    server = launch.redis()
    gateway = launch.gateway(server.url, ticket_seconds=3, heartbeat_seconds=0.5)
    with Client(gateway.url) as client:
        request_id = client.submit("nobody takes it")
        path = client.post(f"/api/v1/runs/{request_id}/ticket").json()["stream"]
    ending: list[Any] = []
    for _ in range(2):
        stream = Stream()
        await stream.open(gateway.url, path, {})
        assert stream.status == 200
        if not ending:
            await stream.until(lambda stream=stream: bool(stream.events))  # type: ignore[misc]
        else:
            assert await stream.ended() == "cut"
        ending.append(stream)
        await stream.close()
    late = Stream()
    await late.open(gateway.url, path, {})
    assert (late.status, await late.ended()) == (401, "finished")


# -- keys ----------------------------------------------------------------------------------------------------


def tickets(**values: Any) -> Tickets:
    return Tickets(settings(**values))


def taken(by: Tickets, made: str) -> bool:
    try:
        return by.principal(made, "r").ticket_for == "r"
    except Unauthorized:
        return False


def test_a_key_is_changed_while_tickets_of_the_old_one_are_still_good() -> None:
    old, both, new = (tickets(ticket_key=key) for key in (KEY, f"{OTHER_KEY}, {KEY}", OTHER_KEY))
    made = {name: signer.make("r", FOR_EVER).text for name, signer in (("old", old), ("both", both), ("new", new))}
    assert [taken(old, made["old"]), taken(both, made["old"]), taken(new, made["old"])] == [True, True, False]
    assert [taken(old, made["both"]), taken(both, made["both"]), taken(new, made["both"])] == [False, True, True]


def test_without_a_key_of_its_own_it_is_made_from_the_secret_and_is_not_the_secret() -> None:
    by_secret = tickets(jwt_secret=SECRET)
    made = by_secret.make("r", FOR_EVER).text
    assert taken(tickets(jwt_secret=SECRET), made)
    assert not taken(tickets(jwt_secret=SECRET + "x"), made)
    assert not taken(tickets(jwt_secret=SECRET, ticket_key=KEY), made)
    with pytest.raises(jwt.InvalidSignatureError):
        jwt.decode(made, SECRET, algorithms=["HS256"], options={"verify_aud": False})
    same = tickets(jwt_secret=KEY, ticket_key=KEY).make("r", FOR_EVER).text
    with pytest.raises(jwt.InvalidSignatureError):
        jwt.decode(same, KEY, algorithms=["HS256"], options={"verify_aud": False})


def test_where_nothing_is_shared_but_public_keys_the_route_says_what_is_missing(launch: Launcher) -> None:
    with pytest.raises(NotConfigured, match="BROKER_TICKET_KEY"):
        tickets(jwt_jwks_url="http://127.0.0.1:1").make("r", FOR_EVER)
    server = launch.redis()
    with Issuer([jwk(RSA_KEY, "k")]) as issuer:
        common: dict[str, Any] = {"jwt_secret": None, "jwt_jwks_url": issuer.url}
        without, with_key = launch.gateway(server.url, **common), launch.gateway(server.url, **common, ticket_key=KEY)
        bearer = {"Authorization": f"Bearer {sign(claims(), RSA_KEY, 'RS256', kid='k')}"}
        with Client(without.url, None, headers=bearer) as one, Client(with_key.url, None, headers=bearer) as two:
            request_id = one.submit("q")
            refused = one.post(f"/api/v1/runs/{request_id}/ticket")
            assert (refused.status_code, refused.json()["code"]) == (501, "not_configured")
            assert "BROKER_TICKET_KEY" in refused.json()["detail"]
            assert one.post(f"/api/v1/runs/{new_request_id()}/ticket").status_code == 404
            stream = two.post(f"/api/v1/runs/{request_id}/ticket").json()["stream"]
            two.post(f"/api/v1/runs/{request_id}/cancel")
        assert raw.ask(with_key.url, "GET", stream).status == 200
        assert raw.ask(without.url, "GET", stream).status == 401
        assert KEY not in without.log_text() + with_key.log_text()


def test_without_authentication_a_ticket_is_taken_and_lets_no_web_page_in(launch: Launcher) -> None:
    assert taken(tickets(auth="none"), tickets(auth="none").make("r", FOR_EVER).text)
    gateway = launch.gateway(launch.redis().url, auth="none", jwt_secret=None)
    with Client(gateway.url, None) as client:
        request_id = client.submit("q")
        client.post(f"/api/v1/runs/{request_id}/cancel")
        stream = client.post(f"/api/v1/runs/{request_id}/ticket").json()["stream"]
    assert raw.ask(gateway.url, "GET", stream).status == 200
    assert raw.ask(gateway.url, "GET", f"{stream}x").status == 401
    for header in (("Origin", "https://evil.example"), ("Sec-Fetch-Site", "cross-site")):
        assert raw.ask(gateway.url, "GET", stream, header).status == 403
    assert raw.ask(gateway.url, "GET", stream, host="evil.example").status == 403
