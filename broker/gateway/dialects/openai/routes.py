"""The routes of OpenAI Responses, for unmodified `openai` clients."""

from __future__ import annotations

import re
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from broker.errors import BadRequest, RunNotFound, TooLarge
from broker.events import dumps
from broker.gateway import requests
from broker.gateway.api import SubmitBody
from broker.gateway.auth import Principal
from broker.gateway.dialects.dialect import fold_log
from broker.gateway.dialects.openai import body, conversation
from broker.gateway.dialects.openai.body import CHAT, Asked, CreateBody
from broker.gateway.dialects.openai.errors import ErrorBody, PreviousNotFound, problem
from broker.gateway.dialects.openai.fold import Responses
from broker.gateway.dialects.openai.response import Profile, request_id_of, response_id
from broker.gateway.front import Front
from broker.gateway.routes import EVENT_STREAM, Asgi, Route
from broker.ids import START, EventId
from broker.runs.record import Head, Question, Submission

_MOST_BYTES = 1024 * 1024
"""Of a body: some clients send the whole conversation each time. What a run is told of it may have twice as many."""


_NOWHERE = -1
"""A sequence number that is before all, and that no frame has: its client is told that it is lost."""


def routes(front: Front, prefix: str) -> list[Route]:
    return OpenAIApi(front).routes(prefix)


