"""What is wrong with one log, one poll, one reader: pure generators, which tests.kit.checker puts together."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from broker.errors import BadCursor
from broker.events import TERMINAL, Entry
from broker.ids import START, EventId
from tests.kit.history import Reading

STATUS_OF = {"final": "completed", "error": "failed", "cancelled": "cancelled"}
HAS_IT_ALL = ("terminal", "204")
"""How a reading ends that has read its run to the end."""


class Finding(NamedTuple):
    kind: str
    text: str


def survivors(entries: Sequence[Entry]) -> list[Entry]:
    """The fold, written out here, so that a fold that errs is not its own judge (PROTOCOL 1.5)."""
    kept: list[Entry] = []
    for entry in entries:
        if entry.type == "attempt":
            resume_from = EventId.parse(json.loads(entry.data)["resume_from"])
            kept = [earlier for earlier in kept if earlier.id <= resume_from]
        else:
            kept.append(entry)
    return kept


def in_sequence(entries: Sequence[Entry], after: EventId = START) -> Iterator[Finding]:
    """P3 and P7, of anything that was read in order after `after`: contiguous, rising, nothing after the end."""
    previous, seen = after, set[EventId]()
    ended: Entry | None = None
    for entry in entries:
        if entry.id in seen or entry.id == previous:
            yield Finding("doubled", f"{entry.id}")
        elif entry.id < previous:
            yield Finding("reordered", f"{entry.id} after {previous}")
        elif entry.id.epoch == previous.epoch and entry.id.seq != previous.seq + 1:
            yield Finding("lost", f"{previous} is followed by {entry.id}")
        elif entry.id.epoch != previous.epoch and entry.id.seq != 1:
            yield Finding("lost", f"epoch {entry.id.epoch} begins with {entry.id}")
        yield from _in_its_place(entry)
        if ended and entry.terminal:
            yield Finding("terminal", f"a second end, {entry.id} {entry.type} after {ended.id} {ended.type}")
        elif ended:
            yield Finding("after the end", f"{entry.id} {entry.type} after {ended.id} {ended.type}")
        ended = ended or (entry if entry.terminal else None)
        seen.add(entry.id)
        previous = max(previous, entry.id)


def _in_its_place(entry: Entry) -> Iterator[Finding]:
    """Epoch 0 is `start` alone, each later one begins with its only `attempt` (PROTOCOL 1.2, 1.4)."""
    expected = {(True, True): "start", (False, True): "attempt"}.get((entry.id.epoch == 0, entry.id.seq == 1))
    if expected and entry.type != expected:
        yield Finding("foreign", f"epoch {entry.id.epoch} begins with {entry.type}")
    elif not expected and (entry.type in ("start", "attempt") or entry.id.epoch == 0):
        yield Finding("foreign", f"{entry.type} at {entry.id}")
    try:
        data = json.loads(entry.data)
        if entry.type == "attempt" and EventId.parse(data["resume_from"]) >= entry.id:
            yield Finding("foreign", f"{entry.id} resumes from {data['resume_from']}")
    except (ValueError, KeyError, TypeError, BadCursor):
        yield Finding("altered", f"the data of {entry.id} {entry.type}: {entry.data[:80]}")


def of_log(log: Sequence[Entry], *, finished: bool = True) -> Iterator[Finding]:
    """P3, P7: in sequence, rewinds to what is there (and so a `start`), one terminal, the last."""
    if not log:
        yield Finding("missing", "an empty log")
        return
    malformed = False
    for finding in in_sequence(log):
        malformed = malformed or finding.kind == "altered"
        yield finding
    if not malformed:
        ids = {entry.id for entry in log}
        for entry in log:
            if entry.type == "attempt" and EventId.parse(json.loads(entry.data)["resume_from"]) not in ids:
                yield Finding("lost", f"{entry.id} resumes from what is not there: {entry.data}")
    terminals = [entry.id for entry in log if entry.terminal]
    if finished and not terminals:
        yield Finding("unfinished", f"the log ends at {log[-1].id} {log[-1].type}, without a terminal")
    if not finished and terminals:
        yield Finding("terminal", f"an unfinished log with {terminals[0]}")


def of_poll(run: Mapping[str, Any], log: Sequence[Entry]) -> Iterator[Finding]:
    """P23: the polled run is the folded log."""
    kept = survivors(log)
    end = kept[-1]
    said: dict[str, Any] = json.loads(end.data) if end.terminal else {}
    tokens = [json.loads(entry.data)["text"] for entry in kept if entry.type == "token"]
    answer = said.get("answer")
    start: dict[str, Any] = json.loads(log[0].data)
    expected = {
        "finished_at": run["finished_at"] if end.terminal else None,
        "last_event_id": str(log[-1].id),
        "answer": "".join(tokens) if answer is None and tokens else answer,
        "citations": said.get("citations", []),
        "usage": said.get("usage", {}),
        "error": said if end.type == "error" else None,
        "request_id": start.get("request_id"),
        "session_id": start.get("session_id"),
        "attempt": max((json.loads(entry.data)["attempt"] for entry in log if entry.type == "attempt"), default=0),
    }
    statuses = (STATUS_OF[end.type],) if end.terminal else ("queued", "running")
    if run["status"] not in statuses:
        yield Finding("poll", f"status {run['status']}, but the log ends with {end.type}")
    if end.terminal and run["finished_at"] is None:
        yield Finding("poll", "no finished_at")
    for name, value in expected.items():
        if run[name] != value:
            yield Finding("poll", f"{name} {run[name]!r}, but the log says {value!r}")


def of_pages(rows: Sequence[tuple[Entry, bool]], log: Sequence[Entry]) -> Iterator[Finding]:
    """The pages of GET /events are the log, and mark what a later `attempt` voids (PROTOCOL 1.4)."""
    rewinds = [
        (EventId.parse(json.loads(entry.data)["resume_from"]), entry.id) for entry in log if entry.type == "attempt"
    ]
    if [entry.id for entry, _ in rows] != [entry.id for entry in log]:
        yield Finding("page", f"{len(rows)} entries, the log has {len(log)}")
    stored = {entry.id: entry for entry in log}
    for entry, void in rows:
        if entry.id in stored and not _same(entry, stored[entry.id]):
            yield Finding("page", f"{entry} differs from the log's {stored[entry.id]}")
        if void != any(resume_from < entry.id < own for resume_from, own in rewinds):
            yield Finding("page", f"{entry.id} {entry.type} with void {void}")


def of_text(text: str, log: Sequence[Entry]) -> Iterator[Finding]:
    """The surviving tokens say what the agent has said."""
    said = "".join(json.loads(entry.data)["text"] for entry in survivors(log) if entry.type == "token")
    if said != text:
        at = next((n for n, pair in enumerate(zip(said, text, strict=False)) if pair[0] != pair[1]), len(said))
        yield Finding("text", f"{len(said)} of {len(text)} characters, {said[at : at + 40]!r} at {at}")


def _same(one: Entry, other: Entry) -> bool:
    return (one.id, one.type) == (other.id, other.type) and json.loads(one.data) == json.loads(other.data)


# -- readers ---------------------------------------------------------------------------------------------------


class _Life(NamedTuple):
    """What a reader saw from a beginning on: its own, or the answer to a lost cursor."""

    after: EventId
    entries: list[Entry]


class Exempt(NamedTuple):
    """What is excused for this run."""

    rolled_back: bool
    lost_closing: bool
    missing: bool
    unfinished: bool


def of_reading(reading: Reading, log: Sequence[Entry], exempt: Exempt) -> Iterator[Finding]:
    """P8 to P11: what a reader saw over all its connections is the log, or it was told otherwise."""
    lives: list[_Life] = []
    try:
        lives.append(_Life(EventId.parse(reading.cursor.rpartition("/")[2]) if reading.cursor else START, []))
        yield from _live(reading, lives)
    except BadCursor as error:
        yield Finding("foreign", f"an id that is none: {error}")
        return
    stored = {entry.id: entry for entry in log}
    first = lives[0].after
    if len(lives) > 1 and not exempt.rolled_back and (first == START or first in stored or lives[0].entries):
        yield Finding("restarted", f"told {len(lives) - 1} times that its cursor is lost")
    saw_a_lost_end = first != START and first not in stored  # its cursor, which another reader had
    for life in lives:
        lost_ends = {entry.id for entry in life.entries if entry.terminal and entry.id not in stored}
        saw_a_lost_end = saw_a_lost_end or bool(lost_ends)
        excused = lost_ends if exempt.lost_closing else ()
        yield from in_sequence([entry for entry in life.entries if entry.id not in excused], life.after)
        for entry in life.entries:
            if entry.id in stored and entry != stored[entry.id]:
                yield Finding("altered", f"{entry} is {stored[entry.id]} in the log")
            elif entry.id not in stored and not exempt.rolled_back and log:
                yield Finding("foreign", f"{entry.id} {entry.type} is not in the log")
    if not (exempt.lost_closing and saw_a_lost_end):
        yield from _against_the_log(reading, lives[-1], log, exempt)
    yield from _ending(reading, lives[-1], exempt)


def _live(reading: Reading, lives: list[_Life]) -> Iterator[Finding]:
    """Sorts what was read into `lives`. Raises BadCursor."""
    previous = reading.cursor
    for frame in reading.frames:
        if is_gone(frame.type, frame.data) and frame.id == previous:
            continue
        previous = frame.id
        request_id, _, text = frame.id.rpartition("/")
        if request_id and request_id != reading.request_id:
            yield Finding("foreign", f"{frame.id} {frame.type}")
        entry = Entry(EventId.parse(text), frame.type, frame.data)
        if entry.id != START:
            lives[-1].entries.append(entry)
            continue
        if entry.type != "attempt" or json.loads(entry.data).get("reason") != "cursor_lost":
            yield Finding("foreign", f"{frame.id} {frame.type} {frame.data[:80]}")
        lives.append(_Life(START, []))


def is_gone(kind: str, data: str) -> bool:
    """Whether this is the frame that ends the stream of a run which is not there (PROTOCOL 6.3); it has no id."""
    return kind == "error" and '"gone"' in data and json.loads(data).get("code") == "gone"


def _against_the_log(reading: Reading, life: _Life, log: Sequence[Entry], exempt: Exempt) -> Iterator[Finding]:
    """Raw entry by entry; where Redis has lost some, by the fold: what was seen or missed wrongly must be void."""
    if not log:
        return
    complete = reading.end in HAS_IT_ALL
    rest = [entry for entry in log if entry.id > life.after]
    if not exempt.rolled_back:
        seen = {entry.id for entry in life.entries}
        upto = rest[-1].id if complete and rest else max(seen, default=START)
        missed = [str(entry.id) for entry in rest if entry.id not in seen and entry.id <= upto]
        if missed:
            yield Finding("lost", f"{len(missed)} of {len(rest)}, the first {missed[0]}, the last {missed[-1]}")
    elif complete:
        before = [entry for entry in log if entry.id <= life.after]
        mine, theirs = survivors([*before, *life.entries]), survivors(log)
        if [entry[:2] for entry in mine] != [entry[:2] for entry in theirs]:
            not_there = [str(entry.id) for entry in mine if entry not in theirs][:3]
            not_seen = [str(entry.id) for entry in theirs if entry not in mine][:3]
            yield Finding("fold", f"differs from the log's: only seen {not_there}, only stored {not_seen}")


def _ending(reading: Reading, life: _Life, exempt: Exempt) -> Iterator[Finding]:
    """Only a terminal ends a stream, and a reader is turned away only when it has it all."""
    has_end = any(entry.terminal for entry in life.entries)
    if reading.end in HAS_IT_ALL:
        if not has_end and not reading.cursor:
            yield Finding("terminal", f"it ended with {reading.end}, without a terminal event")
    elif reading.end in ("gone", "404"):
        if not exempt.missing:
            yield Finding("missing", f"it was told {reading.end}")
    elif reading.end:
        yield Finding("turned away", reading.end)
    elif not exempt.unfinished:
        yield Finding("unfinished", f"it was still reading at {life.entries[-1].id if life.entries else 'nothing'}")
    ended = False
    for connection in reading.connections:
        ended = ended or any(frame.type in TERMINAL for frame in connection.frames)
        if connection.status == 200 and connection.ending == "finished" and not ended:
            yield Finding("false end", f"of the connection at {connection.at} s: the body ended without a terminal")
