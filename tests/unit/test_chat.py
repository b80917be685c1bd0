"""The loop of `chat` with a model that says what it is told to: rounds, checkpoints, limits, and what ends a run."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from typing import Any

import pytest

from broker.events import Error, Event, Final, Token, ToolCall, ToolResult, dumps
from broker.settings import Settings
from tests.kit.waiting import until
from worker import Checkpoint, Run, Turn, tool
from worker.agent import MAX_EVENT_BYTES
from worker.agents import chat as chat_module
from worker.agents import states as states_module
from worker.agents.chat import CALLS_AT_ONCE, make_chat
from worker.agents.joiner import FREELY
from worker.models.model import Call, End, Message, ModelError, Options, Piece, Text, Thought, ToolSpec, Usage
from worker.tools.registry import Tools
from worker.tools.tool import make_tool

RUN = Run(request_id="a" * 32, query="q", deadline=time.time() + 3600)
SETTINGS = Settings(model="m", max_rounds=5, history_tokens=100)


class Scripted:
    """A model server: its answers in their order, one for each number of rounds that the messages have."""

    def __init__(self, *answers: Sequence[Piece | BaseException], pause: bool = False) -> None:
        self.answers = answers
        self.asked: list[tuple[list[Message], list[ToolSpec]]] = []
        self.pause = pause
        self.read = 0

    async def stream(
        self, messages: Sequence[Message], tools: Sequence[ToolSpec], options: Options
    ) -> AsyncIterator[Piece]:
        self.asked.append((list(messages), list(tools)))
        for piece in self.answers[sum(message["role"] == "assistant" for message in messages)]:
            if isinstance(piece, BaseException):
                raise piece
            if self.pause:
                await asyncio.sleep(0)
            self.read += 1
            yield piece


class Bench:
    """Runs `chat` in this process. The tool `count` counts how often it was called with what."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.monkeypatch = monkeypatch
        self.counted: Counter[str] = Counter()

        @tool
        async def count(what: str, size: int = 0) -> str:
            self.counted[what] += 1
            return what + "." * size

        self.tools = Tools([make_tool(count, default_timeout=5)])

    def agent(self, model: Scripted, run: Run = RUN, settings: Settings = SETTINGS) -> AsyncIterator[Any]:
        self.monkeypatch.setattr(chat_module, "open_model", lambda settings: model)
        return make_chat(settings, self.tools)(run)

    async def items(self, model: Scripted, run: Run = RUN, settings: Settings = SETTINGS) -> list[Event | Checkpoint]:
        return [item async for item in self.agent(model, run, settings)]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Bench:
    return Bench(monkeypatch)


def count(what: str, size: int = 0, id: str = "") -> Call:
    return Call(id=id or what, name="count", arguments=json.dumps({"what": what, "size": size}))


def end(reason: Any = "stop", **usage: int) -> End:
    return End(reason=reason, usage=Usage(**usage) if usage else None)


def said(items: Sequence[Event | Checkpoint]) -> str:
    return "".join(item.text for item in items if isinstance(item, Token))


def error(items: Sequence[Event | Checkpoint]) -> tuple[str, str]:
    last = items[-1]
    assert isinstance(last, Error), last
    return last.code, last.message


async def test_without_a_model_a_run_says_which_setting_is_missing(bench: Bench) -> None:
    code, message = error(await bench.items(Scripted(), settings=Settings()))
    assert code == "model_not_configured" and "BROKER_MODEL" in message


THREE_ROUNDS = Scripted(
    [Thought(text="hm"), Text(text="One."), count("a"), count("b"), end("tool_calls", prompt=10, completion=1)],
    [Text(text="Two."), count("c"), end("tool_calls", prompt=20, completion=2, cached=10)],
    [Text(text="Three."), end(prompt=30, completion=3, reasoning=1)],
)


