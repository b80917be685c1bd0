"""Agents of the OpenAI Agents SDK, registered in tests by BROKER_AGENTS."""

from __future__ import annotations

import asyncio
from typing import Any

from agents import (
    Agent,
    GuardrailFunctionOutput,
    ModelSettings,
    RunContextWrapper,
    function_tool,
    handoff,
    input_guardrail,
)
from pydantic import BaseModel

from tests.kit.marked import waits_at
from worker import Run


@function_tool
def weather(city: str) -> dict[str, str]:
    """The weather in a city."""
    return {"city": city, "sky": "clear"}


@function_tool
def fails(text: str) -> str:
    """Raises."""
    raise RuntimeError(f"it broke: {text}")


@function_tool
def session(context: RunContextWrapper[Run]) -> str:
    """The session that the agent is in."""
    return context.context.session_id


@function_tool
async def waits(mark: str) -> str:
    """Notes each call, and whether it was closed; waits until `mark` + ".go" is there."""
    return await waits_at(mark)


@function_tool(needs_approval=True)
def delete(path: str) -> str:
    """Nobody may call it unasked."""
    return f"deleted {path}"


@input_guardrail(name="no_secrets")
def no_secrets(context: RunContextWrapper[Any], agent: Agent[Any], input: Any) -> GuardrailFunctionOutput:
    return GuardrailFunctionOutput(output_info=None, tripwire_triggered="secret" in str(input))


class Forecast(BaseModel):
    city: str
    degrees: float


billing = Agent[Run](name="Billing", instructions="You are billing.", tools=[weather, waits])
helper = Agent[Run](
    name="Helper",
    instructions="You are the helper.",
    tools=[weather, fails, session, waits, delete],
    handoffs=[billing],
    input_guardrails=[no_secrets],
)
typed = Agent[Run](name="Typed", output_type=Forecast)
stops = Agent[Run](name="Stops", tools=[weather, waits], tool_use_behavior="stop_on_first_tool")
forced = Agent[Run](name="Forced", tools=[weather], model_settings=ModelSettings(tool_choice="weather"))
indirect = Agent[Run](name="Indirect", handoffs=[handoff(billing)])


async def _cancels(context: RunContextWrapper[Run], agent: Agent[Run]) -> str:
    raise asyncio.CancelledError


cancels = Agent[Run](name="Cancels", instructions=_cancels)
