"""The native API: the endpoints of /api/v1."""

from __future__ import annotations

import contextlib
import json
import time
from functools import partial

from starlette.requests import Request
from starlette.responses import Response

from broker.errors import Draining, RunNotFound, Unavailable
from broker.events import Entry
from broker.fold import is_void
from broker.gateway import api, requests
from broker.gateway.auth import Principal
from broker.gateway.dialects import DIALECTS, Dialect
from broker.gateway.routes import EVENT_STREAM, Asgi, Gateway, Route, json_response
from broker.gateway.stream import ComeAgain, StreamResponse
from broker.ids import REQUEST_ID, START, EventId, Owner
from broker.runs.record import Head, Submission
from broker.runs.store import Accepted


class NativeApi:
    """The endpoints of /api/v1."""

    def __init__(self, gateway: Gateway) -> None:
        self._runs = gateway.runs
        self._hub = gateway.hub
        self._settings = gateway.settings
        self._dialect: Dialect = DIALECTS["native"]

    def routes(self) -> list[Route]:
        prefix, run = api.PREFIX, api.PREFIX + "/runs/{request_id}"
        submits = ("Idempotency-Key",)
        cursors = ("Last-Event-ID", "last_event_id", "lastEventId")
        return [
            Route(
                method="POST",
                path=f"{prefix}/query",
                endpoint=self.submit,
                summary="Submit a query",
                answers={202: api.Accepted, 200: api.Accepted},
                body=api.SubmitBody,
                parameters=submits,
            ),
            Route(
                method="POST",
                path=f"{prefix}/query/stream",
                endpoint=self.submit_and_stream,
                summary="Submit a query and stream its run; with Last-Event-ID, resume",
                answers={200: EVENT_STREAM},
                body=api.SubmitBody,
                parameters=submits + cursors,
            ),
            Route(
                method="GET",
                path=f"{prefix}/runs",
                endpoint=self.list_runs,
                summary="Your runs, newest first",
                answers={200: api.RunList},
                parameters=("limit", "cursor", "session_id", "status", "subject"),
            ),
            Route(
                method="GET",
                path=run,
                endpoint=self.poll,
                summary="A run, and what it has come to",
                answers={200: api.Run, 304: None},
                parameters=("wait", "Prefer", "If-None-Match"),
            ),
            Route(
                method="DELETE",
                path=run,
                endpoint=self.erase,
                summary="Erase a run and its log",
                answers={204: None},
            ),
            Route(
                method="GET",
                path=f"{run}/stream",
                endpoint=self.stream,
                summary="Stream a run from a cursor",
                answers={200: EVENT_STREAM, 204: None},
                parameters=cursors,
            ),
            Route(
                method="GET",
                path=f"{run}/events",
                endpoint=self.events,
                summary="A run's log in pages",
                answers={200: api.EventList},
                parameters=("limit", "cursor"),
            ),
            Route(
                method="POST",
                path=f"{run}/cancel",
                endpoint=self.cancel,
                summary="Stop a run; what it has come to stays readable",
                answers={200: api.Run},
            ),
        ]

    # -- submit ----------------------------------------------------------------------------------------------

    async def submit(self, request: Request, principal: Principal) -> Asgi:
        submission = await requests.submission(request, self._settings)
        accepted = await self._submit(request, principal, submission, repeated=requests.is_repeat(request))
        links = api.links(accepted.request_id)
        body = api.Accepted.model_validate({**accepted._asdict(), "links": links})
        headers = {"Location": links.self, "X-Request-Id": accepted.request_id}
        return json_response(body, 200 if accepted.joined else 202, headers)

    async def _submit(
        self, request: Request, principal: Principal, submission: Submission, *, repeated: bool
    ) -> Accepted:
        key = requests.idempotency_key(request)
        if self._hub.cutting:
            raise Draining
        return await self._runs.submit(principal.owner, submission, idempotency_key=key, repeated=repeated)

    async def submit_and_stream(self, request: Request, principal: Principal) -> Asgi:
        """A client that blindly repeats its request with Last-Event-ID resumes that run, and starts no other."""
        submission = await requests.submission(request, self._settings)
        cursor = requests.submit_cursor(request)
        if cursor is not None and cursor.request_id is not None:
            head = await self._runs.head(cursor.request_id)
            if head is not None and _sees(principal, head) and head.digest == submission.digest():
                return await self._stream(cursor.request_id, head, principal, cursor.event_id, long_ids=True)
        repeated = cursor is not None or requests.is_repeat(request)
        accepted = await self._submit(request, principal, submission, repeated=repeated)
        head = await self._runs.head(accepted.request_id)
        if head is None:
            raise Unavailable("The run was lost in a failover, or erased. Try again.")
        # A run that Redis has lost may be made anew under its id: what the client has had of it, it has had.
        same = cursor is not None and cursor.request_id == accepted.request_id
        position = cursor.event_id if cursor is not None and same else START
        return await self._stream(accepted.request_id, head, principal, position, long_ids=True)

    # -- read ------------------------------------------------------------------------------------------------

    async def stream(self, request: Request, principal: Principal) -> Asgi:
        request_id = _request_id(request)
        cursor = requests.run_cursor(request, request_id)
        try:
            head = await self._visible(request_id, principal)
        except Unavailable:
            return ComeAgain(self._dialect, self._settings.send_timeout_seconds)
        position = cursor.event_id if cursor else START
        if head.finished and position == head.end:
            return Response(status_code=204, headers=_stream_headers(request_id))
        return await self._stream(request_id, head, principal, position, long_ids=False)

    async def _stream(
        self, request_id: str, head: Head, principal: Principal, position: EventId, *, long_ids: bool
    ) -> Asgi:
        if self._hub.cutting:
            return ComeAgain(self._dialect, self._settings.send_timeout_seconds)
        try:
            await self._watched(request_id, head)
        except Unavailable:
            return ComeAgain(self._dialect, self._settings.send_timeout_seconds)
        limits = [self._settings.max_stream_seconds]
        if principal.expires_at is not None:
            limits.append(max(principal.expires_at - time.time(), 0.0))
        open_reader = partial(
            self._hub.open,
            request_id,
            head,
            self._dialect,
            position=position,
            long_ids=long_ids,
            seconds=min((limit for limit in limits if limit is not None), default=None),
        )
        return StreamResponse(
            self._hub,
            self._dialect,
            open_reader,
            send_timeout=self._settings.send_timeout_seconds,
            headers=_stream_headers(request_id),
        )

    async def poll(self, request: Request, principal: Principal) -> Asgi:
        request_id = _request_id(request)
        wait, preferred = requests.wait_seconds(request)
        head = await self._visible(request_id, principal)
        if not head.finished:
            self._runs.met([request_id])
        with contextlib.suppress(Unavailable):  # that memory is full keeps nobody from reading, and stops the count
            await self._watched(request_id, head)
        if wait and not head.finished:
            await self._hub.wait_end(request_id, head, wait, partial(_left, request))
        headers = {"X-Request-Id": request_id, "Cache-Control": "no-store"}
        if preferred:
            headers |= {"Preference-Applied": f"wait={wait:g}", "Vary": "Prefer"}
        return await self._run(request_id, headers, unless=request.headers.get("if-none-match"))

    async def _run(self, request_id: str, headers: dict[str, str], unless: str | None = None) -> Asgi:
        """The run as JSON. Its ETag is its last event id, since what changes in a run is an event; but for being queued
        again."""
        record = await self._runs.record(request_id)
        again = ".again" if record.status == "queued" and record.attempt else ""
        etag = f'"{record.end}{again}"'
        headers["ETag"] = etag
        if unless is not None and {"*", etag} & {tag.strip().removeprefix("W/") for tag in unless.split(",")}:
            return Response(status_code=304, headers=headers)
        return json_response(api.run(record, await self._runs.outcome(record)), 200, headers)

    async def events(self, request: Request, principal: Principal) -> Asgi:
        request_id = _request_id(request)
        limit, text = requests.limit(request), requests.list_cursor(request)
        after = EventId.parse(text) if text else START
        head = await self._visible(request_id, principal)
        with contextlib.suppress(Unavailable):
            await self._watched(request_id, head)
        entries = await self._runs.events(request_id, after, limit)
        rewinds = (await self._runs.record(request_id)).rewinds
        rows = [_event_json(entry, is_void(entry.id, rewinds)) for entry in entries]
        following = f'"{entries[-1].id}"' if len(entries) == limit else "null"
        body = f'{{"events":[{",".join(rows)}],"next":{following}}}'
        return Response(body, 200, {"X-Request-Id": request_id, "Cache-Control": "no-store"}, "application/json")

    async def list_runs(self, request: Request, principal: Principal) -> Asgi:
        cursor, limit, status = requests.list_cursor(request), requests.limit(request), requests.status(request)
        subject = request.query_params.get("subject", principal.owner.subject)
        if subject == principal.owner.subject or principal.sees_tenant:
            page = await self._runs.page(
                Owner(principal.owner.tenant, subject),
                session_id=request.query_params.get("session_id"),
                status=status,
                cursor=cursor,
                limit=limit,
            )
        else:  # as if that subject had no runs
            page = self._runs.no_page(cursor)
        body = api.RunList(runs=[api.summary(record) for record in page.records], next=page.next)
        return json_response(body, 200, {"Cache-Control": "no-store"})

    # -- stop ------------------------------------------------------------------------------------------------

    async def cancel(self, request: Request, principal: Principal) -> Asgi:
        request_id = _request_id(request)
        await self._visible(request_id, principal)
        await self._runs.cancel(request_id, "client")
        return await self._run(request_id, {"X-Request-Id": request_id, "Cache-Control": "no-store"})

    async def erase(self, request: Request, principal: Principal) -> Asgi:
        request_id = _request_id(request)
        await self._visible(request_id, principal)
        await self._runs.erase(request_id)
        return Response(status_code=204)

    async def _visible(self, request_id: str, principal: Principal) -> Head:
        """Raises RunNotFound for a run that is missing, erased, or not the caller's: the same in all three cases."""
        head = await self._runs.head(request_id)
        if head is None or not _sees(principal, head):
            raise RunNotFound
        return head

    async def _watched(self, request_id: str, head: Head) -> None:
        """Somebody reads the run: what `cancel_if_unwatched` counts from."""
        if head.cancel_if_unwatched and not head.finished:
            await self._runs.watched([request_id])


def _sees(principal: Principal, head: Head) -> bool:
    if principal.owner == head.owner:
        return True
    return principal.sees_tenant and principal.owner.tenant == head.owner.tenant


def _request_id(request: Request) -> str:
    """Raises RunNotFound for what cannot be one."""
    request_id: str = request.path_params["request_id"]
    if not REQUEST_ID.fullmatch(request_id):
        raise RunNotFound
    return request_id


async def _left(request: Request) -> None:
    """Returns when the client has gone."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _stream_headers(request_id: str) -> dict[str, str]:
    return {"X-Request-Id": request_id, "Content-Location": f"{api.PREFIX}/runs/{request_id}/stream"}


def _event_json(entry: Entry, void: bool) -> str:
    """The stored text of `data` goes through as it is."""
    head = json.dumps({"id": str(entry.id), "type": entry.type, "void": void}, separators=(",", ":"))
    return f'{head[:-1]},"data":{entry.data}}}'
