"""Both Python clients under one interface, so that each test is one of both."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from types import TracebackType
from typing import Any, TypeVar

from broker.client import Accepted, AsyncClient, AsyncStream, Client, LogEvent, Received, Run, RunSummary, Stream

T = TypeVar("T")


class Awaited:
    """AsyncClient, called from outside of an event loop."""

    def __init__(self, url: str | None = None, token: Any = None, **options: Any) -> None:
        self._runner = asyncio.Runner()
        self._client = self._runner.run(_made(lambda: AsyncClient(url, token, **options)))

    def __enter__(self) -> Awaited:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._runner.run(self._client.aclose())
        self._runner.close()

    def submit(self, query: str, **body: Any) -> Accepted:
        return self._runner.run(self._client.submit(query, **body))

    def ask(self, query: str, **body: Any) -> AwaitedStream:
        return AwaitedStream(self._runner, self._runner.run(self._client.ask(query, **body)))

    def stream(self, request_id: str, **options: Any) -> AwaitedStream:
        return AwaitedStream(self._runner, self._client.stream(request_id, **options))

    def result(self, request_id: str, wait: float | None = None) -> Run:
        return self._runner.run(self._client.result(request_id, wait))

    def cancel(self, request_id: str) -> Run:
        return self._runner.run(self._client.cancel(request_id))

    def delete(self, request_id: str) -> None:
        return self._runner.run(self._client.delete(request_id))

    def runs(self, **which: Any) -> Iterator[RunSummary]:
        return iter(self._runner.run(_listed(self._client.runs(**which))))

    def events(self, request_id: str) -> Iterator[LogEvent]:
        return iter(self._runner.run(_listed(self._client.events(request_id))))


class AwaitedStream:
    """What it does not have itself is the AsyncStream's."""

    def __init__(self, runner: asyncio.Runner, stream: AsyncStream) -> None:
        self._runner = runner
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def __enter__(self) -> AwaitedStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __iter__(self) -> AwaitedStream:
        return self

    def __next__(self) -> Received:
        try:
            return self._runner.run(_next(self._stream))
        except StopAsyncIteration:
            raise StopIteration from None

    def close(self) -> None:
        self._runner.run(self._stream.aclose())


AnyClient = Client | Awaited
AnyStream = Stream | AwaitedStream
CLIENTS: tuple[type[AnyClient], ...] = (Client, Awaited)
IDS = ("sync", "async")


async def _made(make: Callable[[], T]) -> T:
    return make()


async def _next(stream: AsyncStream) -> Received:
    return await anext(stream)


async def _listed(items: AsyncIterator[T]) -> list[T]:
    return [item async for item in items]
