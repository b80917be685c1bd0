"""`research` with a model: planned, screened and answered by it; its citations checked; its failures told."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from broker.events import AGENT, Error, Event, Final, Progress, Reasoning, Sources, Token, dumps
from broker.settings import Settings
from tests.conftest import Launcher
from tests.kit.checker import check_log, surviving_text
from tests.kit.http import Client
from tests.kit.model_answers import Models
from tests.kit.model_stub import ModelStub
from tests.kit.processes import wait_for
from worker.agent import Agent, Checkpoint, Run
from worker.agents import research
from worker.agents.research import make_research
from worker.agents.research_model import NO_DOCUMENTS, NOTHING_FOUND

CORPUS = Path(__file__).parents[1] / "corpus"
QUESTION = "How hot should the water be for green tea?"
PLAN = '[[say@plan=["green tea water temperature"]]]'.replace("]]]", "] ]]")
SCREEN = "[[say@screen=[1, 2] ]]"
REQUEST_ID = "0" * 32
TEA = "Green tea wants water of 75 to 80 degrees"


pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest.fixture(scope="module")
def stub() -> Iterator[ModelStub]:
    with ModelStub() as server:
        yield server


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def models() -> AsyncIterator[Models]:
    made = Models()
    yield made
    await made.close()


@pytest.fixture
def over(stub: ModelStub, models: Models, monkeypatch: pytest.MonkeyPatch) -> Callable[[Path | None], Agent]:
    """The agent over a folder, as a worker with this model has it."""
    monkeypatch.setattr(research, "open_model", lambda _: models.at(stub))
    return lambda docs: make_research(docs, Settings(model="m"))


@pytest.fixture
def agent(over: Callable[[Path | None], Agent]) -> Agent:
    return over(CORPUS)


async def steps_of(agent: Agent, query: str, *, restored: Any = None, **parameters: Any) -> list[Event | Checkpoint]:
    run = Run(request_id=REQUEST_ID, query=query, parameters=parameters, restored=restored, deadline=time.time() + 60)
    return [step async for step in agent(run)]


def text(steps: list[Event | Checkpoint]) -> str:
    return "".join(step.text for step in steps if isinstance(step, Token))


def final(steps: list[Event | Checkpoint]) -> Final:
    assert isinstance(steps[-1], Final), steps[-1]
    return steps[-1]


def stages(steps: list[Event | Checkpoint]) -> list[tuple[str, int]]:
    return [(step.stage, step.count) for step in steps if isinstance(step, Sources)]


def asked(stub: ModelStub, marker: str) -> list[str]:
    """The first words of the system messages."""
    return [entry["messages"][0]["content"].split()[1] for entry in stub.journal(marker)]


async def test_the_model_plans_screens_and_answers(stub: ModelStub, agent: Agent) -> None:
    answer = "[[say@cite=Green tea needs cooler water than black tea [1]. It was found by a dragon in 1066 [1].]]"
    steps = await steps_of(agent, f"{QUESTION} one. {PLAN} {SCREEN} {answer} [[cached=2]]")
    assert asked(stub, "one.") == ["plan", "screen", "answer"]
    assert [stage for stage, _ in stages(steps)] == ["discovered", "screened", "analyzed"]
    assert stages(steps)[1:] == [("screened", 2), ("analyzed", 2)]
    kinds = [type(step).__name__ for step in steps if isinstance(step, (Checkpoint, Sources, Final))]
    assert kinds == ["Sources", "Checkpoint", "Sources", "Sources", "Checkpoint", "Final"]
    percents = [step.percent for step in steps if isinstance(step, Progress)]
    assert percents == sorted(percents)
    assert all(isinstance(step, (*AGENT, Checkpoint)) for step in steps)
    end = final(steps)
    assert end.usage["citations_dropped"] == 1
    assert end.usage["model"] == "m"
    assert end.usage["cached_tokens"] == 6
    assert end.usage["total_tokens"] == end.usage["prompt_tokens"] + end.usage["completion_tokens"]


async def test_usage_that_the_server_does_not_tell_is_left_out(agent: Agent) -> None:
    usage = final(await steps_of(agent, f"{QUESTION} {PLAN} {SCREEN} [[usage=none]]")).usage
    assert usage.keys() == {"documents", "passages", "model", "finish_reason", "citations_dropped"}


async def test_usage_that_the_server_tells_of_some_stages_is_theirs(agent: Agent) -> None:
    usage = final(await steps_of(agent, f"{QUESTION} {PLAN} {SCREEN} [[usage@cite=none]] [[cached=2]]")).usage
    assert usage["cached_tokens"] == 4


@pytest.mark.parametrize(("limit", "reason", "words"), [(5, "length", 5), (50, "stop", 10)])
async def test_an_answer_that_was_cut_says_so(agent: Agent, limit: int, reason: str, words: int) -> None:
    steps = await steps_of(agent, f"{QUESTION} {PLAN} {SCREEN} [[tokens@cite=10]]", max_tokens=limit)
    assert (final(steps).usage["finish_reason"], len(text(steps).split())) == (reason, words)


async def test_a_citation_that_holds_stays_and_one_that_does_not_is_dropped(stub: ModelStub, agent: Agent) -> None:
    first = (await steps_of(agent, f"{QUESTION} two. {PLAN} {SCREEN}"))[0]
    assert isinstance(first, Event)
    passages = stub.journal("two.")[-1]["messages"][-1]["content"]
    passage = passages.partition("[1] ")[2].partition("\n\n[2] ")[0]
    sentence = passage.partition(": ")[2].partition(". ")[0]
    answer = f"[[say@cite={sentence} [1]. It was found by a dragon in 1066 [1]. And so on [7].]]"
    steps = await steps_of(agent, f"{QUESTION} three. {PLAN} {SCREEN} {answer}")
    assert text(steps) == f"{sentence} [1]. It was found by a dragon in 1066. And so on."
    assert final(steps).usage["citations_dropped"] == 2
    [citation] = final(steps).citations
    assert citation.keys() == {"number", "title", "path", "line", "sentence", "score"}
    assert citation["number"] == 1
    assert citation["sentence"].startswith(sentence)
    file = " ".join((CORPUS / citation["path"]).read_text().split())
    assert citation["sentence"] in file


async def test_reasoning_is_shown(agent: Agent) -> None:
    steps = await steps_of(agent, f"{QUESTION} {PLAN} [[reasoning=hm hm]]")
    assert "".join(step.text for step in steps if isinstance(step, Reasoning)) == "hm hm" * 3


async def test_replies_that_cannot_be_read_leave_the_question_and_the_ranking(stub: ModelStub, agent: Agent) -> None:
    steps = await steps_of(agent, f"{QUESTION} [[say@plan=Tea.]] [[say@screen=All of them.]]", max_sources=3)
    (_, found), (_, screened), (_, analyzed) = stages(steps)
    assert found == screened > 0
    assert analyzed == min(3, found)
    assert "I am a stub" in text(steps)


async def test_a_model_that_keeps_no_passage_is_not_asked_for_an_answer(stub: ModelStub, agent: Agent) -> None:
    steps = await steps_of(agent, f"{QUESTION} four. {PLAN} [[say@screen=[] ]]")
    assert text(steps) == NOTHING_FOUND
    assert asked(stub, "four.") == ["plan", "screen"]
    assert final(steps).citations == []
    assert final(steps).usage["finish_reason"] == "stop"


async def test_nothing_found_is_not_screened(stub: ModelStub, agent: Agent) -> None:
    steps = await steps_of(agent, 'five. [[say@plan=["zyzzyva xylographers"] ]]')
    assert text(steps) == NOTHING_FOUND
    assert asked(stub, "five.") == ["plan"]


async def test_without_documents_there_is_no_answer(over: Callable[[Path | None], Agent], tmp_path: Path) -> None:
    for docs in (None, tmp_path):
        assert text(await steps_of(over(docs), QUESTION)) == NO_DOCUMENTS


@pytest.mark.parametrize(("checkpoint", "left"), [(0, ["screen", "answer"]), (1, ["answer"])])
async def test_a_later_attempt_continues_after_its_checkpoint(
    stub: ModelStub, agent: Agent, checkpoint: int, left: list[str]
) -> None:
    query = f"{QUESTION} six {checkpoint}. {PLAN} {SCREEN} [[say@cite=It is so.]]"
    before = await steps_of(agent, query)
    state = [step.state for step in before if isinstance(step, Checkpoint)][checkpoint]
    asked_before = len(stub.journal(f"six {checkpoint}."))
    after = await steps_of(agent, query, restored=json.loads(dumps(state)))
    assert asked(stub, f"six {checkpoint}.")[asked_before:] == left
    assert text(after) == text(before)
    assert final(after).usage == final(before).usage


async def test_a_checkpoint_has_room_for_what_was_found_in_any_script(
    over: Callable[[Path | None], Agent], tmp_path: Path
) -> None:
    for number in range(30):
        (tmp_path / f"{number}.md").write_text(f"# {number}\n\n" + f"чай {number} вода температура напиток. " * 20)
    steps = await steps_of(over(tmp_path), "чай вода")
    states = [step.state for step in steps if isinstance(step, Checkpoint)]
    assert len(states) == 2
    assert all(len(dumps(state)) <= 64 * 1024 for state in states)
    assert 1 < len(states[0]["candidates"]) < 20


@pytest.mark.parametrize("model", [None, False])
async def test_events_have_room_for_the_most_sources_in_any_script(
    over: Callable[[Path | None], Agent], tmp_path: Path, model: bool | None
) -> None:
    tea, water = "茶" * 20, "水" * 20  # six bytes for each letter, and few blanks
    for number in range(30):
        heading = f"# {number}{tea * 10}\n\n## {water * 10}"
        (tmp_path / f"{'long' * 50}{number}.md").write_text(f"{heading}\n\n" + f"{tea} {number} {water} " * 14)
    cited = " ".join(f"{tea} {water} [{number}]." for number in range(1, 21))
    query = f'{tea} {water} [[say@plan=["{tea} {water}"] ]] [[say@screen=All.]] [[say@cite={cited}]]'
    query = query if model is None else f"{tea} {water}"
    steps = await steps_of(over(tmp_path), query, max_sources=20, model=model)
    assert all(len(step.json_data()) <= 64 * 1024 for step in steps if isinstance(step, Event))
    (_, found), (_, screened), (_, analyzed) = stages(steps)
    assert found == 20
    assert screened == 20
    if model is None:
        assert analyzed == len(final(steps).citations) == 20


@pytest.mark.parametrize("letter", ["u", "ü", "𐌰"])
async def test_a_citation_has_its_whole_sentence_or_says_that_it_is_cut(
    over: Callable[[Path | None], Agent], tmp_path: Path, letter: str
) -> None:
    for number in range(20):
        sentence = f"Green tea {number}" + f" water {letter * 20}" * 14
        (tmp_path / f"{number}.md").write_text(f"# {number}\n\n{sentence}.")
    cited = " ".join(f"Green tea water {letter * 20} [{number}]." for number in range(1, 21))
    query = f'[[say@plan=["green tea water"] ]] [[say@screen=All.]] [[say@cite={cited}]]'
    steps = await steps_of(over(tmp_path), query, max_sources=20)
    citations = final(steps).citations
    assert len(citations) == 20
    for citation in citations:
        beginning, mark, _ = citation["sentence"].partition("…")
        file = " ".join((tmp_path / citation["path"]).read_text().split())
        assert beginning in file
        assert (mark == "…") == (letter == "𐌰") == (not file.endswith(beginning))


async def test_a_bracket_at_the_end_of_an_answer_stays(agent: Agent) -> None:
    assert text(await steps_of(agent, f"{QUESTION} {PLAN} {SCREEN} [[say@cite=It was [1]]")) == "It was [1"


@pytest.mark.parametrize("stage", ["plan", "screen", "cite"])
async def test_a_failing_model_ends_the_run_with_its_code(agent: Agent, stage: str) -> None:
    steps = await steps_of(agent, f"{QUESTION} {PLAN} {SCREEN} [[fail@{stage}=context]]")
    assert isinstance(steps[-1], Error)
    assert steps[-1].code == "model_context_too_long"


async def test_the_log_says_whose_model_failed(agent: Agent, caplog: pytest.LogCaptureFixture) -> None:
    await steps_of(agent, f"{QUESTION} {PLAN} {SCREEN} [[fail@cite=500 times=1]]")
    [failed] = [record for record in caplog.records if record.message == "a model failed"]
    assert vars(failed)["request_id"] == REQUEST_ID


async def test_what_was_streamed_before_a_failure_stays(agent: Agent) -> None:
    steps = await steps_of(agent, f"{QUESTION} {PLAN} {SCREEN} [[say@cite=one two three]] [[fail@cite=break after=2]]")
    assert text(steps) == "one two"
    assert isinstance(steps[-1], Error)
    assert steps[-1].code == "model_broken"


async def test_a_run_may_do_without_the_model(stub: ModelStub, agent: Agent) -> None:
    steps = await steps_of(agent, f"{QUESTION} seven.", model=False)
    assert stub.journal("seven.") == []
    assert final(steps).citations


@pytest.mark.parametrize(
    ("parameters", "said"), [({"temperature": 5}, "temperature"), ({"model": "x"}, "model"), ({"pace": 0}, "pace")]
)
async def test_a_bad_parameter_is_told(agent: Agent, parameters: dict[str, Any], said: str) -> None:
    [error] = await steps_of(agent, QUESTION, **parameters)
    assert isinstance(error, Error)
    assert error.code == "invalid_parameter"
    assert said in error.message


async def test_a_question_that_utf_8_cannot_carry_is_asked(agent: Agent) -> None:
    assert "I am a stub" in text(await steps_of(agent, "\ud800 [[say@plan=Green tea.]] [[say@screen=All.]]" + QUESTION))


async def test_sampling_is_for_the_answer(stub: ModelStub, agent: Agent) -> None:
    await steps_of(agent, f"{QUESTION} eight. {PLAN} {SCREEN}", temperature=0.3)
    temperatures = [entry["parameters"].get("temperature") for entry in stub.journal("eight.")]
    assert temperatures == [None, None, 0.3]


async def test_a_whole_run_through_gateway_and_worker(
    stub: ModelStub, launch: Launcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in stub.environment.items():
        monkeypatch.setenv(name, value)
    server = launch.redis()
    gateway = launch.gateway(server.url)
    launch.worker(server.url, docs=CORPUS, model="m")
    query = f"{QUESTION} nine. {PLAN} {SCREEN} [[say@cite=Green tea is a tea [1], dragons are animals of 1066 [2].]]"
    with Client(gateway.url) as client:
        request_id = client.submit(query, agent="research")
        run = client.finished(request_id)
        check_log(client.log(request_id))
    assert run["status"] == "completed"
    assert run["answer"] == "Green tea is a tea [1], dragons are animals of 1066."
    assert [citation["number"] for citation in run["citations"]] == [1]
    assert run["usage"]["citations_dropped"] == 1
    assert [entry["key"] for entry in stub.journal("nine.")] == [stub.environment["OPENAI_API_KEY"]] * 3


async def test_a_killed_worker_costs_the_answer_again_but_neither_plan_nor_screening(
    stub: ModelStub, launch: Launcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in stub.environment.items():
        monkeypatch.setenv(name, value)
    server = launch.redis()
    gateway = launch.gateway(server.url, lease_seconds=1)
    workers = [launch.worker(server.url, docs=CORPUS, model="m", lease_seconds=1)]
    query = f"{QUESTION} ten. {PLAN} {SCREEN} [[tokens@cite=60]] [[pace@cite=20]]"
    with Client(gateway.url) as client:
        request_id = client.submit(query, agent="research")
        wait_for(lambda: client.run(request_id)["answer"] is not None, seconds=20)
        workers[0].kill()
        workers.append(launch.worker(server.url, docs=CORPUS, model="m", lease_seconds=1))
        run = client.finished(request_id)
        log = client.log(request_id)
    check_log(log)
    assert run["answer"] == surviving_text(log) == " ".join(f"w{n}" for n in range(1, 61))
    assert run["attempt"] == 2
    assert asked(stub, "ten.") == ["plan", "screen", "answer", "answer"]
    stages = [json.loads(entry.data)["stage"] for entry in log if entry.type == "sources"]
    assert stages == ["discovered", "screened", "analyzed"]
