"""Agents of the OpenAI Agents SDK: their stream as our events."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Iterator, Sequence
from typing import Any, Literal

from agents import (
    Agent as SdkAgent,
)
from agents import (
    Handoff,
    InputGuardrailTripwireTriggered,
    ItemHelpers,
    MaxTurnsExceeded,
    ModelBehaviorError,
    OutputGuardrailTripwireTriggered,
    Runner,
    RunResultStreaming,
    StreamEvent,
    ToolInputGuardrailTripwireTriggered,
    ToolOutputGuardrailTripwireTriggered,
    set_tracing_disabled,
)
from pydantic import BaseModel, ConfigDict
from pydantic_core import to_jsonable_python

from broker.events import Data, Error, Event, Reasoning, Token, ToolCall, ToolResult
from broker.settings import Settings
from worker.agent import Agent, Checkpoint, Run
from worker.agents.conversation import opening, sendable
from worker.agents.foreign.telling import BETWEEN_ANSWERS, Events, answer_of, ending, joined, shown
from worker.agents.states import Saver, restored
from worker.models.model import ModelError, Usage
from worker.models.parameters import BadParameter, refuse_unknown, whole
from worker.models.raised import model_error
from worker.tools.tool import shown_arguments

_GUARDRAILS = (InputGuardrailTripwireTriggered, OutputGuardrailTripwireTriggered)
_TOOL_GUARDRAILS = (ToolInputGuardrailTripwireTriggered, ToolOutputGuardrailTripwireTriggered)
_BY_THE_SERVER = frozenset({"web_search", "file_search", "code_interpreter", "image_generation", "mcp"})
"""Tools whose calls come with their results: no event of their own brings these."""
_NO_TRACING = "OPENAI_AGENTS_DISABLE_TRACING"

Items = list[dict[str, Any]]
"""Input items, as the SDK names them: messages, calls, results."""


class State(BaseModel):
    """Where a run of the SDK stands between two turns."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    library: Literal["openai-agents"] = "openai-agents"
    version: Literal[1] = 1
    agent: str
    """The name of the agent that goes on: a handoff changes it."""
    items: Items
    """What came after the query."""
    turns: int
    usage: Usage


def make_openai_agent(start: SdkAgent[Any], settings: Settings) -> Agent:
    """Tracing, which sends each run to OpenAI, is off from here on, unless the environment says otherwise."""
    if _NO_TRACING not in os.environ:
        set_tracing_disabled(True)

    async def openai_agent(run: Run) -> Events:
        try:
            refuse_unknown("an agent of the OpenAI Agents SDK", run.parameters, ("max_turns",))
            check = whole(1, settings.max_rounds)
            turns = check("max_turns", run.parameters.get("max_turns", settings.max_rounds))
        except BadParameter as error:
            yield Error(code="invalid_parameter", message=str(error))
            return
        history = await run.history(tokens=settings.history_tokens) if settings.history_tokens else ()
        before = sendable(opening(None, history, run.query))
        async with contextlib.aclosing(joined(_Talk(run, start, before).events(turns), run.attempt)) as events:
            try:
                async for event in events:
                    yield event
            except ModelError as error:
                yield Error(code=error.code, message=str(error))

    return openai_agent


