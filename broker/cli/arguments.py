"""Arguments and options that several commands take, read from the words of a command line."""

from __future__ import annotations

from typing import Any

import click

from broker.cli.text import parameter
from broker.errors import BadCursor
from broker.ids import REQUEST_ID, EventId


def _run(word: str) -> str:
    if not REQUEST_ID.fullmatch(word):
        raise click.BadParameter(f"{word!r} is not the id of a run, which has 32 digits, 0-9 and a-f.")
    return word


def _one_run(context: click.Context, argument: click.Parameter, value: str) -> str:
    return _run(value)


def _runs(context: click.Context, argument: click.Parameter, values: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(map(_run, values))


def _event(context: click.Context, option: click.Parameter, value: str | None) -> EventId | None:
    try:
        return None if value is None else EventId.parse(value)
    except BadCursor as error:
        raise click.BadParameter(str(error)) from None


def _parameters(context: click.Context, option: click.Parameter, values: tuple[str, ...]) -> dict[str, Any]:
    try:
        return dict(map(parameter, values))
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


run_argument = click.argument("request_id", callback=_one_run)
runs_argument = click.argument("request_ids", metavar="REQUEST_ID...", nargs=-1, required=True, callback=_runs)
some_runs_argument = click.argument("request_ids", metavar="[REQUEST_ID]...", nargs=-1, callback=_runs)
after_option = click.option(
    "--after", callback=_event, metavar="EVENT_ID", help="Begin after this event, as a detached run says it."
)
parameters_option = click.option(
    "--param",
    "parameters",
    callback=_parameters,
    multiple=True,
    metavar="NAME=VALUE",
    help="A parameter of the agent; the value is JSON where it is JSON, else text. May be repeated.",
)
events_as_json_option = click.option("--json", "as_json", is_flag=True, help="One event a line: {id, type, data}.")
