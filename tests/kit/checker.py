"""The pure checker: what must hold for every log, and for what a reader saw of it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from broker.events import TERMINAL, Entry
from broker.fold import fold
from broker.ids import START, EventId
from tests.kit.sse import Event


def check_log(entries: Sequence[Entry], *, finished: bool = True) -> None:
    """P3, P7: contiguous and rising ids, `start` first, each epoch begins with `attempt`, one terminal, the last."""
    assert entries, "an empty log"
    assert entries[0].type == "start", f"the log begins with {entries[0].type}"
    previous = START
    for entry in entries:
        expected = previous.seq + 1 if entry.id.epoch == previous.epoch else 1
        assert entry.id.epoch >= previous.epoch, f"{entry.id} after {previous}: falls"
        assert entry.id.seq == expected, f"{entry.id} after {previous}: a gap or a double"
        if entry.id.seq == 1 and entry.id.epoch > 0:
            assert entry.type == "attempt", f"epoch {entry.id.epoch} begins with {entry.type}"
        previous = entry.id
        json.loads(entry.data)
    terminals = [entry.id for entry in entries if entry.type in TERMINAL]
    if finished:
        assert terminals == [entries[-1].id], f"terminals {terminals}, the log ends at {entries[-1].id}"
    else:
        assert not terminals, f"an unfinished log with {terminals}"


def entries_of(events: Sequence[Event]) -> list[Entry]:
    """What a client of the native dialect read, as entries; ids in either form."""
    return [Entry(EventId.parse(event.id.rpartition("/")[2]), event.type, event.data) for event in events]


def check_reader(seen: Sequence[Entry], log: Sequence[Entry]) -> None:
    """P8: what a reader saw over all its connections is the log: nothing lost, doubled, foreign or out of order."""
    assert [entry.id for entry in seen] == [entry.id for entry in log], _difference(seen, log)
    for mine, stored in zip(seen, log, strict=True):
        assert mine == stored, f"{mine} differs from the log's {stored}"


def _difference(seen: Sequence[Entry], log: Sequence[Entry]) -> str:
    mine, stored = [str(entry.id) for entry in seen], [str(entry.id) for entry in log]
    lost = [event_id for event_id in stored if event_id not in set(mine)]
    foreign = [event_id for event_id in mine if event_id not in set(stored)]
    return (
        f"lost {lost[:5]}, foreign {foreign[:5]}, doubled {len(mine) - len(set(mine))}, read {len(mine)} of {len(log)}"
    )


def surviving_text(entries: Sequence[Entry]) -> str:
    return "".join(json.loads(entry.data)["text"] for entry in fold(entries) if entry.type == "token")


def check_poll(run: Mapping[str, Any], log: Sequence[Entry]) -> None:
    """P23: the polled run is the folded stream. Written out here, so that a fold that errs is not its own judge."""
    survivors: list[Entry] = []
    for entry in log:
        if entry.type == "attempt":
            resume_from = EventId.parse(json.loads(entry.data)["resume_from"])
            survivors = [kept for kept in survivors if kept.id <= resume_from]
        else:
            survivors.append(entry)
    text = "".join(json.loads(entry.data)["text"] for entry in survivors if entry.type == "token")
    has_text = any(entry.type == "token" for entry in survivors)
    end = survivors[-1]
    said: dict[str, Any] = json.loads(end.data) if end.type in TERMINAL else {}
    status = {"final": "completed", "error": "failed", "cancelled": "cancelled"}.get(end.type)
    answer = said.get("answer")
    if answer is None:
        answer = text if has_text else None
    if status is None:
        assert run["status"] in ("queued", "running"), run["status"]
    else:
        assert run["status"] == status, f"{run['status']}, but the log ends with {end.type}"
    assert (run["finished_at"] is not None) == (status is not None)
    assert run["last_event_id"] == str(log[-1].id), f"{run['last_event_id']}, but the log ends at {log[-1].id}"
    assert run["answer"] == answer, f"polled {run['answer']!r}, streamed {answer!r}"
    assert run["citations"] == said.get("citations", [])
    assert run["usage"] == said.get("usage", {})
    assert run["error"] == (said if end.type == "error" else None)
    start = json.loads(log[0].data)
    assert (run["request_id"], run["session_id"]) == (start["request_id"], start["session_id"])
    attempts = [json.loads(entry.data)["attempt"] for entry in log if entry.type == "attempt"]
    assert run["attempt"] == max(attempts, default=0), f"attempt {run['attempt']}, in the log {attempts}"
