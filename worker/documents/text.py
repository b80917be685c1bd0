"""Plain text: from the blocks of a document to the sentences and passages that are found and quoted.

A sentence is a literal piece of its file, whitespace aside: nothing here removes or replaces characters.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass

PASSAGE_CHARS = 700
SENTENCE_CHARS = 400
TITLE_CHARS = 120
MIN_LETTERS = 0.4

_END = re.compile(r"""[.!?…]["'”’)\]*_`]*(?= )|[。！？]""")
_ABBREVIATIONS = "|e.g|i.e|eg|ie|dr|mr|mrs|ms|prof|st|vs|cf|ca|fig|al|approx|jr|sr|mt|"


@dataclass(frozen=True, slots=True)
class Block:
    """A paragraph, list item or table row as it is in the file: its lines with their numbers."""

    heading: str
    lines: tuple[tuple[int, str], ...]


@dataclass(frozen=True, slots=True)
class Document:
    title: str
    blocks: tuple[Block, ...]


@dataclass(frozen=True, slots=True)
class Sentence:
    line: int
    text: str


@dataclass(frozen=True, slots=True)
class Passage:
    """Neighbouring sentences under one heading; the unit of retrieval."""

    title: str
    heading: str
    sentences: tuple[Sentence, ...]

    @property
    def line(self) -> int:
        return self.sentences[0].line

    @property
    def text(self) -> str:
        return " ".join(sentence.text for sentence in self.sentences)


class Outline:
    """Collects the headings and blocks of a document while a reader walks through it."""

    def __init__(self) -> None:
        self._trail: dict[int, str] = {}
        self._headings: list[tuple[int, str]] = []
        self._blocks: list[tuple[tuple[str, ...], tuple[tuple[int, str], ...]]] = []
        self._open: list[tuple[int, list[str]]] = []

    @property
    def open_lines(self) -> int:
        """How many lines the block under construction has."""
        return len(self._open)

    @property
    def open_text(self) -> str:
        return normalise(" ".join("".join(pieces) for _, pieces in self._open))

    def line(self, number: int, text: str) -> None:
        """Adds a line to the block under construction."""
        self._open.append((number, [text]))

    def extend(self, number: int, text: str) -> None:
        """Adds text that may begin in the middle of the last line, and of a word."""
        first, *rest = text.split("\n")
        if self._open:
            self._open[-1][1].append(first)
        else:
            self._open.append((number, [first]))
        self._open.extend((number + i, [part]) for i, part in enumerate(rest, 1))

    def end(self) -> None:
        """Closes the block under construction."""
        if not _is_noise(self.open_text):
            lines = tuple((number, "".join(pieces)) for number, pieces in self._open)
            self._blocks.append((tuple(self._trail.values()), lines))
        self._open = []

    def promote(self, level: int) -> None:
        """Makes the block under construction a heading."""
        text, self._open = self.open_text, []
        self.heading(level, text)

    def heading(self, level: int, text: str) -> None:
        self.end()
        name = shorten(unmarked(text).rstrip("#¶ "), TITLE_CHARS)
        if not name:
            return
        self._trail = {above: heading for above, heading in self._trail.items() if above < level} | {level: name}
        self._headings.append((level, name))

    def document(self, title: str, *, prefer: bool = False) -> Document:
        """What was collected. `title` counts where the document has no heading, or with `prefer` always."""
        self.end()
        if self._headings and not prefer:
            top = min(level for level, _ in self._headings)
            title = next(text for level, text in self._headings if level == top)
        title = shorten(normalise(title), TITLE_CHARS)
        return Document(
            title,
            tuple(
                Block(shorten(" › ".join(part for part in trail if part != title), TITLE_CHARS), lines)
                for trail, lines in self._blocks
            ),
        )


def normalise(text: str) -> str:
    return " ".join(text.split())


def shorten(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 1].rstrip() + "…"


def unmarked(text: str) -> str:
    """Without the markup of links, images and emphasis: for headings, and for the index."""
    text = re.sub(r"!?\[([^\[\]]*)\]\([^()]*\)", r"\1", text)
    return re.sub(r"[*`]", "", text)


def passages(document: Document) -> Iterator[Passage]:
    """Cuts a document into passages of about PASSAGE_CHARS, at its headings and else between blocks."""
    heading, collected, size = "", list[Sentence](), 0
    for block in document.blocks:
        pieces = list(sentences(block))
        length = sum(len(piece.text) + 1 for piece in pieces)
        if collected and (block.heading != heading or size + length > PASSAGE_CHARS):
            yield Passage(document.title, heading, tuple(collected))
            collected, size = [], 0
        heading = block.heading
        for piece in pieces:
            if collected and size + len(piece.text) > PASSAGE_CHARS:
                yield Passage(document.title, heading, tuple(collected))
                collected, size = [], 0
            collected.append(piece)
            size += len(piece.text) + 1
    if collected:
        yield Passage(document.title, heading, tuple(collected))


def sentences(block: Block) -> Iterator[Sentence]:
    """The sentences of a block, whitespace normalised, each with the number of the line where it begins."""
    starts, numbers, parts, length = [], [], [], 0
    for number, raw in block.lines:
        if line := normalise(raw):
            starts.append(length)
            numbers.append(number)
            parts.append(line)
            length += len(line) + 1
    text = " ".join(parts)
    for start, end in _spans(text):
        yield Sentence(numbers[bisect_right(starts, start) - 1], text[start:end])


def _spans(text: str) -> Iterator[tuple[int, int]]:
    start = 0
    for match in _END.finditer(text):
        if _ends_a_sentence(text, match):
            yield from _cut(text, start, match.end())
            start = match.end() + (text[match.end() : match.end() + 1] == " ")
    if start < len(text):
        yield from _cut(text, start, len(text))


def _ends_a_sentence(text: str, match: re.Match[str]) -> bool:
    if text[match.end() : match.end() + 2].strip()[:1].islower():
        return False
    if match[0] != ".":
        return True
    word = text[max(0, match.start() - 20) : match.start()].rpartition(" ")[2].lstrip("(\"'“*_")
    return f"|{word.lower()}|" not in _ABBREVIATIONS and not (len(word) == 1 and word.isupper())


def _cut(text: str, start: int, end: int) -> Iterator[tuple[int, int]]:
    while end - start > SENTENCE_CHARS:
        space = text.rfind(" ", start + 1, start + SENTENCE_CHARS)
        stop = space if space > 0 else start + SENTENCE_CHARS
        yield start, stop
        start = stop + (space > 0)
    yield start, end


def _is_noise(text: str) -> bool:
    """True of rulers, badges, drawings and tables of numbers: what is hardly made of letters."""
    return sum(map(str.isalpha, text)) <= MIN_LETTERS * len(text.replace(" ", ""))
