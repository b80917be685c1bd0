"""Gateways, their hubs, and readers (PROTOCOL 6)."""

from __future__ import annotations

from broker.ids import START
from tests.model.core import Core
from tests.model.processes import Hub, Reader
from tests.model.rules import Rule
from tests.model.scripts import CLOSED, LEASE_MS, LIVE, Entry, Record

GIVE_UP_MS = LEASE_MS + 5000
"""How long a reader waits for a repair."""


class Reading(Core):
    """What a reader gets, over which gateway, and when it is told that its cursor is lost."""

    def step_nobody_reads(self) -> None:
        self.readers = []

    def step_connect(self, n: int, at: int) -> None:
        gateway = self.gateways[at % len(self.gateways)]
        reader = self.readers[n % len(self.readers)] if self.readers else None
        if reader is None or reader.request_id is None or reader.ended:
            return
        record = self.find(reader.request_id)
        if record is None:
            reader.ended = "gone"
            return
        reader.gateway, reader.position, reader.waiting_since = at % len(self.gateways), reader.cursor, None
        if record.status in CLOSED.values() and (
            reader.cursor >= record.end if Rule.STRICT_204 in self.dropped else reader.cursor == record.end
        ):
            reader.ended, reader.gateway = "204", None
        elif reader.request_id not in gateway.hubs:
            gateway.hubs[reader.request_id] = Hub()

    def step_cut(self, n: int) -> None:
        if self.readers:
            self.readers[n % len(self.readers)].gateway = None

    def _read(self, hub: Hub, request_id: str) -> None:
        record = self.find(request_id)
        hub.ring = []
        hub.base = hub.end = record.end if record is not None else START

    def step_pump(self, n: int) -> None:
        """A gateway takes a message."""
        for request_id, hub in sorted(self.gateways[n % len(self.gateways)].hubs.items()):
            if hub.inbox and hub.end is not None:
                previous, entries = hub.inbox.pop(0)
                if previous == hub.end or Rule.PREV in self.dropped:
                    hub.ring = [*hub.ring, *entries]
                    hub.end = entries[-1].id
                elif entries[-1].id > hub.end:
                    self._read(hub, request_id)
                return

    def step_lose_message(self, n: int) -> None:
        for _, hub in sorted(self.gateways[n % len(self.gateways)].hubs.items()):
            if hub.inbox:
                hub.inbox.pop(0)
                return

    def step_beat(self, n: int) -> None:
        n %= len(self.gateways)
        for request_id, hub in sorted(self.gateways[n].hubs.items()):
            record = self.find(request_id)
            if record is not None and record.status in LIVE and request_id not in self.index.state:
                self.index.put(request_id, self.index_time)
            if Rule.BEAT in self.dropped:
                continue
            readers = [reader for reader in self.readers if (reader.gateway, reader.request_id) == (n, request_id)]
            if record is None:
                for reader in readers:
                    reader.ended, reader.gateway = "gone", None
            elif hub.end is not None and record.end != hub.end:
                hub.inbox = []
                self._read(hub, request_id)

    def step_deliver(self, n: int, count: int) -> None:
        """A gateway sends up to `count` frames to a reader: of its ring, or of the log if it is not there."""
        reader = self.readers[n % len(self.readers)] if self.readers else None
        if reader is None or reader.gateway is None or reader.ended or reader.request_id is None:
            return
        hub = self.gateways[reader.gateway].hubs[reader.request_id]
        if hub.end is None:
            self._read(hub, reader.request_id)
        record = self.find(reader.request_id)
        from_log = reader.position not in (hub.base, *(entry.id for entry in hub.ring))
        if from_log and record is None:
            reader.ended, reader.gateway = "gone", None
            return
        source = record.log if from_log and record is not None else hub.ring
        frames = [entry for entry in source if entry.id > reader.position][:count]
        if frames and from_log and record is not None and self._is_lost(reader, frames[0], record):
            self._restart(reader)
            return
        for entry in frames:
            self._frame(reader, entry)
            if reader.ended:
                return
        if frames:
            reader.waiting_since = None
        elif record is not None:
            self._idle_reader(reader, record)

    def _is_lost(self, reader: Reader, following: Entry, record: Record) -> bool:
        """Whether the log has gone on without the epoch in which the reader stands."""
        epoch = reader.position.epoch
        return (
            Rule.KNOWN_EPOCH not in self.dropped
            and following.id.epoch > epoch
            and reader.position > START
            and not any(entry.id.epoch == epoch for entry in record.log)
        )

    def _idle_reader(self, reader: Reader, record: Record) -> None:
        """There is nothing after its position."""
        if Rule.EMPTY_PAGE in self.dropped:
            reader.ended, reader.gateway = "terminal", None
        elif reader.position <= record.end:
            reader.waiting_since = None
        elif Rule.CURSOR_LOST not in self.dropped:
            if reader.waiting_since is None:
                reader.waiting_since = self.now
            if record.status in CLOSED.values() or self.now - reader.waiting_since > GIVE_UP_MS:
                self._restart(reader)

    def _frame(self, reader: Reader, entry: Entry) -> None:
        if entry.resume_from is None:
            reader.view.append(entry)
        else:
            reader.view = [kept for kept in reader.view if kept.id <= entry.resume_from]
        reader.frames.append(entry.id)
        reader.cursor = reader.position = entry.id
        if entry.type in CLOSED:
            reader.ended, reader.terminal, reader.gateway = "terminal", entry.id, None

    def _restart(self, reader: Reader) -> None:
        """`attempt {"reason": "cursor_lost", "resume_from": "0-0"}`."""
        reader.view, reader.position, reader.waiting_since = [], START, None
        reader.frames.append(START)
        if Rule.LOST_ID not in self.dropped:
            reader.cursor = START
