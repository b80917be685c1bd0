"""The built-in agent `research`: looks a question up in a folder of documents, and answers with quotations.

With a model it is research_model.py that does the work.
"""

from __future__ import annotations

import asyncio
import math
import re
from collections.abc import AsyncGenerator, AsyncIterator, Iterable
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from broker.events import Error, Event, Final, Message, Progress, Token
from broker.settings import Settings
from worker.agent import Agent, Checkpoint, Run
from worker.agents.ranking import Quote, Source, quotes, screen
from worker.agents.research_model import NO_DOCUMENTS, NOTHING_FOUND, Choice, Researcher
from worker.agents.search import search
from worker.agents.stages import Citation, Place, stage
from worker.agents.states import restored
from worker.documents.index import Found, Hit
from worker.models import open_model
from worker.models.parameters import SAMPLING, SHOWN_MESSAGE, BadParameter, allowed_parameters, refuse_unknown
from worker.tools.result import cut

DEFAULT_SOURCES = 5
MOST_SOURCES = 20
LONGEST_PAUSE_SECONDS = 3600.0


@dataclass(frozen=True, kw_only=True)
class Parameters:
    """`pace` is in tokens per second; without it the answer comes as fast as it can."""

    pace: float | None = None
    max_sources: int = DEFAULT_SOURCES

    @staticmethod
    def of(given: dict[str, Any]) -> Parameters:
        """Raises BadParameter."""
        refuse_unknown("research", given, ("model", *SAMPLING, "pace", "max_sources"))
        pace, max_sources = given.get("pace"), given.get("max_sources")
        return Parameters(
            pace=None if pace is None else _pace(pace),
            max_sources=DEFAULT_SOURCES if max_sources is None else _max_sources(max_sources),
        )


class Quoted(BaseModel):
    """All that the answer needs: what a later attempt continues from."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: Literal[1] = 1
    citations: tuple[Citation, ...] = ()
    documents: int
    passages: int

    @property
    def answer(self) -> str:
        if not self.documents:
            return NO_DOCUMENTS
        return " ".join(f"{cited.sentence} [{cited.number}]" for cited in self.citations) or NOTHING_FOUND


def make_research(docs: Path | None, settings: Settings | None = None) -> Agent:
    """The agent over a folder of Markdown, reStructuredText, HTML and text files. Without one it finds nothing.

    With a model in the settings, that plans, screens and answers, unless a run has the parameter `"model": false`.
    """
    folder = docs.absolute() if docs is not None else None
    model = open_model(settings) if settings is not None and settings.model is not None else None

    async def research(run: Run) -> AsyncIterator[Event | Checkpoint]:
        try:
            parameters = Parameters.of(run.parameters)
            model_choice = _model_choice(run.parameters, settings)
        except BadParameter as error:
            yield Error(code="invalid_parameter", message=cut(str(error), SHOWN_MESSAGE))
            return
        clock = Clock(parameters.pace)
        if model is not None and model_choice is not None:
            name, sampling = model_choice
            choice = Choice(model=name, sampling=sampling, max_sources=parameters.max_sources, tick=clock.tick)
            answering = Researcher(run, model, partial(search, folder), choice).events()
        else:
            answering = _quotations(run, folder, parameters.max_sources, clock)
        async with aclosing(answering) as events:
            async for event in events:
                yield event

    return research


async def _quotations(
    run: Run, folder: Path | None, max_sources: int, clock: Clock
) -> AsyncGenerator[Event | Checkpoint, None]:
    """Without a model: the best sentences of the best sources are the answer."""
    quoted = restored(Quoted, run.restored)
    if quoted is None:
        yield Message(text="Searching the documents.")
        yield Progress(percent=5, message="Searching")
        found = await search(folder, run.query)
        yield stage("discovered", [_place(hit, hit.score) for hit in found.hits])
        yield Progress(percent=40, message="Screening what was found")
        sources = await asyncio.to_thread(screen, found, max_sources)
        yield stage("screened", _places(sources))
        yield Progress(percent=60, message="Analyzing the best sources")
        chosen = await asyncio.to_thread(quotes, found, sources)
        yield stage("analyzed", _places({id(quote.source): quote.source for quote in chosen}.values()))
        quoted = _quoted(found, chosen)
        if not quoted.citations:
            yield Message(text=quoted.answer)
        yield Progress(percent=80, message="Writing the answer")
        yield Checkpoint(state=quoted.model_dump(mode="json"))
    tokens = split(quoted.answer)
    for token in tokens:
        await clock.tick()
        yield Token(text=token)
    yield Progress(percent=100, message="Done")
    yield Final(
        answer=quoted.answer,
        citations=[citation.model_dump() for citation in quoted.citations],
        usage={"documents": quoted.documents, "passages": quoted.passages, "tokens": len(tokens)},
    )


def split(answer: str) -> list[str]:
    """The words of an answer with the space around them: together they are the answer."""
    return re.findall(r"\s*\S+\s*|\s+", answer)


class Clock:
    """Lets `pace` ticks pass in a second, without making up for time that the consumer took."""

    def __init__(self, pace: float | None) -> None:
        self._interval = min(1 / pace, LONGEST_PAUSE_SECONDS) if pace else 0.0
        self._due = 0.0

    async def tick(self) -> None:
        if self._interval:
            now = asyncio.get_running_loop().time()
            if self._due > now:
                await asyncio.sleep(self._due - now)
            self._due = max(self._due, now) + self._interval


def _model_choice(given: dict[str, Any], settings: Settings | None) -> tuple[str, dict[str, Any]] | None:
    """The model of a run and its sampling parameters, where it is to have one. Raises BadParameter."""
    if settings is None or settings.model is None or given.get("model") is False:
        return None
    return allowed_parameters(given, settings)


def _quoted(found: Found, chosen: list[Quote]) -> Quoted:
    return Quoted(
        citations=tuple(_citation(number, quote) for number, quote in enumerate(chosen, 1)),
        documents=found.documents,
        passages=found.passages,
    )


def _citation(number: int, quote: Quote) -> Citation:
    hit = quote.source.hit
    return Citation(
        number=number,
        title=hit.passage.title,
        path=hit.path,
        line=quote.sentence.line,
        sentence=quote.sentence.text,
        score=round(quote.score, 3),
    )


def _places(sources: Iterable[Source]) -> list[Place]:
    return [_place(source.hit, source.score, source.hit.passage.text) for source in sources]


def _place(hit: Hit, score: float, text: str = "") -> Place:
    passage = hit.passage
    return Place(title=passage.title, heading=passage.heading, path=hit.path, line=passage.line, score=score, text=text)


def _pace(value: Any) -> float:
    try:
        valid = not isinstance(value, bool) and isinstance(value, (int, float)) and 0 < float(value) < math.inf
    except OverflowError:
        valid = False
    if not valid:
        raise BadParameter("pace must be a number above 0: tokens per second")
    return float(value)


def _max_sources(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MOST_SOURCES:
        raise BadParameter(f"max_sources must be a whole number from 1 to {MOST_SOURCES}")
    return value
