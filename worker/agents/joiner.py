"""Text that comes in any number of pieces, and leaves in so few that a log has room for it."""

from __future__ import annotations

from broker.events import Reasoning, Token

FREELY = 10_000
"""So many events of a first attempt leave as soon as they are taken."""
PAUSE_SECONDS = 0.25
"""After these, text waits for more for so long, and twice as long after each SLOWER events."""
SLOWER = 1_000
MAX_CHARS = 5_000
"""In one event, whose JSON may have 12 bytes for a character. So much text never waits."""

MOST_EVENTS = 42_000
"""No stream makes more, if it has at most 64 Mi characters and lasts at most a year. An hour of text makes 14,000."""

Kind = type[Token] | type[Reasoning]


class Joiner:
    """What has arrived and has not left: answer and reasoning apart, each in its order. Times are seconds."""

    def __init__(self, attempt: int = 1) -> None:
        """`attempt`: all of a run write into one log, so each has half of the freedom of the one before it."""
        self._waiting: dict[Kind, list[str]] = {}
        self._chars: dict[Kind, int] = {}
        self._since = 0.0
        self._left = FREELY - (FREELY >> (attempt - 1))

    def add(self, kind: Kind, text: str, now: float) -> None:
        if not text:
            return
        if not self._waiting:
            self._since = now
        self._waiting.setdefault(kind, []).append(text)
        self._chars[kind] = self._chars.get(kind, 0) + len(text)

    def wait(self, now: float) -> float | None:
        """Seconds until something is to leave; None where nothing waits."""
        if not self._waiting:
            return None
        if any(chars >= MAX_CHARS for chars in self._chars.values()):
            return 0.0
        return max(self._since + self._pause - now, 0.0)

    def take(self, now: float, *, everything: bool = False) -> list[Token | Reasoning]:
        """What is to leave now."""
        everything = everything or self._since + self._pause <= now
        events: list[Token | Reasoning] = []
        for kind in list(self._waiting):
            if everything or self._chars[kind] >= MAX_CHARS:
                text = "".join(self._waiting.pop(kind))
                del self._chars[kind]
                end = len(text) if everything else len(text) - len(text) % MAX_CHARS
                events += [kind(text=text[at : min(at + MAX_CHARS, end)]) for at in range(0, end, MAX_CHARS)]
                self.add(kind, text[end:], now)
        self._left += len(events)
        return events

    @property
    def _pause(self) -> float:
        if self._left < FREELY:
            return 0.0
        return PAUSE_SECONDS * 2.0 ** ((self._left - FREELY) // SLOWER)
