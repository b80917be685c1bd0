"""What AI SDK's transports do, in Python: DefaultChatTransport of ai, and WorkflowChatTransport of @ai-sdk/workflow."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote

from tests.kit import ui_stream
from tests.kit.eventsource import Stream
from tests.kit.http import token
from tests.kit.ui_stream import Chunk

_numbers = itertools.count(1)


def user_message(text: str) -> dict[str, Any]:
    return {"id": f"question-{next(_numbers)}", "role": "user", "parts": [{"type": "text", "text": text}]}


def chunks_of(stream: Stream) -> list[Chunk]:
    """As far as they have come."""
    return [event.json for event in stream.events if event.data != ui_stream.DONE]


def message_of(stream: Stream) -> ui_stream.Message:
    return ui_stream.message_of(chunks_of(stream))


def is_done(stream: Stream) -> bool:
    return bool(stream.events) and stream.events[-1].data == ui_stream.DONE


async def whole(stream: Stream, seconds: float = 30) -> ui_stream.Message:
    """The message of a stream that ends as it should."""
    assert await stream.ended(seconds) == "finished", (stream.status, bytes(stream.body[-300:]))
    assert stream.status == 200, bytes(stream.body)
    assert is_done(stream)
    return message_of(stream)


class Chat:
    """A chat whose transport is DefaultChatTransport. `messages` are what its page shows."""

    def __init__(self, url: str, subject: str, chat_id: str) -> None:
        self.url = url
        self.chat_id = chat_id
        self.messages: list[dict[str, Any]] = []
        self._headers = {"Authorization": f"Bearer {token(subject)}"}

    async def send(self, text: str, *, url: str | None = None, **body: Any) -> Stream:
        self.messages.append(user_message(text))
        return await self.post("submit-message", url=url, **body)

    async def regenerate(
        self, *, url: str | None = None, headers: Mapping[str, str] | None = None, **body: Any
    ) -> Stream:
        return await self.post("regenerate-message", url=url, headers=headers, **body)

    async def post(
        self, trigger: str, *, url: str | None = None, headers: Mapping[str, str] | None = None, **body: Any
    ) -> Stream:
        sent = {**body, "id": self.chat_id, "messages": self.messages, "trigger": trigger}
        headers = {**self._headers, "Content-Type": "application/json", **(headers or {})}
        return await Stream().open(
            url or self.url, "/ai/chat", headers, method="POST", body=json.dumps(sent).encode("ascii")
        )

    def answered(self, message: ui_stream.Message) -> None:
        self.messages.append(
            {"id": message.id, "role": "assistant", "parts": [{"type": "text", "text": message.text, "state": "done"}]}
        )

    async def resume(self, *, url: str | None = None) -> Stream:
        path = f"/ai/chat/{quote(self.chat_id, safe='')}/stream"
        return await Stream().open(url or self.url, path, self._headers)

    async def stop(self, *, url: str | None = None) -> int:
        path = f"/ai/chat/{quote(self.chat_id, safe='')}/stop"
        stream = await Stream().open(url or self.url, path, self._headers, method="POST", body=b"")
        await stream.close()
        return stream.status


class Workflow:
    """A chat whose transport is WorkflowChatTransport: it counts chunks, and asks again until it has a `finish`."""

    def __init__(self, urls: Sequence[str], subject: str) -> None:
        self.urls = itertools.cycle(urls)
        self.chunks: list[Chunk] = []
        self.run_id = ""
        self.requests: list[int] = []
        """The startIndex of each GET."""
        self._headers = {"Authorization": f"Bearer {token(subject)}"}

    async def send(self, messages: list[dict[str, Any]], **body: Any) -> ui_stream.Message:
        headers = {**self._headers, "Content-Type": "text/plain;charset=UTF-8"}
        sent = json.dumps({"messages": messages, **body}).encode("ascii")
        stream = await Stream().open(next(self.urls), "/ai/chat", headers, method="POST", body=sent)
        assert stream.status == 200, bytes(stream.body)
        self.run_id = stream.headers["x-workflow-run-id"]
        await self._take(stream)
        return await self.follow()

    async def follow(self) -> ui_stream.Message:
        errors = 0
        while {"type": "finish"} not in self.chunks:
            self.requests.append(len(self.chunks))
            stream = await self.get(len(self.chunks))
            assert stream.status == 200, f"this is fatal: {stream.status}"
            errors = 0 if await self._take(stream) else errors + 1
            assert errors < 3, "three connections in a row that broke: this is fatal"
        return ui_stream.message_of(self.chunks)

    async def get(self, start_index: int) -> Stream:
        path = f"/ai/chat/{self.run_id}/stream?startIndex={start_index}"
        return await Stream().open(next(self.urls), path, self._headers)

    async def _take(self, stream: Stream) -> bool:
        """Whether the body ended as it should."""
        await stream.ended(60)
        self.chunks += chunks_of(stream)
        return stream.ending == "finished"
