"""The built-in agent `chat`: asks a model, calls the tools that it wants called, until it has answered."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from broker.events import Error, Event, Final, ToolCall, ToolResult
from broker.settings import Settings
from worker.agent import MAX_EVENT_BYTES, Agent, Checkpoint, Run
from worker.agents.answer import Answer
from worker.agents.conversation import Conversation, opening, sendable
from worker.agents.given import NAMES as GIVEN
from worker.agents.given import Given
from worker.agents.joiner import Joiner
from worker.agents.states import Saver, restored
from worker.models import open_model
from worker.models.model import Call, End, Message, Model, ModelError, Options
from worker.models.parameters import SAMPLING, SHOWN_MESSAGE, BadParameter, allowed_parameters, refuse_unknown
from worker.tools.registry import Tools
from worker.tools.result import Result, cut
from worker.tools.tool import read_arguments, shown_arguments

CALLS_AT_ONCE = 16
"""Of one run: a model may ask for any number."""
_BETWEEN_ROUNDS = "\n\n"
_SHOWN_NAME = 200


def make_chat(settings: Settings, tools: Tools) -> Agent:
    """The agent over the model of the settings. Without one its runs end with `model_not_configured`."""
    # Now, and not at the first run: importing its SDK would hold the event loop up.
    model = open_model(settings) if settings.model is not None else None

    async def chat(run: Run) -> AsyncIterator[Event | Checkpoint]:
        try:
            choice = Choice.of(run.parameters, settings, tools)
        except BadParameter as error:
            yield Error(code="invalid_parameter", message=cut(str(error), SHOWN_MESSAGE))
            return
        except ModelError as error:
            yield Error(code=error.code, message=str(error))
            return
        assert model is not None
        history = await run.history(tokens=settings.history_tokens) if settings.history_tokens else ()
        before = opening(settings.system_prompt, history, run.query, choice.given)
        talk = _Talk(run, model, tools, choice, before, most_rounds=settings.max_rounds)
        async with aclosing(talk.events()) as events:
            async for event in events:
                yield event

    return chat


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What a run's parameters ask for."""

    model: str
    sampling: dict[str, Any]
    tools: tuple[str, ...]
    given: Given

    @staticmethod
    def of(given: dict[str, Any], settings: Settings, tools: Tools) -> Choice:
        """Raises BadParameter, and ModelError where there is no model."""
        model, sampling = allowed_parameters(given, settings)
        refuse_unknown("chat", given, ("model", *SAMPLING, "tools", *GIVEN))
        return Choice(
            model=model,
            sampling=sampling,
            tools=_narrowed(given.get("tools"), tools.names),
            given=Given.of(given, tools.names),
        )

    @cached_property
    def functions(self) -> frozenset[str]:
        """The names of those that the client calls."""
        return frozenset(function.name for function in self.given.functions)


def _narrowed(given: Any, names: Sequence[str]) -> tuple[str, ...]:
    if given is None:
        return tuple(names)
    if given is False:
        return ()
    if not isinstance(given, list) or not all(isinstance(name, str) for name in given):
        raise BadParameter("tools must be a list of names, or false for none")
    if unknown := [name for name in given if name not in names]:
        raise BadParameter(f"tools: there is no {', '.join(unknown)}; there is {', '.join(names) or 'none'}")
    return tuple(dict.fromkeys(given))


class _Talk:
    """One attempt at a run."""

    def __init__(
        self, run: Run, model: Model, tools: Tools, choice: Choice, before: list[Message], *, most_rounds: int
    ) -> None:
        self._run = run
        self._model = model
        self._tools = tools
        self._choice = choice
        self._before = before
        self._most_rounds = most_rounds
        self._said = restored(Conversation, run.restored) or Conversation()
        self._joiner = Joiner(run.attempt)
        self._end: End | None = None
        """Of the answer that called nothing."""
        self._saver = Saver(run.request_id)
        self._at_once = asyncio.Semaphore(CALLS_AT_ONCE)

    async def events(self) -> AsyncGenerator[Event | Checkpoint, None]:
        """All of them, the last one the end of the run."""
        try:
            while self._end is None:
                pending = self._said.pending
                own = [call for call in pending if call.name not in self._choice.functions]
                if pending and not own:  # the client calls them, and asks again
                    self._end = End(reason="tool_calls")
                    break
                step = self._call_tools(own) if own else self._ask()
                async with aclosing(step) as events:
                    async for event in events:
                        yield event
            yield Final(usage=self._usage(self._end))
        except ModelError as error:
            yield Error(code=error.code, message=str(error))

    async def _ask(self) -> AsyncGenerator[Event | Checkpoint, None]:
        """One answer of the model. The last round that a run may have is asked without tools, so that it answers."""
        last = self._said.rounds + 1 >= self._most_rounds
        stream = self._model.stream(
            sendable([*self._before, *self._said.messages]),
            [] if last else [*self._tools.specs(self._choice.tools), *self._choice.given.functions],
            Options(
                model=self._choice.model,
                deadline=self._run.deadline,
                request_id=self._run.request_id,
                parameters=self._choice.sampling,
            ),
        )
        answer = Answer(before=_BETWEEN_ROUNDS if self._said.has_text else "")
        async with aclosing(answer.events(stream, self._joiner)) as events:
            async for event in events:
                yield event
        if answer.calls and last:
            raise ModelError("too_many_rounds", f"The model still calls tools after {self._most_rounds} rounds.")
        self._said = self._said.answered(answer.text, answer.calls, answer.end.usage)
        if not answer.calls:
            self._end = answer.end
            return
        for called in [self._called(call) for call in answer.calls]:
            yield called
        for checkpoint in self._saver.checkpoint(self._said):
            yield checkpoint

    def _called(self, call: Call) -> ToolCall:
        """For the log. The client executes what this says, so its calls are told whole; raises ModelError where an
        event cannot hold one."""
        if call.name not in self._choice.functions:
            return ToolCall(id=call.id, tool=cut(call.name, _SHOWN_NAME), args=shown_arguments(call.arguments))
        event = ToolCall(id=call.id, tool=call.name, args=read_arguments(call.arguments))
        if (size := len(event.json_data())) > MAX_EVENT_BYTES:
            told = (
                f"The call of {call.name} that the model makes has {size} bytes, above the {MAX_EVENT_BYTES} allowed."
            )
            raise ModelError("model_call_too_large", told)
        return event

    async def _call_tools(self, calls: Sequence[Call]) -> AsyncGenerator[Event | Checkpoint, None]:
        """At the same time; each result as it comes, and a checkpoint with it."""
        tasks = {asyncio.create_task(self._call(call)): call for call in calls}
        try:
            while tasks:
                done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                for task in [task for task in tasks if task in done]:
                    call, result = tasks.pop(task), task.result()
                    self._said = self._said.resulted(call.id, result.text)
                    yield ToolResult(id=call.id, tool=cut(call.name, _SHOWN_NAME), result=result.value)
                    for checkpoint in self._saver.checkpoint(self._said):
                        yield checkpoint
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _call(self, call: Call) -> Result:
        async with self._at_once:
            return await self._tools.call(call, self._run, self._choice.tools)

    def _usage(self, end: End) -> dict[str, Any]:
        """Of all rounds; without tokens where the server does not tell."""
        tokens = self._said.usage.told() if self._said.usage is not None else {}
        return {**tokens, "rounds": self._said.rounds, "model": self._choice.model, "finish_reason": end.reason}
