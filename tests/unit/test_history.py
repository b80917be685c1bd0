"""Sessions: what an agent is told of the earlier runs of its owner and session."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from redis.asyncio import Redis

from broker.events import dumps
from broker.ids import Owner, new_request_id
from broker.runs import keys
from broker.runs.scripts import Scripts
from tests.kit.runs import OWNER, append, cancel, claim, create, lose_worker, words
from worker import Run, Turn
from worker.agent import estimated_tokens
from worker.history import MOST_TURNS, History, fit

SESSION = "s-1"


class Session:
    """Runs of one session, each as old as its place says."""

    def __init__(self, redis: Redis) -> None:
        self.redis = redis
        self.scripts = Scripts(redis)
        self.now = 1_000_000

    async def asked(self, query: str, *, owner: Owner = OWNER, session_id: str = SESSION) -> str:
        """A queued run, in the index as a submit puts it there."""
        self.now += 1000
        request_id = new_request_id()
        await create(self.scripts, request_id, owner=owner, query=query, session_id=session_id, agent="chat")
        await self._set(request_id, created_at=self.now)
        await self.redis.zadd(keys.session_of(owner, session_id), {request_id: self.now})
        return request_id

    async def answered(self, query: str, answer: str | None, *tokens: str, **whose: Any) -> str:
        request_id = await self.asked(query, **whose)
        lease = await claim(self.scripts, request_id)
        final = ("final", dumps({"answer": answer, "citations": [], "usage": {}}))
        await append(self.scripts, lease, 2, *words(*tokens), final)
        await self._set(request_id, finished_at=self.now + 500)
        return request_id

    async def _set(self, request_id: str, **fields: int) -> None:
        await self.redis.hset(keys.run(request_id), mapping=fields)  # type: ignore[misc]

    async def recall(self, tokens: int = 8000, *, before: int | None = None, owner: Owner = OWNER) -> list[Turn]:
        before = self.now + 1000 if before is None else before
        return await History(self.redis, owner, SESSION, before_ms=before, request_id="r").recall(tokens)


@pytest.fixture
def session(redis: Redis) -> Session:
    return Session(redis)


def told(turns: list[Turn]) -> list[tuple[str, str]]:
    return [(turn.query, turn.answer) for turn in turns]


async def test_the_earlier_runs_of_a_session_are_told_oldest_first(session: Session) -> None:
    assert await session.recall() == []
    one = await session.answered("one?", "one")
    await session.answered("two?", None, "tw", "o")
    assert told(await session.recall()) == [("one?", "one"), ("two?", "two")]
    [first, _] = await session.recall()
    assert first == Turn(request_id=one, agent="chat", query="one?", answer="one", created_at=1001.0)


async def test_text_is_told_as_it_was(session: Session) -> None:
    for text in ("\ud800 é", "\u2028\n", '"quoted"'):
        await session.answered(text, text)
        assert told(await session.recall())[-1] == (text, text)


async def test_only_what_ended_well_before_the_run_was_created_counts(session: Session) -> None:
    await session.answered("before", "yes")
    created = session.now + 500
    await session.asked("queued")
    running = await session.asked("running")
    await claim(session.scripts, running)
    for ending in ("cancelled", "failed"):
        request_id = await session.asked(ending)
        lease = await claim(session.scripts, request_id)
        await append(session.scripts, lease, 2, *words("said "))
        if ending == "cancelled":
            await cancel(session.scripts, request_id)
        else:
            await append(session.scripts, lease, 3, ("error", '{"code":"x","message":"y"}'))
        await session._set(request_id, finished_at=session.now + 1)
    await session.answered("nothing said", None)
    await session.answered("later", "no")
    assert told(await session.recall(before=created)) == [("before", "yes")]
    assert told(await session.recall(before=created - 1)) == [], "it ended a millisecond later"
    assert told(await session.recall()) == [("before", "yes"), ("later", "no")]


async def test_an_answer_is_that_of_the_attempt_that_ended_the_run(session: Session) -> None:
    request_id = await session.asked("what?")
    await append(session.scripts, await claim(session.scripts, request_id), 2, *words("void "))
    attempt = await lose_worker(session.redis, session.scripts, request_id)
    lease = await claim(session.scripts, request_id, attempt)
    final = ("final", dumps({"answer": None, "citations": [], "usage": {}}))
    await append(session.scripts, lease, 2, *words("the ", "answer"), final)
    await session._set(request_id, finished_at=session.now + 1)
    assert told(await session.recall()) == [("what?", "the answer")]


async def test_another_owners_session_is_empty_and_another_session_is_another(session: Session) -> None:
    await session.answered("mine", "mine")
    for stranger in (Owner("acme", "bob"), Owner("other", "alice")):
        assert await session.recall(owner=stranger) == []
        await session.answered("theirs", "theirs", owner=stranger)
    await session.answered("elsewhere", "elsewhere", session_id="s-2")
    assert told(await session.recall()) == [("mine", "mine")]


async def test_the_record_says_whose_a_run_is_and_not_the_index(session: Session) -> None:
    mine = await session.answered("mine", "mine")
    for whose in ({"owner": Owner("acme", "bob")}, {"owner": Owner("other", "alice")}, {"session_id": "s-2"}):
        foreign = await session.answered("foreign", "foreign", **whose)
        await session.redis.zadd(keys.session_of(OWNER, SESSION), {foreign: session.now})
    await session.redis.zadd(keys.session_of(OWNER, SESSION), {new_request_id(): session.now})
    assert [turn.request_id for turn in await session.recall()] == [mine]


async def test_an_erased_run_is_not_told(session: Session) -> None:
    await session.answered("kept", "kept")
    erased = await session.answered("erased", "erased")
    await session.scripts.erase(erased, tombstone_ms=60_000)
    assert told(await session.recall()) == [("kept", "kept")]


async def test_the_newest_turns_within_the_budget_are_told(session: Session) -> None:
    for n in range(50):
        await session.answered(f"q{n:02}x", "a" * 36)  # 1 and 9 tokens
    assert told(await session.recall(59)) == [(f"q{n:02}x", "a" * 36) for n in range(45, 50)]
    assert len(await session.recall(500)) == 50, "more than one page of the index"
    assert await session.recall(0) == []


async def test_no_more_than_so_many_turns_are_told(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker.history.MOST_TURNS", 22)
    for n in range(30):
        await session.answered(str(n), str(n))
    assert [turn.query for turn in await session.recall(10**9)] == [str(n) for n in range(8, 30)]
    assert MOST_TURNS >= 100


async def test_the_newest_answer_is_cut_where_it_alone_is_too_long(session: Session) -> None:
    await session.answered("older", "older")
    await session.answered("long", None, *["0123456789"] * 100)
    [turn] = await session.recall(101)
    assert (turn.answer, turn.cut) == (("0123456789" * 100)[:400], True)
    assert await session.recall(1) == []


@given(st.text(st.characters(), max_size=300), st.text(max_size=40), st.integers(-1, 120), st.booleans())
def test_a_turn_fits_or_is_cut_to_fit_or_is_left_out(answer: str, query: str, tokens: int, newest: bool) -> None:
    turn = Turn(request_id="r", agent="chat", query=query, answer=answer, created_at=1.0)
    fitted = fit(turn, tokens, newest=newest)
    cost = estimated_tokens(query) + estimated_tokens(answer)
    if cost <= tokens:
        assert fitted == turn
    elif fitted is not None:
        assert newest and fitted == replace(turn, answer=fitted.answer, cut=True)
        assert answer.startswith(fitted.answer) and len(fitted.answer) < len(answer)
        assert fitted.answer and estimated_tokens(query) + estimated_tokens(fitted.answer) <= tokens
    else:
        assert not newest or estimated_tokens(query) >= tokens


async def test_an_agent_that_does_not_ask_reads_nothing_and_without_a_session_there_is_nothing() -> None:
    assert await Run(request_id="r", query="q").history() == []


def test_a_token_is_four_bytes() -> None:
    assert [estimated_tokens(text) for text in ("", "a", "abcd", "abcde", "日本", "\ud800")] == [0, 1, 1, 2, 2, 1]
