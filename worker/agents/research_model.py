"""`research` with a model: it plans the search, screens what was found, and writes the answer, citing the passages."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from broker.events import Error, Event, Final, Message, Progress, Token, dumps
from worker.agent import Checkpoint, Run
from worker.agents import prompts
from worker.agents.answer import Answer
from worker.agents.citing import Citer, Passages
from worker.agents.conversation import sendable
from worker.agents.joiner import Joiner
from worker.agents.ranking import Source, screen
from worker.agents.stages import MAX_BYTES, Citation, Place, fitted, stage
from worker.agents.states import restored
from worker.documents.index import Found
from worker.models.model import Message as Said
from worker.models.model import Model, ModelError, Options, Usage

CANDIDATES = 20
MAX_CITED_BYTES = 40_000
"""Of the sentences of all citations, which one event has to carry."""

NO_DOCUMENTS = "There are no documents to search, so there is no answer."
NOTHING_FOUND = "Nothing in the documents answers this question."

Step = Event | Checkpoint


class Candidate(BaseModel):
    """A passage that may answer. `sentences` are (line, text); `score` is 0 to 1."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: str
    title: str
    heading: str
    score: float
    sentences: tuple[tuple[int, str], ...]

    @staticmethod
    def of(source: Source) -> Candidate:
        passage = source.hit.passage
        return Candidate(
            path=source.hit.path,
            title=passage.title,
            heading=passage.heading,
            score=round(source.score, 3),
            sentences=tuple((sentence.line, sentence.text) for sentence in passage.sentences),
        )

    @property
    def text(self) -> str:
        return " ".join(text for _, text in self.sentences)

    @property
    def around(self) -> str:
        return f"{self.title} › {self.heading}" if self.heading else self.title

    def shown(self, text: str = "") -> Place:
        line = self.sentences[0][0]
        return Place(title=self.title, heading=self.heading, path=self.path, line=line, score=self.score, text=text)


