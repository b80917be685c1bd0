"""The built-in agent: what it finds in tests/corpus, what it says, and that it can be stopped anywhere."""

from __future__ import annotations

import asyncio
import html
import json
import re
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from pathlib import Path
from typing import Any, NamedTuple, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from broker.events import AGENT, Error, Event, Final, Message, Progress, Reasoning, Sources, Token, dumps
from broker.settings import Settings
from worker.agent import Agent, Checkpoint, Run
from worker.agents import joiner, research
from worker.agents.research import (
    MOST_SOURCES,
    Quoted,
    make_research,
    split,
)
from worker.agents.research_model import NO_DOCUMENTS, NOTHING_FOUND
from worker.agents.stages import fitted
from worker.agents.states import restored
from worker.documents import folder
from worker.documents import index as index_module
from worker.documents.folder import quotable_text
from worker.documents.index import index_of
from worker.documents.text import Passage
from worker.models.model import End, Piece, Text, Thought

CORPUS = Path(__file__).parent.parent / "corpus"


class Question(NamedTuple):
    question: str
    path: str
    phrase: str


QUESTIONS = [Question(**item) for item in json.loads((CORPUS / "questions.json").read_text())]
BAD_PACES: list[Any] = [0, -1, "fast", True, float("nan"), float("inf"), 10**400, [1], {}]
BAD_MAX_SOURCES: list[Any] = [0, 21, -1, 1.5, "3", True, [1], 10**30]
GREEN_TEA = "How hot should the water be for green tea?"


class Outcome(NamedTuple):
    steps: list[Event | Checkpoint]

    def of(self, kind: type[Any]) -> list[Any]:
        return [step for step in self.steps if isinstance(step, kind)]

    @property
    def final(self) -> Final:
        (final,) = self.of(Final)
        return cast(Final, final)

    @property
    def tokens(self) -> str:
        return "".join(token.text for token in self.of(Token))

    @property
    def state(self) -> Any:
        """The state of the checkpoint, through the JSON that a store makes of it."""
        (checkpoint,) = self.of(Checkpoint)
        return json.loads(dumps(checkpoint.state))

    def stage(self, stage: str) -> list[dict[str, Any]]:
        (sources,) = [sources for sources in self.of(Sources) if sources.stage == stage]
        assert sources.count == len(sources.items)
        return cast(list[dict[str, Any]], sources.items)


def a_run(query: str = GREEN_TEA, *, restored: Any = None, **parameters: Any) -> Run:
    return Run(request_id="0" * 32, query=query, parameters=parameters, restored=restored)


def start(agent: Agent, run: Run) -> AsyncGenerator[Event | Checkpoint]:
    return cast("AsyncGenerator[Event | Checkpoint]", agent(run))


async def outcome(agent: Agent, run: Run) -> Outcome:
    async with aclosing(start(agent, run)) as steps:
        return Outcome([step async for step in steps])


async def ask(query: str = GREEN_TEA, docs: Path | None = CORPUS, **parameters: Any) -> Outcome:
    return await outcome(make_research(docs), a_run(query, **parameters))


def passage_at(path: str, line: int) -> Passage:
    found = folder.read(CORPUS, path)
    assert found is not None
    (passage,) = [passage for passage in found if passage.line == line]
    return passage


def rank(question: Question, items: list[dict[str, Any]]) -> int | None:
    """The place of the right passage in a stage, from 1."""
    for place, item in enumerate(items, 1):
        if item["path"] == question.path and question.phrase in passage_at(item["path"], item["line"]).text:
            return place
    return None


def text_of(path: Path) -> str:
    """The text of a file, with as little of the readers' help as possible."""
    raw = path.read_text()
    if path.suffix == ".html":
        raw = html.unescape(re.sub(r"<[^>]+>", "", raw))
    return " ".join(raw.split())


# Retrieval


