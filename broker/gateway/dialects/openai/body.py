"""The body of a request for a response, and the run that it asks for. Fields that OpenAI has and we lack are refused
only where ignoring them would change what the answer is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, Strict

from broker.functions import BadFunction, read_functions
from broker.gateway.api import SessionId
from broker.gateway.dialects.openai import conversation
from broker.gateway.dialects.openai.conversation import Conversation
from broker.gateway.dialects.openai.errors import ModelNotFound
from broker.gateway.dialects.openai.response import OWN
from broker.gateway.requests import known_agent, refuse, validated
from broker.settings import Settings

CHAT = "chat"
"""The agent that asks a model: what a request says of the model and the conversation goes to it."""
_MOST_TOOLS = 128
_OF_FUNCTIONS = ("name", "description", "parameters")
"""`strict` is ignored."""
_MOST_METADATA = 16

_Text = Annotated[str, Strict()]
_Flag = Annotated[bool, Strict()]


class CreateBody(BaseModel):
    """As OpenAI's; `agent`, `parameters`, `session_id` and `cancel_if_unwatched` are ours. Other fields are ignored."""

    model_config = ConfigDict(extra="ignore")

    model: _Text | None = Field(None, description="An agent, or a model of the configured server.")
    input: Any = Field(None, description="A text, or a list of items. The user's last message is the query.")
    instructions: _Text | None = None
    previous_response_id: _Text | None = Field(None, description="Goes on in the session of that response.")
    background: _Flag | None = Field(None, description="Answer at once, and not when the run has ended.")
    stream: _Flag | None = None
    store: _Flag | None = Field(None, description="Ignored: a run can be read until it expires or is erased.")
    metadata: dict[str, _Text] | None = None
    temperature: float | None = Field(None, ge=0, le=2, strict=True)
    top_p: float | None = Field(None, ge=0, le=1, strict=True)
    max_output_tokens: int | None = Field(None, ge=1, strict=True)
    reasoning: dict[str, Any] | None = Field(None, description="Its `effort` is honoured.")
    tools: list[dict[str, Any]] | None = Field(
        None, fail_fast=True, description="Functions of the client's, for the agent `chat`."
    )
    tool_choice: Any = Field(None, description="`auto` or `none`.")
    text: dict[str, Any] | None = Field(None, description="Its `format` can only be plain text.")
    conversation: Any = Field(None, description="Not supported: use previous_response_id.")
    prompt: Any = Field(None, description="Not supported.")
    agent: _Text | None = Field(None, description="Wins over `model`.")
    parameters: dict[str, Any] | None = Field(None, description="The agent's own parameters.")
    session_id: SessionId | None = None
    cancel_if_unwatched: float | None = Field(None, ge=0, le=86400, strict=True)


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What a request asks for, but for what an earlier response has to do with it."""

    agent: str
    conversation: Conversation
    parameters: dict[str, Any]
    """Without the conversation."""
    metadata: dict[str, Any]
    session_id: str | None
    previous: str | None
    """An id as the client sent it."""
    cancel_if_unwatched: float | None
    background: bool
    stream: bool


def read(given: Any, settings: Settings) -> Asked:
    """Raises Invalid, which names the field, and ModelNotFound."""
    body = validated(CreateBody, given, needed="input")
    _refuse_unsupported(body)
    agent, model = _agent(body, settings)
    talk = conversation.read(body.input)
    if agent != CHAT and talk.query is None:
        refuse("input", f"The agent {agent} takes no outputs of functions; it needs a message of the user.")
    return Asked(
        agent=agent,
        conversation=talk,
        parameters={**_parameters(body, agent, model, talk.instructions), **(body.parameters or {})},
        metadata=_metadata(body),
        session_id=body.session_id,
        previous=body.previous_response_id,
        cancel_if_unwatched=body.cancel_if_unwatched,
        background=body.background is True,
        stream=body.stream is True,
    )


def _refuse_unsupported(body: CreateBody) -> None:
    if body.input is None:
        refuse("input", "It is missing.")
    if body.conversation is not None:
        refuse("conversation", "Conversations are not supported here: send previous_response_id, or session_id.")
    if body.prompt is not None:
        refuse("prompt", "Stored prompts are not supported here: send instructions and input.")
    if body.tool_choice not in (None, "auto", "none"):
        refuse("tool_choice", "Only auto and none are supported here.")
    form = (body.text or {}).get("format")
    if form is not None and not (isinstance(form, dict) and form.get("type") == "text"):
        refuse("text.format", "Only plain text is supported here.")
    if not isinstance((body.reasoning or {}).get("effort"), str | None):
        refuse("reasoning.effort", "It must be a text.")
    if body.metadata and len(body.metadata) > _MOST_METADATA:
        refuse("metadata", f"It has at most {_MOST_METADATA} pairs.")
    if body.metadata and OWN in body.metadata:
        refuse(f"metadata.{OWN}", "This key is taken.")


def _agent(body: CreateBody, settings: Settings) -> tuple[str, str | None]:
    """The agent, and the model that it shall ask where the request names one."""
    names = settings.agent_names
    known_agent(body.agent, settings)
    if body.model is None:
        return body.agent or refuse("model", "It is missing."), None
    if body.agent in (None, body.model) and body.model in names:
        return body.model, None
    if body.agent not in (None, CHAT):  # it has its own way to an answer; the SDKs want a model all the same
        return body.agent, None
    if settings.model is not None and ({"*", body.model} & {settings.model, *settings.models}):
        return CHAT, body.model
    known = ", ".join([*names, *model_names(settings)])
    raise ModelNotFound(f"The model {body.model[:200]!r} does not exist here; there are: {known}.")


def model_names(settings: Settings) -> tuple[str, ...]:
    """The models beside the agents that a request can name, as far as they have names."""
    if settings.model is None:
        return ()
    return tuple(dict.fromkeys(name for name in (settings.model, *settings.models) if name != "*"))


def _parameters(body: CreateBody, agent: str, model: str | None, more: Sequence[str]) -> dict[str, Any]:
    """For the agent, by the names that our agents have for them. `more` are instructions of the input."""
    instructions = [text for text in (body.instructions, *more) if text]
    told = {
        "model": model,
        "instructions": "\n\n".join(instructions) or None,
        "temperature": body.temperature,
        "top_p": body.top_p,
        "max_tokens": body.max_output_tokens,
        "reasoning_effort": (body.reasoning or {}).get("effort"),
        "tools": False if agent == CHAT and body.tool_choice == "none" else None,
        "functions": _functions(body, agent),
    }
    return {name: value for name, value in told.items() if value is not None}


def _functions(body: CreateBody, agent: str) -> list[dict[str, Any]] | None:
    """The client's own, which it calls itself."""
    tools = body.tools or []
    if len(tools) > _MOST_TOOLS:
        refuse("tools", f"At most {_MOST_TOOLS}.")
    for number, tool in enumerate(tools):
        if tool.get("type") != "function":
            kind = str(tool.get("type"))[:64]
            refuse(f"tools[{number}].type", f"Only functions are supported here, not {kind!r}.")
    try:
        functions = read_functions([{name: tool.get(name) for name in _OF_FUNCTIONS} for tool in tools])
    except BadFunction as error:
        refuse(f"tools{error.place}", str(error))
    if functions and agent != CHAT:
        refuse("tools", f"The agent {agent} has tools of its own; only {CHAT} takes those of a client.")
    return [asdict(function) for function in functions] if functions and body.tool_choice != "none" else None


def _metadata(body: CreateBody) -> dict[str, Any]:
    """The client's, and beside it what only the response tells again."""
    own: dict[str, Any] = {"background": True} if body.background else {}
    if body.previous_response_id is not None:
        own["previous_response_id"] = body.previous_response_id
    return {**(body.metadata or {}), **({OWN: own} if own else {})}