class State(BaseModel):
    """What a later attempt continues from: what was found, and from `screened` on what of it the answer is from."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    stage: Literal["found", "screened"]
    candidates: tuple[Candidate, ...]
    documents: int
    passages: int
    usage: Usage | None
    """Until then, as far as the server has told."""

    def checkpoint(self) -> Checkpoint:
        """With as many candidates as a checkpoint has room for."""
        kept = self.candidates
        while True:
            state = self.model_copy(update={"candidates": kept}).model_dump(mode="json")
            if len(dumps(state)) <= MAX_BYTES or not kept:
                return Checkpoint(state=state)
            kept = kept[:-1]


@dataclass(frozen=True, kw_only=True)
class Choice:
    """How a run wants it done. `tick` is waited for before each token."""

    model: str
    sampling: dict[str, Any]
    max_sources: int
    tick: Callable[[], Awaitable[None]]


class Researcher:
    """One attempt at a run."""

    def __init__(self, run: Run, model: Model, search: Callable[[str], Awaitable[Found]], choice: Choice) -> None:
        self._run = run
        self._model = model
        self._search = search
        self._choice = choice
        self._joiner = Joiner(run.attempt)
        self._usage: Usage | None = None
        self._heard = ""
        self._reason = "stop"

    async def events(self) -> AsyncGenerator[Step, None]:
        """All of them, the last one the end of the run."""
        try:
            state = restored(State, self._run.restored)
            if state is not None:
                self._usage = state.usage
            while state is None or state.stage == "found":
                async with aclosing(self._find() if state is None else self._screen(state)) as steps:
                    async for step in steps:
                        if isinstance(step, State):
                            state = step
                            yield state.checkpoint()
                        else:
                            yield step
            async with aclosing(self._answer(state)) as events:
                async for event in events:
                    yield event
        except ModelError as error:
            yield Error(code=error.code, message=str(error))

    async def _find(self) -> AsyncGenerator[Event | State, None]:
        yield Message(text="Planning the search.")
        yield Progress(percent=5, message="Planning")
        async with aclosing(self._ask(prompts.plan(self._run.query))) as events:
            async for event in events:
                yield event
        queries = prompts.queries_in(self._heard, self._run.query)
        yield Message(text="Searching the documents for: " + "; ".join(queries))
        yield Progress(percent=20, message="Searching")
        found = [await self._search(query) for query in queries]
        best: dict[tuple[str, tuple[tuple[int, str], ...]], Candidate] = {}
        for source in (source for one in found for source in screen(one, CANDIDATES)):
            candidate = Candidate.of(source)
            passage = (candidate.path, candidate.sentences)
            if passage not in best or best[passage].score < candidate.score:
                best[passage] = candidate
        candidates = sorted(best.values(), key=lambda candidate: -candidate.score)[:CANDIDATES]
        yield stage("discovered", [candidate.shown() for candidate in candidates])
        yield State(
            stage="found",
            candidates=tuple(candidates),
            documents=found[0].documents,
            passages=found[0].passages,
            usage=self._usage,
        )

    async def _screen(self, state: State) -> AsyncGenerator[Event | State, None]:
        kept = list(state.candidates)
        if kept:
            yield Progress(percent=40, message="Screening what was found")
            passages = [f"{candidate.around}: {candidate.text}" for candidate in kept]
            async with aclosing(self._ask(prompts.screening(self._run.query, passages))) as events:
                async for event in events:
                    yield event
            numbers = prompts.numbers_in(self._heard, len(kept))
            kept = kept if numbers is None else [kept[number - 1] for number in numbers]
        yield stage("screened", [candidate.shown(candidate.text) for candidate in kept])
        kept = kept[: self._choice.max_sources]
        yield Progress(percent=60, message="Reading the best sources")
        yield stage("analyzed", [candidate.shown(candidate.text) for candidate in kept])
        yield state.model_copy(update={"stage": "screened", "candidates": tuple(kept), "usage": self._usage})

    async def _answer(self, state: State) -> AsyncGenerator[Event, None]:
        if not state.candidates:
            answer = NOTHING_FOUND if state.documents else NO_DOCUMENTS
            yield Message(text=answer)
            yield Token(text=answer)
            yield Progress(percent=100, message="Done")
            yield Final(usage=self._told(state, dropped=0, reason="stop"))
            return
        yield Progress(percent=80, message="Writing the answer")
        passages = [f"{candidate.around}: {candidate.text}" for candidate in state.candidates]
        citer = Citer(Passages([(candidate.around, candidate.text) for candidate in state.candidates]))
        asked = prompts.answering(self._run.query, passages)
        async with aclosing(self._ask(asked, citer, self._choice.sampling)) as events:
            async for event in events:
                if isinstance(event, Token):
                    await self._choice.tick()
                yield event
        yield Progress(percent=100, message="Done")
        usage = self._told(state, dropped=citer.dropped, reason=self._reason)
        citations = [citation.model_dump() for citation in _citations(citer, state.candidates)]
        yield Final(citations=citations, usage=usage)

    async def _ask(
        self, messages: Sequence[Said], citer: Citer | None = None, sampling: dict[str, Any] | None = None
    ) -> AsyncGenerator[Event, None]:
        """One answer of the model: its reasoning, and with `citer` its text, without the citations that do not hold.
        Without, the text is for us: it is in `_heard` then. Why it ended is in `_reason`.
        """
        options = Options(
            model=self._choice.model,
            deadline=self._run.deadline,
            request_id=self._run.request_id,
            parameters=sampling or {},
        )
        answer = Answer(show=citer.feed, rest=citer.end) if citer is not None else Answer(show=lambda _: "")
        stream = self._model.stream(sendable(messages), [], options)
        async with aclosing(answer.events(stream, self._joiner)) as events:
            async for event in events:
                yield event
        used = answer.end.usage
        self._usage = used if self._usage is None else self._usage + (used or Usage())
        self._heard, self._reason = answer.text, answer.end.reason

    def _told(self, state: State, *, dropped: int, reason: str) -> dict[str, Any]:
        """The usage of the run; without tokens where the server does not tell."""
        return {
            "documents": state.documents,
            "passages": state.passages,
            **(self._usage.told() if self._usage is not None else {}),
            "model": self._choice.model,
            "finish_reason": reason,
            "citations_dropped": dropped,
        }


def _citations(citer: Citer, candidates: Sequence[Candidate]) -> list[Citation]:
    """For each passage that is cited, its sentence that is closest to the claim; its numbers are the answer's."""
    most = MAX_CITED_BYTES // max(len(citer.cited), 1)
    citations = []
    for number, claim in sorted(citer.cited.items()):
        candidate = candidates[number - 1]
        position, score = citer.passages.nearest(claim, [text for _, text in candidate.sentences])
        line, sentence = candidate.sentences[position]
        citations.append(
            Citation(
                number=number,
                title=candidate.title,
                path=candidate.path,
                line=line,
                sentence=fitted(sentence, most),
                score=round(score, 3),
            )
        )
    return citations
