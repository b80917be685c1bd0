"""The document search of `research` as a tool."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from worker.agents.ranking import screen
from worker.agents.search import search
from worker.tools.tool import tool


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
