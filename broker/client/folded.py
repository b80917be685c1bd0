"""What a stream shows of its run, sync or async."""

from __future__ import annotations

from collections.abc import Sequence

from broker.client.errors import RunCancelled, RunFailed
from broker.client.received import Received
from broker.client.tail import Tail
from broker.events import Cancelled, Error, Final, Token
from broker.ids import START, EventId

SILENCE_SECONDS = 35.0
"""Two heartbeats of 15 s, the broker's default, and 5 s."""


class Folded:
    """What survives of the events that were given out so far: a later attempt voids some of them."""

    def __init__(self, tail: Tail) -> None:
        self._tail = tail

    @property
    def request_id(self) -> str:
        return self._tail.request_id

    @property
    def events(self) -> Sequence[Received]:
        """The events that survive, `attempt` events left out."""
        return tuple(self._tail.kept)

    @property
    def text(self) -> str:
        """The tokens that survive. With `after`, of what came after it."""
        return "".join(part.event.text for part in self._tail.kept if isinstance(part.event, Token))

    @property
    def answer(self) -> str | None:
        """As `Run.answer`: the answer of the `final` event, else the text; None where there is neither."""
        end = self._tail.end.event if self._tail.end is not None else None
        if isinstance(end, Final) and end.answer is not None:
            return end.answer
        return self.text or None

    @property
    def end(self) -> Received | None:
        """The terminal event: a Final, an Error or a Cancelled."""
        return self._tail.end

    @property
    def done(self) -> bool:
        """Whether the run has ended, and all of it was given out."""
        return self._tail.done

    @property
    def last_event_id(self) -> EventId | None:
        """Where it stands: another stream goes on from here with `after`. None before the first event."""
        return self._tail.position if self._tail.position != START else None

    @property
    def reconnects(self) -> int:
        """How often the connection was lost and made anew."""
        return self._tail.reconnects

    def raise_for_error(self) -> None:
        """Raises RunFailed or RunCancelled where the run has ended so."""
        end = self._tail.end.event if self._tail.end is not None else None
        if isinstance(end, Error):
            raise RunFailed(end.code, end.message)
        if isinstance(end, Cancelled):
            raise RunCancelled(f"Run {self.request_id} was cancelled ({end.reason}).")
