"""The agents of the benchmark; gateway and worker get them by BROKER_AGENTS."""

from __future__ import annotations

import re
import time
from collections.abc import AsyncIterator
from typing import Any

from broker import settings
from broker.runs.scripts import Batch, Lease, Reply, Scripts
from worker import Event, Final, Run, Token
from worker.agent import Checkpoint
from worker.agents.chat import make_chat
from worker.tools.registry import load_tools

_STAMP = re.compile(r"\d{10,}")


async def words(run: Run) -> AsyncIterator[Event]:
    """The query's words, at once."""
    for word in run.query.split():
        yield Token(text=word + " ")
    yield Final(answer=run.query)


_loaded = settings.load()
_chat = make_chat(_loaded, load_tools(_loaded))
_sent: dict[int, tuple[int, int]] = {}
"""When the append with a token was sent, and answered; by the time that the token is."""


async def timed_chat(run: Run) -> AsyncIterator[Event | Checkpoint]:
    """The built-in agent `chat` over tests.bench.provider. The usage has the times of each token on its way through the
    worker: {time it was written: [it came to the agent's end, its append was sent, the append was answered]}, in ns.
    """
    came: dict[int, int] = {}
    async for event in _chat(run):
        if isinstance(event, Token):
            now = time.monotonic_ns()
            came.update(dict.fromkeys(map(int, _STAMP.findall(event.text)), now))
        if isinstance(event, Final):
            times = {str(stamp): [at, *_sent.pop(stamp, ())] for stamp, at in came.items()}
            yield event.model_copy(update={"usage": {**event.usage, "times": times}})
        else:
            yield event


_append = Scripts.append


async def _timed_append(self: Scripts, lease: Lease, batch: Batch, **options: Any) -> Reply:
    sent = time.monotonic_ns()
    reply = await _append(self, lease, batch, **options)
    answered = time.monotonic_ns()
    for kind, data in batch.entries:
        if kind == "token":
            _sent.update(dict.fromkeys(map(int, _STAMP.findall(data)), (sent, answered)))
    return reply


Scripts.append = _timed_append  # type: ignore[method-assign]
