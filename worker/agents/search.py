"""The document search for coroutines, and as a tool: the index blocks, so it is asked in a thread."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any
from weakref import WeakKeyDictionary

from pydantic import Field

from worker.agents.ranking import screen
from worker.documents.index import Found, index_of
from worker.tools.tool import tool

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


def make_search(docs: Path) -> Callable[..., Any]:
    """The tool `search_documents` over a folder of Markdown, reStructuredText, HTML and text files."""
    folder = docs.absolute()

    @tool
    async def search_documents(
        query: Annotated[str, Field(description="What to look for: a question, or a few words.")],
        limit: Annotated[int, Field(ge=1, le=20, description="The most passages to return.")] = 5,
    ) -> list[dict[str, Any]]:
        """Searches the documents of this service. Returns the passages that answer best, best first, each with the path
        of its file, the line where it begins, and its text."""
        found = await search(folder, query)
        sources = await asyncio.to_thread(screen, found, limit)
        return [
            {
                "path": source.hit.path,
                "line": source.hit.passage.line,
                "title": source.hit.passage.title,
                "heading": source.hit.passage.heading,
                "text": source.hit.passage.text,
            }
            for source in sources
        ]

    return search_documents
