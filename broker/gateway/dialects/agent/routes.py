"""The dialect `agent`: POST /api/v1/agent/stream; GET with a request_id, for EventSource."""

from __future__ import annotations

import re

from pydantic import ConfigDict, Field
from starlette.requests import Request
from starlette.responses import Response

from broker.errors import BadCursor, Unavailable
from broker.gateway import requests
from broker.gateway.api import Query, SubmitBody
from broker.gateway.auth import Principal
from broker.gateway.dialects.agent.fold import TOLD_LOST, Agent
from broker.gateway.front import Front, stream_headers
from broker.gateway.routes import EVENT_STREAM, Asgi, Route
from broker.runs.record import Head

_COUNT = re.compile(r"[0-9]{1,15}", re.ASCII)


class AgentBody(SubmitBody):
    """A message to an agent. The same message by the same owner joins the run that is under way."""

    model_config = ConfigDict(extra="ignore")

    query: Query = Field(alias="message", description="What the agent shall do.")


def routes(front: Front, prefix: str) -> list[Route]:
    api = AgentApi(front, prefix)
    return [
        Route(
            method="POST",
            path=prefix,
            endpoint=api.submit,
            summary="Ask an agent, and stream its tokens; with Last-Event-ID, go on after so many",
            answers={200: EVENT_STREAM, 204: None},
            body=AgentBody,
            parameters=("Idempotency-Key", *requests.CURSORS),
        ),
        Route(
            method="GET",
            path=f"{prefix}/{{request_id}}",
            endpoint=api.resume,
            summary="Stream a run's tokens, for EventSource",
            answers={200: EVENT_STREAM, 204: None},
            parameters=(*requests.CURSORS, "ticket"),
            ticket=True,
        ),
    ]


class AgentApi:
    def __init__(self, front: Front, prefix: str) -> None:
        self._front = front
        self._prefix = prefix

    async def submit(self, request: Request, principal: Principal) -> Asgi:
        """A count does not say of which run it is: who sends one has a run already, and means it. It is not looked at
        where there is none to join, and the stream is that of a new run."""
        body = requests.validated(AgentBody, await requests.read_json(request), needed="message")
        count = _cursor(request)
        submission = requests.submission_of(body, self._front.settings)
        accepted = await self._front.submit(request, principal, submission, repeated=count > 0)
        head = await self._front.accepted_head(accepted.request_id)
        return await self._stream(accepted.request_id, head, principal, count if accepted.joined else 0)

    async def resume(self, request: Request, principal: Principal) -> Asgi:
        request_id, count = request.path_params["request_id"], _cursor(request)
        try:
            head = await self._front.visible(request_id, principal)
            return await self._stream(request_id, head, principal, count)
        except Unavailable:
            return self._front.come_again()

    async def _stream(self, request_id: str, head: Head, principal: Principal, count: int) -> Asgi:
        """Raises Unavailable."""
        dialect = Agent(head.session_id)
        headers = {**stream_headers(request_id), "Content-Location": f"{self._prefix}/{request_id}"}
        if count:
            end = await self._front.end(request_id, dialect)
            if count == TOLD_LOST or (end is not None and count >= end):
                return Response(status_code=204, headers=headers)
        return await self._front.stream(request_id, head, principal, dialect, after=count or None, headers=headers)


def _cursor(request: Request) -> int:
    """The id of the last frame that the client has, or 0. Raises BadCursor."""
    text = requests.cursor_text(request)
    if text and not _COUNT.fullmatch(text):
        raise BadCursor("On this route a cursor is the number that the stream's ids are.")
    return int(text or 0)
