"""Reads a stream ahead of who takes its items, as far as a bounded buffer allows."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator
from types import TracebackType
from typing import Generic, TypeVar, cast

Item = TypeVar("Item")

BUFFER_CHARS = 64 * 1024
"""Of text. With so much waiting, the stream is not read: who makes it is to wait as well."""


class Feed(Generic[Item]):
    """An async context manager; leaving it closes the stream, and with it the connection to the model.

    An item with a `text` counts by that.
    """

    def __init__(self, stream: AsyncIterator[Item]) -> None:
        self._stream = cast("AsyncGenerator[Item, None]", stream)
        self._pieces: list[Item] = []
        self._chars = 0
        self._over = False
        self._error: Exception | None = None
        self._left = False
        self._news = asyncio.Event()
        self._room = asyncio.Event()
        self._room.set()

    async def __aenter__(self) -> Feed[Item]:
        self._reading = asyncio.create_task(self._read())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._left = True
        self._reading.cancel()
        await asyncio.gather(self._reading, return_exceptions=True)

    @property
    def ended(self) -> bool:
        """Whether all has been taken."""
        return self._over and not self._pieces and self._error is None

    async def take(self, seconds: float | None = None) -> list[Item]:
        """What has come since the last time, as soon as there is something; nothing after so many seconds, or at the
        end. Raises what the stream raised, when all before it has been taken; a RuntimeError for what is no Exception.
        """
        if not self._pieces and not self._over:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await self._news.wait()
        pieces, self._pieces, self._chars = self._pieces, [], 0
        self._news.clear()
        self._room.set()
        if not pieces and self._error is not None:
            raise self._error
        return pieces

    async def _read(self) -> None:
        try:
            async with contextlib.aclosing(self._stream) as stream:
                async for piece in stream:
                    self._pieces.append(piece)
                    self._news.set()
                    self._chars += len(getattr(piece, "text", ""))
                    if self._chars >= BUFFER_CHARS:
                        self._room.clear()
                        await self._room.wait()
        except Exception as error:
            self._error = error
        except BaseException as error:
            if self._left:
                raise
            # As itself it would pass for what ends the taker, whose text so far would be lost: a CancelledError does.
            self._error = RuntimeError(f"the stream raised {type(error).__name__}")
            self._error.__cause__ = error
        finally:
            self._over = True
            self._news.set()
