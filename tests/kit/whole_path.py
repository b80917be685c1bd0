"""Submit, stream, poll, resume, cancel, a session's history: what every kind of Redis must carry."""

from __future__ import annotations

import json
import secrets

from tests.kit.checker import check_log, check_poll, check_reader, entries_of
from tests.kit.http import Client


def check_whole_path(one: Client, two: Client) -> None:
    """`one` and `two` are the same owner's clients of two gateways, or of the same."""
    check_stream_and_poll(one)
    check_resume(one, two)
    check_cancel(one, two)
    check_history(one, two)


def check_stream_and_poll(client: Client, query: str = "one two three") -> str:
    """Returns the request_id."""
    events = client.submit_and_read(query)
    request_id: str = events[0].json["request_id"]
    log = client.log(request_id)
    check_log(log)
    check_reader(entries_of(events), log)
    run = client.finished(request_id)
    check_poll(run, log)
    assert (run["status"], run["answer"]) == ("completed", query)
    return request_id


def check_resume(one: Client, two: Client) -> None:
    request_id = one.submit("resume", agent="tokens", parameters={"count": 40, "pause": 0.02})
    first = []
    for event in one.events(request_id):
        first.append(event)
        if len(first) == 12:
            break
    rest = list(two.events(request_id, after=first[-1].id))
    log = one.log(request_id)
    check_log(log)
    check_reader(entries_of([*first, *rest]), log)


def check_cancel(one: Client, two: Client) -> None:
    request_id = one.submit("cancel", agent="hangs")
    events = one.events(request_id)
    seen = [next(events) for _ in range(3)]
    reply = two.post(f"/api/v1/runs/{request_id}/cancel")
    assert (reply.status_code, reply.json()["status"]) == (200, "cancelled")
    seen += list(events)
    log = one.log(request_id)
    check_log(log)
    check_reader(entries_of(seen), log)
    assert seen[-1].type == "cancelled"


def check_history(one: Client, two: Client) -> None:
    session_id = secrets.token_hex(8)
    asked = [one.submit(query, session_id=session_id) for query in ("first", "second")]
    for request_id in asked:
        one.finished(request_id)
    request_id = two.submit("and before?", agent="recalls", session_id=session_id)
    two.finished(request_id)
    turns = [json.loads(entry.data)["value"] for entry in two.log(request_id) if entry.type == "data"]
    assert [(turn["request_id"], turn["query"]) for turn in turns] == list(zip(asked, ("first", "second"), strict=True))
