"""The dialect `openai` with frameworks that speak to OpenAI: its Agents SDK, and LangChain, unmodified."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import agents
import pytest
from langchain_core.messages import AIMessage, ToolMessage
from langchain_openai import ChatOpenAI
from openai import AsyncOpenAI

from tests.conftest import Launcher
from tests.kit.http import token
from tests.kit.model_stub import ModelStub


@pytest.fixture(scope="module")
def url(folder: Path) -> Iterator[str]:
    launcher = Launcher(folder)
    try:
        with ModelStub() as stub, pytest.MonkeyPatch.context() as patched:
            for name, value in stub.environment.items():
                patched.setenv(name, value)
            redis = launcher.redis()
            launcher.worker(redis.url, model="stub")
            yield launcher.gateway(redis.url, model="stub").url
    finally:
        launcher.close()


@agents.function_tool
def open_door(n: int) -> str:
    """Opens a door."""
    return f"door {n} is open"


@pytest.fixture
async def agent(url: str, subject: str) -> AsyncIterator[agents.Agent[None]]:
    async with AsyncOpenAI(base_url=f"{url}/v1", api_key=token(subject)) as client:
        model = agents.OpenAIResponsesModel(model="stub", openai_client=client)
        yield agents.Agent(name="Porter", instructions="Be brief.", model=model, tools=[open_door])


QUIET = agents.RunConfig(tracing_disabled=True)


async def test_the_agents_sdk_calls_its_own_functions(agent: agents.Agent[None]) -> None:
    result = await agents.Runner.run(
        agent, 'Go. [[tool=open_door {"n": 3}]][[tool2=open_door {"n": 4}]]', run_config=QUIET
    )
    assert "door 3 is open" in result.final_output and "door 4 is open" in result.final_output


async def test_the_agents_sdk_streams_its_run(agent: agents.Agent[None]) -> None:
    result = agents.Runner.run_streamed(agent, 'Go. [[tool=open_door {"n": 5}]]', run_config=QUIET)
    seen = [event.name async for event in result.stream_events() if event.type == "run_item_stream_event"]
    assert seen == ["tool_called", "tool_output", "message_output_created"]
    assert "door 5 is open" in result.final_output


def langchain(url: str, subject: str) -> ChatOpenAI:
    return ChatOpenAI(model="stub", base_url=f"{url}/v1", api_key=lambda: token(subject), use_responses_api=True)


def test_langchain_asks_and_streams(url: str, subject: str) -> None:
    model = langchain(url, subject)
    assert model.invoke([("system", "Be brief."), ("user", "[[say=Hello.]]")]).text == "Hello."
    assert "".join(chunk.text for chunk in model.stream("[[say=Hello again.]]")) == "Hello again."


def test_langchain_calls_its_own_functions(url: str, subject: str) -> None:
    model = langchain(url, subject).bind_tools([OPEN_DOOR])
    asked = ("user", 'Go. [[tool=open_door {"n": 6}]]')
    called = model.invoke([asked])
    assert isinstance(called, AIMessage)
    [call] = called.tool_calls
    assert (call["name"], call["args"]) == ("open_door", {"n": 6})
    answered = model.invoke([asked, called, ToolMessage("door 6 is open", tool_call_id=call["id"])])
    assert "door 6 is open" in answered.text


OPEN_DOOR = {
    "name": "open_door",
    "description": "Opens a door.",
    "parameters": {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]},
}
