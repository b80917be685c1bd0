"""The dialects `prompt` and `agent`, read by the EventSource of a real Chromium whose gateway is killed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest

from tests.conftest import Launcher
from tests.kit.browser import Browser, Page
from tests.kit.http import Client, token
from tests.kit.needs import needs
from tests.kit.one_way import got
from tests.kit.processes import wait_for

LISTEN = """(url => {
  window.seen = [];
  window.source = new EventSource(url);
  for (const type of ["message", "token", "done"])
    source.addEventListener(type, event => seen.push([event.lastEventId, event.type, event.data]));
  source.onerror = event => event.data ? seen.push([event.lastEventId, "error", event.data]) : 0;
})"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    browser = Browser(needs("chromium"), tmp_path_factory.mktemp("browser"))
    yield browser
    browser.close()


def listen(page: Page, url: str) -> None:
    page.evaluate(f"{LISTEN}({json.dumps(url)}), 0")
    page.until("seen.length > 3")


def heard(page: Page) -> list[tuple[str, str, Any]]:
    """(id, type, JSON), once it is closed for good, which nobody has told it to be."""
    page.until("source.readyState === 2")
    return [(event_id, kind, json.loads(data)) for event_id, kind, data in page.evaluate("seen")]


def test_an_eventsource_of_another_origin_asks_by_get_and_has_one_whole_answer(
    browser: Browser, launch: Launcher, tmp_path: Path
) -> None:
    """P13, P17: it sends its token in the query, and the id of its run when it comes again."""
    server = launch.redis()
    home = launch.gateway(server.url)
    settings: dict[str, Any] = {"query_token": True, "cors_origins": home.url, "heartbeat_seconds": 0.3}
    gateway = launch.gateway(server.url, **settings)
    launch.worker(server.url)
    go = tmp_path / "go"
    parameters = json.dumps({"count": 3, "pause": 0.1, "until": str(go)})
    asked = {"prompt": "ask", "agent": "chatter", "parameters": parameters, "access_token": token("alice")}
    with browser.page(f"{home.url}/healthz") as page, Client(home.url) as alice:
        listen(page, f"{gateway.url}/chat?{urlencode(asked)}")
        gateway.kill()
        again = launch.gateway(server.url, port=gateway.port, **settings)
        before = page.evaluate("seen.length")
        page.until(f"seen.length > {before}")
        go.touch()
        events = heard(page)
        [run] = alice.get("/api/v1/runs").json()["runs"]
        seen = got("prompt", [(kind, value) for _, kind, value in events])
        assert (seen.text, seen.end) == (alice.run(run["request_id"])["answer"], {"lifecycle": "done"})
        ids = [event_id for event_id, _, _ in events]
        assert len(set(ids)) == len(ids) and all(event_id.startswith(run["request_id"]) for event_id in ids)
        sent = [request["headers"].get("Last-Event-ID") for request in page.requests if "/chat" in request["url"]]
        assert sent[0] is None and sent[-1] == ids[-1]
        assert again.logged("access", path="/chat", status=204)
        assert "access_token" not in gateway.log_text() + again.log_text()


def test_an_eventsource_that_has_a_runs_id_reads_its_tokens_and_stops(
    browser: Browser, launch: Launcher, tmp_path: Path
) -> None:
    server = launch.redis()
    gateway = launch.gateway(server.url, auth="none")
    launch.worker(server.url)
    go = tmp_path / "go"
    with Client(gateway.url, None) as alice, browser.page(f"{gateway.url}/healthz") as page:
        run = alice.submit("ask", agent="chatter", parameters={"count": 3, "pause": 0.1, "until": str(go)})
        wait_for(lambda: alice.run(run)["answer"] is not None)
        listen(page, f"/api/v1/agent/stream/{run}")
        gateway.kill()
        launch.gateway(server.url, port=gateway.port, auth="none")
        go.touch()
        events = heard(page)
        assert [event_id for event_id, _, _ in events] == [str(n) for n in range(1, len(events) + 1)]
        seen = got("agent", [(kind, value) for _, kind, value in events])
        assert seen.text == seen.end["content"] == alice.run(run)["answer"]
        assert (seen.end["status"], seen.end["total_tokens"]) == ("complete", len(events) - 1)
