"""The command `broker` with a window: `python -m tests.kit.observed serve …`. On SIGUSR1 the process writes what it
holds into the file that OBSERVED names.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import signal
import sys
from collections import Counter, deque
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from broker.cli import main
from broker.runs.link import Link
from broker.runs.pool import Cancellable, Pool
from tests.kit.processes import Gateway, Process, Worker, wait_for

_OURS = ("broker.", "worker.")
_OF_A_POOL = (Pool, Cancellable)
"""Counted by themselves."""
_COLLECTIONS = (dict, list, set, deque)


class Census(NamedTuple):
    """What a process holds."""

    tasks: dict[str, int]
    """By the name of their coroutine."""
    objects: dict[str, int]
    """Instances of our classes, by the name of the class."""
    sizes: dict[str, int]
    """Of the collections in attributes of our objects, all instances together: `Hub._channels`; and of those in our
    modules: `worker.documents.index._indexes`."""
    pooled: int
    """Connections to Redis that are open and in a pool, which opens them as it needs them, up to its bound."""
    loose: int
    """Connections to Redis that are open and in no pool."""
    descriptors: int
    """But for those of pooled connections."""
    memory: int
    """Bytes that are resident."""


class ObservedGateway(Gateway):
    module = "tests.kit.observed"


class ObservedWorker(Worker):
    module = "tests.kit.observed"


def observed(env: dict[str, str], folder: Path, name: str) -> dict[str, str]:
    """The environment of an observed process."""
    return {**env, "OBSERVED": str(folder / f"{name}.census")}


def look_into(process: Process, folder: Path, name: str) -> Census:
    file = folder / f"{name}.census"
    file.unlink(missing_ok=True)
    process.signal(signal.SIGUSR1)
    wait_for(file.exists, seconds=20)
    tasks, objects, sizes, pooled, loose = json.loads(file.read_text("ascii"))
    outside = psutil.Process(process.pid)
    return Census(tasks, objects, sizes, pooled, loose, outside.num_fds() - pooled, outside.memory_info().rss)


def _write(*_: object) -> None:
    file = Path(os.environ["OBSERVED"])
    part = file.with_suffix(".part")
    part.write_text(json.dumps(_census()), "ascii")
    part.rename(file)


def _census() -> list[dict[str, int] | int]:
    gc.unfreeze()
    gc.collect()
    tasks = Counter(str(task.get_coro().__qualname__) for task in asyncio.all_tasks())  # type: ignore[union-attr]
    objects, sizes = Counter[str](), Counter[str]()
    pooled = connections = links = 0
    for item in gc.get_objects():
        kind = type(item)
        if not str(kind.__module__).startswith(_OURS):
            continue
        if isinstance(item, Pool):
            pooled += sum(_is_open(connection._writer) for connection in item.connections())
        elif isinstance(item, Cancellable):
            connections += _is_open(item._writer)
        elif isinstance(item, Link):
            links += _is_open(getattr(item, "_writer", None))
        if isinstance(item, _OF_A_POOL):
            continue
        objects[kind.__qualname__] += 1
        for name, value in _attributes(item).items():
            if isinstance(value, _COLLECTIONS):
                sizes[f"{kind.__qualname__}.{name}"] += len(value)
    for path, module in tuple(sys.modules.items()):
        if path.startswith(_OURS):
            named = [(name, value) for name, value in vars(module).items() if not name.startswith("__")]
            sizes.update({f"{path}.{name}": len(value) for name, value in named if isinstance(value, _COLLECTIONS)})
    return [tasks, objects, sizes, pooled, connections - pooled + links]


def _is_open(writer: asyncio.StreamWriter | None) -> bool:
    """redis-py takes a connection for open until it is used, though its server has gone."""
    return writer is not None and not writer.transport.is_closing()


def _attributes(item: Any) -> dict[str, Any]:
    slots = {name: getattr(item, name, None) for name in getattr(type(item), "__slots__", ())}
    return {**slots, **getattr(item, "__dict__", {})}


if __name__ == "__main__":
    signal.signal(signal.SIGUSR1, _write)
    main()
