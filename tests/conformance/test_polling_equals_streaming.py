"""P23: what a poll says is what the stream has told. The fixture of this suite checks it for every other run too."""

from __future__ import annotations

import asyncio
import json
import uuid
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from broker.events import Error, Final, Message, Token
from broker.fold import fold
from broker.ids import EventId
from tests.conformance.conftest import Wire
from tests.kit.checker import check_log, check_poll, check_reader, entries_of
from tests.kit.http import Client
from tests.kit.processes import wait_for
from tests.kit.readers import READERS, follow
from tests.kit.scale import scaled
from tests.kit.scribe import Scribe, Written

WHATWG = READERS[1]
ENDINGS: dict[str, tuple[dict[str, Any], str]] = {
    "final with its own answer": ({"agent": "varied", "parameters": {"count": 8}}, "completed"),
    "final without an answer": ({"agent": "quiet", "parameters": {"count": 3, "pause": 0}}, "completed"),
    "tokens and no final": ({"agent": "no_final"}, "completed"),
    "nothing at all": ({"agent": "quiet", "parameters": {"count": 0, "pause": 0}}, "completed"),
    "an answer too long to repeat": ({"agent": "burst", "parameters": {"count": 100, "size": 1000}}, "completed"),
    "an error that the agent tells": ({"agent": "speaks", "parameters": {"error": True}}, "failed"),
    "an exception after tokens": ({"agent": "raises"}, "failed"),
    "something that is no event": ({"agent": "yields_junk"}, "failed"),
}


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_run_polls_as_it_streams(
    wire: Wire, alice: Client, alice_elsewhere: Client, subject: str, ending: str
) -> None:
    body, status = ENDINGS[ending]
    events = follow(WHATWG, wire.post(subject, ending, **body))
    log = entries_of(events)
    check_log(log)
    for client in (alice, alice_elsewhere):
        run = client.run(events[0].json["request_id"])
        assert run["status"] == status
        check_poll(run, log)


def test_a_run_that_is_cancelled_keeps_its_tokens(wire: Wire, alice: Client, alice_elsewhere: Client) -> None:
    request_id = alice.submit("enough", agent="tokens", parameters={"count": 1000, "pause": 0.02})
    wait_for(lambda: len(alice.log(request_id)) > 6)
    cancelled = alice_elsewhere.post(f"/api/v1/runs/{request_id}/cancel").json()
    log = entries_of(list(alice.events(request_id)))
    check_log(log)
    assert (cancelled["status"], log[-1].type) == ("cancelled", "cancelled")
    assert cancelled["answer"].startswith("0 1 2 ")
    for run in (cancelled, alice.run(request_id), alice_elsewhere.run(request_id)):
        check_poll(run, log)


def test_a_run_under_way_polls_as_far_as_it_has_streamed(wire: Wire, alice: Client, subject: str) -> None:
    request_id = alice.submit("half", agent="slow", parameters={"seconds": 1.0})
    wait_for(lambda: len(alice.log(request_id)) == 3)
    run = alice.run(request_id)
    assert (run["status"], run["answer"]) == ("running", "begun ")
    check_poll(run, alice.log(request_id))
    held = alice.run(request_id, wait=20)
    check_poll(held, entries_of(follow(WHATWG, wire.get(subject, request_id))))
    assert held["status"] == "completed"


STEP = st.one_of(
    st.tuples(st.just("tokens"), st.integers(1, 4)),
    st.tuples(st.just("message"), st.just(0)),
    st.tuples(st.just("attempt"), st.integers(0, 40)),
)
END = st.sampled_from([Final(), Final(answer="said at the end"), Error(code="x", message="y"), None])


@settings(max_examples=scaled(80), print_blob=True, suppress_health_check=list(HealthCheck))
@given(steps=st.lists(STEP, max_size=12), end=END)
def test_a_run_with_rewinds_polls_as_it_streams(
    wire: Wire, steps: list[tuple[str, int]], end: Final | Error | None
) -> None:
    """Attempts that take back some or all of what came before, and any ending; every reader sees the log."""
    subject = f"rewinds-{uuid.uuid4()}"
    request_id = asyncio.run(_write(wire, subject, steps, end))
    with wire.client(subject) as client, wire.client(subject, 1) as elsewhere:
        log = client.log(request_id)
        check_log(log, finished=end is not None)
        for gateway in (client, elsewhere):
            check_poll(gateway.run(request_id), log)
        if end is not None:
            for reader in READERS:
                check_reader(entries_of(follow(reader, wire.get(subject, request_id))), log)
        rows = elsewhere.get(f"/api/v1/runs/{request_id}/events", params={"limit": 500}).json()["events"]
        kept = [str(entry.id) for entry in fold(log)]
        assert [row["id"] for row in rows if not row["void"] and row["type"] != "attempt"] == kept


async def _write(wire: Wire, subject: str, steps: list[tuple[str, int]], end: Final | Error | None) -> str:
    async with Scribe(wire.redis.url) as scribe:
        run = await scribe.running(subject, "with rewinds")
        for kind, number in steps:
            if kind == "tokens":
                texts = [f"{run.attempts}.{number}.{n} " for n in range(number)]
                await run.append([("token", Token(text=text).json_data()) for text in texts])
            elif kind == "message":
                await run.append([("message", Message(text="by the way").json_data())])
            else:
                await run.attempt(await _some_id(run, number))
        if end is not None:
            await run.append([(end.type, end.json_data())])
        return run.request_id


async def _some_id(run: Written, number: int) -> EventId:
    """An id from which an attempt may resume: one that survives, of an earlier epoch, as a checkpoint's would be."""
    kept = fold(await run.log())
    return kept[number % len(kept)].id


def test_a_terminal_of_an_earlier_connection_is_the_answer_of_every_later_poll(wire: Wire, alice: Client) -> None:
    """The ETag is the last event id: nothing changes after the end."""
    request_id = alice.submit("over")
    run = alice.finished(request_id)
    answer = alice.get(f"/api/v1/runs/{request_id}")
    assert json.loads(answer.headers["etag"]) == run["last_event_id"]
    again = alice.get(f"/api/v1/runs/{request_id}", headers={"If-None-Match": answer.headers["etag"]})
    assert again.status_code == 304
