"""The reader of HTML: its visible prose. Scripts, navigation and code are left out."""

from __future__ import annotations

import re
from html.parser import HTMLParser

from worker.documents.text import Document, Outline, normalise, sentences

_HIDDEN_TAGS = "script style template noscript svg nav pre textarea select button footer iframe"
_BLOCK_TAGS = """
address article aside blockquote body caption center dd details dialog div dl dt fieldset figcaption figure
form head header hr html legend li main ol p section summary table tbody tfoot thead title tr ul
"""
_HIDDEN = frozenset(_HIDDEN_TAGS.split())
_BLOCKS = frozenset(_BLOCK_TAGS.split())
_DECLARATION = re.compile(r"<[!?][^<>]*>")
_STRAY = re.compile(r"<(?![a-zA-Z/][^<>]*>)")
_HEADINGS = {f"h{level}": level for level in range(1, 7)}
_SPACES = frozenset(("br", "td", "th"))


def webpage(source: str, name: str) -> Document:
    """`name` is the title where the page has neither a heading nor a title."""
    parser = _Parser()
    parser.feed(_tidy(source))
    parser.close()
    return parser.outline.document(normalise(parser.title) or name)


def extracted_text(source: str) -> str:
    """The text in which every sentence of the page literally occurs."""
    return " ".join(piece.text for block in webpage(source, "").blocks for piece in sentences(block))


def _tidy(source: str) -> str:
    """Without comments and declarations, and every `<` that opens no tag escaped. Keeps the numbers of lines.

    Because html.parser takes hours over two MiB of `<a<a<a`, and raises AssertionError for `<![x`.
    """
    kept, position = list[str](), 0
    while (start := source.find("<!--", position)) >= 0:
        end = source.find("-->", start)
        end = end + 3 if end >= 0 else len(source)
        kept += source[position:start], "\n" * source.count("\n", start, end)
        position = end
    bare = _DECLARATION.sub(lambda match: "\n" * match[0].count("\n"), "".join(kept) + source[position:])
    return _STRAY.sub("&lt;", bare)


class _Parser(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.outline = Outline()
        self.title = ""
        self._hidden = ""
        self._depth = 0
        self._heading = 0
        self._in_title = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if self._hidden:
            self._depth += tag == self._hidden
        elif tag in _HIDDEN:
            self._end()
            self._hidden, self._depth = tag, 1
        elif tag in _BLOCKS or tag in _HEADINGS:
            self._end()
            self._heading = _HEADINGS.get(tag, 0)
            self._in_title = tag == "title"
        elif tag in _SPACES:
            self._text(" ")

    def handle_endtag(self, tag: str) -> None:
        if self._hidden:
            self._depth -= tag == self._hidden
            if not self._depth:
                self._hidden = ""
        elif tag in _BLOCKS or tag in _HEADINGS:
            self._end()

    def handle_data(self, data: str) -> None:
        if self._in_title:
            self.title += data
        elif not self._hidden:
            self._text(data)

    def close(self) -> None:
        super().close()
        self._end()

    def _text(self, data: str) -> None:
        if self.outline.open_lines or data.strip():
            leading = len(data) - len(data.lstrip()) if not self.outline.open_lines else 0
            line = self.getpos()[0] + data.count("\n", 0, leading)
            self.outline.extend(line, data[leading:])

    def _end(self) -> None:
        if self._heading:
            self.outline.promote(self._heading)
        else:
            self.outline.end()
        self._heading, self._in_title = 0, False
