"""A reader by the rules of PROTOCOL 6.5, over a log that can fall back."""

from __future__ import annotations

from dataclasses import dataclass, field

from broker.events import Entry
from broker.fold import fold
from broker.ids import START, EventId
from tests.kit.run_model import CLOSED
from tests.kit.runs import LEASE_MS

GIVE_UP_MS = LEASE_MS + 5000


@dataclass
class RunReader:
    position: EventId = START
    seen: list[Entry] = field(default_factory=list)
    """Since it last was told to begin again."""
    told: int = 0
    """How often it was."""
    ended: bool = False
    """It has read a terminal, and does not come back unless it is made to."""
    gone: bool = False
    waiting_since: int | None = None

    @property
    def view(self) -> list[Entry]:
        return fold(self.seen)

    def look(self, status: str, end: EventId, known: bool, page: list[Entry], now: int) -> None:
        """One read: the record's status and the log's end, whether the log has the epoch of `position`, and entries
        after it. `now` is in ms.
        """
        if status in ("", "erased"):
            self.gone = True
        elif self.position > end:
            self._wait(status in CLOSED, now)
        elif self.position > START and not known:
            self._begin_again()
        else:
            self.waiting_since = None
            self._take(page)
            self.ended = status in CLOSED and self.position == end

    def _wait(self, closed: bool, now: int) -> None:
        if self.waiting_since is None:
            self.waiting_since = now
        if closed or now - self.waiting_since > GIVE_UP_MS:
            self._begin_again()

    def _begin_again(self) -> None:
        self.position, self.seen, self.waiting_since = START, [], None
        self.told += 1

    def _take(self, page: list[Entry]) -> None:
        for entry in page:
            self.seen.append(entry)
            self.position = entry.id
