"""Chats of AI SDK. Talk is one in Node, without React: what useChat is a hook around (tests/clients/js/aisdk.mjs)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.kit.http import Client
from tests.kit.node import Call, Node, Seen

Message = dict[str, Any]
_numbers = itertools.count(1)


def in_halves(gate: Path) -> dict[str, Any]:
    """What the agent `plays` needs to count to 10, and to wait in the middle until there is the file `gate`."""
    tokens = [["token", {"text": f"{n} "}] for n in range(10)]
    return {"script": [*tokens[:5], ["until", str(gate)], *tokens[5:]]}


def new_id() -> str:
    return f"chat-{next(_numbers)}"


class Talk:
    """A chat in a page that was just loaded with the `messages` that it had kept; `options` are the transport's."""

    def __init__(
        self,
        node: Node,
        url: str,
        bearer: str,
        *,
        chat: str | None = None,
        messages: Sequence[Message] = (),
        transport: str = "default",
        **options: Any,
    ) -> None:
        self.chat = chat or new_id()
        self._node = node
        how = {"transport": transport, "messages": list(messages), "options": options}
        node.call("open", chat=self.chat, url=url, token=bearer, **how)

    def send(self, text: str, agent: str | None = None, **parameters: Any) -> Call:
        body = {"agent": agent, "parameters": parameters} if agent else {}
        return self._node.start("send", chat=self.chat, text=text, body=body)

    def regenerate(self, agent: str, **parameters: Any) -> Call:
        return self._node.start("regenerate", chat=self.chat, body={"agent": agent, "parameters": parameters})

    def resume(self) -> Call:
        return self._node.start("resume", chat=self.chat)

    def stop(self) -> Any:
        return self._node.call("stop", chat=self.chat)

    def leave(self) -> Any:
        return self._node.call("leave", chat=self.chat)

    def move(self, url: str) -> None:
        """The next request goes to another gateway."""
        self._node.call("move", chat=self.chat, url=url)


def texts(message: Message) -> list[str]:
    """Of an answer's parts. A run that began again in the middle has more than one; the last is the right one."""
    return [part["text"] for part in message["parts"] if part["type"] == "text"]


def until_text(call: Call, length: int) -> Seen:
    """Until the last text of the last message has so many characters, while the answer goes on."""
    return call.until(lambda seen: seen["status"] == "streaming" and len((texts(seen) or [""])[-1]) >= length)


def check_answer(report: Any, answer: str, *, roles: Sequence[str] = ("user", "assistant")) -> Message:
    """It has ended well, the messages are of these roles, and the last one is the whole answer, in one text."""
    assert (report["status"], report["errors"]) == ("ready", [])
    assert [message["role"] for message in report["messages"]] == list(roles)
    last: Message = report["messages"][-1]
    assert texts(last) == [answer]
    assert all(part["state"] == "done" for part in last["parts"] if part["type"] == "text")
    return last


def runs(owner: Client) -> list[dict[str, Any]]:
    """All that the owner has, newest first, each when it has ended."""
    return [owner.finished(run["request_id"]) for run in owner.get("/api/v1/runs").json()["runs"]]


def counted(n: int) -> str:
    """What the agent `tokens` answers."""
    return "".join(f"{number} " for number in range(n))
