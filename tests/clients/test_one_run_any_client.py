"""One run, any client: OpenAI's library starts it; useChat, EventSource and a poll watch it; all agree on its text."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from broker.events import Entry
from broker.ids import EventId
from tests.clients.conftest import Deployment, kill
from tests.clients.talks import new_id
from tests.kit.browser import Browser
from tests.kit.checker import surviving_text
from tests.kit.http import Client
from tests.kit.node import Refused
from tests.kit.openai_sdk import Sdk, User, is_delta
from tests.kit.page import Chat, Pages

WATCH = """(url, types) => {
  globalThis.heard = [];
  globalThis.source = new EventSource(url);
  const hear = ({ type, data, lastEventId }) => heard.push({ type, data, id: lastEventId });
  for (const type of types) source.addEventListener(type, hear);
}"""
TYPES = ["start", "attempt", "token", "data", "final"]


class Everyone:
    """All at the first gateway, and each has some text. The chat of AI SDK is the run's session."""

    def __init__(self, user: User, owner: Client, chat: Callable[[str], Chat], **parameters: Any) -> None:
        self._user = user
        self._owner = owner
        session_id = new_id()
        extra = {"session_id": session_id, "parameters": parameters}
        self._stream = user.start("stream", body={"model": "steps", "input": "one run", "extra_body": extra})
        self._stream.until(is_delta)
        self._response_id: str = self._stream.seen[0]["response"]["id"]
        self.request_id = self._response_id.removeprefix("resp_")
        self.page = chat(session_id)
        ticket = owner.post(f"/api/v1/runs/{self.request_id}/ticket").json()
        url = json.dumps(user.url + ticket["stream"])
        self.page.page.evaluate(f"({WATCH})({url}, {json.dumps(TYPES)})")
        self.page.until_text(5)
        self.page.page.until("heard.some(event => event.type === 'token')")

    def come_again(self, url: str) -> None:
        """After a cut: OpenAI's library at this gateway, the page where it was; an EventSource comes by itself."""
        with pytest.raises(Refused):
            self._stream.result()
        cut = self._stream
        after = cut.seen[-1]["sequence_number"]
        self._stream = self._user.at(url).start("resume", response=self._response_id, after=after)
        self.page.page.click("#resume")
        self.page.until_status("streaming")

    def check_agreed(self) -> dict[str, Any]:
        """All have come to the end, with the answer that a poll finds. Returns the run."""
        run = self._owner.finished(self.request_id, 60)
        self._stream.result(60)
        self.page.page.until("source.readyState === EventSource.CLOSED", 60)
        self.page.until_status("ready", 60)
        heard = self.page.page.evaluate("heard")
        entries = [Entry(EventId.parse(event["id"]), event["type"], event["data"]) for event in heard]
        completed = self._stream.seen[-1]["response"]
        found = {
            "openai": "".join(part["text"] for item in completed["output"] for part in item["content"]),
            "useChat": self.page.texts[-1],
            "EventSource": surviving_text(entries),
        }
        assert run["status"] == completed["status"] == "completed"
        assert found == dict.fromkeys(found, run["answer"])
        assert self.page.page.complaints == []
        return run


NewEveryone = Callable[..., Everyone]


@pytest.fixture(scope="module")
def sdk(folder: Path) -> Iterator[Sdk]:
    with Sdk(folder, "3") as sdk:
        yield sdk


@pytest.fixture
def everyone(
    deployment: Deployment, sdk: Sdk, browser: Browser, pages: Pages, alice: Client, bearer: str, gate: Path
) -> Iterator[NewEveryone]:
    """Starts a run that goes on until there is the `gate`, with all of them."""
    url, opened = deployment.urls[0], list[Chat]()

    def chat(session_id: str) -> Chat:
        opened.append(pages.chat(browser, 7, chat=session_id, gateway=url, token=bearer))
        return opened[-1]

    yield lambda **parameters: Everyone(User(sdk, url, bearer), alice, chat, count=0, until=str(gate), **parameters)
    for one in opened:
        one.page.__exit__(None, None, None)


def test_a_run_is_the_same_to_every_client(everyone: NewEveryone, gate: Path) -> None:
    clients = everyone(pause=0.05)
    gate.touch()
    run = clients.check_agreed()
    assert run["answer"] == "".join(f"1:{n} " for n in range(len(run["answer"].split())))


def test_a_run_is_the_same_to_every_client_when_their_gateway_is_killed(
    everyone: NewEveryone, gate: Path, deployment: Deployment
) -> None:
    clients = everyone(pause=0.05)
    kill(deployment.gateways[0])
    clients.page.until_status("error")
    deployment.mend()
    clients.come_again(deployment.urls[1])
    gate.touch()
    run = clients.check_agreed()
    assert run["answer"] == "".join(f"1:{n} " for n in range(len(run["answer"].split())))


@pytest.mark.parametrize("every", [None, 5], ids=["from the beginning", "from a checkpoint"])
def test_a_run_is_the_same_to_every_client_when_its_worker_is_killed(
    everyone: NewEveryone, gate: Path, deployment: Deployment, every: int | None
) -> None:
    clients = everyone(pause=0.05, every=every)
    clients.page.until_says("1:6 ")
    deployment.replace_worker()
    clients.page.until_says("2:")
    gate.touch()
    run = clients.check_agreed()
    words = run["answer"].split()
    assert run["attempt"] == 2
    assert [word.partition(":")[2] for word in words] == [str(n) for n in range(len(words))]
    assert words[-1].startswith("2:") and words[0].startswith("2:" if every is None else "1:")
