"""The dialect `chat`: POST /chat, as a stream or as one answer."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, Strict
from starlette.requests import Request

from broker.errors import RunCancelled, RunFailed
from broker.gateway import requests
from broker.gateway.api import Object, Problem, Query, SubmitBody
from broker.gateway.auth import Principal
from broker.gateway.dialects.chat.fold import Chat
from broker.gateway.front import Front, stream_headers
from broker.gateway.routes import EVENT_STREAM, Asgi, Route, json_response
from broker.runs.record import Head


class MessageBody(SubmitBody):
    """A message to an agent. The same message by the same owner joins the run that is under way."""

    model_config = ConfigDict(extra="ignore")

    query: Query = Field(alias="message", description="What the agent shall do.")
    stream: Annotated[bool, Strict()] | None = Field(
        None, description="Whether the answer is streamed; else it comes when it is complete."
    )


class ChatAnswer(BaseModel):
    """The end of a run that succeeded."""

    content: str = Field(description="The whole answer.")
    citations: list[Object]
    usage: Object
    request_id: str
    session_id: str


def routes(front: Front, prefix: str) -> list[Route]:
    return [
        Route(
            method="POST",
            path=prefix,
            endpoint=_Endpoint(front),
            summary="Ask an agent; the answer comes as it is made, or when it is complete",
            answers={200: (ChatAnswer, EVENT_STREAM), 404: Problem, 409: Problem},
            body=MessageBody,
            parameters=("Idempotency-Key",),
        )
    ]


class _Endpoint:
    def __init__(self, front: Front) -> None:
        self._front = front

    async def __call__(self, request: Request, principal: Principal) -> Asgi:
        body = requests.validated(MessageBody, await requests.read_json(request), needed="message")
        submission = requests.submission_of(body, self._front.settings)
        accepted = await self._front.submit(request, principal, submission)
        head = await self._front.accepted_head(accepted.request_id)
        if not body.stream:
            return await self._whole(request, accepted.request_id, head, principal)
        rewinds = (await self._front.runs.record(accepted.request_id)).rewinds
        dialect = Chat(accepted.request_id, head.session_id, rewinds)
        return await self._front.stream(accepted.request_id, head, principal, dialect)

    async def _whole(self, request: Request, request_id: str, head: Head, principal: Principal) -> Asgi:
        """Raises RunFailed and RunCancelled, and what Front.ended does."""
        record = await self._front.ended(request, principal, request_id, head)
        outcome = await self._front.runs.outcome(record)
        match record.status:
            case "completed":
                answer: dict[str, Any] = {
                    "content": outcome.answer or "",
                    "citations": outcome.citations,
                    "usage": outcome.usage,
                    "request_id": request_id,
                    "session_id": record.session_id,
                }
                return json_response(ChatAnswer.model_validate(answer), 200, _headers(request_id))
            case "failed":
                error = RunFailed(outcome.error["message"] if outcome.error else "")
                error.code = outcome.error["code"] if outcome.error else error.code
                raise error
            case _:
                raise RunCancelled


def _headers(request_id: str) -> dict[str, str]:
    return {**stream_headers(request_id), "Cache-Control": "no-store"}
