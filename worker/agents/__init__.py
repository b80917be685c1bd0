"""The agents that a worker has: built in, and registered by BROKER_AGENTS."""

from __future__ import annotations

from broker.errors import Misconfigured
from broker.settings import Settings
from worker.agent import Agent
from worker.agents.chat import make_chat
from worker.agents.research import make_research
from worker.agents.search import make_search
from worker.loading import load_module
from worker.tools.registry import load_tools


def load(settings: Settings) -> dict[str, Agent]:
    """By name. Raises Misconfigured, which names the agent or the tool that cannot be loaded and why."""
    search = [make_search(settings.docs)] if settings.docs is not None else []
    agents: dict[str, Agent] = {
        "research": make_research(settings.docs, settings),
        "chat": make_chat(settings, load_tools(settings, search)),
    }
    for name, target in settings.agent_targets.items():
        agents[name] = _import(name, target)
    return agents


def _import(name: str, target: str) -> Agent:
    module_name, _, attribute = target.partition(":")
    agent = getattr(load_module(module_name, f"BROKER_AGENTS: {name}"), attribute, None)
    if not callable(agent):
        raise Misconfigured(f"BROKER_AGENTS: {name}: {module_name} has no function {attribute}")
    found: Agent = agent
    return found
