"""How a command reaches the service: --url and --token, a Client, and errors that say what to do."""

from __future__ import annotations

import functools
import shlex
from collections.abc import Callable
from typing import TYPE_CHECKING, Concatenate, ParamSpec

import click

from broker.errors import BrokerError, Forbidden, RunNotFound, Unauthorized

if TYPE_CHECKING:
    from broker.client import Client

P = ParamSpec("P")

URL_HELP = "Where the broker is; else BROKER_URL, else http://127.0.0.1:8000."
TOKEN_HELP = "Bearer token; else BROKER_TOKEN, which is better: options can be seen by everyone (ps)."


PATIENCE_SECONDS = 600.0
"""For how long a broker may be away that has answered before: whoever watches has Ctrl-C."""


class Failed(BrokerError):
    """What went wrong, and what to do."""


def with_client(command: Callable[Concatenate[Client, P], None]) -> Callable[..., None]:
    """A command that takes --url and --token, here or before its name, and is called with a Client."""

    @click.option("--url", metavar="URL", help=URL_HELP)
    @click.option("--token", metavar="TOKEN", help=TOKEN_HELP)
    @functools.wraps(command)
    def connected(url: str | None, token: str | None, *args: P.args, **kwargs: P.kwargs) -> None:
        from broker.client import Client

        try:
            with Client(chosen("url", url), chosen("token", token), patience=PATIENCE_SECONDS) as client:
                command(client, *args, **kwargs)
        except Failed:
            raise
        except BrokerError as error:
            raise Failed(explained(error)) from None

    return connected


def chosen(name: str, value: str | None) -> str | None:
    """The option as the command has got it, else as it stands before the command's name. None: the environment's."""
    before: str | None = click.get_current_context().find_root().params.get(name)
    return value or before


def url_option() -> str:
    """`--url URL`, where that is how the broker was named: for commands that are printed to be pasted."""
    url = chosen("url", click.get_current_context().params.get("url"))
    return f" --url {shlex.quote(url)}" if url else ""


def explained(error: BrokerError) -> str:
    """The error and what to do about it, on one line."""
    text = str(error)
    return f"{text}{'' if text.endswith(('.', '?', '!')) else '.'} {advice(error)}".rstrip()


def advice(error: BrokerError) -> str:
    if isinstance(error, Unauthorized):
        return (
            "Set BROKER_TOKEN to a token that is valid now; `broker token --sub NAME` prints one where "
            "BROKER_JWT_SECRET is the gateway's."
        )
    if isinstance(error, Forbidden):
        return "Another token may be allowed to: set BROKER_TOKEN."
    if isinstance(error, RunNotFound):
        return "It may be another's, erased or expired: `broker runs` lists yours."
    if error.code == "unreachable":
        return "Is a gateway running there? Where it is, say --url or BROKER_URL; `broker demo` starts one."
    return ""
