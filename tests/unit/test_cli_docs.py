"""docs/cli.md names what exists: commands, options, exit codes."""

from __future__ import annotations

import re
from pathlib import Path

import click

from broker.cli import CLOSED_PIPE, cli
from broker.cli.follow import CANCELLED, COMPLETED, DETACHED, FAILED

TEXT = (Path(__file__).parents[2] / "docs" / "cli.md").read_text("utf-8")


def options() -> set[str]:
    commands: list[click.Command] = [cli, *cli.commands.values()]
    return {name for command in commands for parameter in command.params for name in parameter.opts} | {"--help"}


def test_every_command_has_its_row() -> None:
    table = TEXT.partition("\n## ")[0]
    named = set(re.findall(r"`(?:broker )?([a-z]+)[ `]", table))
    assert set(cli.commands) <= named


def test_every_command_and_option_that_it_names_is_there() -> None:
    blocks = re.findall(r"```sh\n(.*?)```", TEXT, re.S)
    spans = re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", TEXT, flags=re.S))
    code = re.sub(r"#.*", "", "\n".join([*blocks, *spans]))
    commands = set(re.findall(r"\bbroker ([a-z]+)\b", code))
    assert {"ask", "tail", "completion"} <= commands <= set(cli.commands)
    named = set(re.findall(r"(--[a-z][a-z-]*)", TEXT)) - {"--unbuffered"}
    assert named <= options()


def test_every_option_of_the_commands_that_it_describes_is_named() -> None:
    for command in (cli.commands[name] for name in ("ask", "tail", "runs", "show", "cancel", "delete")):
        for parameter in command.params:
            if isinstance(parameter, click.Option):
                assert parameter.opts[0] in TEXT, f"{command.name} {parameter.opts[0]}"


def test_the_exit_codes_are_those_of_the_code() -> None:
    codes = re.findall(r"^\| (\d+) \| ", TEXT, re.M)
    assert [int(code) for code in codes] == [COMPLETED, FAILED, 2, CANCELLED, DETACHED, CLOSED_PIPE]
