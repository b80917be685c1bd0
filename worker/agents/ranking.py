"""The second look at what the index found: which passages answer a query, and which sentences say it."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from worker.documents.index import Found, Hit
from worker.documents.text import Sentence

MIN_COVERAGE = 1 / 3
MIN_COVERAGE_ON_TOPIC = 0.1
MAX_QUOTES = 5
MIN_QUOTE_WORDS = 3
RELATIVE_SCORE = 0.6
SAME = 0.6


@dataclass(frozen=True, kw_only=True)
class Source:
    """A passage that is likely to answer; `score` is 0 to 1."""

    hit: Hit
    score: float


@dataclass(frozen=True, kw_only=True)
class Quote:
    """A sentence that answers; `score` is 0 to 1."""

    source: Source
    position: int
    score: float

    @property
    def sentence(self) -> Sentence:
        return self.source.hit.passage.sentences[self.position]

    @property
    def stems(self) -> frozenset[str]:
        return frozenset(self.source.hit.sentence_stems[self.position])


def screen(found: Found, limit: int) -> list[Source]:
    """The best passages, best first, without those that share too little with the query."""
    sources = [
        Source(hit=hit, score=_relevance(hit, found.weights)) for hit in found.hits if _may_answer(hit, found.weights)
    ]
    return sorted(sources, key=lambda source: -source.score)[:limit]


def quotes(found: Found, sources: Sequence[Source]) -> list[Quote]:
    """The sentences of the answer: the best passage first, within a passage in the order of the text."""
    candidates = [quote for source in sources for quote in _candidates(source, found.weights)]
    sentences = [quote for quote in candidates if len(quote.stems) >= MIN_QUOTE_WORDS]
    ranked = sorted(sentences or candidates, key=lambda quote: -quote.score)
    chosen: list[Quote] = []
    for quote in ranked:
        worthy = quote.score >= RELATIVE_SCORE * ranked[0].score
        if worthy and not any(_similar(quote.stems, other.stems) for other in chosen):
            chosen.append(quote)
    chosen = chosen[:MAX_QUOTES]
    order = list(dict.fromkeys(id(quote.source) for quote in chosen))
    return sorted(chosen, key=lambda quote: (order.index(id(quote.source)), quote.position))


def _may_answer(hit: Hit, weights: Mapping[str, float]) -> bool:
    """Any query shares a word with something; a share of a document's title may be smaller than others."""
    on_topic = not hit.title_stems.isdisjoint(weights)
    return _coverage(_all_stems(hit), weights) >= (MIN_COVERAGE_ON_TOPIC if on_topic else MIN_COVERAGE)


def _relevance(hit: Hit, weights: Mapping[str, float]) -> float:
    """bm25 counts words wherever they are; an answer has most of the query's, and has them close together."""
    everywhere = _coverage(_all_stems(hit), weights)
    together = max(_coverage(stems, weights) for stems in hit.sentence_stems)
    on_topic = _coverage(hit.title_stems | hit.heading_stems, weights)
    return 0.25 * hit.score + 0.35 * everywhere + 0.25 * together + 0.15 * on_topic


def _candidates(source: Source, weights: Mapping[str, float]) -> Iterator[Quote]:
    """What may be quoted, scored by its words, then by those of its context: title and sentence before."""
    before: Collection[str] = ()
    for position, sentence in enumerate(source.hit.passage.sentences):
        stems = source.hit.sentence_stems[position]
        own = _coverage(stems, weights)
        context = _coverage({*stems, *before, *source.hit.title_stems, *source.hit.heading_stems}, weights)
        if not sentence.text.endswith(("?", ":")) and own + _coverage(before, weights) > 0:
            yield Quote(source=source, position=position, score=source.score * (0.7 * own + 0.3 * context))
        before = stems


def _all_stems(hit: Hit) -> set[str]:
    return set(hit.title_stems).union(hit.heading_stems, *hit.sentence_stems)


def _coverage(stems: Collection[str], weights: Mapping[str, float]) -> float:
    """The share of the query that is there, by weight."""
    present = set(stems)
    return sum(weight for stem, weight in weights.items() if stem in present) / (sum(weights.values()) or 1.0)


def _similar(one: frozenset[str], other: frozenset[str]) -> bool:
    return len(one & other) >= SAME * len(one | other)