class _Talk:
    """One attempt at a run."""

    def __init__(self, run: Run, start: SdkAgent[Any], before: Items) -> None:
        self._run = run
        self._start = start
        self._agent = start
        self._before = before
        self._state = State(agent=start.name, items=[], turns=0, usage=Usage())
        """Where this attempt begins."""
        state = restored(State, run.restored)
        if state is not None and (agent := _reachable(start, state.agent)) is not None:
            self._state, self._agent = state, agent
        self._saver = Saver(run.request_id)
        self._tools: dict[str, str] = {}
        """The names of tools by their calls."""
        self._pending: set[str] = set()
        """The calls of which the result has not been told."""
        self._answers = 0
        self._told = ""
        """Who told something last: of each answer's text, the first piece is parted from what was before."""
        self._untold = ""
        """What was streamed of messages that are not whole yet."""

    async def events(self, turns: int) -> Events:
        """All of them. Raises ModelError for what is no fault of the agent's code."""
        left = turns - self._state.turns
        if left < 1:
            raise _too_many(turns)
        given: Any = [*self._before, *self._state.items]
        result = Runner.run_streamed(self._agent, given, context=self._run, max_turns=left)
        stream = result.stream_events()
        try:
            async for event in stream:
                for told in self._events(event, result):
                    yield told
            _check_ended(result)
            if result.interruptions:
                raise ModelError("agent_interrupted", "The agent waits for an approval, which nobody can give here.")
            if not (answer := answer_of(result.final_output)):
                raise ModelError("model_empty", "The answer is empty.")
            for end in ending(answer, self._usage(result), told=bool(self._told)):
                yield end
        except Exception as error:
            failure = self._failure(error, turns)
            if failure is None:
                raise
            raise failure from error
        finally:
            result.cancel()
            if result.run_loop_task is not None:
                await asyncio.gather(result.run_loop_task, return_exceptions=True)
            await stream.aclose()  # type: ignore[attr-defined]

    def _events(self, event: StreamEvent, result: RunResultStreaming) -> Iterator[Event | Checkpoint]:
        if event.type == "raw_response_event":
            yield from self._text(event.data)
        elif event.type == "agent_updated_stream_event":
            if event.new_agent is not self._agent:
                self._agent = event.new_agent
                yield from self._checkpoint(result)
        else:
            yield from self._item(event.name, event.item)
            if event.name == "tool_output":
                yield from self._checkpoint(result)

    def _text(self, data: Any) -> Iterator[Token | Reasoning]:
        if data.type == "response.created":
            self._answers += 1
        elif data.type == "response.output_text.delta" and data.delta:
            who = f"{self._answers} {data.item_id}"
            between = BETWEEN_ANSWERS if self._told and self._told != who else ""
            self._told = who
            self._untold += data.delta
            yield Token(text=between + data.delta)
        elif data.type in ("response.reasoning_summary_text.delta", "response.reasoning_text.delta") and data.delta:
            yield Reasoning(text=data.delta)

    def _item(self, name: str, item: Any) -> Iterator[Event]:
        if name == "message_output_created":
            text = ItemHelpers.text_message_output(item)
            if self._untold.startswith(text):
                self._untold = self._untold[len(text) :]
            else:  # of a model that does not stream
                between, self._told = BETWEEN_ANSWERS if self._told else "", "whole"
                yield Token(text=between + text)
        elif name == "tool_called":
            yield from self._called(_plain(item.raw_item))
        elif name == "tool_output":
            id = str(_plain(item.raw_item).get("call_id") or "")
            self._pending.discard(id)
            yield ToolResult(id=id, tool=self._tools.get(id, ""), result=shown(item.output))
        elif name == "handoff_occured":
            yield Data(name="handoff", value={"from": item.source_agent.name, "to": item.target_agent.name})

    def _called(self, call: dict[str, Any]) -> Iterator[ToolCall | ToolResult]:
        kind = str(call.get("type", "")).removesuffix("_call")
        id, tool = str(call.get("call_id") or call.get("id") or ""), str(call.get("name") or kind)
        self._tools[id] = tool
        about = {key: value for key, value in call.items() if key not in ("id", "call_id", "type", "name", "status")}
        arguments = call.get("arguments")
        yield ToolCall(id=id, tool=tool, args=shown_arguments(arguments) if arguments is not None else shown(about))
        if kind in _BY_THE_SERVER:
            about.pop("arguments", None)
            yield ToolResult(id=id, tool=tool, result=shown({"status": call.get("status"), **about}))
        else:
            self._pending.add(id)

    def _checkpoint(self, result: RunResultStreaming) -> Iterator[Checkpoint]:
        """Between two turns, where a run that begins with these items goes on as this one does.

        The items of a turn are there together, and their events come one after the other: the last one counts.
        """
        if self._pending:
            return
        items: Items = to_jsonable_python(result.to_input_list(), fallback=str)
        begun = [*self._before, *self._state.items]
        if (
            items[: len(begun)] == begun
            and _is_answered(items)
            and _goes_on(self._agent)
            and _reachable(self._start, self._agent.name) is self._agent
        ):
            state = State(
                agent=self._agent.name,
                items=items[len(self._before) :],
                turns=self._state.turns + result.current_turn,
                usage=self._total(result),
            )
            yield from self._saver.checkpoint(state)

    def _total(self, result: RunResultStreaming) -> Usage:
        told = result.context_wrapper.usage
        return self._state.usage + Usage(
            prompt=told.input_tokens,
            completion=told.output_tokens,
            cached=told.input_tokens_details.cached_tokens or 0,
            reasoning=told.output_tokens_details.reasoning_tokens or 0,
        )

    def _usage(self, result: RunResultStreaming) -> dict[str, Any]:
        """Without tokens where the server does not tell."""
        total = self._total(result)
        tokens = total.told() if total != Usage() else {}
        return {**tokens, "rounds": self._state.turns + result.current_turn}

    def _failure(self, error: Exception, turns: int) -> ModelError | None:
        """What may be told of it; None for what only the worker's log may tell."""
        if isinstance(error, MaxTurnsExceeded):
            return _too_many(turns)
        if isinstance(error, _GUARDRAILS):
            name = error.guardrail_result.guardrail.get_name()
            return ModelError("guardrail", f"The guardrail {name} stopped the run.")
        if isinstance(error, _TOOL_GUARDRAILS):
            return ModelError("guardrail", f"The guardrail {error.guardrail.get_name()} stopped the run.")
        if isinstance(error, ModelBehaviorError):
            return ModelError(
                "model_broken", "The model's answer broke off, cannot be read, or calls what there is not."
            )
        if type(error).__name__ == "ModelRefusalError":  # not in every version
            return ModelError("model_content_filter", "The model refused to answer.")
        model = self._agent.model
        return model_error(error, model if isinstance(model, str) else "of this agent")


