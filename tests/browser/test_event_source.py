"""A real browser's EventSource: with a ticket, and of many runs, each to the end over a gateway that is killed."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from typing import Any

import pytest

from broker.events import NATIVE, Entry
from broker.ids import EventId
from tests.conftest import Launcher
from tests.kit import sse
from tests.kit.browser import Browser, Page
from tests.kit.checker import check_log, check_reader
from tests.kit.http import Client, token
from tests.kit.many import check_cursors, check_runs, path_of
from tests.kit.needs import needs

TICKET = """(async () => {
  const answer = await fetch(PATH + "/ticket", { method: "POST", headers: { Authorization: `Bearer ${TOKEN}` } });
  const { stream } = await answer.json();
  return stream;
})()"""
WATCH = """(async () => {
  const stream = await STREAM;
  window.seen = [];
  window.source = new EventSource(stream);
  for (const type of TYPES) source.addEventListener(type, (event) => {
    if (event.data) seen.push([event.lastEventId, type, event.data]);
  });
})()"""
SEEN = [kind.type for kind in NATIVE]


def watch(page: Page, stream: str, **constants: Any) -> None:
    """`stream` is an expression, of an address or of a promise of one."""
    values = "".join(f"window.{name} = {json.dumps(value)};" for name, value in constants.items())
    page.evaluate(f"window.TYPES = {json.dumps(SEEN)};{values}{WATCH.replace('STREAM', stream)}")


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    browser = Browser(needs("chromium"), tmp_path_factory.mktemp("browser"))
    yield browser
    browser.close()


def test_an_event_source_with_a_ticket_survives_a_kill_and_stops_at_the_end(browser: Browser, launch: Launcher) -> None:
    server = launch.redis()
    gateway = launch.gateway(server.url)
    launch.worker(server.url)
    with browser.page(gateway.url) as page, Client(gateway.url) as client:
        enough = launch.folder / "enough"
        parameters = {"count": 20, "pause": 0.02, "until": str(enough)}
        request_id = client.submit("q", agent="chatter", parameters=parameters)
        watch(page, TICKET, PATH=f"/api/v1/runs/{request_id}", TOKEN=token("alice"))
        page.until("seen.length > 15")
        gateway.signal(signal.SIGKILL)
        gateway.wait()
        launch.gateway(server.url, port=gateway.port)
        page.until("source.readyState === EventSource.OPEN && seen.length > 40")
        enough.touch()
        page.until("source.readyState === EventSource.CLOSED")
        seen = [Entry(EventId.parse(at), kind, data) for at, kind, data in page.evaluate("seen")]
        log = client.log(request_id)
        check_log(log)
        check_reader(seen, log)
        streams = [request for request in page.requests if "/stream?ticket=" in request["url"]]
        assert all("authorization" not in {name.lower() for name in request["headers"]} for request in streams)
        assert {request["status"] for request in streams if "status" in request} == {200, 204}
        assert page.complaints == []


def test_an_event_source_of_many_runs_carries_their_cursor_over_a_kill(browser: Browser, launch: Launcher) -> None:
    """Which is longer here than any other id; without authentication, since a ticket is for one run."""
    server = launch.redis()
    gateway = launch.gateway(server.url, auth="none", jwt_secret=None)
    launch.worker(server.url)
    with browser.page(gateway.url) as page, Client(gateway.url, None) as client:
        enough = launch.folder / "enough"
        parameters = {"count": 5, "pause": 0.2, "until": str(enough)}
        runs = [client.submit(f"q {n}", agent="chatter", parameters=parameters) for n in range(40)]
        watch(page, json.dumps(path_of(*runs)))
        page.until("seen.length > 300")
        gateway.signal(signal.SIGKILL)
        gateway.wait()
        launch.gateway(server.url, port=gateway.port, auth="none", jwt_secret=None)
        page.until("source.readyState === EventSource.OPEN && seen.length > 500")
        enough.touch()
        page.until("source.readyState === EventSource.CLOSED")
        events = [sse.Event(*row) for row in page.evaluate("seen")]
        check_runs(events, {request_id: client.log(request_id) for request_id in runs})
        check_cursors(events)
        assert max(len(event.id) for event in events) > 1500
        sent = [
            request["headers"].get("Last-Event-ID", "") for request in page.requests if "/stream?" in request["url"]
        ]
        assert sent[0] == "" and sent[-1] == events[-1].id
        assert page.complaints == []