async def test_a_later_attempt_goes_on_at_any_checkpoint(bench: Bench) -> None:
    """Whichever was the last that survived: what is covered is not said, asked, called or paid for again."""
    whole = await bench.items(THREE_ROUNDS)
    assert said(whole) == "One.\n\nTwo.\n\nThree."
    final = whole[-1]
    assert isinstance(final, Final) and final.answer is None
    assert final.usage == {
        "prompt_tokens": 60,
        "completion_tokens": 6,
        "total_tokens": 66,
        "cached_tokens": 10,
        "reasoning_tokens": 1,
        "rounds": 3,
        "model": "m",
        "finish_reason": "stop",
    }
    at = [n for n, item in enumerate(whole) if isinstance(item, Checkpoint)]
    assert len(at) == 5, "after the calls of a round, and after each result"
    for n in at:
        checkpoint = whole[n]
        assert isinstance(checkpoint, Checkpoint)
        survived = whole[:n]
        ended = [item.id for item in survived if isinstance(item, ToolResult)]
        bench.counted.clear()
        asked = len(THREE_ROUNDS.asked)
        state = json.loads(dumps(checkpoint.state))
        rest = await bench.items(THREE_ROUNDS, replace(RUN, attempt=2, restored=state))
        assert rest[-1] == final
        assert said([*survived, *rest]) == said(whole)
        assert set(bench.counted) == {"a", "b", "c"} - set(ended) and max(bench.counted.values(), default=1) == 1
        for kind in (ToolCall, ToolResult):
            found = [item for item in [*survived, *rest] if isinstance(item, kind)]
            assert sorted(item.id for item in found) == ["a", "b", "c"]
        assert len(THREE_ROUNDS.asked) - asked == 3 - state["rounds"]
        assert THREE_ROUNDS.asked[-1] == THREE_ROUNDS.asked[2], "the model sees what it has seen before"


async def test_calls_are_announced_in_order_before_any_result(bench: Bench) -> None:
    items = await bench.items(THREE_ROUNDS)
    kinds = [type(item).__name__ for item in items if isinstance(item, (ToolCall, ToolResult))]
    assert kinds == ["ToolCall", "ToolCall", "ToolResult", "ToolResult", "ToolCall", "ToolResult"]


async def test_each_result_comes_when_it_is_there(bench: Bench) -> None:
    go = asyncio.Event()

    @tool
    async def wait(first: bool) -> None:
        if first:
            await go.wait()

    bench.tools = Tools([make_tool(wait, default_timeout=5)])
    calls = [Call(id=str(n), name="wait", arguments=json.dumps({"first": n == 0})) for n in range(3)]
    ended = []
    async for item in bench.agent(Scripted([*calls, end("tool_calls")], [Text(text="done"), end()])):
        if isinstance(item, ToolResult):
            ended.append(item.id)
            if len(ended) == 2:
                go.set()
    assert ended == ["1", "2", "0"]


async def test_a_model_that_calls_tools_for_ever_is_asked_without_them_in_the_end(bench: Bench) -> None:
    calls: list[list[Piece]] = [[count(str(n)), end("tool_calls")] for n in range(5)]
    obstinate = Scripted(*calls)
    assert error(await bench.items(obstinate))[0] == "too_many_rounds"
    assert [bool(tools) for _, tools in obstinate.asked] == [True] * 4 + [False]
    assert len(bench.counted) == 4, "the last calls are not carried out"
    final = (await bench.items(Scripted(*calls[:4], [Text(text="Well."), end()])))[-1]
    assert isinstance(final, Final) and final.usage == {"rounds": 5, "model": "m", "finish_reason": "stop"}


async def test_a_round_of_any_number_of_calls_runs_so_many_at_once(bench: Bench) -> None:
    at_once = most = 0

    @tool
    async def slow() -> None:
        nonlocal at_once, most
        at_once += 1
        most = max(most, at_once)
        await asyncio.sleep(0.01)
        at_once -= 1

    bench.tools = Tools([make_tool(slow, default_timeout=5)])
    calls = [Call(id=str(n), name="slow", arguments="") for n in range(3 * CALLS_AT_ONCE)]
    items = await bench.items(Scripted([*calls, end("tool_calls")], [Text(text="done"), end()]))
    assert sum(isinstance(item, ToolResult) for item in items) == len(calls) and most == CALLS_AT_ONCE


async def test_what_the_model_said_before_it_failed_comes_first(bench: Bench) -> None:
    items = await bench.items(Scripted([Text(text="so far"), ModelError("model_broken", "why")]))
    assert (said(items), error(items)) == ("so far", ("model_broken", "why"))


async def test_an_answer_without_an_end_is_a_broken_one(bench: Bench) -> None:
    assert error(await bench.items(Scripted([Text(text="so far")])))[0] == "model_broken"


