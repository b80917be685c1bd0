"""`broker ask` and `broker tail`: a run as it happens."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import click

from broker.cli.access import url_option, with_client
from broker.cli.arguments import after_option, events_as_json_option, parameters_option, run_argument
from broker.ids import EventId

if TYPE_CHECKING:
    from broker.client import Client

EXIT_CODES = (
    "\b\nExit codes:\n  0    the run completed\n  1    it failed, or something else went wrong\n"
    "  2    wrong usage\n  3    it was cancelled\n  130  detached by Ctrl-C: the run goes on"
)


@click.command(epilog=EXIT_CODES)
@click.argument("query", required=False)
@click.option("--agent", help="One of the broker's agents; else its default.")
@click.option("--session", metavar="ID", help="The conversation that this belongs to.")
@parameters_option
@events_as_json_option
@after_option
@click.option("--detach", is_flag=True, help="Print the run's id, and do not wait for it.")
@click.option("--idempotency-key", metavar="KEY", help="The run that this key has started, also when it has ended.")
@with_client
def ask(
    client: Client,
    query: str | None,
    agent: str | None,
    session: str | None,
    parameters: dict[str, Any],
    as_json: bool,
    after: EventId | None,
    detach: bool,
    idempotency_key: str | None,
) -> None:
    """Submit a query, and show its run as it happens.

    QUERY is read from standard input where it is `-`, or left out and something is piped in. The same query joins the
    run that is under way.

    On a terminal, Ctrl-C once detaches: the run goes on, and it is said how to come back. Twice cancels it. Where
    standard output is no terminal, it gets the answer alone, when the run has ended.
    """
    from broker.cli.follow import DETACHED, follow, say
    from broker.events import dumps

    text = _query(query)
    try:
        accepted = client.submit(
            text, agent=agent, session_id=session, parameters=parameters, idempotency_key=idempotency_key
        )
    except KeyboardInterrupt:
        say("Interrupted before the broker answered; it may have the query: broker runs")
        sys.exit(DETACHED)
    if detach:
        click.echo(dumps(accepted.model_dump()) if as_json else accepted.request_id)
        if sys.stdout.isatty():
            say(f"Watch it with: broker tail {accepted.request_id}{url_option()}")
        return
    if after is not None and not accepted.joined:
        say("No run of this query was under way: this is a new one, from its beginning.")
        after = None
    sys.exit(follow(client, accepted.request_id, after=after, as_json=as_json, is_known=False))


@click.command(epilog=EXIT_CODES)
@run_argument
@after_option
@events_as_json_option
@with_client
def tail(client: Client, request_id: str, after: EventId | None, as_json: bool) -> None:
    """Show a run from its beginning, or after an event, and go on with it to its end.

    Ctrl-C and standard output are as with `broker ask`.
    """
    from broker.cli.follow import follow

    sys.exit(follow(client, request_id, after=after, as_json=as_json, is_known=True))


def _query(given: str | None) -> str:
    """Raises UsageError where there is none."""
    if given is None and sys.stdin.isatty():
        raise click.UsageError("Missing argument 'QUERY': what shall be asked?")
    if given is None or given == "-":
        given = sys.stdin.buffer.read().decode("utf-8", "replace").strip()
        if not given:
            raise click.UsageError("Standard input is empty, so there is no query.")
    return given
