"""A set that only grows, of which every earlier state stays as it was."""

from __future__ import annotations

from typing import NamedTuple


class Known(NamedTuple):
    """Its parts have falling sizes, each at least twice the next: adding n items copies each about log2(n) times."""

    parts: tuple[frozenset[str], ...] = ()

    def holds(self, item: str) -> bool:
        return any(item in part for part in self.parts)

    def plus(self, item: str) -> Known:
        parts, last = self.parts, frozenset((item,))
        while parts and len(parts[-1]) <= len(last):
            parts, last = parts[:-1], parts[-1] | last
        return Known((*parts, last))