class OpenAIApi:
    """The endpoints."""

    def __init__(self, front: Front) -> None:
        self._front = front
        self._runs = front.runs
        self._settings = front.settings

    def routes(self, prefix: str) -> list[Route]:
        one = f"{prefix}/responses/{{request_id}}"
        shape: dict[str, Any] = {"problem": problem, "problem_body": ErrorBody}
        return [
            Route(
                method="POST",
                path=f"{prefix}/responses",
                endpoint=self.create,
                summary="OpenAI: ask for a response, streamed or whole, now or in the background",
                answers={200: ("json", EVENT_STREAM), 404: ErrorBody},
                body=CreateBody,
                parameters=("Idempotency-Key",),
                **shape,
            ),
            Route(
                method="GET",
                path=one,
                endpoint=self.retrieve,
                summary="OpenAI: a response, or its stream from a sequence number on",
                answers={200: ("json", EVENT_STREAM)},
                parameters=("stream", "starting_after", "Last-Event-ID"),
                **shape,
            ),
            Route(
                method="DELETE",
                path=one,
                endpoint=self.delete,
                summary="OpenAI: erase a response",
                answers={200: "json"},
                **shape,
            ),
            Route(
                method="POST",
                path=f"{one}/cancel",
                endpoint=self.cancel,
                summary="OpenAI: stop a response",
                answers={200: "json"},
                **shape,
            ),
            Route(
                method="GET",
                path=f"{one}/input_items",
                endpoint=self.input_items,
                summary="OpenAI: what a response was asked",
                answers={200: "json"},
                **shape,
            ),
            Route(
                method="GET",
                path=f"{prefix}/models",
                endpoint=self.models,
                summary="OpenAI: the agents, and the models by their names",
                answers={200: "json"},
                **shape,
            ),
        ]

    # -- ask -------------------------------------------------------------------------------------------------

    async def create(self, request: Request, principal: Principal) -> Asgi:
        asked = body.read(await requests.read_json(request, limit=_MOST_BYTES), self._settings)
        submission = await self._submission(asked, principal)
        accepted = await self._front.submit(request, principal, submission)
        head = await self._front.accepted_head(accepted.request_id)
        if asked.stream:
            return await self._stream(accepted.request_id, head, principal, None)
        if not asked.background:
            await self._front.ended(request, principal, accepted.request_id, head)
        return await self._object(accepted.request_id)

    async def _submission(self, asked: Asked, principal: Principal) -> Submission:
        """With what the earlier response brings: its session, and what it has left open."""
        talk, session_id, parameters = asked.conversation, asked.session_id, asked.parameters
        if asked.previous is not None:
            request_id, head = await self._previous(asked.previous, principal)
            if session_id not in (None, head.session_id):
                requests.refuse("session_id", "The previous response is in another session.")
            if not head.finished:  # its turn would be missing in what the agent is told
                requests.refuse("previous_response_id", "It has not ended yet: wait for its end, or cancel it.")
            session_id = head.session_id
            if talk.goes_on:
                talk = talk.after_run(*await self._left_open(request_id))
        if talk.query is None:
            requests.refuse(
                "input", "Outputs of functions need the previous_response_id, or the user's message in the input."
            )
        if len(talk.query.encode("utf-8", "surrogatepass")) > requests.MAX_BODY:
            raise TooLarge(f"The user's last message is larger than {requests.MAX_BODY} bytes.")
        conversation.check_outputs(talk.before)
        conversation.check_outputs(talk.after)
        if asked.agent == CHAT:
            said = {"before": talk.before, "after": talk.after}
            parameters = {**{name: messages for name, messages in said.items() if messages}, **parameters}
        if len(dumps(parameters)) > 2 * _MOST_BYTES:
            raise TooLarge("The conversation has become too large.")
        submit = SubmitBody(
            query=talk.query,
            agent=asked.agent,
            session_id=session_id,
            parameters=parameters,
            metadata=asked.metadata,
            cancel_if_unwatched=asked.cancel_if_unwatched,
        )
        return requests.submission_of(submit, self._settings)

    async def _previous(self, given: str, principal: Principal) -> tuple[str, Head]:
        request_id = request_id_of(given)
        try:
            if request_id is not None:
                return request_id, await self._front.visible(request_id, principal)
        except RunNotFound:
            pass
        raise PreviousNotFound(errors=[{"field": "previous_response_id", "message": "There is no such response."}])

    async def _left_open(self, request_id: str) -> tuple[str, list[conversation.Message]]:
        """The query that is not answered yet, and all that was said after it."""
        question = await self._runs.question(request_id)
        entries = await self._runs.log(await self._runs.record(request_id))
        dialect = Responses(_profile(request_id, question))
        earlier = question.parameters.get("after")
        said = conversation.of_run(entries, dialect.call_id)
        return question.query, [*(earlier if isinstance(earlier, list) else []), *said]

    # -- read ------------------------------------------------------------------------------------------------

    async def retrieve(self, request: Request, principal: Principal) -> Asgi:
        request_id = _request_id(request)
        streamed = request.query_params.get("stream", "").lower() in ("true", "1")
        starting_after = _starting_after(request) if streamed else None
        cursor = requests.run_cursor(request, request_id) if streamed else None
        head = await self._front.visible(request_id, principal)
        if not streamed:
            await self._front.wait(request, request_id, head, 0)
            return await self._object(request_id)
        if cursor is not None:
            starting_after = await self._seen(request_id, cursor.event_id)
        return await self._stream(request_id, head, principal, starting_after)

    async def _stream(self, request_id: str, head: Head, principal: Principal, after: int | None) -> Asgi:
        dialect = await self._dialect(request_id)
        return await self._front.stream(request_id, head, principal, dialect, after=after)

    async def _seen(self, request_id: str, event_id: EventId) -> int | None:
        """The last sequence number of a client that has seen the event: None for nothing, _NOWHERE where the log has it
        not, as then nobody knows what the client has seen."""
        dialect, record = await self._dialect(request_id), await self._runs.record(request_id)
        if event_id == record.end:
            folded = await self._front.folded(record, dialect)
        else:
            entries = await self._runs.log(record)
            last = next((number for number, entry in enumerate(entries, 1) if entry.id == event_id), 0)
            if not last and event_id != START:
                return _NOWHERE
            folded = await fold_log(dialect, entries[:last])
        seen: int | None = folded.seen
        return seen

    async def _dialect(self, request_id: str) -> Responses:
        question = await self._runs.question(request_id)
        return Responses(_profile(request_id, question))

    async def _object(self, request_id: str) -> Response:
        dialect = await self._dialect(request_id)
        folded = await self._front.folded(await self._runs.record(request_id), dialect)
        return _json(dialect.response(folded.state), request_id)

    async def input_items(self, request: Request, principal: Principal) -> Asgi:
        request_id = _request_id(request)
        await self._front.visible(request_id, principal)
        question = await self._runs.question(request_id)
        item = {
            "id": f"msg_{request_id}_query",
            "type": "message",
            "role": "user",
            "status": "completed",
            "content": [{"type": "input_text", "text": question.query}],
        }
        told = {"object": "list", "data": [item], "first_id": item["id"], "last_id": item["id"], "has_more": False}
        return _json(dumps(told), request_id)

    async def models(self, request: Request, principal: Principal) -> Asgi:
        names = dict.fromkeys([*self._settings.agent_names, *body.model_names(self._settings)])
        data = [{"id": name, "object": "model", "created": 0, "owned_by": "stream-broker"} for name in names]
        return Response(dumps({"object": "list", "data": data}), media_type="application/json")

    # -- stop ------------------------------------------------------------------------------------------------

    async def cancel(self, request: Request, principal: Principal) -> Asgi:
        request_id = _request_id(request)
        await self._front.visible(request_id, principal)
        await self._runs.cancel(request_id, "client")
        return await self._object(request_id)

    async def delete(self, request: Request, principal: Principal) -> Asgi:
        request_id = _request_id(request)
        await self._front.visible(request_id, principal)
        await self._runs.erase(request_id)
        told = {"id": response_id(request_id), "object": "response", "deleted": True}
        return _json(dumps(told), request_id)


def _profile(request_id: str, question: Question) -> Profile:
    return Profile(
        request_id=request_id,
        created_at=question.created_at_ms // 1000,
        agent=question.agent,
        parameters=question.parameters,
        metadata=question.metadata,
    )


def _request_id(request: Request) -> str:
    """Raises RunNotFound for what cannot be one."""
    request_id = request_id_of(request.path_params["request_id"])
    if request_id is None:
        raise RunNotFound
    return request_id


def _starting_after(request: Request) -> int | None:
    text = request.query_params.get("starting_after")
    if not text:
        return None
    if not re.fullmatch(r"-?\d{1,15}", text, re.ASCII):
        message = "starting_after is a sequence number."
        raise BadRequest(message, errors=[{"field": "starting_after", "message": message}])
    number = int(text)
    return number if number >= 0 else None


def _json(text: str, request_id: str) -> Response:
    return Response(text, 200, {"X-Request-Id": request_id, "Cache-Control": "no-store"}, "application/json")
