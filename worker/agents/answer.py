"""One answer of a model: told piece by piece, and kept whole."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable

from broker.events import Reasoning, Token
from worker.agents.feed import Feed
from worker.agents.joiner import Joiner
from worker.models.model import Call, End, ModelError, Piece, Text, Thought


class Answer:
    """`show` is given each piece of the text, and says what of it is to be told; `rest` is what it then held back.
    `before` is told before the first piece.
    """

    end: End
    """Once all events have been taken."""

    def __init__(
        self,
        *,
        before: str = "",
        show: Callable[[str], str] = lambda text: text,
        rest: Callable[[], str] = lambda: "",
    ) -> None:
        self.calls: list[Call] = []
        self._text: list[str] = []
        self._before = before
        self._show = show
        self._rest = rest

    @property
    def text(self) -> str:
        """All of it, whatever was told."""
        return "".join(self._text)

    async def events(self, stream: AsyncIterator[Piece], joiner: Joiner) -> AsyncGenerator[Token | Reasoning, None]:
        """What is told of the stream, as it comes. Raises ModelError, after all that came before."""
        now = asyncio.get_running_loop().time
        failure: ModelError | None = ModelError("model_broken", "The model's answer broke off.")
        async with Feed(stream) as feed:
            try:
                while not feed.ended:
                    for piece in await feed.take(joiner.wait(now())):
                        if isinstance(piece, Text):
                            joiner.add(Token, self._told(piece.text), now())
                        elif isinstance(piece, Thought):
                            joiner.add(Reasoning, piece.text, now())
                        elif isinstance(piece, Call):
                            self.calls.append(piece)
                        else:
                            self.end, failure = piece, None
                    for event in joiner.take(now()):
                        yield event
            except ModelError as error:
                failure = error
        joiner.add(Token, self._rest(), now())
        for event in joiner.take(now(), everything=True):
            yield event
        if failure is not None:
            raise failure

    def _told(self, text: str) -> str:
        if not text:
            return ""
        before = "" if self._text else self._before
        self._text.append(text)
        return before + self._show(text)
