"""The agent of the `submit` scenario; gateway and worker get it by BROKER_AGENTS."""

from __future__ import annotations

from collections.abc import AsyncIterator

from worker import Event, Final, Run, Token


async def words(run: Run) -> AsyncIterator[Event]:
    """The query's words, at once."""
    for word in run.query.split():
        yield Token(text=word + " ")
    yield Final(answer=run.query)
