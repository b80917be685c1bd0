"""Readers of Markdown, reStructuredText and plain text. Code, comments, directives and rulers are left out."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from worker.documents.text import Document, Outline, normalise

_FENCE = re.compile(r"(`{3,}|~{3,})[^`]*$")
_ITEM = re.compile(r"(?:[-*+•]|\d{1,3}[.)]|#\.)\s+(?=\S)")
_LINK_DEFINITION = re.compile(r"\[(?!\^)[^\[\]]+\]:\s")
_FOOTNOTE = re.compile(r"\[\^[^\[\]]+\]:\s+")
_TAG = re.compile(r"<[^<>]*>")
_DIRECTIVE = re.compile(r"\.\.\s+([\w-]+)::\s*")
_FIELD = re.compile(r":[\w-]+:(?:\s|$)")
_PUNCTUATION = "=-~^\"'`#*+:._<>"
_SPOKEN_DIRECTIVES = """
note warning tip important hint caution danger attention error seealso admonition topic sidebar
versionadded versionchanged deprecated
"""
_SPOKEN = frozenset(_SPOKEN_DIRECTIVES.split())
_MAX_HEADING = 70


def markdown(source: str, name: str) -> Document:
    """`name` is the title where the text has none."""
    lines = source.split("\n")
    skip, title = _front_matter(lines)
    reader = _Markdown()
    for number, line in enumerate(lines[skip:], skip + 1):
        reader.read(number, line)
    return reader.outline.document(title or name, prefer=bool(title))


def _front_matter(lines: list[str]) -> tuple[int, str]:
    """How many lines the YAML at the top has, and the title in it."""
    if lines[0].strip() != "---":
        return 0, ""
    for index, line in enumerate(lines[1:], 1):
        if line.strip() in ("---", "..."):
            titles = [item[6:].strip().strip("\"'") for item in lines[1:index] if item.startswith("title:")]
            return index + 1, titles[0] if titles else ""
    return 0, ""


@dataclass
class _Markdown:
    outline: Outline = field(default_factory=Outline)
    fence: str = ""
    comment: bool = False
    in_list: bool = False

    def read(self, number: int, line: str) -> None:
        text = line.strip()
        if self._is_hidden(text) or not text.strip("> "):
            self.outline.end()
        elif self._is_heading(text, line):
            self.in_list = False
        elif not self.outline.open_lines and line.startswith(("    ", "\t")) and not self.in_list:
            pass  # indented code
        else:
            self._read_text(number, line, text)

    def _is_hidden(self, text: str) -> bool:
        """True within fences and comments, and of lines that are nothing but markup."""
        if self.fence:
            if text.startswith(self.fence) and not text.strip(self.fence[0]):
                self.fence = ""
            return True
        if match := _FENCE.match(text):
            self.fence = match[1]
            return True
        if self.comment or text.startswith("<!--"):
            self.comment = "-->" not in text
            return True
        if _LINK_DEFINITION.match(text) or text.startswith("> [!"):
            return True
        return text.startswith("<") and not _TAG.sub("", text).strip()

    def _is_heading(self, text: str, line: str) -> bool:
        """True of headings, their underlines, and rulers."""
        if text[0] == "#" and not line.startswith("    "):
            level = len(text) - len(text.lstrip("#"))
            if level <= 6 and text[level : level + 1].strip() == "":
                self.outline.heading(level, text.strip("#").strip())
                return True
        underlined = self.outline.open_lines == 1 and not self.in_list
        if underlined and text[0] in "=-" and not text.strip(text[0]):
            self.outline.promote(1 if text[0] == "=" else 2)
            return True
        if text.strip("|-=:*_ "):
            return False
        self.outline.end()
        return True

    def _read_text(self, number: int, line: str, text: str) -> None:
        if match := _ITEM.match(text):
            self.in_list = True
            self.outline.end()
            text = text[match.end() :]
        elif not self.outline.open_lines:
            self.in_list = self.in_list and line[0].isspace()
            text = _FOOTNOTE.sub("", text.lstrip("> "), count=1)
        if text.startswith("|"):
            self.outline.end()
            self.outline.line(number, text.strip("|"))
            self.outline.end()
        else:
            self.outline.line(number, text)


def restructured_text(source: str, name: str) -> Document:
    """`name` is the title where the text has none."""
    reader = _Rst()
    for number, line in enumerate(source.split("\n"), 1):
        reader.read(number, line)
    return reader.outline.document(name)


@dataclass
class _Rst:
    outline: Outline = field(default_factory=Outline)
    styles: list[tuple[str, bool]] = field(default_factory=list)
    """The underlines in the order of their appearance, which is what defines their levels."""
    ruler: int = 0
    """The line number of the last row of punctuation: an overline, if a title follows."""
    in_table: bool = False
    hidden_below: int | None = None
    """Lines indented by more than this belong to code, a comment or a directive."""
    indent: int = 0
    """The indentation of the paragraph under construction."""
    in_doctest: bool = False

    def read(self, number: int, line: str) -> None:
        text, indent = line.strip(), len(line) - len(line.lstrip())
        if not text:
            self._end_of_paragraph()
        elif self.in_doctest or (self.hidden_below is not None and indent > self.hidden_below):
            pass
        else:
            self.hidden_below = None
            self._read_text(number, text, indent)

    def _end_of_paragraph(self) -> None:
        if self.outline.open_text.endswith("::"):
            self.hidden_below = self.indent
        self.in_table = self.in_doctest = False
        self.outline.end()

    def _read_text(self, number: int, text: str, indent: int) -> None:
        if text.startswith(".. ") or text == "..":
            self._read_directive(number, text, indent)
        elif _is_ruler(text):
            self._read_ruler(number, text)
        elif len(text) > 3 and not text.strip("=-+| "):
            self.outline.end()
            self.in_table = True
        elif text.startswith(">>>"):
            self.outline.end()
            self.in_doctest = True
        elif text in ("::", "|") or (_FIELD.match(text) and indent):
            self.hidden_below = indent if text == "::" else None
        else:
            self._read_prose(number, text, indent)

    def _read_prose(self, number: int, text: str, indent: int) -> None:
        match = _ITEM.match(text)
        row = self.in_table or text.startswith("| ")
        if match or row:
            self.outline.end()
        if not self.outline.open_lines:
            self.indent = indent
        self.outline.line(number, text[match.end() :] if match else text.strip("|") if row else text)
        if row:
            self.outline.end()

    def _read_directive(self, number: int, text: str, indent: int) -> None:
        self.outline.end()
        match = _DIRECTIVE.match(text)
        if match is None or match[1] not in _SPOKEN:
            self.hidden_below = indent
        elif rest := text[match.end() :]:
            self.indent = indent
            self.outline.line(number, rest)

    def _read_ruler(self, number: int, text: str) -> None:
        if self.outline.open_lines == 1 and len(text) >= len(self.outline.open_text):
            style = (text[0], self.ruler == number - 2)
            if style not in self.styles:
                self.styles.append(style)
            self.outline.promote(self.styles.index(style) + 1)
        else:
            self.outline.end()
        self.ruler = number


def plain_text(source: str, name: str) -> Document:
    """Titles are underlined, or short lines that stand alone. `name` is the title where the text has none."""
    outline = Outline()
    may_be_title, level = False, 1
    for number, line in enumerate([*source.split("\n"), ""], 1):
        text = line.strip()
        underlined = bool(text) and _is_ruler(text) and outline.open_lines == 1
        alone = not text and may_be_title and outline.open_lines == 1
        if underlined or (alone and _is_title(outline.open_text)):
            outline.promote(level)
            level = 2
        elif not text or _is_ruler(text):
            outline.end()
        elif match := _ITEM.match(text):
            outline.end()
            outline.line(number, text[match.end() :])
            may_be_title = text[0].isdigit()
        else:
            may_be_title = may_be_title if outline.open_lines else True
            outline.line(number, text)
    return outline.document(name)


def _is_title(text: str) -> bool:
    words = normalise(text)
    return len(words) <= _MAX_HEADING and not words[0].islower() and words[-1] not in ".,;:!?"


def _is_ruler(text: str) -> bool:
    return len(text) >= 3 and text[0] in _PUNCTUATION and not text.strip(text[0])
