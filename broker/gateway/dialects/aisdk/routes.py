"""The AI SDK dialect over HTTP: `useChat` with DefaultChatTransport or WorkflowChatTransport.

The first has the chat as its key, which is the session of its runs, and resumes from its beginning the newest of them
that is under way. The second has the run, and counts chunks; a request of it is known by its `startIndex`.
"""

from __future__ import annotations

import contextlib
import re

from starlette.requests import Request
from starlette.responses import Response

from broker.errors import BadRequest, BrokerError, RunNotFound, Unavailable
from broker.gateway import requests
from broker.gateway.auth import Principal
from broker.gateway.dialects.aisdk import messages
from broker.gateway.dialects.aisdk.chunks import loose
from broker.gateway.dialects.aisdk.fold import AiSdk
from broker.gateway.dialects.aisdk.messages import Question, UIMessagesBody
from broker.gateway.front import Front, sees
from broker.gateway.problems import problem
from broker.gateway.routes import EVENT_STREAM, Asgi, Route
from broker.gateway.stream import event_stream
from broker.ids import REQUEST_ID
from broker.runs.record import Head

RUN_ID = "x-workflow-run-id"
TAIL_INDEX = "x-workflow-stream-tail-index"
_STREAM_HEADERS = {"x-vercel-ai-ui-message-stream": "v1"}
_NUMBER = re.compile(r"-?[0-9]{1,9}", re.ASCII)


def routes(front: Front, prefix: str) -> list[Route]:
    api = AiSdkApi(front)
    chat = prefix + "/{chat_id}"
    return [
        Route(
            method="POST",
            path=prefix,
            endpoint=api.send,
            summary="AI SDK: send a message, and stream the answer",
            answers={200: EVENT_STREAM},
            body=UIMessagesBody,
            parameters=("Idempotency-Key",),
            problem=_plain_text,
            problem_body="text",
        ),
        Route(
            method="GET",
            path=f"{chat}/stream",
            endpoint=api.resume,
            summary="AI SDK: resume the newest answer of a chat that is under way; by chat or by run",
            answers={200: EVENT_STREAM, 204: None},
            parameters=("startIndex",),
            problem=_plain_text,
            problem_body="text",
        ),
        Route(
            method="POST",
            path=f"{chat}/stop",
            endpoint=api.stop,
            summary="AI SDK: stop the runs of a chat that are under way, if there are any",
            answers={204: None},
            problem=_plain_text,
            problem_body="text",
        ),
    ]


class AiSdkApi:
    """The endpoints."""

    def __init__(self, front: Front) -> None:
        self._front = front
        self._runs = front.runs
        self._settings = front.settings

    async def send(self, request: Request, principal: Principal) -> Asgi:
        # WorkflowChatTransport lets fetch name the type of its string.
        body = await requests.read_json(request, limit=messages.MAX_BODY, also="text/plain")
        question = messages.parse(body)
        session_id = question.submit.session_id or await self._session_of(question, principal)
        submission = requests.submission_of(
            question.submit.model_copy(update={"session_id": session_id}), self._settings
        )
        accepted = await self._front.submit(request, principal, submission)
        # A key makes one run: with it, what is joined is the run of this very request, sent before.
        if question.regenerate and accepted.joined and requests.idempotency_key(request) is None:
            await self._runs.cancel(accepted.request_id, "regenerated")
            accepted = await self._front.submit(request, principal, submission)
        head = await self._front.accepted_head(accepted.request_id)
        return await self._stream(accepted.request_id, head, principal)

    async def _session_of(self, question: Question, principal: Principal) -> str | None:
        """Of the run before, where a client names no chat, so that the agent knows of the conversation."""
        if question.follows is None or not REQUEST_ID.fullmatch(question.follows):
            return None
        head = await self._runs.head(question.follows)
        return head.session_id if head is not None and head.owner == principal.owner else None

    async def resume(self, request: Request, principal: Principal) -> Asgi:
        name, start_index = request.path_params["chat_id"], _start_index(request)
        try:
            if start_index is None:
                return await self._resume_chat(name, principal)
            return await self._resume_run(name, start_index, principal)
        except Unavailable:  # to a 503 both transports give up
            return self._front.come_again()

    async def _resume_chat(self, name: str, principal: Principal) -> Asgi:
        found = await self._find(name, principal)
        if not found or found[0][1].finished:
            return Response(status_code=204, headers=_STREAM_HEADERS)
        return await self._stream(*found[0], principal)

    async def _resume_run(self, name: str, start_index: int, principal: Principal) -> Asgi:
        """From the chunk of this number on; a negative one counts from the end."""
        found = await self._find(name, principal)
        if not found:
            return _nothing_runs()
        request_id, head = found[0]
        headers: dict[str, str] = {}
        if start_index < 0 or head.finished:
            try:
                record = await self._runs.record(request_id)
                count = (await self._front.folded(record, self._dialect(request_id))).state.chunks
            except RunNotFound:
                return _nothing_runs()
            if start_index < 0:
                start_index = max(count + start_index, 0)
                headers[TAIL_INDEX] = str(count - 1)
            if head.finished and start_index >= count:
                return _nothing_runs()
        return await self._stream(request_id, head, principal, after=start_index, headers=headers)

    async def stop(self, request: Request, principal: Principal) -> Asgi:
        for request_id, head in await self._find(request.path_params["chat_id"], principal):
            if not head.finished:
                with contextlib.suppress(RunNotFound):
                    await self._runs.cancel(request_id, "client")
        return Response(status_code=204)

    async def _find(self, name: str, principal: Principal) -> list[tuple[str, Head]]:
        """The run of this request_id, else the runs of the caller's session of this name that are under way: newest
        first."""
        if REQUEST_ID.fullmatch(name):
            head = await self._runs.head(name)
            if head is not None and sees(principal, head):
                return [(name, head)]
        return await self._runs.under_way(principal.owner, name)

    async def _stream(
        self,
        request_id: str,
        head: Head,
        principal: Principal,
        *,
        after: int = 0,
        headers: dict[str, str] | None = None,
    ) -> Asgi:
        return await self._front.stream(
            request_id,
            head,
            principal,
            self._dialect(request_id),
            after=after or None,
            headers={**_STREAM_HEADERS, RUN_ID: request_id, **(headers or {})},
        )

    def _dialect(self, request_id: str) -> AiSdk:
        return AiSdk(request_id, reset_step=self._settings.aisdk_reset_step)


def _start_index(request: Request) -> int | None:
    text = request.query_params.get("startIndex")
    if text is None:
        return None
    if not _NUMBER.fullmatch(text):
        raise BadRequest("`startIndex` is a whole number.")
    return int(text)


def _nothing_runs() -> Response:
    """For a client that counts chunks: it takes no 204 and no 404, and asks again until it has a `finish`."""
    return event_stream(loose({"type": "finish"}), _STREAM_HEADERS)


def _plain_text(error: BrokerError) -> Response:
    """A chat shows the body of an error to its user."""
    told = problem(error)
    headers = {name: told.headers[name] for name in ("www-authenticate", "retry-after") if name in told.headers}
    return Response(error.detail.encode("utf-8", "replace"), told.status_code, headers, "text/plain")
