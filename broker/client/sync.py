"""The client for programs without an event loop."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator
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


class Client:
    """A client of the broker, for one owner; a context manager. May be shared by threads, a stream may not."""

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
        self._http = httpx.Client(**transport.options(self._site))

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    @property
    def url(self) -> str:
        return self._site.url

    # -- runs ------------------------------------------------------------------------------------------------

    def submit(self, query: str, **given: Unpack[Submission]) -> Accepted:
        """Starts a run, or joins the one that answers this query or key.

        After a lost answer it is sent again, for at most 50 s without an `idempotency_key`: that joins the run that
        was started, unless it has failed or was cancelled meanwhile. With a key it joins in any case.
        """
        return self._call(calls.submit(query, **given))

    def stream(
        self,
        request_id: str,
        *,
        after: str | EventId | None = None,
        silence: float = SILENCE_SECONDS,
        on_disconnect: Callable[[Disconnected], object] | None = None,
        on_reconnect: Callable[[], object] | None = None,
    ) -> Stream:
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
        return Stream(self._http, self._site, tail, silence)

    def ask(self, query: str, **given: Unpack[Submission]) -> Stream:
        """submit() and stream() in one."""
        accepted = self.submit(query, **given)
        return self.stream(accepted.request_id)

    def result(self, request_id: str, wait: float | None = None) -> Run:
        """The run when it has ended, or as it is after `wait` seconds; 0 is now."""
        polls = calls.Polls(wait, time.monotonic())
        while True:
            run = self._call(calls.poll(request_id, polls.hold(time.monotonic())))
            pause = polls.pause(run, time.monotonic())
            if pause is None:
                return run
            time.sleep(pause)

    def cancel(self, request_id: str) -> Run:
        """Stops the run; what it has come to stays readable. One that has ended stays as it is."""
        return self._call(calls.cancel(request_id))

    def delete(self, request_id: str) -> None:
        """Erases the run and its log."""
        return self._call(calls.delete(request_id))

    def runs(
        self,
        *,
        session_id: str | None = None,
        status: str | None = None,
        subject: str | None = None,
        limit: int | None = None,
    ) -> Iterator[RunSummary]:
        """Your runs, newest first, at most `limit`; asked for page by page.

        `subject`: another user's of your tenant, for a token with the scope `broker:tenant`.
        """
        left, cursor = limit, None
        while left is None or left > 0:
            size = calls.page_size(left)
            page = self._call(calls.runs(cursor, size, session_id=session_id, status=status, subject=subject))
            yield from page.runs
            left, cursor = None if left is None else left - len(page.runs), page.next
            if cursor is None:
                return

    def events(self, request_id: str) -> Iterator[LogEvent]:
        """The run's log as far as it goes, what later attempts took back included; asked for page by page."""
        cursor = None
        while True:
            page = self._call(calls.events(request_id, cursor))
            yield from page.events
            cursor = page.next
            if cursor is None:
                return

    # -- the way there ---------------------------------------------------------------------------------------

    def _call(self, call: Call[T]) -> T:
        tries = Tries(call, self.url, self._site.backoff(call.patience))
        while True:
            try:
                response = self._http.request(**transport.request(self._site, call, tries.headers()))
            except httpx.RequestError as error:
                pause: float | None = tries.failed(transport.cause(error), time.monotonic(), sent=transport.sent(error))
            else:
                self._site.known = True
                answer = transport.answer(response)
                pause = tries.answered(answer, time.monotonic())
                if pause is None:
                    return tries.result(answer)
            time.sleep(pause or 0.0)


class Stream(Folded):
    """An iterator over a run's events, which reconnects by itself, and ends with the run; a context manager.

    After an error it may be iterated again: it goes on where it was.
    """

    def __init__(self, http: httpx.Client, site: Site, tail: Tail, silence: float) -> None:
        super().__init__(tail)
        self._http = http
        self._site = site
        self._silence = silence
        self._events: Generator[Received, None, None] | None = None
        self._closed = False

    def __enter__(self) -> Stream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> Received:
        if self._closed or self._tail.done:
            raise StopIteration
        if self._events is None:
            self._events = self._read()
        try:
            return next(self._events)
        except BaseException:
            self._events = None
            raise

    def close(self) -> None:
        """Closes the connection. The run goes on."""
        self._closed = True
        events, self._events = self._events, None
        if events is not None:
            events.close()

    def _read(self) -> Generator[Received, None, None]:
        tail = self._tail
        while not tail.done:
            try:
                yield from self._connection()
                if not tail.done:
                    raise Broken("the connection ended")
            except (httpx.RequestError, Broken) as error:
                if not tail.done:  # a connection that fails as it is closed has done its work
                    time.sleep(tail.broken(transport.cause(error), time.monotonic()))
        if tail.end is not None:
            yield tail.end

    def _connection(self) -> Iterator[Received]:
        """The events of one connection, but for the terminal, before which it is closed."""
        tail = self._tail
        with self._http.stream(**transport.stream(self._site, tail, self._silence)) as response:
            self._site.known = True
            if response.status_code != 200:
                response.read()
            tail.opened(*transport.opened(response))
            if not tail.done:
                for data in response.iter_raw():
                    yield from tail.feed(data)
                    if tail.done:
                        return
