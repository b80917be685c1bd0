"""The tools that a worker has, and how one is called."""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import Callable, Iterable
from contextvars import copy_context
from functools import partial
from typing import Any

from broker.errors import Misconfigured
from broker.settings import Settings
from worker.agent import Run
from worker.loading import load_module
from worker.models.model import Call, ToolSpec
from worker.threads import Threads
from worker.tools.result import BadResult, Result, failure, make_result
from worker.tools.tool import BadArguments, BadTool, Tool, is_marked, make_tool

logger = logging.getLogger(__name__)

CLOSE_SECONDS = 1.0
"""How long a tool that was cancelled may take to close."""


class Tools:
    """By name. Of one event loop."""

    def __init__(self, tools: Iterable[Tool]) -> None:
        self._tools = {tool.name: tool for tool in tools}
        self._threads = Threads("tool of a worker")

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._tools)

    def specs(self, names: Iterable[str]) -> list[ToolSpec]:
        """What a model is told of these."""
        tools = (self._tools[name] for name in names)
        return [ToolSpec(name=tool.name, description=tool.description, parameters=tool.schema) for tool in tools]

    async def call(self, call: Call, run: Run, allowed: Iterable[str]) -> Result:
        """Calls a tool. Whatever goes wrong is a result for the model, and no reason for a run to end."""
        tool = self._tools.get(call.name) if call.name in allowed else None
        if tool is None:
            return failure(f"There is no tool of this name. Tools: {', '.join(allowed) or 'none'}.")
        try:
            arguments = tool.bind(call.arguments, run)
            return make_result(await self._finish(tool, arguments, run))
        except (BadArguments, BadResult) as error:
            return failure(str(error))
        except _TimedOut:
            return failure(f"The tool did not answer within {tool.timeout:g} seconds.")
        except Exception as error:
            logger.exception("a tool failed", extra={"request_id": run.request_id, "tool": tool.name})
            return failure(_told(error))

    async def _finish(self, tool: Tool, arguments: dict[str, Any], run: Run) -> object:
        """What the tool returned. Raises what it raised, or _TimedOut."""
        task = asyncio.create_task(self._invoke(tool, arguments))
        try:
            await asyncio.wait([task], timeout=tool.timeout)
            if not task.done():
                raise _TimedOut
            if task.cancelled():
                raise RuntimeError("the tool was cancelled, but not by its run")
            return task.result()
        finally:
            if not task.done():
                await _give_up(task, tool, run)

    async def _invoke(self, tool: Tool, arguments: dict[str, Any]) -> object:
        try:
            if tool.asynchronous:
                return await tool.function(**arguments)
            blocking = partial(copy_context().run, partial(tool.function, **arguments))
            returned = await asyncio.get_running_loop().run_in_executor(self._threads, blocking)
            return await returned if inspect.isawaitable(returned) else returned
        except (Exception, asyncio.CancelledError):
            raise
        except BaseException as error:  # asyncio would end the worker by a SystemExit of a task
            raise RuntimeError(f"the tool raised {type(error).__name__}") from error


def _told(error: Exception) -> str:
    """The exception for the model: its type and its message, where it has one that can be read."""
    try:
        message = str(error)
    except Exception:  # its own __str__ fails too
        message = ""
    return f"{type(error).__name__}: {message}" if message else type(error).__name__


class _TimedOut(Exception):
    """Not TimeoutError, which a tool may raise itself."""


async def _give_up(task: asyncio.Task[object], tool: Tool, run: Run) -> None:
    """A thread cannot be ended, and a coroutine need not let itself be."""
    task.cancel()
    try:
        await asyncio.wait([task], timeout=CLOSE_SECONDS)
    finally:
        if not task.done() or not tool.asynchronous:
            logger.warning(
                "a tool does not end; it is left behind, and its result will not be used",
                extra={"request_id": run.request_id, "tool": tool.name},
            )
        _left_behind.add(task)
        task.add_done_callback(_forget)


_left_behind: set[asyncio.Task[object]] = set()
"""A task that nobody refers to may be collected in the middle of its work."""


def _forget(task: asyncio.Task[object]) -> None:
    _left_behind.discard(task)
    if not task.cancelled():
        task.exception()


def load_tools(settings: Settings, built_in: Iterable[Callable[..., Any]] = ()) -> Tools:
    """Those of BROKER_TOOLS, after those that are built in.

    Raises Misconfigured, which names the module and the function that cannot be used, and why.
    """
    places: dict[Any, str] = dict.fromkeys(built_in, "a built-in tool")
    """Of each function; one that a module has from another is one tool."""
    for module in settings.tools:
        for attribute, function in _marked(module).items():
            places.setdefault(function, f"{module}: {attribute}")
    tools: dict[str, tuple[Tool, str]] = {}
    for function, place in places.items():
        try:
            tool = make_tool(function, default_timeout=settings.tool_seconds)
        except BadTool as error:
            raise Misconfigured(f"BROKER_TOOLS: {place} cannot be a tool: {error}") from None
        if tool.name in tools:
            raise Misconfigured(f"BROKER_TOOLS: {place} has the name of {tools[tool.name][1]}, {tool.name!r}")
        tools[tool.name] = tool, place
    return Tools(tool for tool, _ in tools.values())


def _marked(module: str) -> dict[str, Any]:
    found = {name: value for name, value in vars(load_module(module, "BROKER_TOOLS")).items() if is_marked(value)}
    if not found:
        raise Misconfigured(f"BROKER_TOOLS: {module} has no function with the decorator @tool")
    return found
