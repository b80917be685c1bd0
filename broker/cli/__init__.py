"""The command `broker`. Each module beside this one holds some of its commands."""

from __future__ import annotations

import os
import sys

import click

from broker import __version__
from broker.cli import serving
from broker.cli.doctor import doctor
from broker.errors import BrokerError


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="broker")
def cli() -> None:
    """Runs of AI agents that outlive their connections.

    Settings are BROKER_… environment variables; docs/settings.md is their table.
    """


for command in (serving.serve, serving.worker, serving.token, serving.demo, doctor):
    cli.add_command(command)


def main() -> None:
    """Errors are one line, without a traceback. Exit codes: 0, 1 for an error, 2 for wrong usage."""
    if os.environ.get("BROKER_DEBUG"):
        cli()
    try:
        cli(standalone_mode=False)
    except click.exceptions.Abort:
        sys.exit(130)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except BrokerError as error:
        click.echo(f"broker: {error}", err=True)
        sys.exit(1)
