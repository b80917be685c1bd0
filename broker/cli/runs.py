"""`broker runs`, `show`, `cancel` and `delete`: runs that are there already."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import click

from broker.cli.access import explained, with_client
from broker.cli.arguments import run_argument, runs_argument, some_runs_argument
from broker.cli.text import one_line
from broker.errors import BrokerError, RunNotFound
from broker.status import STATUSES
from broker.words import count

if TYPE_CHECKING:
    from broker.client import Client


@click.command()
@click.option("--status", type=click.Choice(STATUSES), help="Only runs in this status.")
@click.option("--session", metavar="ID", help="Only runs of this session.")
@click.option("--subject", metavar="SUB", help="Another user's runs; for tokens with the scope broker:tenant.")
@click.option("--limit", default=20, show_default=True, type=click.IntRange(1), help="How many.")
@click.option("--json", "as_json", is_flag=True, help="One run a line.")
@with_client
def runs(
    client: Client, status: str | None, session: str | None, subject: str | None, limit: int, as_json: bool
) -> None:
    """List runs, newest first."""
    found = client.runs(status=status, session_id=session, subject=subject, limit=limit)
    if as_json:
        from broker.events import dumps

        for run in found:
            click.echo(dumps(run.model_dump(mode="json")))
        return
    from broker.cli.screen import console
    from broker.cli.tables import RunsTable

    listed = list(found)
    if not listed:
        click.echo("There are no such runs.", err=True)
        return
    console(sys.stdout).print(RunsTable(listed))


@click.command()
@run_argument
@click.option("--json", "as_json", is_flag=True, help="As one JSON object.")
@with_client
def show(client: Client, request_id: str, as_json: bool) -> None:
    """Show a run: result, attempts, times, tokens, and what its retries have cost.

    An attempt lasts until the next one begins: the wait for a lost worker's lease is in it. Void is what a later
    attempt took back.
    """
    from datetime import UTC, datetime

    from rich.console import Group

    from broker.cli.account import account
    from broker.cli.report import report, report_json
    from broker.cli.screen import console

    run = client.result(request_id, wait=0)
    taken = account(run, client.events(request_id), datetime.now(UTC))
    if as_json:
        click.echo(report_json(run, taken))
    else:
        console(sys.stdout).print(Group(*report(run, taken)), crop=False)


@click.command()
@runs_argument
@with_client
def cancel(client: Client, request_ids: tuple[str, ...]) -> None:
    """Stop runs; what they have come to stays readable. Runs that have ended stay as they are."""

    def stop(request_id: str) -> None:
        click.echo(f"{request_id} {client.cancel(request_id).status}")

    _each(request_ids, stop)


@click.command()
@some_runs_argument
@click.option("--subject", metavar="SUB", help="All runs of this user.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@with_client
def delete(client: Client, request_ids: tuple[str, ...], subject: str | None, yes: bool) -> None:
    """Erase runs and all that they have written: their answers, and their events.

    With --subject every run of a user, after asking. That may be yourself; for others it needs a token with the scope
    broker:tenant.
    """
    if bool(request_ids) == (subject is not None):
        raise click.UsageError("Name runs, or a --subject.")

    def erase(request_id: str) -> None:
        client.delete(request_id)
        click.echo(f"{request_id} erased")

    if subject is None:
        _each(request_ids, erase)
        return
    found = [run.request_id for run in client.runs(subject=subject)]
    whose = f"of {one_line(subject)}"
    if not found:
        click.echo(f"There are no runs {whose} that this token may see.", err=True)
        return
    if not yes and not _confirmed(f"Erase {count(len(found), 'run')} {whose}, for good?"):
        click.echo("Nothing was erased.", err=True)
        sys.exit(1)
    for request_id in found:
        with contextlib.suppress(RunNotFound):  # it expired meanwhile, or somebody else was faster
            client.delete(request_id)
    click.echo(f"{count(len(found), 'run')} {whose} erased")


def _confirmed(question: str) -> bool:
    """Raises UsageError where nobody can be asked."""
    if not sys.stdin.isatty():
        raise click.UsageError(f"{question} There is no terminal to ask on: say --yes.")
    return click.confirm(question, err=True)


def _each(request_ids: Iterable[str], act: Callable[[str], None]) -> None:
    """One that fails does not keep the others; the exit code is 1 then. Without a broker there is no point in going
    on."""
    failed = False
    for request_id in request_ids:
        try:
            act(request_id)
        except BrokerError as error:
            if error.code in ("unreachable", "unauthorized"):
                raise
            failed = True
            click.echo(f"broker: {one_line(request_id)}: {one_line(explained(error))}", err=True)
    if failed:
        sys.exit(1)
