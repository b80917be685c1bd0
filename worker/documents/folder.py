"""The documents in a folder: which there are, and what they say. What cannot be read is left out, with a warning."""

from __future__ import annotations

import functools
import logging
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

from worker.documents.markup import markdown, plain_text, restructured_text
from worker.documents.text import Document, Passage, normalise, passages
from worker.documents.webpage import extracted_text, webpage

MAX_BYTES = 2 * 1024 * 1024

READERS: dict[str, Callable[[str, str], Document]] = {
    ".md": markdown,
    ".markdown": markdown,
    ".rst": restructured_text,
    ".txt": plain_text,
    ".html": webpage,
    ".htm": webpage,
}
_NOT_DOCUMENTS = frozenset(("node_modules", "venv", "__pycache__", "site-packages"))

logger = logging.getLogger(__name__)

Version = tuple[int, int, int]
"""Changes when a file does. With the ctime, because a file may be replaced by an older one of the same size."""


def documents(folder: Path) -> Iterator[tuple[str, Version]]:
    """The documents below a folder: their paths relative to it, with `/`.

    Linked folders are not followed, which keeps loops out; nor are linked files whose target is elsewhere.
    """
    root = os.path.realpath(folder)
    prefix = root.rstrip(os.sep) + os.sep
    pending = [root]
    while pending:
        for entry in _entries(pending.pop()):
            path = entry.path[len(prefix) :].replace(os.sep, "/")
            try:
                if entry.is_dir(follow_symlinks=False):
                    if entry.name not in _NOT_DOCUMENTS:
                        pending.append(entry.path)
                elif _is_document(entry, prefix):
                    path.encode()  # raises where the name is not UTF-8: it could not be stored or shown
                    info = entry.stat()
                    yield path, (info.st_mtime_ns, info.st_ctime_ns, info.st_size)
            except (OSError, UnicodeEncodeError) as error:
                _warn(entry.path, str(error))


def read(folder: Path, path: str) -> list[Passage] | None:
    """The passages of a document, or None where the file is not one. Raises nothing."""
    name = Path(path)
    title = normalise(name.stem.replace("-", " ").replace("_", " "))
    try:
        return list(passages(READERS[name.suffix.lower()](_source(folder / path), title)))
    except Exception as error:  # a file that breaks its reader must not break the queries
        _warn(path, str(error))
        return None


def quotable_text(folder: Path, path: str) -> str:
    """The text in which every sentence quoted from a document literally occurs, whitespace normalised."""
    source = _source(folder / path)
    return extracted_text(source) if READERS[Path(path).suffix.lower()] is webpage else normalise(source)


def _entries(directory: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(directory) as entries:
            return sorted((e for e in entries if not e.name.startswith(".")), key=lambda entry: entry.name)
    except OSError as error:
        _warn(directory, str(error))
        return []


def _is_document(entry: os.DirEntry[str], prefix: str) -> bool:
    if not entry.name.lower().endswith(tuple(READERS)):
        return False
    inside = not entry.is_symlink() or os.path.realpath(entry.path).startswith(prefix)
    return inside and stat.S_ISREG(entry.stat().st_mode)


def _source(path: Path) -> str:
    with path.open("rb") as file:
        raw = file.read(MAX_BYTES + 1)
    if len(raw) > MAX_BYTES:
        raise ValueError(f"larger than {MAX_BYTES} bytes")
    if b"\0" in raw:
        raise ValueError("not a text file")
    return raw.decode("utf-8-sig", errors="replace").replace("\r\n", "\n").replace("\r", "\n")


@functools.lru_cache(maxsize=1024)
def _warn(path: str, reason: str) -> None:
    """Once each, or every query would repeat them."""
    logger.warning("skipped %r: %s", path, reason)