def test_the_questions_are_fit_to_measure_with() -> None:
    assert len(QUESTIONS) == 20
    assert len({question.path for question in QUESTIONS}) == 20
    for question in QUESTIONS:
        assert question.phrase in text_of(CORPUS / question.path)
        assert question.phrase.lower() not in question.question.lower()


async def test_the_right_passage_is_among_the_first_three_for_18_of_20_questions() -> None:
    missed = []
    for question in QUESTIONS:
        place = rank(question, (await ask(question.question)).stage("screened"))
        if place is None or place > 3:
            missed.append((question.question, place))
    assert len(missed) <= 2, missed


@pytest.mark.parametrize("question", QUESTIONS, ids=lambda question: question.path)
async def test_every_citation_is_a_sentence_of_its_file(question: Question) -> None:
    result = await ask(question.question, max_sources=MOST_SOURCES)
    citations = result.final.citations
    assert citations
    for citation in citations:
        assert set(citation) == {"number", "title", "path", "line", "sentence", "score"}
        assert citation["sentence"] in text_of(CORPUS / citation["path"])
        assert citation["sentence"] in quotable_text(CORPUS, citation["path"])
        line = (CORPUS / citation["path"]).read_text().split("\n")[citation["line"] - 1]
        assert citation["sentence"].split()[0] in re.sub(r"<[^>]+>", "", line)
        assert 0 < citation["score"] <= 1
    assert [citation["number"] for citation in citations] == list(range(1, len(citations) + 1))


@pytest.mark.parametrize("question", QUESTIONS, ids=lambda question: question.path)
async def test_the_answer_is_its_sentences_with_their_numbers(question: Question) -> None:
    result = await ask(question.question)
    assert result.tokens == result.final.answer
    assert result.final.answer == " ".join(f"{c['sentence']} [{c['number']}]" for c in result.final.citations)


async def test_the_answer_says_what_was_asked() -> None:
    assert "cool to about 80 degrees" in (await ask(GREEN_TEA)).tokens
    assert "copper instead of iron" in (await ask("Why does an octopus have blue blood?")).tokens


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("Zebras have stripes.\n", "Zebras have stripes. [1]"),
        ("- Zebra: striped\n", "Zebra: striped [1]"),
        ("# Questions\n\nWhat does a zebra have?\n\nIt has many stripes.\n", "It has many stripes. [1]"),
    ],
)
async def test_short_documents_are_quoted_too(tmp_path: Path, text: str, answer: str) -> None:
    (tmp_path / "zebra.md").write_text(text)
    assert (await ask("Does the zebra have stripes?", tmp_path)).tokens == answer


async def test_the_same_sentence_in_two_files_is_quoted_once(tmp_path: Path) -> None:
    for name in ("a.md", "b.txt", "c.rst"):
        (tmp_path / name).write_text("The capital of Utopia is Amaurot.\n")
    result = await ask("What is the capital of Utopia?", tmp_path)
    assert len(result.final.citations) == 1
    assert len(result.stage("screened")) == 3


@pytest.mark.parametrize(
    "query",
    [
        "Who won the football world cup in 2018?",
        "Explain Kubernetes pod eviction",
        "How do I renew my passport?",
        "How tall is the Eiffel tower in metres?",
        "What is it about?",
        "",
    ],
)
async def test_a_question_that_the_documents_do_not_answer_is_not_answered(query: str) -> None:
    result = await ask(query)
    assert result.final.answer == result.tokens == NOTHING_FOUND
    assert result.final.citations == []
    assert result.of(Message)[-1].text == NOTHING_FOUND


