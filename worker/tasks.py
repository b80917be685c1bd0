"""Tasks that agents start: what they raise does not end the event loop that they share."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from types import TracebackType
from typing import Any


def guard(loop: asyncio.AbstractEventLoop) -> None:
    """asyncio re-raises a SystemExit and a KeyboardInterrupt of any task out of its loop: a library that runs a tool in
    a task of its own would so end the worker, and then the next one that takes the run. From here on they fail only
    their task.
    """
    loop.set_task_factory(_make_task)


def _make_task(loop: asyncio.AbstractEventLoop, work: Any, **options: Any) -> asyncio.Task[Any]:
    return asyncio.Task(_Guarded(work) if asyncio.iscoroutine(work) else work, loop=loop, **options)


class _Guarded(Coroutine[Any, Any, Any]):
    """The coroutine, apart from these two exceptions.

    Not an `async def` around it: a task that is cancelled before it begins would never begin what is inside, of which
    Python warns. Anything else is asked of the coroutine: anyio looks at `cr_running`.
    """

    def __init__(self, work: Coroutine[Any, Any, Any]) -> None:
        self._work = work

    def send(self, value: Any) -> Any:
        return _contained(self._work.send, value)

    def throw(self, kind: Any, value: Any = None, trace: TracebackType | None = None) -> Any:
        given = (kind,) if value is None and trace is None else (kind, value, trace)
        return _contained(self._work.throw, *given)

    def close(self) -> None:
        self._work.close()

    def __await__(self) -> Any:
        return self._work.__await__()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)


def _contained(step: Callable[..., Any], *given: Any) -> Any:
    try:
        return step(*given)
    except (SystemExit, KeyboardInterrupt) as error:
        raise RuntimeError(f"a task raised {type(error).__name__}") from error
