"""What was shown to a client that cannot take text back, and what may still be shown after a rewind.

A later attempt mostly says again what an earlier one has said. So after a rewind nothing is shown for as long as it
repeats what the client has; where it goes on from there, the rest is shown. Where it says something else, what the
client has is wrong, and cannot be mended.

All values are immutable and share their parts: a log's states cost what its entries cost. A step takes the time of the
text that it adds, a rewind that of the entries that it voids.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import NamedTuple

from broker.ids import EventId


class _Kept(NamedTuple):
    """A surviving entry that was shown, and those below it."""

    id: EventId
    text: str | None
    """Of a token; else `other` counts."""
    other: Hashable
    below: _Kept | None


class _Text(NamedTuple):
    """Text from `start` on, and what comes after it."""

    text: str
    start: int
    then: _Text | None


class _Other(NamedTuple):
    what: Hashable
    then: _Other | None


class Shown(NamedTuple):
    """What the client has: the surviving text, and then `unsaid`, which a rewind has voided and nobody has said again
    yet. What else it has is told apart by value only."""

    kept: _Kept | None = None
    unsaid: _Text | None = None
    others: _Other | None = None

    def token(self, event_id: EventId, text: str) -> tuple[Shown, str | None] | None:
        """A piece of the answer; with it what is to be shown of it, None for nothing.

        None where it differs from what the client has: nothing that is shown from now on can be right.
        """
        at, unsaid = 0, self.unsaid
        while unsaid is not None and at < len(text):
            length = min(len(unsaid.text) - unsaid.start, len(text) - at)
            if not unsaid.text.startswith(text[at : at + length], unsaid.start):
                return None
            at += length
            ends = unsaid.start + length == len(unsaid.text)
            unsaid = unsaid.then if ends else unsaid._replace(start=unsaid.start + length)
        kept = _Kept(event_id, text, None, self.kept)
        repeats = self.unsaid is not None and at == len(text)
        return Shown(kept, unsaid, self.others), None if repeats else text[at:]

    def other(self, event_id: EventId, what: Hashable) -> tuple[Shown, bool]:
        """Something beside the answer, by what the client gets of it; with it whether it is to be shown.

        It is not where it repeats what the client has. Where it differs it is shown, as is all that follows.
        """
        kept = _Kept(event_id, None, what, self.kept)
        if self.others is not None and self.others.what == what:
            return Shown(kept, self.unsaid, self.others.then), False
        return Shown(kept, self.unsaid, None), True

    def rewind(self, resume_from: EventId) -> Shown:
        """Voids what is above `resume_from`."""
        kept, unsaid, others = self
        while kept is not None and kept.id > resume_from:
            if kept.text is None:
                others = _Other(kept.other, others)
            elif kept.text:
                unsaid = _Text(kept.text, 0, unsaid)
            kept = kept.below
        return Shown(kept, unsaid, others)

    @property
    def text(self) -> str:
        """What survives of the answer."""
        texts, kept = [], self.kept
        while kept is not None:
            texts.append(kept.text or "")
            kept = kept.below
        return "".join(reversed(texts))

    @property
    def unsaid_text(self) -> str:
        """What the client has of the answer above `text`."""
        texts, unsaid = [], self.unsaid
        while unsaid is not None:
            texts.append(unsaid.text[unsaid.start :])
            unsaid = unsaid.then
        return "".join(texts)