async def test_without_documents_it_says_so(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("not a folder")
    for docs in (None, tmp_path / "missing", tmp_path / "empty", tmp_path / "file"):
        result = await ask(docs=docs)
        assert result.final.answer == result.tokens == NO_DOCUMENTS
        assert result.final.citations == []
        assert result.of(Message)[-1].text == NO_DOCUMENTS


async def test_it_follows_its_documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_module, "RESCAN_SECONDS", 0.0)
    agent, run = make_research(tmp_path), a_run("What is the capital of Utopia?")
    file = tmp_path / "utopia.md"
    assert (await outcome(agent, run)).tokens == NO_DOCUMENTS
    file.write_text("The capital of Utopia is Amaurot.\n")
    assert (await outcome(agent, run)).tokens == "The capital of Utopia is Amaurot. [1]"
    file.write_text("The capital of Utopia has moved.\n")
    assert (await outcome(agent, run)).tokens == "The capital of Utopia has moved. [1]"
    file.unlink()
    assert (await outcome(agent, run)).tokens == NO_DOCUMENTS


# Events


async def test_the_events_come_in_their_order() -> None:
    result = await ask()
    kinds = [step.type if isinstance(step, Event) else "checkpoint" for step in result.steps]
    assert [kind for kind in kinds if kind not in ("progress", "token")] == [
        *("message", "sources", "sources", "sources", "checkpoint", "final"),
    ]
    assert [sources.stage for sources in result.of(Sources)] == ["discovered", "screened", "analyzed"]
    assert kinds.index("checkpoint") < kinds.index("token")
    assert kinds[-1] == "final"
    assert all(isinstance(step, (*AGENT, Checkpoint)) for step in result.steps)


async def test_progress_rises_to_100() -> None:
    percents = [progress.percent for progress in (await ask()).of(Progress)]
    assert percents == sorted(set(percents))
    assert percents[-1] == 100


async def test_each_stage_keeps_some_of_the_one_before() -> None:
    result = await ask()
    stages = [
        {(item["path"], item["line"]) for item in result.stage(name)} for name in ("discovered", "screened", "analyzed")
    ]
    assert stages[0] > stages[1] >= stages[2]
    assert len(stages[0]) <= 20
    assert {citation["path"] for citation in result.final.citations} == {path for path, _ in stages[2]}
    for item in result.stage("screened"):
        assert set(item) == {"title", "heading", "path", "line", "score", "passage"}
        assert 0 < item["score"] <= 1


async def test_a_token_is_a_word_with_the_space_after_it() -> None:
    tokens = [token.text for token in (await ask()).of(Token)]
    assert len(tokens) > 10
    assert all(len(token.split()) == 1 for token in tokens)


@given(st.text())
def test_the_pieces_of_an_answer_are_the_answer(answer: str) -> None:
    assert "".join(split(answer)) == answer
    assert all(split(answer))


@settings(max_examples=50)
@given(st.text(st.characters(), max_size=100))
def test_any_query_ends_in_a_final_that_json_can_carry(query: str) -> None:
    result = asyncio.run(ask(query))
    assert result.final.answer == result.tokens
    for event in result.of(Event):
        event.json_data().encode()


async def test_a_huge_query_is_a_query() -> None:
    assert (await ask("green tea water " + '"x" AND ' * 12_000)).final.citations


# Parameters


async def test_max_sources_limits_the_sources() -> None:
    for most in (1, 2, MOST_SOURCES):
        result = await ask(max_sources=most)
        assert 1 <= len(result.stage("screened")) <= most
        assert len({(item["path"], item["line"]) for item in result.stage("analyzed")}) <= most


async def test_pace_is_the_number_of_tokens_in_a_second() -> None:
    began = time.perf_counter()
    result = await ask(pace=200)
    assert time.perf_counter() - began >= (len(result.of(Token)) - 1) / 200
    assert result.tokens == (await ask()).tokens


async def test_pace_does_not_make_up_for_a_slow_reader() -> None:
    arrivals = list[float]()
    async with aclosing(start(make_research(CORPUS), a_run(pace=50))) as steps:
        async for step in steps:
            if isinstance(step, Token):
                arrivals.append(time.perf_counter())
                await asyncio.sleep(0.2 if len(arrivals) == 1 else 0)
            if len(arrivals) == 6:
                break
    assert arrivals[5] - arrivals[1] >= 4 / 50 / 2


