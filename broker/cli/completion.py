"""`broker completion`: what a shell needs to complete our commands and options."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

WHERE = {
    "bash": '  eval "$(broker completion bash)"    in ~/.bashrc (bash 4.4 or later)',
    "zsh": '  eval "$(broker completion zsh)"     in ~/.zshrc, after compinit',
    "fish": "  broker completion fish | source     in ~/.config/fish/config.fish",
}


@click.command(epilog="\b\n" + "\n".join(WHERE.values()))
@click.argument("shell", type=click.Choice(list(WHERE)))
@click.pass_context
def completion(context: click.Context, shell: str) -> None:
    """Print a script that completes commands and options. Load it where your shell starts:"""
    found = get_completion_class(shell)
    assert found is not None
    click.echo(found(context.find_root().command, {}, "broker", "_BROKER_COMPLETE").source())
