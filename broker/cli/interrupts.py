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

    So the last event that was printed is known exactly: printed as a whole, or not begun. A SIGINT that was ignored
    when the process began, as for a job in the background of a script, stays ignored.
    """

    def __init__(self) -> None:
        self._holding = False
        self._pending = False

    def __enter__(self) -> Interrupts:
        self._before = signal.getsignal(signal.SIGINT)
        if self._before is not signal.SIG_IGN:
            signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._holding and not self._pending:  # a second one gets out of an output that takes nothing
            self._pending = True
        else:
            raise KeyboardInterrupt

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        self._holding = True
        try:
            yield
        except KeyboardInterrupt:
            self._pending = False
            raise
        finally:
            self._holding = False
        if self._pending:
            self._pending = False
            raise KeyboardInterrupt


def again(seconds: float = SECOND_SECONDS) -> bool:
    """Waits for a second Ctrl-C; whether it came."""
    try:
        time.sleep(seconds)
    except KeyboardInterrupt:
        return True
    return False