async def test_a_conversation_that_is_too_large_for_a_checkpoint_goes_on_without(
    bench: Bench, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And is not written again with each result, only to be too large again."""
    written: list[int] = []

    def counted(value: Any) -> str:
        written.append(len(dumps(value)))
        return dumps(value)

    monkeypatch.setattr(states_module, "dumps", counted)
    rounds: list[list[Piece]] = [[count(str(n), 20_000), end("tool_calls")] for n in range(3)]
    rounds.append([*(count(str(n), 20_000) for n in range(3, 6)), end("tool_calls")])
    items = await bench.items(Scripted(*rounds, [Text(text="done"), end()]))
    assert isinstance(items[-1], Final) and said(items) == "done"
    states = [len(dumps(item.state)) for item in items if isinstance(item, Checkpoint)]
    assert len(states) == 7 and max(states) <= MAX_EVENT_BYTES
    assert sum("too large for a checkpoint" in record.message for record in caplog.records) == 1
    assert sum(size > MAX_EVENT_BYTES for size in written) == 1


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        ('{"what": NaN}', '{"what": NaN}'),
        ("", {}),
        ("[" * 50_000 + "]" * 50_000, "["),
        (json.dumps({"what": "é" * 50_000}), '{"what": "'),
        ('{"what": 1e999}', '{"what": 1e999}'),
    ],
)
async def test_any_arguments_are_an_event(bench: Bench, arguments: str, shown: Any) -> None:
    call = Call(id="1", name="x" * 70_000, arguments=arguments)
    items = await bench.items(Scripted([call, end("tool_calls")], [Text(text="ok"), end()]))
    assert isinstance(items[-1], Final)
    [called] = [item for item in items if isinstance(item, ToolCall)]
    assert called.args == shown if len(arguments) < 100 else str(called.args).startswith(shown)
    assert all(len(item.json_data()) <= MAX_EVENT_BYTES for item in items if isinstance(item, Event))


async def test_a_hundred_thousand_tokens_fit_into_a_log(bench: Bench) -> None:
    texts = [f"w{n} " for n in range(100_001)]
    items = await bench.items(Scripted([*[Text(text=text) for text in texts], end()], pause=True))
    assert said(items) == "".join(texts)
    assert FREELY <= len(items) < 15_000


async def test_a_model_is_not_read_ahead_of_a_log_that_does_not_take(bench: Bench) -> None:
    model = Scripted([*[Text(text="x" * 1000) for _ in range(1000)], end()])
    agent = bench.agent(model)
    await anext(agent)
    before = model.read
    await asyncio.sleep(0.05)
    assert model.read - before <= 66, "what the buffer holds"
    rest = said([item async for item in agent])
    assert len(rest) > 900_000


async def test_closing_the_agent_closes_the_model_and_its_tools(bench: Bench) -> None:
    closed = []

    class Endless(Scripted):
        async def stream(self, *_: Any) -> AsyncIterator[Piece]:
            try:
                while True:
                    yield Text(text="x")
                    await asyncio.sleep(0.001)
            finally:
                closed.append("model")

    agent: Any = bench.agent(Endless())
    await anext(agent)
    await agent.aclose()
    assert closed == ["model"]

    @tool
    async def lasts() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            closed.append("tool")

    bench.tools = Tools([make_tool(lasts, default_timeout=50)])
    agent = bench.agent(Scripted([Call(id="1", name="lasts", arguments=""), end("tool_calls")]))
    assert isinstance(await anext(agent), ToolCall) and isinstance(await anext(agent), Checkpoint)
    waiting = asyncio.create_task(anext(agent))
    await asyncio.sleep(0.05)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    await agent.aclose()
    await until(lambda: closed == ["model", "tool"])


async def test_the_history_is_read_only_where_it_is_wanted(bench: Bench) -> None:
    reads = []

    async def recall(tokens: int) -> list[Turn]:
        reads.append(tokens)
        return [Turn(request_id="1", agent="chat", query="before?", answer="yes", created_at=1.0)]

    run = replace(RUN, recall=recall)
    model = Scripted([Text(text="?")], [Text(text="ok"), end()])
    await bench.items(model, run)
    assert reads == [100]
    assert [message["content"] for message in model.asked[0][0]] == ["before?", "yes", "q"]
    await bench.items(model, replace(run, parameters={"unknown": 1}))
    await bench.items(model, run, SETTINGS.model_copy(update={"history_tokens": 0}))
    assert reads == [100]
