"""The pure checker: what must hold for every log, and for what a reader saw of it."""

from __future__ import annotations

import json
from collections.abc import Sequence

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
