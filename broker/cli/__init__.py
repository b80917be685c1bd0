"""The command `broker`. Each module beside this one holds some of its commands."""

from __future__ import annotations

import contextlib
import os
import sys
from typing import Any

import click

from broker import __version__
from broker.cli import asking, runs, serving
from broker.cli.access import TOKEN_HELP, URL_HELP
from broker.cli.completion import completion
from broker.cli.doctor import doctor
from broker.cli.text import one_line
from broker.errors import BrokerError

CLOSED_PIPE = 141
"""The exit code of a command whose output nobody reads any more, such as `broker runs | head -1`."""


class _Group(click.Group):
    def invoke(self, ctx: click.Context) -> Any:
        """Click itself would make exit code 1 of a closed pipe: that of a run that failed."""
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            _give_up_output()
            sys.exit(CLOSED_PIPE)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="broker")
@click.option("--url", metavar="URL", help=URL_HELP)
@click.option("--token", metavar="TOKEN", help=TOKEN_HELP)
def cli(url: str | None, token: str | None) -> None:
    """Runs of AI agents that outlive their connections.

    Settings are BROKER_… environment variables; docs/settings.md is their table. docs/cli.md is the manual of the
    commands.
    """


for command in (
    asking.ask,
    asking.tail,
    runs.runs,
    runs.show,
    runs.cancel,
    runs.delete,
    serving.serve,
    serving.worker,
    serving.token,
    serving.demo,
    doctor,
    completion,
):
    cli.add_command(command)


def main() -> None:
    """Errors are one line, without a traceback. Exit codes: 0, 1 for an error, 2 for wrong usage; others are in the
    help of their command."""
    _open_what_is_closed()
    if os.environ.get("BROKER_DEBUG"):
        cli()
    try:
        cli(standalone_mode=False)
    except OSError as error:
        _give_up_output()
        click.echo(f"broker: {error}", err=True)
        sys.exit(1)
    except click.exceptions.Abort:
        sys.exit(130)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except BrokerError as error:
        click.echo(f"broker: {one_line(str(error))}", err=True)
        sys.exit(1)


def _open_what_is_closed() -> None:
    """A standard stream that the caller has closed (`<&-`) is None in Python."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_RDWR), mode))


def _give_up_output() -> None:
    """Python writes what it still has when it ends, and would fail once more."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
