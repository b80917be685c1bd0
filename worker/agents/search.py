"""The document search for coroutines: the index blocks, so it is asked in a thread."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from weakref import WeakKeyDictionary

from worker.agents.documents import Found, index_of

_gates: WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Lock] = WeakKeyDictionary()


async def search(folder: Path | None, query: str) -> Found:
    """A search off the event loop, that ends soon after it is given up. Without a folder nothing is found.

    One at a time, because those that wait for a first, long scan would hold all threads of the event loop, which
    needs some to look up the names of hosts.
    """
    if folder is None:
        return Found(documents=0, passages=0, weights={}, hits=())
    stop = threading.Event()
    async with _gates.setdefault(asyncio.get_running_loop(), asyncio.Lock()):
        try:
            return await asyncio.to_thread(lambda: index_of(folder).search(query, stop))
        finally:
            stop.set()
