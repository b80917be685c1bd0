"""Many runs over one connection: GET /api/v1/stream."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from starlette.requests import Request
from starlette.responses import Response

from broker.errors import BadCursor, BadRequest, Draining, RunNotFound, Unavailable
from broker.gateway import api, requests
from broker.gateway.auth import Principal
from broker.gateway.dialects.native.fold import Native
from broker.gateway.dialects.native.many.cursor import MAX_RUNS, Composite
from broker.gateway.dialects.native.many.lookout import Lookouts
from broker.gateway.dialects.native.many.multiplexer import Multiplexer, Source
from broker.gateway.dialects.native.many.sources import Listed, OfSession
from broker.gateway.front import Front, sees
from broker.gateway.hub import Hub
from broker.gateway.reader import End
from broker.gateway.routes import EVENT_STREAM, Asgi, Route
from broker.gateway.sinks import StreamSink
from broker.gateway.stream import StreamResponse
from broker.ids import REQUEST_ID
from broker.runs.record import Head


class ManyRuns:
    """The endpoint."""

    def __init__(self, front: Front) -> None:
        self._front = front
        self._lookouts = Lookouts(front.runs.session_above)

    def routes(self) -> list[Route]:
        return [
            Route(
                method="GET",
                path=f"{api.PREFIX}/stream",
                endpoint=self.stream,
                summary="Stream many runs over one connection: those that are listed, or those of a session",
                answers={200: EVENT_STREAM, 204: None, 404: api.Problem},
                parameters=("run", "session_id", *requests.CURSORS),
            )
        ]

    async def stream(self, request: Request, principal: Principal) -> Asgi:
        names, session_id = _wanted(request)
        try:
            if session_id is None:
                return await self._listed(names, _listed_cursor(request, names), principal)
            cursor = _session_cursor(request)
            if cursor.floor:
                cursor = cursor.not_ahead_of(await self._front.runs.now_ms())
            return await self._session(session_id, cursor, principal)
        except Unavailable:
            return self._front.come_again()

    async def _listed(self, names: Collection[str], cursor: Composite, principal: Principal) -> Asgi:
        """A run that is not there, or foreign, is refused; but one that the client has a part of is told to be gone."""
        if not all(REQUEST_ID.fullmatch(name) for name in names):
            raise RunNotFound
        told = [name for name, at in cursor.places.items() if at is None]
        heads = await self._heads([name for name in names if name not in told], principal)
        missing = [name for name in names if name not in heads and name not in told]
        if not cursor.places.keys() >= set(missing):
            raise RunNotFound
        if not missing and all(head.finished and cursor.places.get(name) == head.end for name, head in heads.items()):
            return Response(status_code=204)
        return await self._stream(Listed(cursor, heads, missing), heads, principal)

    async def _session(self, session_id: str, cursor: Composite, principal: Principal) -> Asgi:
        begun = [*cursor.positions]
        heads = {
            name: head
            for name, head in (await self._heads(begun, principal)).items()
            if head.owner == principal.owner and head.session_id == session_id
        }
        source = OfSession(
            cursor,
            heads,
            [name for name in begun if name not in heads],
            runs=self._front.runs,
            lookouts=self._lookouts,
            watched=self._front.watched,
            owner=principal.owner,
            session_id=session_id,
        )
        return await self._stream(source, heads, principal)

    async def _heads(self, names: Collection[str], principal: Principal) -> dict[str, Head]:
        """Of the runs that the caller may see."""
        found = zip(names, await self._front.runs.heads([*names]), strict=True)
        return {name: head for name, head in found if head is not None and sees(principal, head)}

    async def _stream(self, source: Source, heads: Mapping[str, Head], principal: Principal) -> Asgi:
        if self._front.hub.cutting:
            raise Draining
        counted = [name for name, head in heads.items() if head.cancel_if_unwatched and not head.finished]
        if counted:
            await self._front.runs.watched(counted)
        return ManyResponse(
            self._front.hub,
            source,
            seconds=self._front.seconds(principal),
            send_timeout=self._front.settings.send_timeout_seconds,
            heartbeat_seconds=self._front.settings.heartbeat_seconds,
        )


class ManyResponse(StreamResponse):
    """An ASGI application that streams many runs, in the native dialect."""

    __slots__ = ("_heartbeat_seconds", "_seconds", "_source")

    def __init__(
        self, hub: Hub, source: Source, *, seconds: float | None, send_timeout: float, heartbeat_seconds: float
    ) -> None:
        """Cut after `seconds`."""
        super().__init__(hub, Native("", long_ids=True), send_timeout=send_timeout, headers={})
        self._source = source
        self._seconds = seconds
        self._heartbeat_seconds = heartbeat_seconds

    async def follow(self, sink: StreamSink) -> End:
        multiplexer = Multiplexer(
            self.hub, self._source, sink, seconds=self._seconds, heartbeat_seconds=self._heartbeat_seconds
        )
        return await multiplexer.follow()


def _wanted(request: Request) -> tuple[list[str], str | None]:
    """What a stream of many runs is of: (`?run=…&run=…`, None) or ([], `?session_id=`). Raises BadRequest."""
    names = list(dict.fromkeys(request.query_params.getlist("run")))
    session_id = request.query_params.get("session_id")
    if (session_id is None) != bool(names):
        raise BadRequest("Name the runs, `?run=…&run=…`, or a session, `?session_id=…`: one of the two.")
    if session_id is not None and not 0 < len(session_id) <= api.MAX_SESSION_ID:
        raise BadRequest(f"`session_id` has 1 to {api.MAX_SESSION_ID} characters.")
    if len(names) > MAX_RUNS:
        raise BadRequest(f"A stream has at most {MAX_RUNS} runs.")
    return names, session_id


def _listed_cursor(request: Request, names: Collection[str]) -> Composite:
    """Of a stream of these runs. Raises BadCursor."""
    text = requests.cursor_text(request)
    found = Composite.parse(text) if text else Composite({})
    if found.floor is not None or not found.places.keys() <= set(names):
        raise BadCursor("This cursor belongs to another stream: it names what `run` does not.")
    return found


def _session_cursor(request: Request) -> Composite:
    """Of a stream of a session. Raises BadCursor."""
    text = requests.cursor_text(request)
    found = Composite.parse(text) if text else Composite({}, 0)
    if found.floor is None:
        raise BadCursor("This cursor belongs to another stream: a session's ends with a number.")
    return found
