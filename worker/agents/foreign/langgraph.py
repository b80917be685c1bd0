"""Graphs of LangGraph: their stream as our events."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Iterable, Iterator
from typing import Any, Literal, get_type_hints

from langchain_core.callbacks import AsyncCallbackHandler
from langchain_core.messages import (
    AIMessage,
    AIMessageChunk,
    BaseMessage,
    HumanMessage,
    ToolMessage,
    messages_from_dict,
    messages_to_dict,
)
from langgraph.checkpoint.base import BaseCheckpointSaver
from langgraph.errors import GraphRecursionError
from langgraph.pregel import Pregel
from pydantic import BaseModel, ConfigDict
from pydantic_core import to_jsonable_python

from broker.errors import Misconfigured
from broker.events import AGENT, Data, Error, Event, Final, Reasoning, Token, ToolCall, ToolResult
from broker.settings import Settings
from worker.agent import Agent, Checkpoint, Run
from worker.agents.conversation import opening, sendable
from worker.agents.foreign.floor import Floor
from worker.agents.foreign.telling import Events, answer_of, ending, joined, shown
from worker.agents.states import Saver, restored
from worker.models.model import ModelError, Usage
from worker.models.parameters import BadParameter, refuse_unknown, whole
from worker.models.raised import model_error

logger = logging.getLogger(__name__)

STEPS = 25
"""Of a graph that does not say its `recursion_limit`; the library's own default is no limit that a bill would feel."""

Graph = Pregel[Any, Any, Any, Any]


class State(BaseModel):
    """What a run's messages came to, where the graph has no other state."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    library: Literal["langgraph"] = "langgraph"
    version: Literal[1] = 1
    messages: list[dict[str, Any]]
    """What came after the query."""
    usage: Usage


def make_langgraph_agent(graph: Graph, settings: Settings, setting: str) -> Agent:
    """Raises Misconfigured where the graph's input has no place for a query."""
    inputs = _inputs(graph)
    if not {"messages", "query"} & set(inputs):
        told = ", ".join(inputs) or "nothing"
        raise Misconfigured(f"{setting} takes {told}, and neither messages nor query, which would be the run's")
    others = tuple(name for name in inputs if name not in ("messages", "query"))
    limit = int((graph.config or {}).get("recursion_limit", STEPS))

    async def langgraph_agent(run: Run) -> Events:
        try:
            refuse_unknown("this graph", run.parameters, ("recursion_limit", *others))
            steps = whole(1, limit)("recursion_limit", run.parameters.get("recursion_limit", limit))
        except BadParameter as error:
            yield Error(code="invalid_parameter", message=str(error))
            return
        values = {name: run.parameters[name] for name in others if name in run.parameters}
        if "query" in inputs:
            values["query"] = run.query
        if "messages" in inputs:
            history = await run.history(tokens=settings.history_tokens) if settings.history_tokens else ()
            values["messages"] = _opening(run, history)
        walk = _Walk(run, graph, values)
        async with contextlib.aclosing(joined(walk.events(steps), run.attempt, walk.stop)) as events:
            try:
                async for event in events:
                    yield event
            except ModelError as error:
                yield Error(code=error.code, message=str(error))

    return langgraph_agent


def _inputs(graph: Graph) -> tuple[str, ...]:
    """The names of what the graph takes. Not from its JSON schema where there is a class, of which pydantic may be
    unable to make one.
    """
    schema = getattr(getattr(graph, "builder", None), "input_schema", None)
    return tuple(get_type_hints(schema) if schema else graph.get_input_jsonschema().get("properties", {}))


def _opening(run: Run, history: Iterable[Any]) -> list[BaseMessage]:
    """With ids, by which they are known again in the graph's state."""
    kinds: dict[str, type[HumanMessage | AIMessage]] = {"user": HumanMessage, "assistant": AIMessage}
    return [
        kinds[message["role"]](content=message["content"], id=f"{run.request_id}-{number}")
        for number, message in enumerate(sendable(opening(None, history, run.query)))
    ]


