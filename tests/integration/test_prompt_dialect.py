"""The dialect `prompt`: a GET that is repeated starts one run; tokens in the query; pages of other origins."""

from __future__ import annotations

from collections.abc import Iterator
from urllib.parse import quote

import httpx
import pytest

from tests.conftest import Launcher
from tests.kit import raw, sse
from tests.kit.http import Client, token
from tests.kit.one_way import ALICE, Site, answered, asking, got_from, runs_of, whole
from tests.kit.processes import Gateway

APP = "https://app.example.com"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """Its second gateway takes tokens in the query, and calls of a page."""
    launcher = Launcher(tmp_path_factory.mktemp("prompt"))
    try:
        yield Site(launcher, query_token=True, cors_origins=APP, jwt_leeway_seconds=0)
    finally:
        launcher.close()


@pytest.fixture
def alice(site: Site) -> Iterator[Client]:
    with Client(site.url) as client:
        yield client


def test_a_get_that_is_repeated_with_an_id_starts_no_second_run(site: Site, alice: Client) -> None:
    asked = asking("prompt", "once", agent="tokens", count=3)
    events = sse.parse(whole(site.url, asked))
    for event in events[:-1]:
        body = whole(site.url, asked, **{"Last-Event-ID": event.id})
        assert sse.parse(body) == events[events.index(event) + 1 :]
    query_id = asked._replace(path=f"{asked.path}&last_event_id={quote(events[0].id)}")
    assert sse.parse(whole(site.url, query_id)) == events[1:]
    for _ in range(2):
        with answered(site.url, asked, **{"Last-Event-ID": events[-1].id}) as response:
            assert response.status_code == 204
    assert len([run for run in runs_of(alice) if run["agent"] == "tokens"]) == 1


def test_a_client_that_is_cut_before_the_first_word_has_an_id_already(site: Site, alice: Client) -> None:
    asked = asking("prompt", "slowly", agent="sleeper", seconds=20)
    with answered(site.url, asked) as response:
        first = b""
        for chunk in response.iter_raw():
            first += chunk
            if first.endswith(b"\n\n"):
                break
        request_id = response.headers["x-request-id"]
    [event] = sse.parse(first)
    assert (event.id, event.json) == (f"{request_id}/0-1", {"token": ""})
    alice.post(f"/api/v1/runs/{request_id}/cancel")
    rest = got_from("prompt", whole(site.url, asked, **{"Last-Event-ID": event.id}))
    assert rest.end["code"] == "cancelled"


def test_the_beginning_is_a_cursor_too(site: Site) -> None:
    asked = asking("prompt", "from the start", agent="tokens", count=2)
    events = sse.parse(whole(site.url, asked))
    request_id = events[0].id.partition("/")[0]
    assert sse.parse(whole(site.url, asked, **{"Last-Event-ID": f"{request_id}/0-0"})) == events


def test_a_cursor_of_a_run_that_is_gone_starts_no_other_and_one_with_another_prompt_does(
    site: Site, alice: Client
) -> None:
    asked = asking("prompt", "gone", agent="tokens", count=2)
    last = sse.parse(whole(site.url, asked))[1].id
    other = sse.parse(whole(site.url, asking("prompt", "other", agent="tokens", count=2), **{"Last-Event-ID": last}))
    assert other[0].id.partition("/")[0] != last.partition("/")[0]
    alice.delete(f"/api/v1/runs/{last.partition('/')[0]}")
    before = len(runs_of(alice))
    with answered(site.url, asked, **{"Last-Event-ID": last}) as response:
        assert (response.status_code, response.read() and response.json()["code"]) == (404, "run_not_found")
    assert len(runs_of(alice)) == before


@pytest.mark.parametrize("cursor", ["0-1", "x", "/0-1", f"{'0' * 31}/0-1", f"{'0' * 32}/0-1.0", f"{'0' * 32}/x"])
def test_a_cursor_that_is_none_is_refused(alice: Client, cursor: str) -> None:
    reply = alice.get("/chat", params={"prompt": "x", "last_event_id": cursor})
    assert (reply.status_code, reply.json()["code"]) == (400, "bad_cursor")