@pytest.mark.parametrize(
    "parameters",
    [
        *({"pace": bad} for bad in BAD_PACES),
        *({"max_sources": bad} for bad in BAD_MAX_SOURCES),
    ],
    ids=lambda parameters: ascii(parameters)[:30],
)
async def test_a_bad_parameter_is_named(parameters: dict[str, Any]) -> None:
    (name,) = parameters
    (error,) = (await ask(**parameters)).steps
    assert isinstance(error, Error)
    assert error.code == "invalid_parameter"
    assert error.message.startswith(f"{name} must be")


async def test_parameters_may_be_absent_or_null_or_for_a_model_that_is_not_there() -> None:
    assert (await ask(pace=None, max_sources=None, temperature=1, model=False)).final == (await ask()).final


@pytest.mark.parametrize("unknown", ["language", "max_source", "\ud800" * 100_000])
async def test_a_parameter_that_research_does_not_have_is_named(unknown: str) -> None:
    given: dict[str, Any] = {unknown: "en"}
    (error,) = (await ask(**given)).steps
    assert isinstance(error, Error)
    assert error.code == "invalid_parameter"
    assert error.message.startswith(f"research has no parameter {unknown[:100]}")
    assert len(error.json_data()) < 64 * 1024
    if len(unknown) < 100:
        assert "; it has model, temperature, " in error.message and "max_sources" in error.message


# With a model


@given(text=st.text(max_size=300), most=st.integers(6, 400))
def test_a_text_is_fitted_into_bytes(text: str, most: int) -> None:
    room = len(dumps("")) + max(most, len(dumps("…")))
    shown = fitted(text, room)
    assert len(dumps(shown)) <= room
    assert shown == text if len(dumps(text)) <= room else shown.endswith("…") and text.startswith(shown[:-1])


async def test_the_stages_share_the_room_that_a_log_has_for_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """A late attempt has one piece that leaves freely; all others wait for more, here until their stage has ended."""

    class Thinks:
        async def stream(self, *_: object) -> AsyncIterator[Piece]:
            for _n in range(5):
                yield Thought(text="hm ")
                await asyncio.sleep(0.01)
            yield Text(text="Green tea.")
            yield End(reason="stop")

    monkeypatch.setattr(joiner, "PAUSE_SECONDS", 600.0)
    monkeypatch.setattr(research, "open_model", lambda _: Thinks())
    run = Run(request_id="0" * 32, query=GREEN_TEA, attempt=14, deadline=time.time() + 60)
    steps = [step async for step in make_research(CORPUS, Settings(model="m"))(run)]
    thoughts = [step.text for step in steps if isinstance(step, Reasoning)]
    assert "".join(thoughts) == "hm " * 15
    assert len(thoughts) == 4


# Restoring


async def test_a_restored_state_gives_the_same_answer_without_retrieval(monkeypatch: pytest.MonkeyPatch) -> None:
    first = await ask()
    monkeypatch.setattr(index_module.Index, "search", None)
    again = await ask(restored=first.state)
    assert again.final == first.final
    assert again.tokens == first.tokens
    assert not again.of(Sources)
    assert not again.of(Checkpoint)


async def test_a_restored_answer_of_nothing_is_the_same() -> None:
    for docs, query in ((CORPUS, "Explain Kubernetes"), (None, "Explain Kubernetes")):
        first = await ask(query, docs)
        assert (await ask(query, docs, restored=first.state)).final == first.final


@pytest.mark.parametrize("state", [0, "", [], {}, {"version": 2}, {"citations": [{}]}, {"unknown": True}])
async def test_a_foreign_state_is_not_used(state: Any) -> None:
    assert (await ask(restored=state)).final == (await ask()).final


