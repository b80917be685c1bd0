"""What a terminal shows of the bytes that it gets: as much of one as our command line needs, and no more.

Anything that it does not know raises: a terminal would do something with it.
"""

from __future__ import annotations

import codecs
import re
import unicodedata
from dataclasses import dataclass, field

_CSI = re.compile(r"\x1b\[([0-9;]*)([A-Za-z])")


def cells(char: str) -> int:
    """How many columns it takes."""
    if unicodedata.combining(char) or unicodedata.category(char) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(char) in "WF" else 1


@dataclass
class Row:
    """One row: its cells (text, style; an empty text is the second half of a wide character), and whether the text
    went on in the next one because the row was full."""

    cells: list[tuple[str, str]] = field(default_factory=list)
    wrapped: bool = False

    @property
    def text(self) -> str:
        return "".join(text for text, _ in self.cells)


class Display:
    """A terminal of `columns` and any number of rows. `rows` are all that it has ever shown and not erased."""

    def __init__(self, columns: int = 80) -> None:
        self.columns = columns
        self.rows = [Row()]
        self.column = 0
        self.erased: list[str] = []
        """The rows that vanished, as they were."""
        self._style = ""
        self._full = False
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._rest = ""

    @property
    def lines(self) -> list[str]:
        """What was written, rows that the terminal has wrapped joined again, without blanks at their ends."""
        lines, begun = [], ""
        for row in self.rows:
            begun += row.text
            if not row.wrapped:
                lines.append(begun.rstrip())
                begun = ""
        return lines if lines[-1] or len(lines) == 1 else lines[:-1]

    @property
    def text(self) -> str:
        return "\n".join(self.lines)

    def styles(self, text: str) -> set[str]:
        """The styles in which `text`, which stands in one row, is shown: such as {"2"} for dim."""
        for row in self.rows:
            at = row.text.find(text)
            if at >= 0:
                before = 0
                found = set()
                for char, style in row.cells:
                    if at <= before < at + len(text):
                        found.add(style)
                    before += len(char)
                return found
        raise AssertionError(f"{text!r} is in no row of {self.text!r}")

    def feed(self, data: bytes) -> None:
        text = self._rest + self._decoder.decode(data)
        self._rest = ""
        at = 0
        while at < len(text):
            if text[at] != "\x1b":
                self._put(text[at])
                at += 1
                continue
            match = _CSI.match(text, at)
            if match is None:
                if re.fullmatch(r"\x1b(\[[0-9;]*)?", text[at:]):
                    self._rest = text[at:]  # the rest of it is on its way
                    return
                raise AssertionError(f"an escape sequence that is not known: {text[at : at + 10]!r}")
            self._control(match[1], match[2])
            at = match.end()

    def _control(self, values: str, name: str) -> None:
        if name == "m":
            self._style = "" if values in ("", "0") else values
        elif name == "K" and values == "2":
            self.erased.append(self.rows[-1].text)
            self.rows[-1] = Row()
            self._full = False
        else:
            raise AssertionError(f"an escape sequence that is not known: {values}{name}")

    def _put(self, char: str) -> None:
        if char == "\r":
            self.column, self._full = 0, False
        elif char == "\n":
            self.rows.append(Row())
            self._full = False
        elif char == "\t":
            for _ in range(min(8 - self.column % 8, self.columns - 1 - self.column)):
                self._print(" ", 1)
        elif unicodedata.category(char) == "Cc":
            raise AssertionError(f"a control character: {char!r}")
        else:
            self._print(char, cells(char))

    def _print(self, char: str, width: int) -> None:
        row = self.rows[-1]
        if width == 0:
            if row.cells:
                text, style = row.cells[-1]
                row.cells[-1] = (text + char, style)
            return
        if self._full or self.column + width > self.columns:
            row.wrapped = True
            row = Row()
            self.rows.append(row)
            self.column, self._full = 0, False
        row.cells += [(" ", "")] * (self.column - len(row.cells))
        row.cells[self.column : self.column + width] = [(char, self._style)] + [("", self._style)] * (width - 1)
        self.column += width
        if self.column == self.columns:
            self.column, self._full = self.columns - 1, True
