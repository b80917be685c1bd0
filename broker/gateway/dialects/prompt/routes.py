"""The dialect `prompt`: GET /chat?prompt=…, which an EventSource repeats whenever its connection ends."""

from __future__ import annotations

from pydantic import ConfigDict, Field
from starlette.requests import Request
from starlette.responses import Response

from broker.errors import BadCursor, Unavailable
from broker.gateway import requests
from broker.gateway.api import Problem, Query, SubmitBody
from broker.gateway.auth import Principal
from broker.gateway.dialects.place import Place
from broker.gateway.dialects.prompt.fold import TOLD_LOST, Prompt
from broker.gateway.front import Front, stream_headers
from broker.gateway.routes import EVENT_STREAM, Asgi, Route
from broker.ids import REQUEST_ID, START
from broker.runs.record import Head, Submission


class PromptQuery(SubmitBody):
    """What the query string has."""

    model_config = ConfigDict(extra="ignore")

    query: Query = Field(alias="prompt")


def routes(front: Front, prefix: str) -> list[Route]:
    return [
        Route(
            method="GET",
            path=prefix,
            endpoint=PromptApi(front).stream,
            summary="Ask an agent, and stream its answer, for EventSource; with Last-Event-ID, resume",
            answers={200: EVENT_STREAM, 204: None, 404: Problem, 422: Problem},
            parameters=("prompt", "agent", "session_id of a run", "parameters", "access_token", *requests.CURSORS),
            query_token=True,
        )
    ]


class PromptApi:
    def __init__(self, front: Front) -> None:
        self._front = front

    async def stream(self, request: Request, principal: Principal) -> Asgi:
        """A cursor names its run. Where that run is no longer there, the answer is a 404: who asks again shall not
        start, and pay for, a second one."""
        submission, cursor = self._submission(request), _cursor(request)
        if request.method == "HEAD":  # starts nothing, and is answered with a stream's head
            return self._front.come_again()
        try:
            if cursor is not None:
                request_id, place = cursor
                head = await self._front.visible(request_id, principal)
                if head.digest == submission.digest():
                    return await self._stream(request_id, head, principal, place)
            accepted = await self._front.submit(request, principal, submission)
            head = await self._front.accepted_head(accepted.request_id)
            return await self._stream(accepted.request_id, head, principal, None)
        except Unavailable:
            return self._front.come_again()

    def _submission(self, request: Request) -> Submission:
        sent = request.query_params
        fields = {name: sent[name] for name in ("prompt", "agent", "session_id") if name in sent}
        parameters = requests.query_json(request, "parameters")
        body = {**fields, "parameters": {} if parameters is None else parameters}
        return requests.submission_of(requests.validated(PromptQuery, body, needed="prompt"), self._front.settings)

    async def _stream(self, request_id: str, head: Head, principal: Principal, place: Place | None) -> Asgi:
        """From the frame at `place` on. Raises Unavailable."""
        dialect = Prompt(request_id)
        if place is not None and await self._is_last(place, request_id, head, dialect):
            return Response(status_code=204, headers=stream_headers(request_id))
        return await self._front.stream(request_id, head, principal, dialect, after=place)

    async def _is_last(self, place: Place, request_id: str, head: Head, dialect: Prompt) -> bool:
        """Most who ask have the log's last event, and for them the log need not be read."""
        if place == TOLD_LOST or (head.finished and place == Place(*head.end)):
            return True
        end: Place | None = await self._front.end(request_id, dialect)
        return place == end


def _cursor(request: Request) -> tuple[str, Place | None] | None:
    """A run, and where in it the client stands; None for its beginning. Raises BadCursor."""
    text = requests.cursor_text(request)
    if not text:
        return None
    request_id, _, place = text.rpartition("/")
    if not REQUEST_ID.fullmatch(request_id):
        raise BadCursor("On this route a cursor is '<request_id>/<event id>', as the stream's ids are.")
    found = Place.parse(place)
    return request_id, None if found == Place(*START) else found
