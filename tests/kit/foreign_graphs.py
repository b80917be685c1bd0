"""Graphs of LangGraph, registered in tests by BROKER_AGENTS."""

from __future__ import annotations

from typing import Any, TypedDict

from langchain_core.language_models import FakeListChatModel
from langchain_core.messages import AIMessage
from langchain_core.runnables import RunnableConfig
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.config import get_stream_writer
from langgraph.graph import START, MessagesState, StateGraph
from langgraph.prebuilt import ToolNode, tools_condition
from langgraph.types import interrupt

from tests.kit.marked import waits_at
from worker import Progress


@tool
def weather(city: str) -> str:
    """The weather in a city."""
    write = get_stream_writer()
    write({"asked": city})
    write(Progress(percent=50, message=city))
    return f"clear in {city}"


@tool
def session(config: RunnableConfig) -> str:
    """The session that the graph is in."""
    return str(config["configurable"]["session_id"])


@tool
async def waits(mark: str) -> str:
    """Notes each call, and whether it was closed; waits until `mark` + ".go" is there."""
    return await waits_at(mark)


@tool
def delete(path: str) -> str:
    """Nobody may call it unasked."""
    return f"deleted {interrupt(path)}"


@tool(response_format="content_and_artifact")
def sketch() -> tuple[str, object]:
    """A picture, and with it what JSON cannot carry."""
    return "a picture", object()


TOOLS = [weather, session, waits, delete, sketch]


async def talk(state: MessagesState) -> dict[str, Any]:
    model = ChatOpenAI(model="m", use_responses_api=True).bind_tools(TOOLS)
    return {"messages": [await model.ainvoke(state["messages"])]}


react = StateGraph(MessagesState)
react.add_node("talk", talk)
react.add_node("tools", ToolNode(TOOLS))
react.add_edge(START, "talk")
react.add_conditional_edges("talk", tools_condition)
react.add_edge("tools", "talk")

graph = react.compile()
remembers = react.compile(checkpointer=InMemorySaver())


async def call(state: MessagesState) -> dict[str, Any]:
    """Its query names the ids of the calls, one for each round: a model that has no ids has empty ones."""
    ids = state["messages"][0].text.split(",")
    rounds = sum(isinstance(message, AIMessage) for message in state["messages"])
    if rounds == len(ids):
        return {"messages": [AIMessage("done")]}
    return {"messages": [AIMessage("", tool_calls=[{"name": "echo", "args": {"n": rounds}, "id": ids[rounds]}])]}


@tool
def echo(n: int) -> str:
    """The number."""
    return str(n)


calling = StateGraph(MessagesState)
calling.add_node("call", call)
calling.add_node("tools", ToolNode([echo]))
calling.add_edge(START, "call")
calling.add_conditional_edges("call", tools_condition)
calling.add_edge("tools", "call")
calls = calling.compile()
kept = InMemorySaver()
calls_kept = calling.compile(checkpointer=kept)

around = StateGraph(MessagesState)
around.add_node("calls", calls)
around.add_edge(START, "calls")
calls_inside = around.compile()

outer = StateGraph(MessagesState)
outer.add_node("inner", graph)
outer.add_edge(START, "inner")
nested = outer.compile()


class Question(TypedDict, total=False):
    query: str
    loud: bool
    answer: str


async def answer(state: Question) -> dict[str, Any]:
    return {"answer": state["query"].upper() if state.get("loud") else state["query"]}


plain = StateGraph(Question)
plain.add_node("answer", answer)
plain.add_edge(START, "answer")
pipeline = plain.compile()


async def whole(state: MessagesState) -> dict[str, Any]:
    return {"messages": [AIMessage("x" * 100_000)]}


at_once = StateGraph(MessagesState)
at_once.add_node("whole", whole)
at_once.add_edge(START, "whole")
long = at_once.compile()


class Other(TypedDict):
    other: str


aside = StateGraph(Other)
aside.add_node("nothing", lambda state: state)
aside.add_edge(START, "nothing")
nowhere = aside.compile()


def speaks(text: str) -> FakeListChatModel:
    """A letter at a time, so that others speak meanwhile."""
    return FakeListChatModel(responses=[text], sleep=0.01)


async def left(state: MessagesState) -> dict[str, Any]:
    return {"messages": [await speaks("left answer").ainvoke(state["messages"])]}


async def right(state: MessagesState) -> dict[str, Any]:
    return {"messages": [await speaks("right one").ainvoke(state["messages"])]}


async def breaks_off(state: MessagesState) -> dict[str, Any]:
    async for _ in (stream := speaks("left answer").astream(state["messages"])):
        break
    await stream.aclose()  # type: ignore[attr-defined]
    return {"messages": []}


def branches(*nodes: Any) -> Any:
    parallel = StateGraph(MessagesState)
    for node in nodes:
        parallel.add_node(node.__name__, node)
        parallel.add_edge(START, node.__name__)
    return parallel.compile()


both = branches(left, right)
one_breaks_off = branches(breaks_off, right)
