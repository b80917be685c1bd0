"""Prints pieces on a terminal: text as it comes, never wrapped or written again; at most one line that vanishes."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import TextIO

from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.control import Control
from rich.segment import ControlType
from rich.text import Text

from broker.cli.render import Bar, Block, Gap, Inline, Piece
from broker.cli.text import make_legible

BAR_CELLS = 24
UNLIMITED = 100_000
_ERASE = Control(ControlType.CARRIAGE_RETURN, (ControlType.ERASE_IN_LINE, 2))


class _Console(Console):
    """Leaves a pipe that is closed to the command."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


def console(stream: TextIO) -> Console:
    """One that prints what it is given: no markup, no emoji codes, no guesses at what is a number. What is no terminal
    has lines of any length."""
    make_legible(stream)
    width = None if stream.isatty() else UNLIMITED
    return _Console(file=stream, width=width, markup=False, emoji=False, highlight=False)


class Screen:
    """Standard output as a terminal; what is `aside` goes to standard error.

    The cursor is at the end of what was printed. Only where that is the beginning of a line the bar is shown, so that
    it can be erased without knowing how a terminal has wrapped the text before it.
    """

    def __init__(self, out: Console | None = None, err: Console | None = None) -> None:
        self._out = out or console(sys.stdout)
        self._err = err or console(sys.stderr)
        self._dumb = self._out.is_dumb_terminal
        self._tail = "\n\n"
        self._known: dict[str, tuple[str, str]] = {"": ("", "")}
        self._bar: Bar | None = None
        self._bar_is_shown = False
        self._in_text = False

    def show(self, pieces: Iterable[Piece]) -> None:
        for piece in pieces:
            match piece:
                case Inline():
                    self._hide_bar()
                    self._write(piece.text, piece.style)
                    self._in_text = True
                case Block():
                    self._block(piece)
                case Gap():
                    self._hide_bar()
                    self.fresh_line()
                    if not self._tail.endswith("\n\n"):
                        self._write("\n")
                    self._in_text = True
                case Bar():
                    self._bar = piece if piece != Bar() else None
                    self._hide_bar()
        self._show_bar()

    def fresh_line(self) -> None:
        """The cursor stands at the beginning of a line."""
        self._hide_bar()
        if not self._tail.endswith("\n"):
            self._write("\n")

    def close(self) -> None:
        """Leaves the terminal to whoever comes next."""
        self._bar = None
        self.fresh_line()

    def _block(self, block: Block) -> None:
        self.fresh_line()
        # In a Group, because `print` joins texts to one that knows nothing of their overflow.
        (self._err if block.aside else self._out).print(Group(block.body), crop=False)
        self._tail, self._in_text = "\n", False

    def _write(self, text: str, style: str = "") -> None:
        before, after = self._codes(style)
        self._out.file.write(f"{before}{text}{after}")
        self._out.file.flush()
        self._tail = (self._tail + text)[-2:]

    def _codes(self, style: str) -> tuple[str, str]:
        """What switches a style on and off on this terminal."""
        if style not in self._known:
            with self._out.capture() as capture:
                self._out.print(Text("x", style=style), end="")
            before, _, after = capture.get().partition("x")
            self._known[style] = (before, after)
        return self._known[style]

    def _show_bar(self) -> None:
        if self._bar is not None and not (self._bar_is_shown or self._in_text or self._dumb):
            self.fresh_line()
            self._out.print(BarLine(self._bar), end="")
            self._bar_is_shown = True

    def _hide_bar(self) -> None:
        if self._bar_is_shown:
            self._out.control(_ERASE)
            self._bar_is_shown = False


class BarLine:
    """`━━━━────  40 % message`, one column less than the terminal has: no terminal wraps that."""

    def __init__(self, bar: Bar) -> None:
        self._bar = bar

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = options.max_width - 1
        line = Text(end="")
        if self._bar.percent is not None:
            cells = min(BAR_CELLS, width // 3)
            done = round(cells * self._bar.percent / 100)
            line.append("━" * done, "green").append("─" * (cells - done), "dim").append(f" {self._bar.percent:3.0f} % ")
        line.append(self._bar.message, "dim")
        line.truncate(width, overflow="ellipsis")
        yield line
