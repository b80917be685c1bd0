"""The client for asyncio: the same as `sync`, awaited."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from types import TracebackType
from typing import TypeVar, Unpack

import httpx

from broker.client import calls, transport
from broker.client.calls import Call, Submission, Tries
from broker.client.folded import SILENCE_SECONDS, Folded
from broker.client.models import Accepted, LogEvent, Run, RunSummary
from broker.client.received import Received
from broker.client.site import Site, Token, site
from broker.client.tail import Broken, Disconnected, Tail
from broker.ids import EventId

T = TypeVar("T")


class AsyncClient:
    """A client of the broker, for one owner; a context manager. Of one event loop: its tasks may share it, but no
    stream.
    """

    def __init__(
        self,
        url: str | None = None,
        token: Token | None = None,
        *,
        timeout: float = 30.0,
        patience: float = 60.0,
        longest_pause: float = 15.0,
    ) -> None:
        """`url` and `token` are those of BROKER_URL (else http://127.0.0.1:8000) and BROKER_TOKEN by default.

        All in seconds: `timeout` is for how long nothing of an answer may come; `patience`, for how long the service
        may be away before a call or a stream gives up, 2 s where it has never answered; `longest_pause`, the longest
        pause between two tries. Raises Misconfigured.

        Methods raise Unreachable where nothing answers, Unauthorized, RunNotFound and the others of broker.errors by
        the `code` of the answer, and ApiError where there is none.
        """
        self._site = site(url, token, timeout=timeout, patience=patience, longest_pause=longest_pause)
        self._http = httpx.AsyncClient(**transport.options(self._site))

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        await self._http.aclose()

    @property
    def url(self) -> str:
        return self._site.url

    # -- runs ------------------------------------------------------------------------------------------------

    async def submit(self, query: str, **given: Unpack[Submission]) -> Accepted:
        """Starts a run, or joins the one that answers this query or key.

        After a lost answer it is sent again, for at most 50 s without an `idempotency_key`: that joins the run that
        was started, unless it has failed or was cancelled meanwhile. With a key it joins in any case.
        """
        return await self._call(calls.submit(query, **given))

    def stream(
        self,
        request_id: str,
        *,
        after: str | EventId | None = None,
        silence: float = SILENCE_SECONDS,
        on_disconnect: Callable[[Disconnected], object] | None = None,
        on_reconnect: Callable[[], object] | None = None,
    ) -> AsyncStream:
        """The run's events from its beginning, or after an event's id, to its end, over as many connections as needed.

        A connection that is silent for `silence` seconds is given up: a live one has heartbeats. Raises BadCursor.
        """
        tail = Tail(
            request_id,
            self.url,
            self._site.backoff(),
            after=after,
            on_disconnect=on_disconnect,
            on_reconnect=on_reconnect,
        )
        return AsyncStream(self._http, self._site, tail, silence)

    async def ask(self, query: str, **given: Unpack[Submission]) -> AsyncStream:
        """submit() and stream() in one."""
        accepted = await self.submit(query, **given)
        return self.stream(accepted.request_id)

    async def result(self, request_id: str, wait: float | None = None) -> Run:
        """The run when it has ended, or as it is after `wait` seconds; 0 is now."""
        polls = calls.Polls(wait, time.monotonic())
        while True:
            run = await self._call(calls.poll(request_id, polls.hold(time.monotonic())))
            pause = polls.pause(run, time.monotonic())
            if pause is None:
                return run
            await asyncio.sleep(pause)

    async def cancel(self, request_id: str) -> Run:
        """Stops the run; what it has come to stays readable. One that has ended stays as it is."""
        return await self._call(calls.cancel(request_id))

    async def delete(self, request_id: str) -> None:
        """Erases the run and its log."""
        return await self._call(calls.delete(request_id))

    async def runs(
        self,
        *,
        session_id: str | None = None,
        status: str | None = None,
        subject: str | None = None,
        limit: int | None = None,
    ) -> AsyncIterator[RunSummary]:
        """Your runs, newest first, at most `limit`; asked for page by page.

        `subject`: another user's of your tenant, for a token with the scope `broker:tenant`.
        """
        left, cursor = limit, None
        while left is None or left > 0:
            size = calls.page_size(left)
            page = await self._call(calls.runs(cursor, size, session_id=session_id, status=status, subject=subject))
            for run in page.runs:
                yield run
            left, cursor = None if left is None else left - len(page.runs), page.next
            if cursor is None:
                return

    async def events(self, request_id: str) -> AsyncIterator[LogEvent]:
        """The run's log as far as it goes, what later attempts took back included; asked for page by page."""
        cursor = None
        while True:
            page = await self._call(calls.events(request_id, cursor))
            for event in page.events:
                yield event
            cursor = page.next
            if cursor is None:
                return

    # -- the way there ---------------------------------------------------------------------------------------

    async def _call(self, call: Call[T]) -> T:
        tries = Tries(call, self.url, self._site.backoff(call.patience))
        while True:
            try:
                response = await self._http.request(**transport.request(self._site, call, tries.headers()))
            except httpx.RequestError as error:
                pause: float | None = tries.failed(transport.cause(error), time.monotonic(), sent=transport.sent(error))
            else:
                self._site.known = True
                answer = transport.answer(response)
                pause = tries.answered(answer, time.monotonic())
                if pause is None:
                    return tries.result(answer)
            await asyncio.sleep(pause or 0.0)


class AsyncStream(Folded):
    """An iterator over a run's events, which reconnects by itself, and ends with the run; a context manager.

    After an error it may be iterated again: it goes on where it was.
    """

    def __init__(self, http: httpx.AsyncClient, site: Site, tail: Tail, silence: float) -> None:
        super().__init__(tail)
        self._http = http
        self._site = site
        self._silence = silence
        self._events: AsyncGenerator[Received, None] | None = None
        self._closed = False

    async def __aenter__(self) -> AsyncStream:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    def __aiter__(self) -> AsyncStream:
        return self

    async def __anext__(self) -> Received:
        if self._closed or self._tail.done:
            raise StopAsyncIteration
        if self._events is None:
            self._events = self._read()
        try:
            return await anext(self._events)
        except BaseException:
            self._events = None
            raise

    async def aclose(self) -> None:
        """Closes the connection. The run goes on."""
        self._closed = True
        events, self._events = self._events, None
        if events is not None:
            await events.aclose()

    async def _read(self) -> AsyncGenerator[Received, None]:
        tail = self._tail
        while not tail.done:
            try:
                async with aclosing(self._connection()) as events:
                    async for received in events:
                        yield received
                if not tail.done:
                    raise Broken("the connection ended")
            except (httpx.RequestError, Broken) as error:
                if not tail.done:  # a connection that fails as it is closed has done its work
                    await asyncio.sleep(tail.broken(transport.cause(error), time.monotonic()))
        if tail.end is not None:
            yield tail.end

    async def _connection(self) -> AsyncGenerator[Received, None]:
        """The events of one connection, but for the terminal, before which it is closed."""
        tail = self._tail
        async with self._http.stream(**transport.stream(self._site, tail, self._silence)) as response:
            self._site.known = True
            if response.status_code != 200:
                await response.aread()
            tail.opened(*transport.opened(response))
            if not tail.done:
                async for data in response.aiter_raw():
                    for received in tail.feed(data):
                        yield received
                    if tail.done:
                        return
