"""A real browser's EventSource with a ticket, which reads a run to its end over a gateway that is killed."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator

import pytest

from broker.events import NATIVE, Entry
from broker.ids import EventId
from tests.conftest import Launcher
from tests.kit.browser import Browser
from tests.kit.checker import check_log, check_reader
from tests.kit.http import Client, token
from tests.kit.needs import needs

WATCH = """(async () => {
  const answer = await fetch(PATH + "/ticket", { method: "POST", headers: { Authorization: `Bearer ${TOKEN}` } });
  const { stream } = await answer.json();
  window.seen = [];
  window.source = new EventSource(stream);
  for (const type of TYPES) source.addEventListener(type, (event) => {
    if (event.data) seen.push([event.lastEventId, type, event.data]);
  });
  return answer.status;
})()"""


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
        values = {
            "PATH": f"/api/v1/runs/{request_id}",
            "TOKEN": token("alice"),
            "TYPES": [kind.type for kind in NATIVE],
        }
        constants = "".join(f"window.{name} = {json.dumps(value)};" for name, value in values.items())
        assert page.evaluate(constants + WATCH) == 200
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
