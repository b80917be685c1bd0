"""Citations in a streamed answer: `[1]`, `[2, 3]`. Each is checked against its passage as soon as it has come.

The rule. A citation stands for the words of its sentence before it, back to the citation before, if there is one. It
holds when

- each quotation among these words, of three words or more, is literally in the passage,
- each number among them is in the passage, and
- of the other words that say something at least half are in the passage, by their stems, and at least two; or each
  of the words, where there is only one.

This finds what is made up and what is attributed to the wrong passage. It cannot find a sentence that denies its
passage in its passage's own words, and does not accept one that says it all in other words, or another language.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from worker.documents.index import STOP_WORDS
from worker.documents.stems import Stemmer
from worker.documents.text import normalise, unmarked

MIN_SHARE = 0.5
MIN_WORDS = 2
MIN_QUOTED_WORDS = 3
LONGEST_BRACKET = 40
LONGEST_CLAIM = 2000

_BRACKET = re.compile(r" *\[")
_CITATION = re.compile(r"( *)\[ *[1-9]\d{0,2}(?: *[,;] *[1-9]\d{0,2})* *\]")
_UNFINISHED = re.compile(r" *\[[\d,; ]*")
_LIST_MARK = re.compile(r"\s*(?:[-*•]|\d+[.)])\s+")
_NUMBER = re.compile(r"\d+(?:[.,]\d+)*")
_QUOTATION = re.compile(r'"([^"]+)"|“([^”]+)”|«([^»]+)»|„([^“”]+)[“”]')
_WORD = re.compile(r"[^\W\d_]+")
_UNSPACED = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\uac00-\ud7af\u0e00-\u0e7f]")
_SENTENCE_END = re.compile(r"""[.!?…]["'”’)\]*_]*\s++(?![a-z])|[。！？]|\n""")


class Passages:
    """What passages say, as far as claims are checked against it. `passages` are (what is around it, its text); the
    first one's number is 1.
    """

    def __init__(self, passages: Sequence[tuple[str, str]]) -> None:
        self._stemmer = Stemmer()
        self._texts = [_plain(text) for _, text in passages]
        self._numbers = [_numbers(f"{around} {text}") for around, text in passages]
        self._terms = [self._terms_of(f"{around} {text}") for around, text in passages]

    def hold(self, claim: str, number: int) -> bool:
        """Whether the passage of this number, from 1, says so. There is none of other numbers."""
        if not 1 <= number <= len(self._texts):
            return False
        text, numbers, terms = self._texts[number - 1], self._numbers[number - 1], self._terms[number - 1]
        claim = _LIST_MARK.sub("", claim, count=1) if _LIST_MARK.match(claim) else claim
        quoted = [_plain("".join(groups)) for groups in _QUOTATION.findall(claim)]
        literal = [quote.rstrip(".,;:!?…") for quote in quoted if len(quote.split()) >= MIN_QUOTED_WORDS]
        if not all(quote in text for quote in literal) or not _numbers(claim) <= numbers:
            return False
        wanted = self._terms_of(claim)
        shared = len(wanted & terms)
        return bool(shared) and shared >= max(MIN_SHARE * len(wanted), min(MIN_WORDS, len(wanted)))

    def says_enough(self, claim: str) -> bool:
        """Whether it can be checked by itself."""
        return len(self._terms_of(claim)) >= MIN_WORDS

    def nearest(self, claim: str, sentences: Sequence[str]) -> tuple[int, float]:
        """The sentence that has most of the claim's words, and the share of them that it has."""
        terms = self._terms_of(claim)
        shares = [len(terms & self._terms_of(sentence)) / (len(terms) or 1) for sentence in sentences]
        best = max(range(len(shares)), key=lambda position: shares[position])
        return best, shares[best]

    def _terms_of(self, text: str) -> set[str]:
        """The stems of the words that say something; in scripts without spaces, each two letters side by side."""
        words = [word for word in _WORD.findall(text.casefold()) if word not in STOP_WORDS]
        [stems] = self._stemmer.stems([" ".join(word for word in words if not _UNSPACED.search(word))])
        pairs = {word[at : at + 2] for word in words if _UNSPACED.search(word) for at in range(max(len(word) - 1, 1))}
        return set(stems) | pairs


class Citer:
    """Takes an answer in pieces, and gives it back without the citations that do not hold.

    Only what may become a citation is held back, and the blanks before it. `cited` are the passages whose citations
    held, by their numbers in the answer, which count from 1, each with the first claim that it supports.
    """

    def __init__(self, passages: Passages) -> None:
        self.cited: dict[int, str] = {}
        self.dropped = 0
        self.passages = passages
        self._held = ""
        self._sentence = ""
        self._part = 0
        """Where in the sentence the last citation was."""
        self._claim = ""
        """What a citation stands for that comes now, if nothing is said before it."""

    def feed(self, text: str) -> str:
        """What of the answer can be shown now."""
        text, self._held, out = self._held + text, "", list[str]()
        while found := _BRACKET.search(text):
            out.append(self._said(text[: found.start()]))
            text = text[found.start() :]
            if citation := _CITATION.match(text):
                out.append(self._checked(citation))
                text = text[citation.end() :]
            elif len(text) <= LONGEST_BRACKET and _UNFINISHED.fullmatch(text):
                self._held = text
                return "".join(out)
            else:
                out.append(self._said(found[0]))
                text = text[len(found[0]) :]
        shown = text.rstrip(" ")
        self._held = text[len(shown) :]
        return "".join([*out, self._said(shown)])

    def end(self) -> str:
        """The rest."""
        rest, self._held = self._held, ""
        return rest

    def _said(self, text: str) -> str:
        self._sentence += text
        while ended := _SENTENCE_END.search(self._sentence):
            rest = self._sentence[ended.end() :]
            self._sentence = self._sentence[: ended.end()]
            self._settle()
            self._sentence, self._part = rest, 0
        if len(self._sentence) > 2 * LONGEST_CLAIM:
            self._sentence, self._part = self._sentence[-LONGEST_CLAIM:], 0
        return text

    def _settle(self) -> None:
        """What has been said since the last citation is what the next one stands for: with all of its sentence, where
        it alone says too little.
        """
        part = self._sentence[self._part :]
        if any(character.isalnum() for character in part):
            self._claim = part if self.passages.says_enough(part) else self._sentence

    def _checked(self, citation: re.Match[str]) -> str:
        """The citation without those of its numbers that do not hold. Without any, the blanks before it go as well."""
        self._settle()
        self._part = len(self._sentence)
        numbers = list(dict.fromkeys(int(number) for number in re.findall(r"\d+", citation[0])))
        kept = [number for number in numbers if self.passages.hold(self._claim, number)]
        self.dropped += len(numbers) - len(kept)
        for number in kept:
            self.cited.setdefault(number, self._claim)
        if kept == numbers:
            return citation[0]
        return f"{citation[1]}[{', '.join(map(str, kept))}]" if kept else ""


def _numbers(text: str) -> set[str]:
    return {number.replace(",", "") for number in _NUMBER.findall(text)}


def _plain(text: str) -> str:
    """As quotations are compared."""
    return normalise(unmarked(text)).casefold().replace("’", "'")
