"""Logs that a run may have, made up: any events, attempts with their rewinds, and an end or none."""

from __future__ import annotations

import json
from collections.abc import Iterable
from itertools import pairwise
from typing import Any

from hypothesis import strategies as st

from broker.events import Entry, Event, Token, dumps
from broker.ids import EventId

REQUEST_ID = "ab" * 16

_HOSTILE = (
    "",
    "\n\n",
    "\r",
    "\u2028",
    "\ud800",
    "\udc00",
    '"}',
    "\\",
    "data: x\n\n",
    "[DONE]",
    "\0",
    "</script>",
    "é😀",
)
TEXTS = st.lists(st.one_of(st.sampled_from(_HOSTILE), st.text(max_size=4)), max_size=3).map("".join)
_NAMES = st.one_of(st.sampled_from(("a", "b")), TEXTS)
"""Few, so that calls and results find each other."""
_STAGES = st.sampled_from(("discovered", "analyzed"))
_LINKS: st.SearchStrategy[dict[str, Any]] = st.builds(dict, url=st.one_of(TEXTS, st.just("https://a.example")))
_VALUES = st.one_of(st.none(), TEXTS, st.dictionaries(TEXTS, TEXTS, max_size=2), st.lists(st.integers(), max_size=2))

_TOLD: st.SearchStrategy[dict[str, Any]] = st.builds(dict, text=st.one_of(st.sampled_from("abc"), TEXTS))

_EVENTS = st.one_of(
    *[st.tuples(st.just("token"), _TOLD)] * 4,
    *[st.tuples(st.just("reasoning"), _TOLD)] * 2,
    st.tuples(st.just("message"), _TOLD),
    st.tuples(st.just("tool_call"), st.builds(dict, id=_NAMES, tool=TEXTS, args=_VALUES)),
    st.tuples(st.just("tool_result"), st.builds(dict, id=_NAMES, tool=TEXTS, result=_VALUES)),
    st.tuples(st.just("data"), st.builds(dict, name=TEXTS, value=_VALUES)),
    st.tuples(st.just("progress"), st.builds(dict, percent=st.just(50.0), message=TEXTS)),
    st.tuples(
        st.just("sources"),
        st.builds(
            dict,
            stage=st.sampled_from(("discovered", "analyzed")),
            count=st.just(1),
            items=st.lists(_LINKS, max_size=2),
        ),
    ),
)
_USAGE: st.SearchStrategy[dict[str, Any]] = st.one_of(
    st.just({}),
    st.builds(dict, finish_reason=st.sampled_from(("stop", "length"))),
    st.builds(dict, prompt_tokens=st.integers(0, 9), completion_tokens=st.integers(0, 9)),
    st.dictionaries(TEXTS, _VALUES, max_size=2),
)
_CITATIONS: st.SearchStrategy[list[dict[str, Any]]] = st.lists(st.builds(dict, title=TEXTS, url=TEXTS), max_size=2)


def entry(event_id: str | EventId, kind: str, **data: Any) -> Entry:
    return Entry(EventId.parse(str(event_id)), kind, dumps(data))


def attempt(event_id: str | EventId, resume_from: str | EventId, number: int = 1, reason: str = "worker_lost") -> Entry:
    return entry(event_id, "attempt", attempt=number, reason=reason, resume_from=str(resume_from))


def start() -> Entry:
    return entry("0-1", "start", request_id=REQUEST_ID, session_id="s")


def surviving_text(log: list[Entry]) -> str:
    """The tokens, joined, of what survives."""
    kept: list[Entry] = []
    for each in log:
        if each.type == "attempt":
            resume_from = EventId.parse(json.loads(each.data)["resume_from"])
            kept = [old for old in kept if old.id <= resume_from]
        else:
            kept.append(each)
    return "".join(json.loads(each.data)["text"] for each in kept if each.type == "token")


def log_of(*attempts: Iterable[Event] | tuple[str, Iterable[Event]]) -> list[Entry]:
    """Epochs 1, 2, … of these events. A later attempt resumes from 0-1, or from the id that is before its events."""
    log = [start()]
    for number, said in enumerate(attempts, start=1):
        resume_from, events = said if isinstance(said, tuple) else ("0-1", said)
        log.append(attempt(EventId(number, 1), resume_from, number, "started" if number == 1 else "worker_lost"))
        log += [Entry(EventId(number, seq), event.type, event.json_data()) for seq, event in enumerate(events, start=2)]
    return log


def words(*texts: str) -> list[Event]:
    return [Token(text=text) for text in texts]


@st.composite
def logs(draw: st.DrawFn, *, ended: bool | None = None, repeating: bool = False) -> list[Entry]:
    """`ended`: whether it has a terminal event; None is either. `repeating`: later attempts often say again what the
    earlier ones said, cut into other pieces."""
    log, epoch = [start()], 0
    attempts = draw(st.integers(0, 4))
    for number in range(1, attempts + 1):
        epoch += draw(st.integers(1, 1000))
        back = log[0].id if number == 1 else draw(st.sampled_from(draw(_targets(log))))
        before = surviving_text(log)
        log.append(attempt(EventId(epoch, 1), back, number, "started" if number == 1 else "worker_lost"))
        unsaid = before[len(surviving_text(log)) :] if repeating else ""
        for seq, (kind, made) in enumerate(draw(st.lists(_EVENTS, max_size=8)), 2):
            data = made
            if unsaid and kind == "token" and draw(st.sampled_from((True, True, True, False))):
                length = draw(st.integers(1, len(unsaid)))
                more = made["text"] if length == len(unsaid) else ""
                data, unsaid = {"text": unsaid[:length] + more}, unsaid[length:]
            log.append(entry(EventId(epoch, seq), kind, **data))
    if ended or (ended is None and draw(st.booleans())):
        log += draw(_ends(log, attempts, epoch))
    return log


def _targets(log: list[Entry]) -> st.SearchStrategy[list[EventId]]:
    """Where a rewind may go: anywhere, or into the middle of a text."""
    middles = [one.id for one, two in pairwise(log) if one.type == two.type and one.type in ("token", "reasoning")]
    return st.sampled_from([[each.id for each in log], *([middles] if middles else [])])


@st.composite
def _ends(draw: st.DrawFn, log: list[Entry], attempts: int, epoch: int) -> list[Entry]:
    """A terminal: in the last attempt's epoch, or in that of who closes the run."""
    last = log[-1].id
    kind = draw(st.sampled_from(("final", "error", "cancelled")))
    if kind == "cancelled" or not attempts:
        closing = EventId(epoch + 1, 1)
        data = {"reason": draw(TEXTS)} if kind == "cancelled" else {"code": draw(TEXTS), "message": draw(TEXTS)}
        kind = kind if kind == "cancelled" else "error"
        return [
            attempt(closing, last, attempts, "cancelled"),
            entry(closing._replace(seq=2), kind, **data),
        ]
    at = EventId(epoch, last.seq + 1)
    if kind == "error":
        return [entry(at, "error", code=draw(TEXTS), message=draw(TEXTS))]
    told = surviving_text(log)
    answer = draw(
        st.one_of(st.none(), st.just(told), st.builds(lambda more: told + more, TEXTS), st.just(told[1:]), TEXTS)
    )
    return [entry(at, "final", answer=answer, citations=draw(_CITATIONS), usage=draw(_USAGE))]
