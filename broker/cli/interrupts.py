"""Ctrl-C: once detaches, twice cancels. It interrupts waiting, never the printing of an event."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Iterator
from types import FrameType

SECOND_SECONDS = 1.5
"""How long after the first Ctrl-C a second one counts."""


class Interrupts:
    """A context in which SIGINT raises KeyboardInterrupt; inside `held()` it waits for the end of that block.

    So the last event that was printed is known exactly: printed as a whole, or not begun. After the first
    KeyboardInterrupt nothing is interrupted any more, so that whoever is quick with the second Ctrl-C does not break
    off what follows on the first: `again()` says whether there was one. A SIGINT that was ignored when the process
    began, as for a job in the background of a script, stays ignored.
    """

    def __init__(self) -> None:
        self._holding = False
        self._pending = False
        self._raised = False
        self._again = False
        self._waiting = False

    def __enter__(self) -> Interrupts:
        self._before = signal.getsignal(signal.SIGINT)
        if self._before is not signal.SIG_IGN:
            signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._raised:
            self._again = True
            if self._waiting:
                raise KeyboardInterrupt
        elif self._holding and not self._pending:
            self._pending = True
        else:  # nobody waits, or it is the second one while an output takes nothing
            self._raise()

    def _raise(self) -> None:
        self._pending, self._raised = False, True
        raise KeyboardInterrupt

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        self._holding = True
        try:
            yield
        finally:
            self._holding = False
        if self._pending:
            self._raise()

    def again(self) -> bool:
        """After the first one: waits for a second, and says whether it came. The next one interrupts as the first."""
        try:
            self._waiting = True
            if not self._again:
                time.sleep(SECOND_SECONDS)
        except KeyboardInterrupt:
            pass
        finally:
            self._waiting = self._raised = False
        return self._again