async def test_the_state_is_small(tmp_path: Path) -> None:
    for number in range(30):
        (tmp_path / f"{number}.txt").write_text("\U0001f993 tea word\u00e9 " * 3000 + f"number{number}")
    for state in [(await ask("tea wordé", docs, max_sources=20)).state for docs in (tmp_path, CORPUS)]:
        assert len(dumps(state)) < 64 * 1024
        assert restored(Quoted, state)


async def test_events_are_small(tmp_path: Path) -> None:
    for number in range(30):
        (tmp_path / f"{number}.txt").write_text(("\u0436" * 6 + " tea ") * 3000 + f"number{number}")
    result = await ask("tea", tmp_path, max_sources=20)
    assert max(len(event.json_data()) for event in result.of(Event)) < 64 * 1024


# Being a good guest


async def test_files_and_the_index_are_used_in_threads_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.md").write_text("Zebras have stripes.\n")
    used = set[threading.Thread]()
    read, search = folder.read, index_module.Index.search

    def noted_read(root: Path, path: str) -> list[Passage] | None:
        used.add(threading.current_thread())
        return read(root, path)

    def noted_search(self: index_module.Index, query: str, stop: threading.Event | None = None) -> index_module.Found:
        used.add(threading.current_thread())
        return search(self, query, stop)

    monkeypatch.setattr(folder, "read", noted_read)
    monkeypatch.setattr(index_module.Index, "search", noted_search)
    assert (await ask("zebra stripes", tmp_path)).final.citations
    assert used
    assert threading.current_thread() not in used


async def test_it_can_be_closed_after_any_step() -> None:
    agent = make_research(CORPUS)
    for steps in range(len((await outcome(agent, a_run())).steps) + 1):
        generator = start(agent, a_run())
        for _ in range(steps):
            await anext(generator)
        await generator.aclose()
        with pytest.raises(StopAsyncIteration):
            await anext(generator)
    assert len(asyncio.all_tasks()) == 1


async def test_it_can_be_cancelled_while_it_writes() -> None:
    task = asyncio.create_task(ask(pace=1))
    await asyncio.sleep(0.2)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert len(asyncio.all_tasks()) == 1


async def test_cancelling_a_search_stops_its_thread_and_leaves_the_index_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(50):
        (tmp_path / f"{number}.md").write_text("Zebras have stripes.\n")
    reading, go_on = threading.Event(), threading.Event()
    reads, read = list[str](), folder.read

    def slow_read(root: Path, path: str) -> list[Passage] | None:
        reads.append(path)
        reading.set()
        go_on.wait(10)
        return read(root, path)

    monkeypatch.setattr(folder, "read", slow_read)
    task = asyncio.create_task(ask("zebra", tmp_path))
    await asyncio.to_thread(reading.wait, 10)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    go_on.set()
    found = await asyncio.to_thread(index_of(tmp_path).search, "zebra")
    assert found.documents == 50
    assert sorted(reads) == sorted(set(reads)), "the file that was being read is kept, and the others were not begun"


async def test_many_runs_may_search_at_once(tmp_path: Path) -> None:
    for number in range(50):
        (tmp_path / f"{number}.md").write_text(f"Zebra number {number} has stripes of its own.\n")
    results = await asyncio.gather(*(ask(f"zebra number {number}", tmp_path) for number in range(50)))
    for number, result in enumerate(results):
        assert f"Zebra number {number} has" in result.tokens


async def test_a_waiting_search_can_be_cancelled_and_the_others_go_on(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text("Zebras have stripes.\n")
    tasks = [asyncio.create_task(ask("zebra stripes", tmp_path)) for _ in range(20)]
    await asyncio.sleep(0)
    for task in tasks[::2]:
        task.cancel()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    for number, result in enumerate(results):
        if number % 2:
            assert isinstance(result, Outcome)
            assert result.final.citations
        else:
            assert isinstance(result, asyncio.CancelledError)
