"""What a model's reader made of an answer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from worker.models import completions, responses
from worker.models.model import Call, End, Piece, Text, Thought


def feed(reader: completions.Reader | responses.Reader, parts: Iterable[Any]) -> list[Piece]:
    pieces = [piece for part in parts for piece in reader.feed(part)]
    return [*pieces, *reader.end()]


def text(pieces: Sequence[Piece]) -> str:
    return "".join(piece.text for piece in pieces if isinstance(piece, Text))


def thoughts(pieces: Sequence[Piece]) -> str:
    return "".join(piece.text for piece in pieces if isinstance(piece, Thought))


def calls(pieces: Sequence[Piece]) -> list[tuple[str, str, str]]:
    """(id, name, arguments)"""
    return [(piece.id, piece.name, piece.arguments) for piece in pieces if isinstance(piece, Call)]


def end(pieces: Sequence[Piece]) -> End:
    """The last piece, and the only one of its kind."""
    [found] = [piece for piece in pieces if isinstance(piece, End)]
    assert pieces[-1] is found
    return found
