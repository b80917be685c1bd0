"""One log, every dialect, any gateway: the same bytes everywhere, live and replayed, and resumed at any cut."""

from __future__ import annotations

import json
import random
import re
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, NamedTuple
from urllib.parse import urlencode

import pytest

from tests.conformance.conftest import Wire
from tests.conformance.test_heartbeats import PATIENCE
from tests.kit import sse
from tests.kit.folds import FOLDS
from tests.kit.http import Client, token
from tests.kit.processes import wait_for
from tests.kit.readers import Target
from tests.kit.scale import scaled
from tests.kit.watch import observe

AGENT: dict[str, Any] = {"agent": "varied", "parameters": {"count": 60, "every": 20, "pause": 0.5}}
_BESIDE = re.compile(rb"^(: .*|retry: \d+)\n", re.MULTILINE)
_OPENINGS = re.compile(rb"\A\n+|(?<=\n\n)\n+")
"""The blank lines after the comments of the dialects that end them so."""


class Run(NamedTuple):
    request_id: str
    session_id: str
    query: str


def door(dialect: str, run: Run) -> tuple[str, dict[str, Any] | None]:
    """The path, and the body of a POST: where a client of this dialect reads a run that is under way."""
    asked = {**AGENT, "session_id": run.session_id}
    match dialect:
        case "native":
            return f"/api/v1/runs/{run.request_id}/stream", None
        case "chat":
            return "/chat", {**asked, "message": run.query, "stream": True}
        case "session_chat":
            return "/api/chat", {**AGENT, "message": run.query, "sessionId": run.session_id}
        case "agent":
            return f"/api/v1/agent/stream/{run.request_id}", None
        case "prompt":
            fields = {"prompt": run.query, "parameters": json.dumps(AGENT["parameters"]), "agent": AGENT["agent"]}
            return f"/chat?{urlencode({**fields, 'session_id': run.session_id})}", None
        case "openai":
            return f"/v1/responses/resp_{run.request_id}?stream=true", None
        case "aisdk":
            return f"/ai/chat/{run.request_id}/stream?startIndex=0", None
    raise AssertionError(dialect)


def target(wire: Wire, gateway: int, subject: str, dialect: str, run: Run) -> Target:
    path, body = door(dialect, run)
    return Target(
        url=wire.urls[gateway] + path,
        headers={"Authorization": f"Bearer {token(subject)}", "Content-Type": "application/json"},
        body=body,
    )


def begun(client: Client, query: str) -> Run:
    session_id = uuid.uuid4().hex
    return Run(client.submit(query, session_id=session_id, **AGENT), session_id, query)


def frames(body: bytes) -> bytes:
    """Without what is beside them."""
    return _OPENINGS.sub(b"", _BESIDE.sub(b"", body))


@pytest.mark.parametrize("dialect", FOLDS)
def test_two_gateways_give_the_same_bytes_live_and_replayed(
    wire: Wire, alice: Client, subject: str, dialect: str
) -> None:
    run = begun(alice, f"the same in {dialect}")
    with ThreadPoolExecutor(2) as pool:
        live = list(pool.map(lambda n: observe(target(wire, n, subject, dialect, run)), range(2)))
    assert max(each.longest_gap for each in live) < PATIENCE
    assert frames(live[0].body) == frames(live[1].body)
    assert len(sse.parse(live[0].body)) > 10
    for each in live:  # P13
        assert any(comment.startswith(b"heartbeat") for comment in each.comments())
    wait_for(lambda: alice.run(run.request_id)["status"] == "completed")
    if door(dialect, run)[1] is None:
        again = [target(wire, n, subject, dialect, run) for n in range(2)]
        if dialect == "prompt":  # without the run's id it would be a new run
            again = [with_header(each, f"{run.request_id}/0-0") for each in again]
        replayed = [observe(each) for each in again]
        assert {frames(each.body) for each in replayed} == {frames(live[0].body)}


def _count(events: list[sse.Event]) -> int:
    return len(events) - sum(event.data == "[DONE]" for event in events)


RESUMED: dict[str, Callable[[Target, list[sse.Event]], Target]] = {
    "native": lambda target, seen: with_header(target, seen[-1].id),
    "agent": lambda target, seen: with_header(target, seen[-1].id),
    "prompt": lambda target, seen: with_header(target, seen[-1].id),
    "openai": lambda target, seen: replace(
        target, url=f"{target.url}&starting_after={json.loads(seen[-1].data)['sequence_number']}"
    ),
    "aisdk": lambda target, seen: replace(target, url=f"{target.url.removesuffix('0')}{_count(seen)}"),
}
"""How a client of a dialect goes on after what it has seen; the others have no cursor, and begin again."""


def with_header(target: Target, last_event_id: str) -> Target:
    return replace(target, headers={**target.headers, "Last-Event-ID": last_event_id})


@pytest.mark.parametrize("dialect", RESUMED)
def test_a_body_that_is_cut_at_any_byte_goes_on_at_another_gateway(
    wire: Wire, alice: Client, subject: str, dialect: str, chance: random.Random
) -> None:
    """P8: the frames that came whole, and what the resumed stream brings, are the stream."""
    run = begun(alice, f"cut in {dialect}")
    alice.finished(run.request_id)
    first = target(wire, 0, subject, dialect, run)
    whole = observe(with_header(first, f"{run.request_id}/0-0") if dialect == "prompt" else first).body
    expected = [(event.id, event.type, event.data) for event in sse.parse(whole)]
    for _ in range(scaled(200)):
        seen = sse.parse(whole[: chance.randrange(len(whole))])
        if not seen or len(seen) >= len(expected) - 1:  # what has it all is answered in each dialect's own way
            continue
        again = observe(RESUMED[dialect](target(wire, chance.randrange(2), subject, dialect, run), seen)).body
        got = [(event.id, event.type, event.data) for event in [*seen, *sse.parse(again)]]
        # Without the ids: a frame that has none is given the last one of its connection by a reader.
        assert [each[1:] for each in got] == [each[1:] for each in expected], seen[-1]
