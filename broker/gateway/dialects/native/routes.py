"""The native API: the endpoints of /api/v1."""

from __future__ import annotations

import contextlib
import json

from starlette.requests import Request
from starlette.responses import Response

from broker.errors import RunNotFound, Unavailable
from broker.events import Entry
from broker.fold import is_void
from broker.gateway import api, requests
from broker.gateway.auth import Principal
from broker.gateway.dialects.native.fold import Native
from broker.gateway.dialects.native.many.routes import ManyRuns
from broker.gateway.front import Front, sees, stream_headers
from broker.gateway.routes import EVENT_STREAM, Asgi, Route, json_response
from broker.ids import REQUEST_ID, START, EventId, Owner
from broker.runs.record import Head


def routes(front: Front, prefix: str) -> list[Route]:
    """The routes of /api/v1, whose links are absolute: `prefix` is no other."""
    return [*NativeApi(front).routes(), *ManyRuns(front).routes()]


class NativeApi:
    """The endpoints of /api/v1."""

    def __init__(self, front: Front) -> None:
        self._front = front
        self._runs = front.runs
        self._settings = front.settings

    def routes(self) -> list[Route]:
        prefix, run = api.PREFIX, api.PREFIX + "/runs/{request_id}"
        submits = ("Idempotency-Key",)
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
                parameters=submits + requests.CURSORS,
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
                parameters=(*requests.CURSORS, "ticket"),
                ticket=True,
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
                path=f"{run}/ticket",
                endpoint=self.ticket,
                summary="A ticket for a run's stream, for clients that can set no header",
                answers={200: api.Ticket, 501: api.Problem},
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
        accepted = await self._front.submit(request, principal, submission)
        links = api.links(accepted.request_id)
        body = api.Accepted.model_validate({**accepted._asdict(), "links": links})
        headers = {"Location": links.self, "X-Request-Id": accepted.request_id}
        return json_response(body, 200 if accepted.joined else 202, headers)

    async def submit_and_stream(self, request: Request, principal: Principal) -> Asgi:
        """A client that blindly repeats its request with Last-Event-ID resumes that run, and starts no other."""
        submission = await requests.submission(request, self._settings)
        cursor = requests.submit_cursor(request)
        if cursor is not None and cursor.request_id is not None:
            head = await self._runs.head(cursor.request_id)
            if head is not None and sees(principal, head) and head.digest == submission.digest():
                return await self._stream(cursor.request_id, head, principal, cursor.event_id, long_ids=True)
        accepted = await self._front.submit(request, principal, submission, repeated=cursor is not None)
        head = await self._front.accepted_head(accepted.request_id)
        # A run that Redis has lost may be made anew under its id: what the client has had of it, it has had.
        same = cursor is not None and cursor.request_id == accepted.request_id
        position = cursor.event_id if cursor is not None and same else START
        return await self._stream(accepted.request_id, head, principal, position, long_ids=True)

    # -- read ------------------------------------------------------------------------------------------------

    async def stream(self, request: Request, principal: Principal) -> Asgi:
        request_id = _request_id(request)
        cursor = requests.run_cursor(request, request_id)
        try:
            head = await self._front.visible(request_id, principal)
        except Unavailable:
            return self._front.come_again()
        position = cursor.event_id if cursor else START
        if head.finished and position == head.end:
            return Response(status_code=204, headers=stream_headers(request_id))
        return await self._stream(request_id, head, principal, position, long_ids=False)

    async def _stream(
        self, request_id: str, head: Head, principal: Principal, position: EventId, *, long_ids: bool
    ) -> Asgi:
        dialect = Native(request_id, long_ids=long_ids)
        try:
            return await self._front.stream(request_id, head, principal, dialect, after=position)
        except Unavailable:
            return self._front.come_again()

    async def poll(self, request: Request, principal: Principal) -> Asgi:
        request_id = _request_id(request)
        wait, preferred = requests.wait_seconds(request)
        head = await self._front.visible(request_id, principal)
        await self._front.wait(request, request_id, head, wait)
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
        head = await self._front.visible(request_id, principal)
        with contextlib.suppress(Unavailable):
            await self._front.watched(request_id, head)
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

    async def ticket(self, request: Request, principal: Principal) -> Asgi:
        request_id = _request_id(request)
        await self._front.visible(request_id, principal)
        ticket = self._front.tickets.make(request_id, principal)
        headers = {"X-Request-Id": request_id, "Cache-Control": "no-store", "Referrer-Policy": "no-referrer"}
        return json_response(api.ticket(request_id, ticket.text, ticket.expires_at), 200, headers)

    # -- stop ------------------------------------------------------------------------------------------------

    async def cancel(self, request: Request, principal: Principal) -> Asgi:
        request_id = _request_id(request)
        await self._front.visible(request_id, principal)
        await self._runs.cancel(request_id, "client")
        return await self._run(request_id, {"X-Request-Id": request_id, "Cache-Control": "no-store"})

    async def erase(self, request: Request, principal: Principal) -> Asgi:
        request_id = _request_id(request)
        await self._front.visible(request_id, principal)
        await self._runs.erase(request_id)
        return Response(status_code=204)


def _request_id(request: Request) -> str:
    """Raises RunNotFound for what cannot be one."""
    request_id: str = request.path_params["request_id"]
    if not REQUEST_ID.fullmatch(request_id):
        raise RunNotFound
    return request_id


def _event_json(entry: Entry, void: bool) -> str:
    """The stored text of `data` goes through as it is."""
    head = json.dumps({"id": str(entry.id), "type": entry.type, "void": void}, separators=(",", ":"))
    return f'{head[:-1]},"data":{entry.data}}}'
