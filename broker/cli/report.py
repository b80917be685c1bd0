"""A run in full, as `broker show` prints it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from broker.cli.account import Account, AttemptAccount, Count
from broker.cli.tables import citation_lines, local_time, status_text
from broker.cli.text import compact, duration, harmless, one_line
from broker.client import Run
from broker.events import dumps
from broker.words import count


def report(run: Run, taken: Account) -> Iterator[RenderableType]:
    """What is known of it, a line each; then its attempts, its answer and its citations."""
    facts = Table.grid(padding=(0, 2, 0, 0))
    facts.add_column(no_wrap=True, style="dim")
    facts.add_column(overflow="fold")
    for name, value in _facts(run, taken):
        facts.add_row(name, value if isinstance(value, Text) else Text(value))
    yield facts
    yield from _attempts(taken)
    yield from _result(run)


def _facts(run: Run, taken: Account) -> Iterator[tuple[str, str | Text]]:
    yield "run", run.request_id
    yield "status", status_text(run.status)
    if run.error is not None:
        yield "error", Text(f"{one_line(run.error.code)}: {one_line(run.error.message)}", style="red")
    yield "agent", one_line(run.agent)
    yield "session", one_line(run.session_id)
    yield "created", local_time(run.created_at)
    yield "queued", duration(taken.queued_seconds)
    if run.started_at is not None:
        yield "running", duration(taken.running_seconds)
    yield "events", counted(taken.total)
    if taken.void.events:
        yield "void", Text(f"{counted(taken.void)}: the cost of retries", style="yellow")
    for name, value in run.usage.items():
        yield f"usage: {one_line(name)}", compact(value)
    if run.metadata:
        yield "metadata", compact(run.metadata)


def counted(number: Count) -> str:
    return f"{count(number.events, 'event')}, of which {count(number.token_events, 'piece')} of text"


def _attempts(taken: Account) -> Iterator[RenderableType]:
    if taken.attempts:
        yield Text()
    for attempt in taken.attempts:
        yield Text(_attempt(attempt))


def _attempt(attempt: AttemptAccount) -> str:
    void = f", {attempt.void.events:,} void" if attempt.void.events else ""
    return (
        f"attempt {attempt.attempt} ({one_line(attempt.reason)}): began after {duration(attempt.began_seconds)}, "
        f"lasted {duration(attempt.seconds)}, {count(attempt.total.events, 'event')}{void}"
    )


def _result(run: Run) -> Iterator[RenderableType]:
    if run.answer is not None:
        yield Text()
        yield Text(harmless(run.answer), no_wrap=True, overflow="ignore")
    if run.citations:
        yield Text()
        yield from citation_lines(run.citations)


def report_json(run: Run, taken: Account) -> str:
    """The run as a poll returns it, and beside it what it has taken."""
    return dumps({**run.model_dump(mode="json"), "account": asdict(taken)})
