"""Reasoning that a server leaves in the text: at its beginning, between tags, as open models write it."""

from __future__ import annotations

from collections.abc import Iterator

from worker.models.model import Text, Thought

OPEN, CLOSE = "<think>", "</think>"


class Thinking:
    """Takes a text in pieces and parts the reasoning from it. Held back is only what may be a part of a tag, and blanks
    beside one.
    """

    def __init__(self) -> None:
        self._held = ""
        self._stage = "start"

    def feed(self, text: str) -> Iterator[Text | Thought]:
        if self._stage == "text":
            yield Text(text=text)
            return
        self._held += text
        if self._stage == "start":
            yield from self._start()
        if self._stage == "thinking":
            yield from self._thought()
        if self._stage == "after":
            yield from self._after()

    def end(self) -> Iterator[Text | Thought]:
        """The rest."""
        rest, self._held = self._held, ""
        if self._stage == "thinking" and rest:
            yield Thought(text=rest)
        elif self._stage == "start" and rest:
            yield Text(text=rest)

    def _start(self) -> Iterator[Text]:
        begun = self._held.lstrip()
        if begun.startswith(OPEN):
            self._stage, self._held = "thinking", begun.removeprefix(OPEN)
        elif not OPEN.startswith(begun):
            self._stage = "text"
            yield Text(text=self._held)
            self._held = ""

    def _thought(self) -> Iterator[Thought]:
        thought, closed, rest = self._held.partition(CLOSE)
        if closed:
            self._stage, self._held = "after", rest
        else:
            keep = next(size for size in range(len(CLOSE) - 1, -1, -1) if thought.endswith(CLOSE[:size]))
            self._held = thought[len(thought) - keep :]
            thought = thought[: len(thought) - keep]
        if thought:
            yield Thought(text=thought)

    def _after(self) -> Iterator[Text]:
        self._held = self._held.lstrip()
        if self._held:
            self._stage = "text"
            yield Text(text=self._held)
            self._held = ""