def test_a_query_that_is_not_acceptable_is_refused_and_a_head_starts_nothing(alice: Client) -> None:
    before = len(runs_of(alice))
    for params, field in [
        ({}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": "x", "agent": "nobody"}, "agent"),
        ({"prompt": "x", "parameters": "[]"}, "parameters"),
        ({"prompt": "x", "session_id": "x" * 256}, "session_id"),
    ]:
        reply = alice.get("/chat", params=params)
        assert (reply.status_code, reply.json()["errors"][0]["field"]) == (422, field)
    reply = alice.get("/chat", params={"prompt": "x", "parameters": "{"})
    assert (reply.status_code, reply.json()["detail"]) == (400, "`parameters` is not JSON (line 1, column 2).")
    head = alice.head("/chat", params={"prompt": "a head"})
    assert (head.status_code, head.headers["content-type"]) == (200, "text/event-stream; charset=utf-8")
    assert len(runs_of(alice)) == before


# -- tokens in the query ---------------------------------------------------------------------------------------


def ask(gateway: Gateway, query: str, *headers: tuple[str, str]) -> raw.Reply:
    return raw.ask(gateway.url, "GET", f"/chat?{query}", *headers)


def test_a_token_in_the_query_is_taken_where_a_setting_allows_it_and_never_logged(site: Site) -> None:
    by_default, allowing = site.gateways
    good, other = token("alice"), token("alice", ttl=-60)
    bearer = ("Authorization", f"Bearer {good}")
    assert ask(allowing, f"prompt=by+query&access_token={good}").status == 200
    assert ask(allowing, "prompt=by+header", bearer).status == 200
    for query, headers in [
        (f"access_token={other}", ()),
        ("access_token=", ()),
        ("access_token=%FF%00", ()),
        (f"access_token={good}&access_token={good}", ()),
        (f"access_token={good}", (bearer,)),
        (f"access_token={other}", (bearer,)),
    ]:
        assert ask(allowing, f"prompt=x&{query}", *headers).status == 401, query
    assert ask(by_default, f"prompt=x&access_token={good}").status == 401
    assert ask(by_default, f"prompt=x&access_token={other}", bearer).status == 200, "ignored"
    path = f"/api/v1/runs?access_token={good}"
    assert raw.ask(allowing.url, "GET", path).status == 401, "on this route only"
    for gateway in site.gateways:
        assert gateway.logged("access", path="/chat", status=401)
        text = gateway.log_text()
        assert good not in text and other not in text and "access_token" not in text


def test_pages_of_the_configured_origins_may_read_it(site: Site) -> None:
    """EventSource asks no permission before, and sends its cursor without asking either."""
    query = f"prompt=cors&access_token={token('alice')}"
    for origin, allowed in ((APP, APP), ("https://evil.example", None)):
        reply = ask(site.gateways[1], query, ("Origin", origin), ("Last-Event-ID", f"{'0' * 32}/0-1"))
        assert reply.status == 404
        assert reply.header("access-control-allow-origin") == allowed
        reply = ask(site.gateways[1], query, ("Origin", origin))
        assert reply.status == 200
        assert reply.header("access-control-allow-origin") == allowed
    assert ask(site.gateways[0], "prompt=x", *ALICE.items(), ("Origin", APP)).header("vary") is None


def test_a_stream_ends_when_the_token_of_its_query_does(site: Site) -> None:
    """P21. An EventSource repeats the same query, which is then refused."""
    short = token("alice", ttl=1)
    with httpx.Client(base_url=site.gateways[1].url, verify=False, timeout=30) as client:
        query = {"prompt": "long", "agent": "sleeper", "access_token": short}
        with pytest.raises(httpx.RemoteProtocolError), client.stream("GET", "/chat", params=query) as response:
            assert response.status_code == 200
            response.read()
        assert client.get("/chat", params=query).status_code == 401
