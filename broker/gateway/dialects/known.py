"""A map that only grows, of which every earlier state stays as it was."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple


class Known(NamedTuple):
    """Its parts have falling sizes, each at least twice the next: adding n items copies each about log2(n) times.

    Of a key that is added again the last value counts.
    """

    parts: tuple[Mapping[str, Any], ...] = ()

    def holds(self, key: str) -> bool:
        return any(key in part for part in self.parts)

    def get(self, key: str) -> Any:
        """None where it is not known."""
        return next((part[key] for part in reversed(self.parts) if key in part), None)

    def plus(self, key: str, value: Any = None) -> Known:
        parts, last = self.parts, {key: value}
        while parts and len(parts[-1]) <= len(last):
            parts, last = parts[:-1], {**parts[-1], **last}
        return Known((*parts, last))
