"""Every dialect: its name, where its routes are, and what they are. BROKER_DIALECTS chooses from this table."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from starlette.responses import Response

from broker.errors import BrokerError, Misconfigured
from broker.gateway import api
from broker.gateway.dialects.agent import routes as agent
from broker.gateway.dialects.aisdk import routes as aisdk
from broker.gateway.dialects.chat import routes as chat
from broker.gateway.dialects.native import routes as native
from broker.gateway.dialects.openai import routes as openai
from broker.gateway.dialects.prompt import routes as prompt
from broker.gateway.dialects.session_chat import routes as session_chat
from broker.gateway.front import Front
from broker.gateway.routes import Route


class Mount(NamedTuple):
    prefix: str
    """Of its routes, unless BROKER_DIALECTS has another."""
    routes: Callable[[Front, str], list[Route]]


NATIVE = "native"
DIALECTS: dict[str, Mount] = {
    NATIVE: Mount(api.PREFIX, native.routes),
    "chat": Mount("/chat", chat.routes),
    "session_chat": Mount("/api/chat", session_chat.routes),
    "agent": Mount(f"{api.PREFIX}/agent/stream", agent.routes),
    "prompt": Mount("/chat", prompt.routes),
    "openai": Mount("/v1", openai.routes),
    "aisdk": Mount("/ai/chat", aisdk.routes),
}


def mounted(front: Front) -> list[Route]:
    """The routes of every dialect that is on. Raises Misconfigured."""
    prefixes = _prefixes(front.settings.dialects)
    return [route for name, prefix in prefixes.items() for route in DIALECTS[name].routes(front, prefix)]


def problem_shapes(front: Front) -> dict[str, Callable[[BrokerError], Response]]:
    """By prefix, how the clients of the dialect that is there are told of an error."""
    prefixes = _prefixes(front.settings.dialects)
    return {prefix: DIALECTS[name].routes(front, prefix)[0].problem for name, prefix in prefixes.items()}


def _prefixes(wanted: tuple[str, ...]) -> dict[str, str]:
    """`name` or `name=/path` each; none is all. The native dialect is always there: every run's links lead to it."""
    prefixes = {NATIVE: api.PREFIX}
    for item in wanted or DIALECTS:
        name, _, prefix = item.partition("=")
        if name not in DIALECTS:
            raise Misconfigured(f"BROKER_DIALECTS: there is no dialect {name!r}; there are: {', '.join(DIALECTS)}.")
        if name == NATIVE and prefix:
            raise Misconfigured(f"BROKER_DIALECTS: the routes of {NATIVE} are always below {api.PREFIX}.")
        prefixes[name] = prefix or DIALECTS[name].prefix
    return prefixes
