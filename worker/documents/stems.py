"""The stems of words, as the index of documents has them."""

from __future__ import annotations

import sqlite3
import weakref
from collections.abc import Sequence

TOKENIZER = "porter unicode61 remove_diacritics 2"

_SCHEMA = f"""
CREATE VIRTUAL TABLE scratch USING fts5(text, content='', tokenize='{TOKENIZER}');
CREATE VIRTUAL TABLE stems USING fts5vocab(scratch, instance);
"""
_STEM = "INSERT INTO scratch (rowid, text) VALUES (?, ?)"
_STEMS = "SELECT doc, term FROM stems ORDER BY doc, offset"
_FORGET = "INSERT INTO scratch (scratch) VALUES ('delete-all')"


class Stemmer:
    """By SQLite's own tokenizer, so that stems are equal where the index matches. For one thread at a time."""

    def __init__(self) -> None:
        self._connection = sqlite3.connect(":memory:", check_same_thread=False)
        self._connection.executescript(_SCHEMA)
        weakref.finalize(self, self._connection.close)

    def stems(self, texts: Sequence[str]) -> list[tuple[str, ...]]:
        """Those of each text, in its order."""
        with self._connection:
            self._connection.executemany(_STEM, enumerate(texts))
            found: list[list[str]] = [[] for _ in texts]
            for number, stem in self._connection.execute(_STEMS):
                found[number].append(stem)
            self._connection.execute(_FORGET)
        return [tuple(stems) for stems in found]
