"""The agents that a worker has: built in, and registered by BROKER_AGENTS."""

from __future__ import annotations

from broker.errors import Misconfigured
from broker.settings import Settings
from worker.agent import Agent
from worker.agents.chat import make_chat
from worker.agents.foreign import adapted
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
        agents[name] = _import(name, target, settings)
    return agents


def _import(name: str, target: str, settings: Settings) -> Agent:
    module_name, _, attribute = target.partition(":")
    setting = f"BROKER_AGENTS: {name}"
    found = getattr(load_module(module_name, setting), attribute, None)
    try:
        if made := adapted(found, settings, f"{setting}: {target}"):
            return made
    except ImportError as error:
        raise Misconfigured(f"{setting}: {target} is of a library that cannot be used: {error}") from error
    if not callable(found):
        kind = "" if found is None else f"; {attribute} is a {type(found).__name__}, which is no agent"
        raise Misconfigured(f"{setting}: {module_name} has no function {attribute}{kind}")
    agent: Agent = found
    return agent
