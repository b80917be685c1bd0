"""A client of the native API over asyncio, for tests that ask for many things at once."""

from __future__ import annotations

import asyncio
from types import TracebackType
from typing import Any

import httpx

from tests.kit.eventsource import Stream
from tests.kit.http import token

AUTHORIZATION = {"Authorization": f"Bearer {token('alice')}"}


class Api:
    """An async context manager."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.http = httpx.AsyncClient(base_url=url, headers=AUTHORIZATION, timeout=30)

    async def __aenter__(self) -> Api:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.http.aclose()

    async def ask(self, method: str, path: str, **options: Any) -> httpx.Response:
        return await self.http.request(method, f"/api/v1/{path}", **options)

    async def submit(self, query: str, agent: str = "echo", **parameters: Any) -> str:
        """The request_id of a new run."""
        body = {"query": query, "agent": agent, "parameters": parameters}
        reply = await self.ask("POST", "query", json=body)
        assert reply.status_code == 202, reply.text
        request_id: str = reply.json()["request_id"]
        return request_id

    async def running(self, query: str, agent: str = "echo", **parameters: Any) -> str:
        """The same, once a worker has taken it and its agent has said something."""
        request_id = await self.submit(query, agent, **parameters)
        async with asyncio.timeout(30):
            while int((await self.poll(request_id)).json()["last_event_id"].partition("-")[2]) < 2:
                await asyncio.sleep(0.02)
        return request_id

    async def cancel(self, request_id: str) -> httpx.Response:
        return await self.ask("POST", f"runs/{request_id}/cancel")

    async def erase(self, request_id: str) -> httpx.Response:
        return await self.ask("DELETE", f"runs/{request_id}")

    async def poll(self, request_id: str) -> httpx.Response:
        """The run, or a 404: once Redis can be asked."""
        async with asyncio.timeout(30):
            while (reply := await self.ask("GET", f"runs/{request_id}")).status_code == 503:
                await asyncio.sleep(0.02)
        return reply

    async def until(self, request_id: str, *statuses: str, seconds: float = 30) -> dict[str, Any]:
        """The run, once it has one of these."""
        async with asyncio.timeout(seconds):
            while (run := (await self.poll(request_id)).json()).get("status") not in statuses:
                await asyncio.sleep(0.05)
        return dict(run)

    async def until_gone(self, request_id: str, seconds: float = 30) -> None:
        async with asyncio.timeout(seconds):
            while (await self.poll(request_id)).status_code != 404:
                await asyncio.sleep(0.05)

    async def stream(self, request_id: str) -> Stream:
        """Opened; to be closed by its end."""
        return await Stream().open(self.url, f"/api/v1/runs/{request_id}/stream", AUTHORIZATION)
