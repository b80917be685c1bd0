"""The dialect `session_chat`: POST /api/chat."""

from __future__ import annotations

from pydantic import ConfigDict, Field
from starlette.requests import Request

from broker.gateway import requests
from broker.gateway.api import Query, SessionId, SubmitBody
from broker.gateway.auth import Principal
from broker.gateway.dialects.session_chat.fold import SessionChat
from broker.gateway.front import Front
from broker.gateway.routes import EVENT_STREAM, Asgi, Route


class SessionChatBody(SubmitBody):
    """A message to an agent. `userId` is not looked at: who asks is who the token says."""

    model_config = ConfigDict(extra="ignore", populate_by_name=True)

    query: Query = Field(alias="message", description="What the agent shall do.")
    session_id: SessionId | None = Field(None, alias="sessionId", description="Groups runs; made up when absent.")


def routes(front: Front, prefix: str) -> list[Route]:
    async def stream(request: Request, principal: Principal) -> Asgi:
        """A client that has lost its connection sends the same again, and joins its run."""
        body = requests.validated(SessionChatBody, await requests.read_json(request), needed="message")
        accepted = await front.submit(request, principal, requests.submission_of(body, front.settings))
        head = await front.accepted_head(accepted.request_id)
        record = await front.runs.record(accepted.request_id)
        dialect = SessionChat(record.created_at_ms, record.rewinds)
        return await front.stream(accepted.request_id, head, principal, dialect)

    return [
        Route(
            method="POST",
            path=prefix,
            endpoint=stream,
            summary="Ask an agent in a session, and stream its answer",
            answers={200: EVENT_STREAM},
            body=SessionChatBody,
            parameters=("Idempotency-Key",),
        )
    ]
