"""Tools: what a model is told of a function, what becomes of its arguments, and of what the function does."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, Field

from broker.errors import Misconfigured
from broker.events import ToolCall, ToolResult, dumps
from broker.settings import Settings
from tests.kit.waiting import until
from worker import Run, threads, tool
from worker.agent import MAX_EVENT_BYTES
from worker.agents.search import make_search
from worker.models.model import Call
from worker.tools import registry
from worker.tools.registry import Tools, load_tools
from worker.tools.result import MAX_RESULT_BYTES, BadResult, cut, make_result
from worker.tools.tool import BadArguments, BadTool, Tool, make_tool

RUN = Run(request_id="a" * 32, query="q", tenant="acme", subject="alice")


class Place(BaseModel):
    city: str
    country: str = "CH"


def of(function: Callable[..., Any], **options: Any) -> Tool:
    return make_tool(tool(**options)(function), default_timeout=5)


async def call(function: Callable[..., Any], arguments: Any = None, **options: Any) -> Any:
    """The value of the result."""
    text = arguments if isinstance(arguments, str) else json.dumps(arguments or {})
    made = of(function, **options)
    result = await Tools([made]).call(Call(id="c", name=made.name, arguments=text), RUN, [made.name])
    assert result.text == result.value or json.loads(result.text) == result.value
    return result.value


# -- what a model is told -------------------------------------------------------------------------------------------


def test_a_function_is_told_by_its_name_its_docstring_and_its_types() -> None:
    @tool
    def weather(city: Annotated[str, Field(description="Where.")], days: int = 3, unit: Literal["C", "F"] = "C") -> str:
        """The weather of the next days.

        Of any city.
        """
        return f"{city} {days} {unit}"

    assert weather("Bern") == "Bern 3 C", "it stays a function"
    made = make_tool(weather, default_timeout=7)
    assert (made.name, made.timeout) == ("weather", 7)
    assert made.description == "The weather of the next days.\n\nOf any city."
    assert made.schema == {
        "type": "object",
        "properties": {
            "city": {"type": "string", "description": "Where."},
            "days": {"type": "integer", "default": 3},
            "unit": {"type": "string", "enum": ["C", "F"], "default": "C"},
        },
        "required": ["city"],
        "additionalProperties": False,
    }
    [spec] = Tools([made]).specs(["weather"])
    assert (spec.name, spec.description, spec.parameters) == ("weather", made.description, made.schema)


def test_the_run_is_given_by_us_and_hidden_from_the_model() -> None:
    def who(run: Run, greeting: str) -> str:
        return ""

    made = of(who)
    assert list(made.schema["properties"]) == ["greeting"]
    assert made.bind('{"greeting": "hi"}', RUN) == {"greeting": "hi", "run": RUN}
    with pytest.raises(BadArguments, match="run"):
        made.bind('{"greeting": "hi", "run": {}}', RUN)


def test_a_decorator_may_name_it_and_limit_its_time() -> None:
    made = of(lambda: 1, name="one", timeout=0.5)
    assert (made.name, made.timeout, made.schema["properties"]) == ("one", 0.5, {})


def test_a_parameter_may_have_any_name() -> None:
    def odd(schema: int, _id: int, model_dump: int, copy: int = 1) -> None: ...

    made = of(odd)
    assert list(made.schema["properties"]) == ["schema", "_id", "model_dump", "copy"]
    given = {"schema": 1, "_id": 2, "model_dump": 3}
    assert made.bind(json.dumps(given), RUN) == {**given, "copy": 1}


def test_models_dataclasses_and_unions_are_arguments_too() -> None:
    @dataclass
    class Span:
        first: date
        last: date | None = None

    async def plan(places: list[Place], span: Span, *, note: str | None = None) -> None: ...

    made = make_tool(tool(_resolved(plan, Span=Span)), default_timeout=1)
    bound = made.bind('{"places": [{"city": "Bern"}], "span": {"first": "2026-01-02"}}', RUN)
    assert bound == {"places": [Place(city="Bern")], "span": Span(date(2026, 1, 2)), "note": None}


def _resolved(function: Callable[..., Any], **names: Any) -> Callable[..., Any]:
    """Annotations are text in this file, and these names are not its globals."""
    function.__globals__.update(names)
    return function


def _unfit() -> dict[str, Callable[..., Any]]:
    def untyped(a): ...  # type: ignore[no-untyped-def]
    def starred(*rest: int) -> None: ...
    def keywords(**rest: int) -> None: ...
    def positional(a: int, /) -> None: ...
    def unknown(a: Nowhere) -> None: ...  # type: ignore[name-defined]  # noqa: F821
    def uncheckable(a: threading.Lock) -> None: ...
    def without_schema(a: Callable[[], int]) -> None: ...

    def yields() -> Any:
        yield 1

    async def yields_async() -> Any:
        yield 1

    return {
        "parameter a has no type": untyped,
        "parameter rest has no name": starred,
        "rest has no name": keywords,
        "parameter a has no name": positional,
        "'Nowhere' is not defined": unknown,
        "cannot be checked": uncheckable,
        "no JSON schema": without_schema,
        "it yields": yields,
        "it yields; ": yields_async,
    }


@pytest.mark.parametrize(("why", "function"), _unfit().items())
def test_a_function_that_cannot_be_a_tool_is_refused(why: str, function: Callable[..., Any]) -> None:
    with pytest.raises(BadTool, match=why):
        of(function)


@pytest.mark.parametrize("timeout", [0, -1, float("nan"), float("inf"), "3", True])
def test_a_timeout_is_seconds_above_0(timeout: Any) -> None:
    with pytest.raises(BadTool, match="timeout="):
        of(lambda: 1, name="x", timeout=timeout)


@pytest.mark.parametrize("name", ["", "<lambda>", "a b", "x" * 65, "é"])
def test_a_name_is_what_servers_take(name: str) -> None:
    with pytest.raises(BadTool, match="name"):
        of(lambda: 1, name=name)


# -- the tools of a worker ------------------------------------------------------------------------------------------

GOOD = "from worker import tool\n@tool\ndef one() -> int:\n    return 1\n@tool\nasync def two() -> int:\n    return 2\n"


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Settings]]:
    """Writes modules into the working directory. Returns settings that name them."""
    monkeypatch.chdir(tmp_path)

    def write(**sources: str) -> Settings:
        for name, source in sources.items():
            (tmp_path / f"{name}.py").write_text(source)
        return Settings(tools=tuple(sources), tool_seconds=9)

    yield write
    sys.path[:] = [place for place in sys.path if place != str(tmp_path)]
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


def test_every_decorated_function_of_a_module_is_a_tool_of_the_worker(modules: Callable[..., Settings]) -> None:
    tools = load_tools(modules(mine_a=GOOD, mine_b="from mine_a import one\nfrom worker import tool\n"))
    assert tools.names == ("one", "two"), "what a module has from another is the same tool"
    assert load_tools(Settings()).names == ()


@pytest.mark.parametrize(
    ("source", "why"),
    [
        ("import nowhere_at_all", "importing mine_c failed: ModuleNotFoundError"),
        ("raise SystemExit(3)", "importing mine_c failed: SystemExit"),
        ("x = 1", "mine_c has no function with the decorator @tool"),
        (GOOD + "@tool\ndef bad(x): ...", "mine_c: bad cannot be a tool: its parameter x has no type"),
        (GOOD.replace("def two", "def one_more").replace("@tool\nasync", "@tool(name='one')\nasync"),
         "mine_c: one_more has the name of mine_c: one, 'one'"),
    ],
)  # fmt: skip
def test_what_cannot_be_loaded_refuses_to_start_by_name(
    modules: Callable[..., Settings], source: str, why: str
) -> None:
    with pytest.raises(Misconfigured, match="BROKER_TOOLS: ") as refused:
        load_tools(modules(mine_c=source))
    assert why in str(refused.value)


def test_the_example_of_the_documentation_is_a_tool_in_ten_lines(modules: Callable[..., Settings]) -> None:
    page = (Path(__file__).parents[2] / "docs" / "agents.md").read_text()
    [example] = [
        block for block in re.findall(r"```python\n(.*?)```", page, re.S) if "from worker import tool" in block
    ]
    assert example.count("\n") <= 10
    assert load_tools(modules(my_tools=example)).names == ("local_time",)


async def test_the_documents_can_be_searched_where_there_are_any(tmp_path: Path) -> None:
    (tmp_path / "reef.md").write_text("# Reefs\n\nCoral polyps build reefs out of limestone.\n")
    tools = load_tools(Settings(), [make_search(tmp_path)])
    assert tools.names == ("search_documents",)
    asked = Call(id="c", name="search_documents", arguments='{"query": "How do corals build reefs?"}')
    result = await tools.call(asked, RUN, tools.names)
    assert result.value == [
        {
            "path": "reef.md",
            "line": 3,
            "title": "Reefs",
            "heading": "",
            "text": "Coral polyps build reefs out of limestone.",
        }
    ]
    asked = Call(id="c", name="search_documents", arguments='{"query": "x", "limit": 1000}')
    assert "limit" in (await tools.call(asked, RUN, tools.names)).value["error"]


# -- a call --------------------------------------------------------------------------------------------------------


async def test_functions_are_called_with_what_the_model_gives() -> None:
    def add(a: int, b: int = 2) -> int:
        return a + b

    async def greet(run: Run, name: str) -> str:
        return f"{run.subject} greets {name}"

    assert await call(add, {"a": 1}) == 3
    assert await call(add, {"a": "40"}) == 42, "as lenient as pydantic"
    assert await call(greet, {"name": "Bob"}) == "alice greets Bob"
    assert await call(lambda: 1, "", name="none") == 1


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ("{", "The arguments are not JSON"),
        ('{"a": NaN}', "The arguments are not JSON"),
        ("[1]", "must be a JSON object"),
        ("{}", "a: Field required"),
        ('{"a": 1, "z": 2}', "z: Extra inputs are not permitted"),
        ('{"a": "x", "b": {"city": 3}}', "b.city: Input should be a valid string"),
        ("[" * 100_000, "The arguments"),
    ],
)
async def test_bad_arguments_go_back_to_the_model(arguments: str, why: str) -> None:
    def takes(a: int, b: Place | None = None) -> None: ...

    assert why in (await call(takes, arguments))["error"]


async def test_a_tool_that_does_not_exist_or_is_not_allowed_goes_back_to_the_model() -> None:
    tools = Tools([of(lambda: 1, name="one"), of(lambda: 2, name="two")])
    for name in ("three", "two"):
        result = await tools.call(Call(id="c", name=name, arguments="{}"), RUN, ["one"])
        assert result.value == {"error": "There is no tool of this name. Tools: one."}


class Strange(BaseException):
    pass


@pytest.mark.parametrize("asynchronous", [True, False])
@pytest.mark.parametrize("raised", [ValueError, StopIteration, SystemExit, KeyboardInterrupt, GeneratorExit,
                                    asyncio.CancelledError, TimeoutError, Strange])  # fmt: skip
async def test_a_tool_that_raises_goes_back_to_the_model(
    asynchronous: bool, raised: type[BaseException], caplog: pytest.LogCaptureFixture
) -> None:
    def sync() -> None:
        raise raised("no such city")

    async def coroutine() -> None:
        raise raised("no such city")

    error = (await call(coroutine if asynchronous else sync))["error"]
    if raised in (ValueError, TimeoutError):
        assert error == f"{raised.__name__}: no such city"
    [record] = [record for record in caplog.records if record.message == "a tool failed"]
    assert record.exc_info is not None, "the traceback is in the worker's log"
    assert record.__dict__["request_id"] == RUN.request_id
    assert "Traceback" not in error


async def test_an_exception_that_cannot_be_written_goes_back_by_its_name() -> None:
    class Mute(Exception):
        def __str__(self) -> str:
            raise RuntimeError("no words")

    async def fails() -> None:
        raise Mute

    assert await call(fails) == {"error": "Mute"}


async def test_a_tool_that_takes_too_long_goes_back_to_the_model() -> None:
    closed = []

    async def slow() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            closed.append(True)

    assert (await call(slow, timeout=0.05))["error"] == "The tool did not answer within 0.05 seconds."
    assert closed, "it was cancelled"


async def test_a_thread_that_takes_too_long_is_left_behind_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    go = threading.Event()
    error = (await call(lambda: go.wait(30), name="blocks", timeout=0.05))["error"]
    assert error == "The tool did not answer within 0.05 seconds."
    [record] = [record for record in caplog.records if "left behind" in record.message]
    assert (record.levelno, record.__dict__["tool"]) == (logging.WARNING, "blocks")
    assert any(thread.name.startswith("tool ") and thread.daemon for thread in threading.enumerate())
    go.set()
    await until(lambda: not any(thread.name.startswith("tool ") for thread in threading.enumerate()))


async def test_a_coroutine_that_does_not_end_is_left_behind(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(registry, "CLOSE_SECONDS", 0.05)
    go = asyncio.Event()

    async def stubborn() -> None:
        while not go.is_set():
            try:
                await go.wait()
            except asyncio.CancelledError:
                continue

    assert "did not answer" in (await call(stubborn, timeout=0.05))["error"]
    assert [record for record in caplog.records if "left behind" in record.message]
    go.set()
    await until(lambda: not registry._left_behind)


async def test_threads_that_hang_hold_neither_the_event_loops_own_nor_more_than_their_share(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(threads, "MOST_THREADS", 40)
    go = threading.Event()
    made = of(lambda: go.wait(30), name="blocks", timeout=0.3)
    tools = Tools([made])
    asked = Call(id="c", name="blocks", arguments="{}")
    calls = [asyncio.create_task(tools.call(asked, RUN, ["blocks"])) for _ in range(60)]
    await until(lambda: sum(thread.name.startswith("tool ") for thread in threading.enumerate()) == 40)
    assert await asyncio.to_thread(lambda: "free") == "free", "more than the event loop's own would have been"
    results = [await each for each in calls]
    assert all("did not answer" in result.value["error"] for result in results)
    go.set()
    await until(lambda: not any(thread.name.startswith("tool ") for thread in threading.enumerate()))
    quick = of(lambda: "again", name="blocks")
    tools._tools["blocks"] = quick
    assert (await tools.call(asked, RUN, ["blocks"])).value == "again", "the threads that ended made room"


async def test_cancelling_a_call_cancels_its_tool() -> None:
    began, closed = asyncio.Event(), []

    async def slow() -> None:
        began.set()
        try:
            await asyncio.sleep(60)
        finally:
            closed.append(True)

    calling = asyncio.create_task(call(slow, timeout=50))
    await began.wait()
    calling.cancel()
    with pytest.raises(asyncio.CancelledError):
        await calling
    assert closed


async def test_a_function_that_blocks_does_not_block_the_event_loop() -> None:
    def slow() -> str:
        time.sleep(0.3)
        return "done"

    turns = 0
    calling = asyncio.create_task(call(slow))
    while not calling.done():
        turns += 1
        await asyncio.sleep(0.01)
    assert await calling == "done" and turns > 3


# -- results -------------------------------------------------------------------------------------------------------


async def test_results_are_text_or_what_json_can_carry() -> None:
    @dataclass
    class Found:
        at: date
        place: Place

    values: list[tuple[Any, Any]] = [
        ("plain", "plain"),
        ("\ud800 é", "\ud800 é"),
        (None, None),
        ([1, {"a": 2.5}], [1, {"a": 2.5}]),
        (Place(city="Bern"), {"city": "Bern", "country": "CH"}),
        ({"found": Found(date(2026, 1, 2), Place(city="x"))},
         {"found": {"at": "2026-01-02", "place": {"city": "x", "country": "CH"}}}),
        ((1, 2), [1, 2]),
    ]  # fmt: skip
    for returned, expected in values:
        assert make_result(returned).value == expected

        def gives() -> Any:
            return returned  # noqa: B023

        assert await call(gives) == expected


@pytest.mark.parametrize("returned", [float("nan"), object(), {"a": threading.Lock()}, b"\xff"])
async def test_what_json_cannot_carry_goes_back_to_the_model(returned: object) -> None:
    with pytest.raises(BadResult, match=f"returned a {type(returned).__name__}"):
        make_result(returned)


@pytest.mark.parametrize("returned", ["x" * 40_000, "é" * 10_000, ["word"] * 10_000, [{"a": "😀" * 9_000}]])
def test_a_result_that_is_too_large_is_cut_and_says_so(returned: Any) -> None:
    result = make_result(returned)
    assert result.value == result.text
    assert "\n[cut: these are the first " in result.text
    event = ToolResult(id="c" * 64, tool="t" * 200, result=result.value)
    assert len(event.json_data()) <= MAX_EVENT_BYTES


@given(st.text(st.characters(), max_size=400), st.integers(100, 600))
def test_a_cut_text_is_its_beginning_and_within_the_limit(text: str, limit: int) -> None:
    kept = cut(text, limit)
    assert len(dumps(kept)) <= limit
    beginning, mark, note = kept.rpartition("\n[cut: these are the first ")
    if kept != text:
        assert mark and text.startswith(beginning)
        assert note == f"{len(beginning)} of {len(text)} characters]"
        assert len(beginning) == len(text) or len(dumps(text[: len(beginning) + 10])) > limit - 130


def test_an_error_and_the_largest_arguments_fit_into_an_event() -> None:
    event = ToolCall(id="c" * 64, tool=cut("é" * 5000, 200), args=cut("😀" * 100_000))
    assert len(event.json_data()) <= MAX_EVENT_BYTES and MAX_RESULT_BYTES < MAX_EVENT_BYTES
