"""The feed: a model is read ahead, but not without bounds, and is left at once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from tests.kit.waiting import until
from worker.agents.feed import BUFFER_CHARS, Feed
from worker.models.model import Call, End, ModelError, Piece, Text


class Spoken:
    """A model that notes how far it was read."""

    def __init__(self, *pieces: Piece | BaseException, pause: bool = False) -> None:
        self.pieces = pieces
        self.read = 0
        self.closed = False
        self.pause = pause

    async def stream(self) -> AsyncIterator[Piece]:
        try:
            for piece in self.pieces:
                if isinstance(piece, BaseException):
                    raise piece
                self.read += 1
                yield piece
                if self.pause:
                    await asyncio.sleep(0)
        finally:
            self.closed = True


async def all_of(feed: Feed[Piece]) -> list[list[Piece]]:
    taken = []
    while not feed.ended:
        taken.append(await feed.take())
    return taken


async def test_what_has_come_meanwhile_is_taken_at_once_and_in_order() -> None:
    model = Spoken(Text(text="a"), Text(text="b"), Call(id="1", name="x", arguments=""), End(reason="stop"))
    async with Feed(model.stream()) as feed:
        await until(lambda: model.closed)
        assert await all_of(feed) == [list(model.pieces)]


async def test_nothing_comes_late_and_nothing_is_lost() -> None:
    model = Spoken(*[Text(text=str(n)) for n in range(1000)], End(reason="stop"), pause=True)
    async with Feed(model.stream()) as feed:
        taken = await all_of(feed)
    assert [piece for pieces in taken for piece in pieces] == list(model.pieces)
    assert len(taken) > 300


async def test_taking_waits_no_longer_than_it_may() -> None:
    async def silent() -> AsyncIterator[Piece]:
        await asyncio.sleep(60)
        yield Text(text="never")

    async with Feed(silent()) as feed:
        assert await feed.take(0.01) == []
        assert not feed.ended


async def test_a_model_is_read_no_faster_than_its_pieces_are_taken() -> None:
    model = Spoken(*[Text(text="x" * 1000) for _ in range(500)])
    async with Feed(model.stream()) as feed:
        for turn in range(1, 4):
            await asyncio.sleep(0.05)
            assert model.read == turn * -(-BUFFER_CHARS // 1000)
            assert len(await feed.take()) == -(-BUFFER_CHARS // 1000)


async def test_a_failure_comes_after_what_came_before_it() -> None:
    model = Spoken(Text(text="so far"), ModelError("model_broken", "why"))
    async with Feed(model.stream()) as feed:
        await until(lambda: model.closed)
        assert await feed.take() == [Text(text="so far")]
        assert not feed.ended
        with pytest.raises(ModelError, match="why"):
            await feed.take()


@pytest.mark.parametrize("raised", [BaseException, SystemExit, asyncio.CancelledError, GeneratorExit])
async def test_no_failure_is_taken_for_an_end(raised: type[BaseException]) -> None:
    async with Feed(Spoken(Text(text="so far"), raised("why")).stream()) as feed:
        assert await feed.take() == [Text(text="so far")]
        with pytest.raises(RuntimeError, match=f"the stream raised {raised.__name__}") as failed:
            await feed.take()
    assert type(failed.value.__cause__) is raised


async def test_leaving_closes_the_model_although_it_is_not_at_its_end() -> None:
    model = Spoken(*[Text(text="x" * 1000) for _ in range(500)])
    async with Feed(model.stream()) as feed:
        await feed.take()
    assert model.closed and model.read < 500
