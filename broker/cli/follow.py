"""Follows a run to its end: on a terminal, as its plain answer, or as JSON; and what Ctrl-C does meanwhile."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass

import click

from broker.cli.access import url_option
from broker.cli.interrupts import Interrupts
from broker.cli.render import Transcript
from broker.cli.screen import Screen
from broker.cli.text import harmless, make_legible, one_line
from broker.client import Client, Run
from broker.errors import BrokerError, RunNotFound
from broker.events import dumps
from broker.ids import EventId
from broker.status import STATUS_OF

COMPLETED, FAILED, CANCELLED, DETACHED = 0, 1, 3, 130
CODES = {"completed": COMPLETED, "failed": FAILED, "cancelled": CANCELLED}
"""Exit codes by the status of the run."""


@dataclass(kw_only=True)
class Place:
    """How far the user has seen the run."""

    request_id: str
    after: EventId | None

    @property
    def command(self) -> str:
        """What shows the rest."""
        after = f" --after {self.after}" if self.after is not None else ""
        return f"broker tail {self.request_id}{after}{url_option()}"


def follow(client: Client, request_id: str, *, after: EventId | None, as_json: bool, is_known: bool) -> int:
    """Returns the exit code. Raises BrokerError where the run cannot be followed any more.

    How to come back is said, unless the run is gone, or the user knows the run (`is_known`) and has seen nothing new.
    """
    place = Place(request_id=request_id, after=after)
    with Interrupts() as interrupts:
        try:
            if as_json:
                status = _print_json(client, place, interrupts)
            elif sys.stdout.isatty():
                status = _show(client, place, interrupts)
            else:
                status = _print_answer(client, place)
        except KeyboardInterrupt:
            return _detach(client, place, interrupts)
        except RunNotFound:
            raise
        except BrokerError:
            if place.after != after or not is_known:
                say(f"Come back with: {place.command}")
            raise
    return CODES.get(status, FAILED)


def say(text: str) -> None:
    """On standard error."""
    make_legible(sys.stderr)
    click.echo(harmless(text), err=True)


def _show(client: Client, place: Place, interrupts: Interrupts) -> str:
    """Everything, as it comes. Returns the status."""
    screen, transcript = Screen(), Transcript(f"broker show {place.request_id}{url_option()}", after=place.after)
    since: float | None = None

    def lost(_: object) -> None:
        nonlocal since
        if since is None:
            since = time.monotonic()
            with interrupts.held():
                screen.show(transcript.lost())

    def found() -> None:
        nonlocal since
        if since is not None:
            with interrupts.held():
                screen.show(transcript.found(time.monotonic() - since))
            since = None

    try:
        with client.stream(place.request_id, after=place.after, on_disconnect=lost, on_reconnect=found) as stream:
            for received in stream:
                with interrupts.held():
                    screen.show(transcript.feed(received.id, received.event, time.monotonic()))
                    place.after = received.id
    finally:
        screen.close()
    if stream.end is None:
        return _ended(client, place)
    return STATUS_OF[stream.end.type]


def _print_json(client: Client, place: Place, interrupts: Interrupts) -> str:
    with client.stream(place.request_id, after=place.after) as stream:
        for received in stream:
            with interrupts.held():
                sys.stdout.write(dumps({"id": str(received.id), "type": received.type, "data": received.data}) + "\n")
                sys.stdout.flush()
                place.after = received.id
    if stream.end is None:
        return _ended(client, place)
    return STATUS_OF[stream.end.type]


def _print_answer(client: Client, place: Place) -> str:
    """The run's answer and nothing else, at its end: until then a later attempt may take back what was there."""
    run = client.result(place.request_id)
    make_legible(sys.stdout)
    if run.answer is not None:
        sys.stdout.write(run.answer if run.answer.endswith("\n") else run.answer + "\n")
        sys.stdout.flush()
    if run.error is not None:
        say(f"error {one_line(run.error.code)}: {one_line(run.error.message)}")
    elif run.status == "cancelled":
        say("cancelled")
    return run.status


def _ended(client: Client, place: Place) -> str:
    """Of a run that has nothing after `place`."""
    run: Run = client.result(place.request_id, wait=0)
    say(f"Nothing follows {place.after}: the run is {run.status}.")
    return run.status


def _detach(client: Client, place: Place, interrupts: Interrupts) -> int:
    """After Ctrl-C. The run goes on, unless there is a second one."""
    if sys.stderr.isatty():
        click.echo("\r", nl=False, err=True)  # the terminal has written ^C
    say(f"Detached, and the run goes on. Come back with: {place.command}")
    say("Ctrl-C again cancels it.")
    if not interrupts.again():
        return DETACHED
    run = client.cancel(place.request_id)
    say("cancelled" if run.status == "cancelled" else f"It had ended before: the run is {run.status}.")
    return CODES.get(run.status, FAILED)
