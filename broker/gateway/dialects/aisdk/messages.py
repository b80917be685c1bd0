"""What a chat transport sends: the whole conversation. Its last message is the query."""

from __future__ import annotations

import re
from typing import Any, Literal, NamedTuple, NoReturn

from pydantic import Field

from broker.errors import TooLarge
from broker.gateway import requests
from broker.gateway.api import Object, RunOptions, SessionId, SubmitBody

MAX_BODY = 1024 * 1024
"""A chat sends all of its messages each time."""
_SHOWN = 60
_NO_PATH = re.compile(r"[/\\?#\t\n\r\ud800-\udfff]|%[0-9A-Fa-f]{2}|\A\.\.?\Z")
"""Ids that lead elsewhere: DefaultChatTransport does not encode them, so that the URL standard rules what they mean.
No page could resume or stop what it has asked."""


class UIMessagesBody(RunOptions):
    """The body of DefaultChatTransport; WorkflowChatTransport sends `messages` alone. Other fields are ignored."""

    messages: list[Object] = Field(
        min_length=1, fail_fast=True, description="UI messages. The last one is the user's, and the query."
    )
    id: SessionId | None = Field(None, description="The chat: the session of its runs, unless `session_id` is another.")
    trigger: Literal["submit-message", "regenerate-message"] | None = Field(
        None, description="`regenerate-message` starts a new run though one is under way."
    )


class Question(NamedTuple):
    """What a chat asks."""

    submit: SubmitBody
    follows: str | None
    """The id of the last answer in the conversation, which is its run's request_id."""
    regenerate: bool


def parse(body: Any) -> Question:
    """Raises Invalid and TooLarge, which name what cannot be taken."""
    chat = requests.validated(UIMessagesBody, body, needed="messages")
    if chat.id is not None and _NO_PATH.search(chat.id):
        requests.refuse(
            "id",
            "A chat's id stands as it is in the path of its stream: it is not . or .., and has no slash or backslash, "
            "? or #, no % before two hexadecimal digits, no tab, line break or lone surrogate.",
        )
    answers = [message.get("id") for message in chat.messages if message.get("role") == "assistant"]
    options = {name: getattr(chat, name) for name in RunOptions.model_fields}
    return Question(
        SubmitBody(**{**options, "query": _text(chat.messages), "session_id": chat.session_id or chat.id}),
        follows=answers[-1] if answers and isinstance(answers[-1], str) else None,
        regenerate=chat.trigger == "regenerate-message",
    )


def _text(messages: list[Object]) -> str:
    """Of the last message, every part a line."""
    number = len(messages) - 1
    message, place = messages[number], f"messages.{number}"
    if message.get("role") != "user":
        requests.refuse(place, "The last message must be the user's; results of tools in the client are not supported.")
    parts = message.get("parts")
    if not isinstance(parts, list):
        requests.refuse(f"{place}.parts", 'Missing. A message is {"role": "user", "parts": [{"type": "text", …}]}.')
    text = "\n".join(_part(part, f"{place}.parts.{n}") for n, part in enumerate(parts))
    if not text:
        requests.refuse(f"{place}.parts", "There is no text in them.")
    if len(text.encode("utf-8", "surrogatepass")) > requests.MAX_BODY:
        raise TooLarge(f"The last message is larger than {requests.MAX_BODY} bytes.")
    return text


def _part(part: Any, place: str) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if not isinstance(kind, str):
        requests.refuse(place, "A part is an object with a type.")
    if kind != "text":
        _unsupported(part, kind, place)
    text = part.get("text")
    if not isinstance(text, str):
        requests.refuse(place, "A part of the type text has a text.")
    return text


def _unsupported(part: dict[str, Any], kind: str, place: str) -> NoReturn:
    media = part.get("mediaType")
    what = f"{kind} ({media})" if isinstance(media, str) else kind
    requests.refuse(place, f"A part of the type {what[:_SHOWN]} is not supported: agents here take text.")
