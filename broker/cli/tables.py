"""Tables of sources, citations and runs, which fit any width."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from broker.cli.text import compact, duration, one_line
from broker.events import Sources

if TYPE_CHECKING:
    from broker.client import RunSummary

NARROW = 60
"""Columns below which sources are a list of titles."""
LONG = 90
"""Columns from which a run has one line."""

_STATUS_STYLES = {"completed": "green", "failed": "red", "cancelled": "yellow"}


class SourcesTable:
    """The sources of a stage; on a narrow terminal their titles only."""

    def __init__(self, sources: Sources) -> None:
        self._items = sources.items

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        wide = options.max_width >= NARROW
        table = new_table(options, header=wide)
        table.add_column("source", no_wrap=True, overflow="ellipsis", ratio=3)
        if wide:
            table.add_column("where", no_wrap=True, overflow="ellipsis", ratio=2, style="dim")
            table.add_column("score", no_wrap=True, justify="right", style="dim")
        for item in self._items:
            row = (title_of(item), where(item), compact(item.get("score", "")))
            table.add_row(*map(Text, row if wide else row[:1]))
        yield table


class RunsTable:
    """Runs, newest first. An id is never cut: it is there to be copied. Where a line is too short, a run has two."""

    def __init__(self, runs: Sequence[RunSummary]) -> None:
        self._runs = runs

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if options.max_width < LONG:
            for run in self._runs:
                yield Text(run.request_id, overflow="fold")
                yield Text.assemble("  ", status_text(run.status), f" {_created(run)}", overflow="fold")
            return
        table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
        table.add_column("run", no_wrap=True)
        table.add_column("status", no_wrap=True)
        table.add_column("created", no_wrap=True)
        table.add_column("took", no_wrap=True, justify="right")
        table.add_column("agent")  # these two may shrink: they are what rich calls wrapable
        table.add_column("session")
        for run in self._runs:
            took = duration((run.finished_at - run.created_at).total_seconds()) if run.finished_at else ""
            facts = (one_line(run.agent), one_line(run.session_id))
            cut = [Text(fact, no_wrap=True, overflow="ellipsis") for fact in facts]
            table.add_row(run.request_id, status_text(run.status), _created(run), took, *cut)
        yield table


def status_text(status: str) -> Text:
    return Text(one_line(status), style=_STATUS_STYLES.get(status, ""))


def _created(run: RunSummary) -> str:
    return local_time(run.created_at)


def local_time(moment: datetime) -> str:
    """`2026-11-20 17:08:10`, in the time zone of this machine."""
    return f"{moment.astimezone():%Y-%m-%d %H:%M:%S}"


def new_table(options: ConsoleOptions, *, header: bool = True) -> Table:
    """Without lines: what is copied out of a terminal is text."""
    return Table(
        box=None, show_header=header, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0), width=options.max_width
    )


def citation_lines(citations: Iterable[Mapping[str, Any]]) -> Iterator[Text]:
    """`[1] title  where`, a line each, cut to the width."""
    for number, citation in enumerate(citations, 1):
        yield Text.assemble(
            (f"[{compact(citation.get('number', number))}] ", "cyan"),
            title_of(citation),
            (f"  {where(citation)}", "dim"),
            no_wrap=True,
            overflow="ellipsis",
        )


def title_of(item: Mapping[str, Any]) -> str:
    """By the names that agents usually give."""
    title = _first(item, ("title", "name", "url", "path", "id"))
    heading = _first(item, ("heading",))
    if heading and heading != title:
        title += f" – {heading}"
    return title or compact(dict(item))


def where(item: Mapping[str, Any]) -> str:
    """`path:line`, or the URL."""
    path = _first(item, ("path", "url"))
    return f"{path}:{compact(item['line'])}" if path and "line" in item else path


def _first(item: Mapping[str, Any], names: Iterable[str]) -> str:
    return next((one_line(item[name]) for name in names if isinstance(item.get(name), str) and item[name]), "")
