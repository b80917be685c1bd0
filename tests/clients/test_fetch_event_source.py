"""fetch-event-source of npm in a real Chromium: it asks by POST, and repeats that when it is cut."""

from __future__ import annotations

from broker.events import Entry
from broker.ids import EventId
from tests.clients.conftest import Deployment, kill
from tests.kit.browser import Browser
from tests.kit.checker import check_reader
from tests.kit.http import Client
from tests.kit.page import Pages


def test_a_question_whose_gateway_is_killed_is_asked_again_and_starts_no_second_run(
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
