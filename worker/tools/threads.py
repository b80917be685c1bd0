"""Threads for tools that block. Not asyncio's own, all of which tools that hang would hold."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

MOST_THREADS = 128


class Threads:
    """Of one event loop. A call waits while MOST_THREADS are busy."""

    def __init__(self) -> None:
        self._free = asyncio.Semaphore(MOST_THREADS)

    async def run(self, function: Callable[..., Any], **arguments: Any) -> Any:
        """Calls the function in a thread of its own. When this is cancelled, the thread is left behind."""
        await self._free.acquire()
        loop = asyncio.get_running_loop()
        done: asyncio.Future[Any] = loop.create_future()

        def finish(result: Any, error: BaseException | None) -> None:
            self._free.release()
            if done.done():
                return
            if error is None:
                done.set_result(result)
            else:
                done.set_exception(error)

        def work() -> None:
            result: Any = None
            error: BaseException | None = None
            try:
                result = context.run(partial(function, **arguments))
            except StopIteration as raised:  # which a future refuses
                error = RuntimeError(f"the tool raised {raised!r}")
            except BaseException as raised:
                error = raised
            with contextlib.suppress(RuntimeError):  # the event loop has ended without us
                loop.call_soon_threadsafe(finish, result, error)

        context = contextvars.copy_context()
        try:
            # A daemon: Python would wait for others at its end.
            threading.Thread(target=work, name=f"tool {getattr(function, '__name__', '')}", daemon=True).start()
        except RuntimeError:  # the machine has no more
            self._free.release()
            raise
        return await done
