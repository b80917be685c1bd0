"""Agents of other libraries, registered by BROKER_AGENTS as they are: OpenAI Agents SDK, LangGraph."""

from __future__ import annotations

from broker.errors import Misconfigured
from broker.settings import Settings
from worker.agent import Agent

_OPENAI_AGENTS = ("agents.agent", "Agent")
_GRAPH = ("langgraph.pregel", "Pregel")
_UNCOMPILED = ("langgraph.graph", "StateGraph")


def adapted(found: object, settings: Settings, setting: str) -> Agent | None:
    """The object as an agent of ours; None where it is of neither library.

    It is known by its classes' names: whoever has no such agent does without these libraries. Raises Misconfigured,
    which begins with `setting`, for a graph that cannot be an agent.
    """
    if _is_a(found, _OPENAI_AGENTS):
        from worker.agents.foreign.openai_agents import make_openai_agent

        return make_openai_agent(found, settings)  # type: ignore[arg-type]
    if _is_a(found, _GRAPH):
        from worker.agents.foreign.langgraph import make_langgraph_agent

        return make_langgraph_agent(found, settings, setting)  # type: ignore[arg-type]
    if _is_a(found, _UNCOMPILED):
        raise Misconfigured(f"{setting} is a graph that is not compiled yet: register what its compile() returns")
    return None


def _is_a(found: object, kind: tuple[str, str]) -> bool:
    module, name = kind
    return any(
        (base.__module__ == module or base.__module__.startswith(f"{module}.")) and base.__name__ == name
        for base in type(found).__mro__
    )
