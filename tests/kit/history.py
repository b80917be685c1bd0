"""What happened in a test, in memory for the checker and as lines of JSON in a file for a post-mortem."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from tests.kit.sse import Event


class Frame(NamedTuple):
    """An event as a reader got it. Times are seconds since the history began."""

    at: float
    id: str
    """The reader's last event id with it: of a frame without an id, that of the frame before."""
    type: str
    data: str


@dataclass
class Connection:
    at: float
    url: str
    cursor: str
    """The Last-Event-ID that was sent; "" is none."""
    status: int | None
    """None where no answer came."""
    frames: list[Frame] = field(default_factory=list)
    ending: str = "open"
    """`finished`: the body ended as its framing says. `cut`: it did not. `left`: the reader went."""


@dataclass
class Reading:
    """One reader of one run, over all its connections."""

    name: str
    request_id: str
    """"" as long as a reader that submits has not been told."""
    cursor: str = ""
    """With which it began."""
    connections: list[Connection] = field(default_factory=list)
    end: str = ""
    """Why it reads no more: `terminal` and `204` have it all, `gone` and `404` miss the run, another status turned it
    away. "" where the test ended first.
    """

    @property
    def frames(self) -> list[Frame]:
        return [frame for connection in self.connections for frame in connection.frames]


class Submit(NamedTuple):
    at: float
    key: str
    """Which submits are one: the Idempotency-Key, or the query."""
    request_id: str


class Fault(NamedTuple):
    at: float
    kind: str
    details: dict[str, Any]


class Poll(NamedTuple):
    at: float
    request_id: str
    run: dict[str, Any] | None
    """None where there is no such run."""


class History:
    """Each call adds a line to the file. Cheap enough for 10^5 events."""

    def __init__(self, path: Path | None = None) -> None:
        self.readings: dict[str, Reading] = {}
        self.submits: list[Submit] = []
        self.faults: list[Fault] = []
        self.polls: list[Poll] = []
        self.notes: list[dict[str, Any]] = []
        self._began = time.monotonic()
        self._file: TextIO | None = path.open("w", encoding="ascii") if path else None

    @classmethod
    def load(cls, path: Path) -> History:
        """From a file, as it was when that ended."""
        history = cls()
        with path.open(encoding="ascii") as file:
            for line in file:
                history._apply(json.loads(line))
        return history

    def close(self) -> None:
        """Of its file; what comes now is kept in memory only."""
        if self._file is not None:
            self._file.close()
            self._file = None

    @property
    def now(self) -> float:
        """Seconds since it began."""
        return time.monotonic() - self._began

    @property
    def cut_streams(self) -> int:
        """Connections that somebody else has broken while they were read."""
        readings = self.readings.values()
        return sum(connection.ending == "cut" for reading in readings for connection in reading.connections)

    # -- what is recorded ------------------------------------------------------------------------------------

    def reads(self, reader: str, request_id: str = "", cursor: str = "") -> Reading:
        """A reader begins; its name is its own."""
        assert reader not in self.readings, f"two readers called {reader}"
        self._record("reads", reader=reader, run=request_id, cursor=cursor)
        return self.readings[reader]

    def told(self, reader: str, request_id: str) -> None:
        """A reader that submits learns which run is its own."""
        self._record("told", reader=reader, run=request_id)

    def connected(self, reader: str, url: str, cursor: str, status: int | None) -> None:
        self._record("connected", reader=reader, url=url, cursor=cursor, status=status)

    def frame(self, reader: str, event: Event) -> None:
        self._record("frame", reader=reader, id=event.id, type=event.type, data=event.data)

    def disconnected(self, reader: str, ending: str) -> None:
        self._record("disconnected", reader=reader, ending=ending)

    def ended(self, reader: str, why: str) -> None:
        self._record("ended", reader=reader, why=why)

    def submitted(self, key: str, request_id: str) -> None:
        self._record("submitted", key=key, run=request_id)

    def polled(self, request_id: str, run: dict[str, Any] | None) -> None:
        self._record("polled", run=request_id, result=run)

    def fault(self, kind: str, **details: Any) -> None:
        self._record("fault", kind=kind, details=details)
        if self._file is not None:
            self._file.flush()

    def note(self, **anything: Any) -> None:
        """Whatever else a post-mortem should know; the checker does not."""
        self._record("note", details=anything)

    def _record(self, what: str, **fields: Any) -> None:
        record = {"at": round(self.now, 4), "what": what, **fields}
        if self._file is not None:
            self._file.write(json.dumps(record, separators=(",", ":")) + "\n")
        self._apply(record)

    def _apply(self, record: dict[str, Any]) -> None:
        match record:
            case {"what": "frame", "at": at, "reader": reader}:
                frame = Frame(at, record["id"], record["type"], record["data"])
                self.readings[reader].connections[-1].frames.append(frame)
            case {"what": "reads", "reader": reader, "run": run, "cursor": cursor}:
                self.readings[reader] = Reading(reader, run, cursor)
            case {"what": "told", "reader": reader, "run": run}:
                self.readings[reader].request_id = run
            case {"what": "connected", "at": at, "reader": reader, "url": url, "cursor": cursor, "status": status}:
                self.readings[reader].connections.append(Connection(at, url, cursor, status))
            case {"what": "disconnected", "reader": reader, "ending": ending}:
                self.readings[reader].connections[-1].ending = ending
            case {"what": "ended", "reader": reader, "why": why}:
                self.readings[reader].end = why
            case {"what": "submitted", "at": at, "key": key, "run": run}:
                self.submits.append(Submit(at, key, run))
            case {"what": "polled", "at": at, "run": run, "result": result}:
                self.polls.append(Poll(at, run, result))
            case {"what": "fault", "at": at, "kind": kind, "details": details}:
                self.faults.append(Fault(at, kind, details))
            case {"what": "note", "details": details}:
                self.notes.append(details)
            case _:
                raise ValueError(f"not a line of a history: {record}")
