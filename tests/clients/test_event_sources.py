"""EventSources of npm on the native streams: `eventsource` in Node, `fetch-event-source` in a real Chromium.

A browser's own is in tests/browser.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from broker.events import Entry
from broker.ids import EventId
from tests.clients.conftest import Deployment, NodeOf, kill
from tests.kit.browser import Browser
from tests.kit.checker import check_reader
from tests.kit.http import Client
from tests.kit.node import Node, Seen
from tests.kit.page import Pages

TYPES = ("start", "token", "data", "final", "cancelled", "gone")
COUNT = 60


@pytest.fixture
def node(node_of: NodeOf) -> Node:
    return node_of("eventsource.mjs")


def check_seen(seen: Sequence[Seen], log: Sequence[Entry]) -> None:
    assert [(one["id"], one["type"]) for one in seen] == [
        (str(entry.id), entry.type) for entry in log if entry.type in TYPES
    ]


def test_eventsource_of_npm_reads_a_run_to_its_end_and_stops(
    deployment: Deployment, node: Node, alice: Client, bearer: str
) -> None:
    request_id = alice.submit("count", agent="tokens", parameters={"count": COUNT, "pause": 0.01})
    path = f"/api/v1/runs/{request_id}/stream"
    call = node.start("watch", name=request_id, url=deployment.urls[0], token=bearer, path=path, types=TYPES)
    assert call.result() == 204
    check_seen(call.seen, alice.log(request_id))


def test_eventsource_of_npm_goes_on_at_another_gateway_when_its_own_is_killed(
    deployment: Deployment, node: Node, alice: Client, bearer: str
) -> None:
    request_id = alice.submit("count", agent="tokens", parameters={"count": COUNT, "pause": 0.05})
    path = f"/api/v1/runs/{request_id}/stream"
    call = node.start("watch", name=request_id, url=deployment.urls[0], token=bearer, path=path, types=TYPES)
    call.until(lambda seen: seen["type"] == "token")
    kill(deployment.gateways[0])
    node.call("move", name=request_id, url=deployment.urls[1])
    assert call.result() == 204
    check_seen(call.seen, alice.log(request_id))


def test_fetch_event_source_asks_again_when_its_gateway_is_killed_and_starts_no_second_run(
    deployment: Deployment, browser: Browser, pages: Pages, alice: Client, bearer: str
) -> None:
    body = {"query": "count", "agent": "tokens", "parameters": {"count": 40, "pause": 0.05}}
    with pages.page(browser, "asking.js", {"url": deployment.urls[0], "token": bearer, "body": body}) as page:
        page.until("seen.length > 5")
        kill(deployment.gateways[0])
        deployment.mend()
        page.until("over")
        seen = page.evaluate("seen")
    [run] = alice.get("/api/v1/runs").json()["runs"]
    mine = [Entry(EventId.parse(one["id"].partition("/")[2]), one["event"], one["data"]) for one in seen]
    check_reader(mine, alice.log(run["request_id"]))
    assert {one["id"].partition("/")[0] for one in seen} == {run["request_id"]}
    assert len([request for request in page.requests if request["method"] == "POST"]) > 1
