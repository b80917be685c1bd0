"""Threads for calls that block: one for each, which nobody waits for."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

MOST_THREADS = 128


class Threads(ThreadPoolExecutor):
    """An executor whose calls may hang: a thread cannot be ended, and asyncio's own executor has few, for which it
    waits at its end, as Python does. A call waits while MOST_THREADS are busy.

    A ThreadPoolExecutor by name only: asyncio takes no other as an event loop's default.
    """

    def __init__(self, name: str) -> None:
        """`name` begins the names of the threads."""
        super().__init__(thread_name_prefix=name)
        self._name = name
        self._free = MOST_THREADS
        self._queue: deque[tuple[Future[Any], Callable[[], Any]]] = deque()
        self._guard = threading.Lock()

    def submit(self, function: Callable[..., Any], /, *arguments: Any, **named: Any) -> Future[Any]:
        future: Future[Any] = Future()
        with self._guard:
            self._queue.append((future, partial(function, *arguments, **named)))
            if not self._free:
                return future
            self._free -= 1
        try:
            threading.Thread(target=self._work, name=self._name, daemon=True).start()
        except RuntimeError:  # the machine has no more
            future.cancel()
            with self._guard:
                self._free += 1
            raise
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Waits for nothing."""

    def _work(self) -> None:
        while True:
            with self._guard:
                if not self._queue:
                    self._free += 1
                    return
                future, call = self._queue.popleft()
            if future.set_running_or_notify_cancel():
                _settle(future, call)


def _settle(future: Future[Any], call: Callable[[], Any]) -> None:
    try:
        result = call()
    except StopIteration as raised:  # which a future of asyncio refuses
        error = RuntimeError(f"the function raised {raised!r}")
        error.__cause__ = raised
        future.set_exception(error)
    except BaseException as raised:
        future.set_exception(raised)
    else:
        future.set_result(result)