class _Brake(AsyncCallbackHandler):
    """Ends a model's answer at its next piece, once it is pulled.

    langchain-openai waits for each piece with `asyncio.wait_for`, which on Python 3.11 can lose a cancellation: the
    model would speak on to its end, and whoever has cancelled it wait as long.
    """

    run_inline = True
    raise_error = True
    pulled = False

    async def on_llm_new_token(self, *piece: Any, **more: Any) -> None:
        if self.pulled:
            raise asyncio.CancelledError


class _Walk:
    """One attempt at a run."""

    def __init__(self, run: Run, graph: Graph, values: dict[str, Any]) -> None:
        self._run = run
        self._graph = graph
        self._values = values
        """The graph's input, and its state after each step."""
        self._before: list[BaseMessage] = values.get("messages", [])
        self._usage = Usage()
        if (state := restored(State, run.restored)) is not None:
            self._usage = state.usage
            self._values = {**values, "messages": [*self._before, *messages_from_dict(state.messages)]}
        self._saver = Saver(run.request_id)
        self._brake = _Brake()
        self._calls: dict[str, str] = {}
        """The names of tools by their last calls: a model may repeat an id, or have none."""
        self._messages: list[BaseMessage] = []
        """Those of which the calls or the result have been told."""
        self._speakers: set[str] = set()
        """The ids of messages that were streamed."""
        self._floor = Floor()

    async def events(self, steps: int) -> Events:
        """All of them. Raises ModelError for what is no fault of the graph's code."""
        run = self._run
        about = {"request_id": run.request_id, "session_id": run.session_id}
        # Of its own for each attempt: one that begins anew must not find what an earlier one has left.
        thread = f"{run.request_id}-{run.attempt}"
        config: Any = {
            "configurable": {"thread_id": thread, **about, "tenant": run.tenant, "subject": run.subject},
            "recursion_limit": steps,
            "callbacks": [self._brake],
        }
        stream = self._graph.astream(
            self._values, config, stream_mode=["messages", "updates", "custom", "values"], subgraphs=True
        )
        try:
            async for part in stream:
                for event in self._events(*part):
                    yield event
            for text in self._floor.end_all():
                yield Token(text=text)
            usage = self._usage.told() if self._usage != Usage() else {}
            for end in ending(self._answer(), usage, told=self._floor.used):
                yield end
        except GraphRecursionError as error:
            raise ModelError("too_many_rounds", f"The graph has not come to its end after {steps} steps.") from error
        except Exception as error:
            if (failure := model_error(error, "of this graph")) is None:
                raise
            raise failure from error
        finally:
            await stream.aclose()  # type: ignore[attr-defined]
            await self._forget(thread)

    async def _forget(self, thread: str) -> None:
        """Nobody enters the thread again, and a run that is erased must not be left in it."""
        if isinstance(saver := self._graph.checkpointer, BaseCheckpointSaver):
            try:
                await saver.adelete_thread(thread)
            except Exception:  # NotImplementedError, where a saver has no such method
                logger.warning(
                    "a graph's checkpointer has not deleted the thread of a run: what the run said stays there",
                    exc_info=True,
                    extra={"request_id": self._run.request_id, "thread_id": thread},
                )

    def stop(self) -> None:
        """To be called before `events` is closed."""
        self._brake.pulled = True

    def _events(self, space: tuple[str, ...], mode: str, chunk: Any) -> Iterator[Event | Checkpoint]:
        if mode == "messages":
            yield from self._spoken(chunk[0], chunk[1].get("langgraph_checkpoint_ns", ""))
        elif mode == "updates":
            yield from self._updated(space, chunk)
        elif mode == "custom":
            own = isinstance(chunk, AGENT) and not isinstance(chunk, (Final, Error))
            yield chunk if own else Data(name="custom", value=shown(chunk))
        else:
            for text in self._floor.end_all(space):
                yield Token(text=text)
            if not space:
                self._values = chunk
                yield from self._checkpoint()

    def _spoken(self, message: BaseMessage, task: str) -> Iterator[Event]:
        if not isinstance(message, AIMessage):
            return
        whole, id = not isinstance(message, AIMessageChunk), message.id or ""
        if whole and id in self._speakers:
            return
        if usage := message.usage_metadata:
            self._usage += _usage(usage)
        for block in message.content_blocks:
            if block["type"] == "reasoning" and block.get("reasoning"):
                yield Reasoning(text=block["reasoning"])
            elif block["type"] == "text" and block["text"]:
                self._speakers.add(id)
                for text in self._floor.say(task, id, block["text"]):
                    yield Token(text=text)
        if whole or getattr(message, "chunk_position", None) == "last":  # not in every version; a step's end does then
            for text in self._floor.end(task):
                yield Token(text=text)

    def _updated(self, space: tuple[str, ...], update: dict[str, Any]) -> Iterator[Event]:
        if "__interrupt__" in update:
            raise ModelError("agent_interrupted", "The graph waits for an answer, which nobody can give here.")
        for node, told in update.items():
            for values in told if isinstance(told, list) else [told]:
                if isinstance(values, dict):
                    yield from self._tools(values.get("messages"))
                    others = {name: value for name, value in values.items() if name != "messages"}
                    if others and not space:
                        yield Data(name="update", value={"node": node, "values": shown(others)})

    def _tools(self, messages: Any) -> Iterator[ToolCall | ToolResult]:
        for message in messages if isinstance(messages, list) else [messages]:
            if isinstance(message, AIMessage) and message.tool_calls and self._is_new(message):
                for call in message.tool_calls:
                    id = call["id"] or ""
                    self._calls[id] = call["name"]
                    yield ToolCall(id=id, tool=call["name"], args=shown(call["args"]))
            elif isinstance(message, ToolMessage) and message.tool_call_id in self._calls and self._is_new(message):
                id = message.tool_call_id
                content: Any = shown(message.content)
                result = {"error": content} if message.status == "error" else content
                yield ToolResult(id=id, tool=message.name or self._calls[id], result=result)

    def _is_new(self, message: BaseMessage) -> bool:
        """A subgraph's messages come again with those of its node, and then all of them have ids."""
        if any(told is message or (told.id and told.id == message.id) for told in self._messages):
            return False
        self._messages.append(message)
        return True

    def _checkpoint(self) -> Iterator[Checkpoint]:
        """After a round of tools, where a run that begins with these messages goes on as this one does."""
        messages = self._values.get("messages") if isinstance(self._values, dict) else None
        if self._graph.checkpointer or not messages or self._values.keys() != {"messages"}:
            return
        before = len(self._before)
        kept = [message.id for message in messages[:before]] == [message.id for message in self._before]
        if kept and isinstance(messages[-1], ToolMessage) and _is_answered(messages):
            try:
                told = to_jsonable_python(messages_to_dict(messages[before:]))
            except ValueError:  # a tool's artifact may be anything
                return
            yield from self._saver.checkpoint(State(messages=told, usage=self._usage))

    def _answer(self) -> str | None:
        """None where the tokens are it. Raises ModelError."""
        values = self._values
        if not isinstance(values, dict):
            return answer_of(values)
        if values.get("structured_response") is not None:
            return answer_of(values["structured_response"])
        if messages := values.get("messages"):
            text = str(messages[-1].text)
            if not text and isinstance(messages[-1], AIMessage):  # or it was refused, which is not always told
                raise ModelError("model_empty", "The answer is empty.")
            return text
        return None if self._floor.used else answer_of(values)


def _is_answered(messages: list[BaseMessage]) -> bool:
    called = {call["id"] for message in messages if isinstance(message, AIMessage) for call in message.tool_calls}
    return called <= {message.tool_call_id for message in messages if isinstance(message, ToolMessage)}


def _usage(told: Any) -> Usage:
    return Usage(
        prompt=told["input_tokens"],
        completion=told["output_tokens"],
        cached=told.get("input_token_details", {}).get("cache_read", 0),
        reasoning=told.get("output_token_details", {}).get("reasoning", 0),
    )
