"""An index of the passages of a folder, in memory. All of it blocks: call it from a thread."""

from __future__ import annotations

import math
import sqlite3
import threading
import time
import unicodedata
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from worker.documents import folder as files
from worker.documents.stems import TOKENIZER, Stemmer
from worker.documents.text import Passage, unmarked

RESCAN_SECONDS = 1.0
MAX_HITS = 20
MAX_TERMS = 64
MAX_QUERY_CHARS = 20_000

_STOP_WORDS = """
a about after all also am an and any are as at be because been before being but by can could describe did
difference differences do does doing don explain for from get give had has have having he her here hers him
his how i if in into is it its just ll may me mean means might more most much must my no not of off on or
our out over own please re s shall she should so some such t tell than that the their them then there these
they this those to too under up us ve very was we were what when where which while who whom whose why will
with would you your
"""
STOP_WORDS = frozenset(_STOP_WORDS.split())

_SCHEMA = f"""
CREATE VIRTUAL TABLE passages USING fts5(title, heading, body, tokenize='{TOKENIZER}');
CREATE VIRTUAL TABLE vocabulary USING fts5vocab(passages, row);
"""
_INSERT = "INSERT INTO passages (rowid, title, heading, body) VALUES (?, ?, ?, ?)"
_DELETE = "DELETE FROM passages WHERE rowid = ?"
_MATCH = """
SELECT rowid, -bm25(passages, 4.0, 3.0, 1.0) AS score FROM passages WHERE passages MATCH ?
ORDER BY score DESC, rowid LIMIT ?
"""
_FREQUENCY = "SELECT doc FROM vocabulary WHERE term = ?"


_indexes: dict[Path, Index] = {}
_indexes_lock = threading.Lock()


class Stopped(Exception):
    """The search was given up before its end."""


@dataclass(frozen=True, kw_only=True)
class Hit:
    """A passage that has a term of the query; `score` is its bm25, relative to the best one's."""

    path: str
    passage: Passage
    score: float
    title_stems: frozenset[str]
    heading_stems: frozenset[str]
    sentence_stems: tuple[tuple[str, ...], ...]


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a query found, best first. `weights` has the query's stems; the rarer, the heavier."""

    documents: int
    passages: int
    weights: dict[str, float]
    hits: tuple[Hit, ...]


def index_of(folder: Path) -> Index:
    """The index of a folder: one per process."""
    with _indexes_lock:
        if folder not in _indexes:
            _indexes[folder] = Index(folder)
        return _indexes[folder]


class Index:
    """Follows the files of a folder: looks for changes before a search, at most once in RESCAN_SECONDS."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock = threading.Lock()
        self._connection = sqlite3.connect(":memory:", check_same_thread=False)
        self._connection.executescript(_SCHEMA)
        weakref.finalize(self, self._connection.close)
        self._stemmer = Stemmer()
        self._versions: dict[str, files.Version] = {}
        self._rows: dict[str, list[int]] = {}
        self._passages: dict[int, tuple[str, Passage]] = {}
        self._next_row = 1
        self._scanned = -math.inf

    def search(self, query: str, stop: threading.Event | None = None) -> Found:
        """The passages with a word of the query. Raises Stopped soon after `stop` is set."""
        stop = stop or threading.Event()
        with self._lock:
            if time.monotonic() - self._scanned >= RESCAN_SECONDS:
                self._rescan(stop)
            if stop.is_set():
                raise Stopped
            self._scanned = time.monotonic()
            return self._find(query_words(query))

    def _find(self, words: Sequence[str]) -> Found:
        with self._connection:
            rows = self._connection.execute(_MATCH, (_match_expression(words), MAX_HITS)).fetchall()
            return Found(
                documents=len(self._rows),
                passages=len(self._passages),
                weights=self._weights(words),
                hits=tuple(self._hits(rows)),
            )

    def _rescan(self, stop: threading.Event) -> None:
        """Ends early, and consistent, when it is stopped."""
        present: dict[str, files.Version] = {}
        for path, version in files.documents(self._folder):
            if stop.is_set():
                return
            present[path] = version
        for path in self._versions.keys() - present.keys():
            self._remove(path)
            del self._versions[path]
        for path, version in present.items():
            if stop.is_set():
                break
            if self._versions.get(path) != version:
                self._remove(path)
                self._add(path)
                self._versions[path] = version
        self._connection.commit()

    def _remove(self, path: str) -> None:
        for row in self._rows.pop(path, ()):
            del self._passages[row]
            self._connection.execute(_DELETE, (row,))

    def _add(self, path: str) -> None:
        found = files.read(self._folder, path)
        if found is None:
            return
        rows = self._rows[path] = []
        for passage in found:
            row, self._next_row = self._next_row, self._next_row + 1
            rows.append(row)
            self._passages[row] = path, passage
            body = unmarked(passage.text)
            self._connection.execute(_INSERT, (row, passage.title, passage.heading, body))

    def _weights(self, words: Sequence[str]) -> dict[str, float]:
        stems = dict.fromkeys(stem for text in self._stemmer.stems(words) for stem in text)
        total = len(self._passages)
        return {stem: rarity(self._frequency(stem), total) for stem in stems}

    def _frequency(self, stem: str) -> int:
        row = self._connection.execute(_FREQUENCY, (stem,)).fetchone()
        return row[0] if row else 0

    def _hits(self, rows: Iterable[tuple[int, float]]) -> Iterable[Hit]:
        best = 0.0
        for row, score in rows:
            best = best or score
            path, passage = self._passages[row]
            title, heading, *sentences = self._stemmer.stems(
                [passage.title, passage.heading, *(unmarked(sentence.text) for sentence in passage.sentences)]
            )
            yield Hit(
                path=path,
                passage=passage,
                score=score / best,
                title_stems=frozenset(title),
                heading_stems=frozenset(heading),
                sentence_stems=tuple(sentences),
            )


def rarity(frequency: int, total: int) -> float:
    """The weight of a term that `frequency` of `total` passages have."""
    return math.log(1 + (total - frequency + 0.5) / (frequency + 0.5))


def query_words(query: str) -> list[str]:
    """The words of a query that say something, once each: letters, digits and the marks on them, nothing else."""
    text = unicodedata.normalize("NFC", query[:MAX_QUERY_CHARS]).lower()
    kept = "".join(c if c.isalnum() or unicodedata.category(c)[0] == "M" else " " for c in text)
    return list(dict.fromkeys(word for word in kept.split() if word not in STOP_WORDS))[:MAX_TERMS]


def _match_expression(words: Iterable[str]) -> str:
    """An FTS5 expression. The words are quoted and hold no quote, so that none is an operator."""
    return " OR ".join(f'"{word}"' for word in words) or '""'
