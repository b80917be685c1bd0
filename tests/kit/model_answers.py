"""A model server asked through the product's own code, in the test's process."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from tests.kit.model_stub import ModelStub
from worker.models.model import Message, ModelError, Options, Piece, ToolSpec
from worker.models.provider import OpenAIModel, Server

KEY = "a-key-of-the-tests"


@dataclass
class Answered:
    """What came, and how it failed if it did."""

    pieces: list[Piece] = field(default_factory=list)
    error: ModelError | None = None

    @property
    def code(self) -> str | None:
        return self.error.code if self.error else None


class Models:
    """Models that share an event loop: one client for each kind, because a client takes a tenth of a second to make."""

    def __init__(self) -> None:
        self._made: dict[Server, OpenAIModel] = {}

    def at(self, stub: ModelStub | str, **fields: Any) -> OpenAIModel:
        url = stub if isinstance(stub, str) else stub.url
        defaults = {"api": "completions", "stall_seconds": 10, "retry_seconds": 10, "first_pause": 0.02, "key": KEY}
        server = Server(base_url=url, **{**defaults, **fields})
        if server not in self._made:
            self._made[server] = OpenAIModel(server)
        return self._made[server]

    async def close(self) -> None:
        for model in self._made.values():
            await model.aclose()


async def ask(
    model: OpenAIModel,
    query: str | Sequence[Message],
    *,
    tools: Sequence[ToolSpec] = (),
    seconds: float = 30,
    **parameters: Any,
) -> Answered:
    """One answer."""
    messages = [{"role": "user", "content": query}] if isinstance(query, str) else query
    options = Options(model="m", deadline=time.time() + seconds, parameters=parameters)
    answered = Answered()
    try:
        async with aclosing(model.stream(messages, tools, options)) as pieces:
            async for piece in pieces:
                answered.pieces.append(piece)
    except ModelError as error:
        answered.error = error
    return answered
