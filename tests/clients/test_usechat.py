"""useChat of @ai-sdk/react in a page, in a real Chromium, on the gateways of another origin."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.clients.conftest import Deployment, kill
from tests.clients.talks import counted, in_halves, new_id, runs
from tests.kit.browser import Browser
from tests.kit.http import Client
from tests.kit.needs import needs
from tests.kit.nginx import Nginx
from tests.kit.page import Chat, Pages
from tests.kit.processes import wait_for

MAJORS = (5, 6, 7)
SHORT: dict[str, Any] = {"count": 20, "pause": 0.02}
LONG: dict[str, Any] = {"count": 40, "pause": 0.05}
Open = Callable[..., Chat]


@pytest.fixture(params=MAJORS)
def major(request: pytest.FixtureRequest) -> int:
    found: int = request.param
    return found


@pytest.fixture(scope="module")
def balanced(_deployment: Deployment, folder: Path) -> Iterator[Nginx]:
    """The gateways that a test may kill."""
    needs("nginx")
    nginx = Nginx(folder / "nginx", [gateway.port for gateway in _deployment.gateways[:2]])
    yield nginx.until_ready()
    nginx.close()


@pytest.fixture
def opened(
    browser: Browser, pages: Pages, deployment: Deployment, balanced: Nginx, bearer: str, major: int
) -> Iterator[Open]:
    """Opens the page of a chat, whose questions go to an agent with these parameters."""
    shown: list[Chat] = []

    def opened(agent: str, chat: str | None = None, **parameters: Any) -> Chat:
        how = {"agent": agent, "parameters": parameters}
        shown.append(pages.chat(browser, major, chat=chat or new_id(), gateway=balanced.url, token=bearer, **how))
        shown[-1].until_status("ready")
        return shown[-1]

    yield opened
    for chat in shown:
        chat.page.__exit__(None, None, None)
        assert chat.page.complaints == []


def check_shown(chat: Chat, alice: Client, **parameters: Any) -> None:
    """Question and answer, once, and the answer is the one that a poll finds."""
    chat.until_text(len(counted(parameters["count"])))
    chat.until_status("ready")
    assert chat.roles == ["user", "assistant"]
    assert chat.texts == [counted(parameters["count"])] == [runs(alice)[0]["answer"]]


def test_an_answer_grows_in_the_page_to_its_end(opened: Open, alice: Client) -> None:
    chat = opened("tokens", **LONG)
    chat.send("count")
    first = chat.until_text(5)
    assert counted(LONG["count"]).startswith(first) and first != counted(LONG["count"])
    check_shown(chat, alice, **LONG)


def test_a_reload_in_the_middle_of_an_answer_goes_on_with_it(opened: Open, alice: Client, gate: Path) -> None:
    chat = opened("plays", **in_halves(gate))
    chat.send("count")
    chat.until_text(10)
    chat.page.reload()
    chat.until_status("streaming")
    gate.touch()
    check_shown(chat, alice, count=10)
    assert len(runs(alice)) == 1


def test_a_stopped_answer_does_not_come_back(opened: Open, alice: Client) -> None:
    chat = opened("tokens", **LONG)
    chat.send("count")
    chat.until_text(10)
    chat.page.click("#stop")
    chat.until_status("ready")
    [run] = runs(alice)
    assert run["status"] == "cancelled"
    shown = chat.texts
    chat.page.reload()
    until_nothing_was_resumed(chat, 2)  # the page had asked when it was opened
    chat.page.click("#resume")
    until_nothing_was_resumed(chat, 3)
    assert chat.texts == shown
    chat.send("once more")
    chat.page.until("document.querySelectorAll('section').length === 4")
    chat.until_text(len(counted(LONG["count"])))
    chat.until_status("ready")
    assert [run["status"] for run in runs(alice)] == ["completed", "cancelled"]


def until_nothing_was_resumed(chat: Chat, times: int) -> None:
    """The page has asked so many times whether there is something to resume, and it was nothing."""
    asked = [("GET", 204)] * times

    def answers() -> list[tuple[str, int]]:
        chat.page.browser.read_events(0.03)
        streams = [request for request in chat.page.requests if request["url"].endswith("/stream")]
        return [(one["method"], one["status"]) for one in streams if one["method"] == "GET" and "status" in one]

    wait_for(lambda: answers() == asked, seconds=20)
    chat.until_status("ready")


def test_when_its_gateway_is_killed_the_page_says_so_and_goes_on_at_another(
    opened: Open, deployment: Deployment, alice: Client, major: int, gate: Path
) -> None:
    chat = opened("plays", **in_halves(gate))
    chat.send("count")
    chat.until_text(10)
    for gateway in deployment.gateways[:2]:  # whichever it is
        kill(gateway)
    chat.until_status("error")
    deployment.mend()
    if major < 7:  # their useChat appends what a resume replays to the half answer; a reload makes it whole
        chat.page.reload()
    else:
        chat.page.click("#resume")
    chat.until_status("streaming")
    gate.touch()
    check_shown(chat, alice, count=10)
    assert len(runs(alice)) == 1


@pytest.mark.parametrize("major", MAJORS[-1:])
def test_an_error_is_shown_to_the_user(opened: Open, alice: Client) -> None:
    chat = opened("raises")
    chat.send("fail")
    chat.until_status("error")
    assert chat.page.text("#error") == runs(alice)[0]["error"]["message"]
    assert chat.texts == ["so far "]


@pytest.mark.parametrize("major", MAJORS[-1:])
def test_an_answer_is_made_again(opened: Open, alice: Client) -> None:
    chat = opened("tokens", **SHORT)
    chat.send("count")
    check_shown(chat, alice, **SHORT)
    first = chat.last_id
    chat.page.click("#regenerate")
    chat.page.until(f"![...document.querySelectorAll('section')].some(e => e.id === {json.dumps(first)})")
    check_shown(chat, alice, **SHORT)
    assert chat.last_id != first
    assert len(runs(alice)) == 2
