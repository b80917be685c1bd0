"""What a terminal shows of a run: events become pieces, which a Screen prints. Pure: no terminal, no clock."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from broker.cli.tables import SourcesTable, citation_lines
from broker.cli.text import compact, duration, harmless, one_line
from broker.events import (
    Attempt,
    Cancelled,
    Error,
    Event,
    Final,
    Message,
    Progress,
    Reasoning,
    Sources,
    Start,
    Token,
    ToolCall,
    ToolResult,
)
from broker.ids import START, EventId
from broker.words import count

WHY = {
    "worker_lost": "its worker was lost",
    "handed_over": "another worker takes over",
    "data_lost": "Redis lost a part of it",
}
"""Reasons of an attempt, for people. The others end a run, and its end says so."""

_SHORTEST_SECONDS = 0.1
"""A replay brings a call and its result at once: a shorter time would say nothing about the tool."""


@dataclass(frozen=True, kw_only=True)
class Inline:
    """Goes on where the cursor is: a part of the answer, or of the reasoning."""

    text: str
    style: str = ""


@dataclass(frozen=True, kw_only=True)
class Block:
    """Has lines of its own. `aside`: on standard error."""

    body: RenderableType
    aside: bool = False


@dataclass(frozen=True, kw_only=True)
class Gap:
    """An empty line between what was and what comes."""


@dataclass(frozen=True, kw_only=True)
class Bar:
    """The last line, but while text is written. Another one takes its place; with neither of the two it is gone."""

    percent: float | None = None
    message: str = ""


Piece = Inline | Block | Gap | Bar


class Transcript:
    """One run on one terminal, from the event after `after` on. `more` is the command that tells more of it."""

    def __init__(self, more: str, *, after: EventId | None = None) -> None:
        self._more = more
        self._after = after or START
        self._shown: list[tuple[EventId, str]] = []
        self._attempt = 0
        self._section = ""
        self._sources: tuple[EventId, Sources] | None = None
        self._calls: dict[str, float] = {}

    @property
    def answer(self) -> str:
        """The tokens that survive, as far as this transcript has them."""
        return "".join(text for _, text in self._shown)

    def feed(self, event_id: EventId, event: Event, now: float) -> list[Piece]:
        """What the event adds; `now` in seconds of any steady clock. Unknown events and the agent's own add nothing."""
        pieces = list(self._pieces(event_id, event, now))
        if not isinstance(event, Attempt):
            self._shown.append((event_id, event.text if isinstance(event, Token) else ""))
        return pieces

    def _pieces(self, event_id: EventId, event: Event, now: float) -> Iterator[Piece]:
        match event:
            case Start():
                yield Bar(message="waiting for a worker…")
            case Token() | Reasoning():
                yield from self._text(event)
            case Message():
                yield from self._lines(Text(harmless(event.text.strip("\n")), no_wrap=True, overflow="ignore"))
            case Progress():
                yield Bar(percent=event.percent, message=one_line(event.message))
            case Sources():
                yield from self._lines(_line(f"{event.stage}: {count(event.count, 'source')}", "cyan"))
                self._sources = (event_id, event) if event.items else None
                if event.stage == "analyzed":
                    yield from self._table()
            case ToolCall():
                self._calls[event.id] = now
                yield from self._lines(_tool("→", event.tool, _arguments(event.args)))
            case ToolResult():
                seconds = now - self._calls.pop(event.id, now)
                took = f" {duration(seconds)}" if seconds >= _SHORTEST_SECONDS else ""
                yield from self._lines(_tool("←", event.tool, f"{took} {compact(event.result)}"))
            case Attempt():
                yield from self._rewound(event)
            case Final():
                yield from self._final(event)
            case Error():
                yield from self._end(_line(f"error {event.code}: {event.message}", "bold red", whole=True))
            case Cancelled():
                yield from self._end(_line(f"cancelled: {event.reason}", "yellow", whole=True))

    def _text(self, event: Token | Reasoning) -> Iterator[Piece]:
        text = harmless(event.text)
        section, style = ("answer", "") if isinstance(event, Token) else ("reasoning", "dim")
        if self._section != section:
            text = text.lstrip("\n")  # it stands apart anyway, and agents begin a later part of an answer with them
        if not text:
            return
        yield from self._table()
        if self._section != section:
            yield Gap()
            self._section = section
        yield Inline(text=text, style=style)

    def _lines(self, *bodies: RenderableType) -> Iterator[Piece]:
        """Something that is not the answer: it stands apart from it, but not from its own kind."""
        if self._section:
            yield Gap()
            self._section = ""
        for body in bodies:
            yield Block(body=body)

    def _table(self) -> Iterator[Piece]:
        """Of the last stage, in full, when nothing can come after it."""
        if self._sources is not None:
            yield from self._lines(SourcesTable(self._sources[1]))
            self._sources = None

    def _rewound(self, event: Attempt) -> Iterator[Piece]:
        resume_from = EventId.parse(event.resume_from)
        kept = bisect_right(self._shown, resume_from, key=lambda shown: shown[0])
        void, self._shown = self._shown[kept:], self._shown[:kept]
        if self._sources is not None and self._sources[0] > resume_from:
            self._sources = None
        closing, self._attempt = event.attempt <= self._attempt, event.attempt
        if event.reason == "started":
            yield Bar(message="running…")
        elif event.reason == "cursor_lost":
            self._after = START
            yield from self._notice("the broker has lost what came before: the run is shown from its beginning")
        elif event.reason not in WHY:
            return
        elif void or resume_from < self._after:
            yield from self._voided(event, resume_from, void)
        elif not closing:
            yield Block(body=_line(f"attempt {event.attempt}: {WHY[event.reason]}; nothing is void", "yellow"))

    def _voided(self, event: Attempt, resume_from: EventId, void: list[tuple[EventId, str]]) -> Iterator[Piece]:
        """What was printed cannot be taken back: it is said what is void, and the answer is printed anew."""
        yield Bar()
        what = f"attempt {event.attempt}: {WHY[event.reason]}; what came after {resume_from} is void"
        if resume_from < self._after:
            # What survives was printed by another command, and that this one has begun later does not show it again.
            self._after = resume_from
            yield from self._notice(f"{what}. From there on:")
        elif any(text for _, text in void):
            yield from self._notice(f"{what}. The answer starts anew:")
            if self.answer:
                yield from self._text(Token(text=self.answer))
        else:
            yield from self._notice(what)

    def _notice(self, text: str) -> Iterator[Piece]:
        yield Block(body=_line(text, "yellow", whole=True))
        self._section = ""

    def _final(self, event: Final) -> Iterator[Piece]:
        yield Bar()
        yield from self._table()
        if event.answer is not None and not self._has_shown(event.answer):
            if self.answer:
                yield from self._lines(_line("the final answer differs:", "yellow"))
            yield from self._text(Token(text=event.answer))
        if event.citations:
            yield Gap()
            yield Block(body=Group(*citation_lines(event.citations)))
        self._section = ""
        yield Gap()
        facts = ["completed", *usage_facts(event.usage), self._more]
        yield Block(body=_line(" · ".join(facts), "dim", whole=True))

    def _has_shown(self, answer: str) -> bool:
        """White space aside. After a cursor only the end of the answer can have been shown."""
        shown, whole = self.answer.split(), answer.split()
        return shown == whole if self._after == START else " ".join(whole).endswith(" ".join(shown))

    def _end(self, line: Text) -> Iterator[Piece]:
        yield Bar()
        yield from self._table()
        if self._section:
            yield Gap()
        yield Block(body=line, aside=True)

    def lost(self) -> list[Piece]:
        """The connection broke; the client comes again by itself."""
        return [Block(body=_line("connection lost, reconnecting…", "yellow", whole=True))]

    def found(self, seconds: float) -> list[Piece]:
        """It is there again, after so long."""
        return [Block(body=_line(f"connected again after {duration(seconds)}", "yellow", whole=True))]


def _line(text: str, style: str, *, whole: bool = False) -> Text:
    """Cut to the width, unless the whole of it matters: that is left to the terminal to wrap, and can be copied."""
    return Text(one_line(text), style=style, no_wrap=True, overflow="ignore" if whole else "ellipsis")


def _tool(arrow: str, name: str, rest: str) -> Text:
    return Text.assemble(
        (f"{arrow} ", "dim"), (one_line(name), "bold"), (rest, "dim"), no_wrap=True, overflow="ellipsis"
    )


def _arguments(args: Any) -> str:
    if isinstance(args, Mapping):
        return f"({', '.join(f'{one_line(str(name))}={compact(value)}' for name, value in args.items())})"
    return f"({'' if args is None else compact(args)})"


def usage_facts(usage: Mapping[str, Any]) -> list[str]:
    """`{"total_tokens": 12}` is `total tokens 12`. Only numbers, and no zeros: the rest is in `broker show`."""
    return [
        f"{one_line(name).replace('_', ' ')} {value:,}"
        for name, value in usage.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool) and value
    ]
