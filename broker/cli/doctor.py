"""`broker doctor`."""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
from dataclasses import replace

import click

from broker.cli.access import TOKEN_HELP, chosen
from broker.cli.text import make_legible, one_line


@click.command()
@click.option("--url", metavar="URL", help="Look at this gateway and the way to it, and not at the settings.")
@click.option("--token", metavar="TOKEN", help=TOKEN_HELP)
@click.option(
    "--seconds",
    default=20.0,
    show_default=True,
    type=click.FloatRange(3, 3600),
    help="With --url: for how long an idle stream is watched.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def doctor(url: str | None, token: str | None, seconds: float, as_json: bool) -> None:
    """Say what is wrong with a deployment, and what to do about it.

    Without --url: what the BROKER_… settings name, which are Redis, the queue, the workers and the keys of tokens.

    With --url: a gateway and everything on the way to it. Two short runs of the agent `research` show whether anything
    buffers, delays or cuts a stream; they cost nothing and are deleted at the end.

    Exit codes: 0 all is fine (notes allowed), 1 there are warnings, 2 there are errors, or wrong usage. docs/doctor.md
    has every finding.
    """
    from broker import settings
    from broker.doctor import report
    from broker.doctor.examination import examine
    from broker.doctor.finding import error
    from broker.doctor.way import examine_way
    from broker.errors import Misconfigured

    url, token = chosen("url", url), chosen("token", token)
    try:
        loaded = settings.load()
    except Misconfigured as failure:
        findings = [error("settings", failure.detail, "docs/settings.md lists all settings and what they accept.")]
    else:
        if url and sys.stderr.isatty():
            click.echo(f"Watching streams for {seconds:g} seconds ...", err=True)
        work = examine_way(url, token, seconds=seconds, settings=loaded) if url else examine(loaded)
        findings = asyncio.run(work)
    make_legible(sys.stdout)
    if as_json:
        click.echo(report.to_json(findings))
    else:
        width = shutil.get_terminal_size((100, 24)).columns
        color = sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
        for finding in findings:
            # Servers and proxies have a say in what is printed.
            shown = replace(finding, title=one_line(finding.title), advice=one_line(finding.advice))
            for line in report.lines(shown, width=width, color=color):
                click.echo(line, color=color)
        click.echo(f"\n{report.summary(findings)}")
    sys.exit(report.exit_code(findings))