def _check_ended(result: RunResultStreaming) -> None:
    """Raises RuntimeError where a CancelledError of the agent's own code has ended the run: the library hides it."""
    if result.run_loop_task is not None and result.run_loop_task.cancelled():
        try:
            result.run_loop_task.result()
        except asyncio.CancelledError as error:
            raise RuntimeError("the agent's code raised CancelledError") from error


def _too_many(turns: int) -> ModelError:
    return ModelError("too_many_rounds", f"The agent has no answer after {turns} turns.")


def _plain(item: Any) -> dict[str, Any]:
    plain: dict[str, Any] = item if isinstance(item, dict) else item.model_dump(mode="json", exclude_unset=True)
    return plain


def _is_answered(items: Items) -> bool:
    """Whether each call has its result: no server takes a call without."""
    kinds = [(str(item.get("type", "")), item.get("call_id")) for item in items]
    called = {id for kind, id in kinds if id and kind.endswith("_call")}
    return called <= {id for kind, id in kinds if kind.endswith("_output")}


def _goes_on(agent: SdkAgent[Any]) -> bool:
    """Whether another run would ask the model now, as this one does. A result may end a run, and a call that the model
    is made to make is made to make only once: both is known to this run alone.
    """
    return agent.tool_use_behavior == "run_llm_again" and agent.model_settings.tool_choice in (None, "auto", "none")


def _reachable(start: SdkAgent[Any], name: str) -> SdkAgent[Any] | None:
    """The agent of this name, by handoffs from the first one."""
    seen: list[SdkAgent[Any]] = [start]
    for agent in seen:
        if agent.name == name:
            return agent
        seen += [other for other in _targets(agent.handoffs) if not any(other is one for one in seen)]
    return None


def _targets(handoffs: Sequence[SdkAgent[Any] | Handoff[Any, Any]]) -> Iterator[SdkAgent[Any]]:
    """A handoff that was made by `handoff(…)` does not tell its agent to others; then no checkpoint is made there."""
    return (target for target in handoffs if isinstance(target, SdkAgent))
