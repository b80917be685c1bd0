"""P18: what is read is what was written, whatever it holds; nothing in a text becomes an event, a line or a header."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tests.conformance.conftest import Wire
from tests.kit import sse
from tests.kit.checker import check_reader, entries_of
from tests.kit.http import Client
from tests.kit.readers import READERS, follow
from tests.kit.scale import scaled

NASTY = (
    "\n",
    "\r\n",
    "\r",
    "\n\n",
    "\x0b",
    "\x0c",
    "\x1c\x1d\x1e",
    "\x85",
    "\u2028",
    "\u2029",
    "\0",
    "\x7f\x1b[31m",
    "\ufeff",
    "\ud800",
    "\udfff",
    "\ude00\ud83d",
    "😀👩‍👩‍👧",
    "\u202e",
    "\uffff\U0010ffff",
    " ",
    "",
    '"}\\',
    "\\u0000\\ud800",
    "data: x\n\n",
    "\nevent: final\ndata: {}\n\n",
    "\n\nid: 9-9\nevent: x\ndata: {}\n\n",
    "\rid: 0-0\r\r",
    "\u2028event: cancelled\u2028data: {}\u2028\u2028",
    ": comment\n",
    "retry: 1\n",
    "0\r\n\r\n",
    "\r\nX-Injected: 1\r\n\r\n",
    "%0d%0aX-Injected: 1",
    "1 0-1\n2-1 final {}",
    "[DONE]",
    "</script>",
)


def _as_json(text: str) -> str:
    """Two surrogates that meet are one character, in JSON as in UTF-16."""
    met: str = json.loads(json.dumps(text))
    return met


ALL = _as_json("".join(NASTY))
TEXT = st.one_of(
    st.lists(st.one_of(st.sampled_from(NASTY), st.text(max_size=8)), max_size=6).map("".join),
    st.text(st.characters(exclude_categories=()), max_size=40),
).map(_as_json)
NOT_EMPTY = TEXT.filter(bool)
JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), TEXT),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(TEXT, inner, max_size=4)),
    max_leaves=8,
)
STREAM_HEADERS = {
    "date",
    "content-type",
    "cache-control",
    "x-accel-buffering",
    "x-request-id",
    "content-location",
    "transfer-encoding",
}
JSON_HEADERS = {"date", "content-type", "content-length", "cache-control", "x-request-id", "etag", "location"}

batches: Callable[[Any], Any] = settings(
    max_examples=scaled(60), print_blob=True, suppress_health_check=list(HealthCheck)
)


def _spoken(texts: list[str], *, error: bool) -> list[tuple[str, Any]]:
    """What the agent `speaks` yields."""
    events: list[tuple[str, Any]] = []
    for text in texts:
        item = {"title": text, "path": text, text: text}
        events += [
            ("message", {"text": text}),
            ("progress", {"percent": 50.0, "message": text}),
            ("sources", {"stage": "discovered", "count": 1, "items": [item]}),
            ("reasoning", {"text": text}),
            ("tool_call", {"id": text, "tool": text, "args": {text: [text]}}),
            ("tool_result", {"id": text, "tool": text, "result": text}),
            ("data", {"name": text, "value": {text: text}}),
            ("token", {"text": text}),
        ]
    final = ("final", {"answer": text, "citations": [item], "usage": {text: text}})
    return [*events, ("error", {"code": text, "message": text}) if error else final]


@batches
@given(texts=st.lists(TEXT, min_size=1, max_size=20))
@example(texts=list(NASTY))
def test_what_an_agent_says_is_what_every_reader_reads(wire: Wire, texts: list[str]) -> None:
    """In every field of every event that has one, in the stream, the poll and the pages."""
    subject = f"says-{uuid.uuid4()}"
    expected = _spoken(texts, error=False)
    with wire.client(subject) as client:
        body: dict[str, Any] = {"agent": "speaks", "parameters": {"texts": texts}}
        post = wire.post(subject, "say it", **body)
        first = follow(READERS[1], post)
        request_id = first[0].json["request_id"]
        get = wire.get(subject, request_id)
        log = client.log(request_id)
        assert [(entry.type, json.loads(entry.data)) for entry in log[2:]] == expected
        check_reader(entries_of(first), log)
        for reader in READERS:
            short = follow(reader, get)
            check_reader(entries_of(short), log)
            assert [(event.type, event.json) for event in short[2:]] == expected, reader.name
            long = follow(reader, post, after=f"{request_id}/0-0")
            assert long == first, reader.name
        run = client.run(request_id)
        final = expected[-1][1]
        assert (run["answer"], run["citations"], run["usage"]) == (final["answer"], final["citations"], final["usage"])


@batches
@given(
    query=NOT_EMPTY,
    session_id=NOT_EMPTY,
    metadata=st.dictionaries(TEXT, JSON, max_size=4),
    parameters=st.dictionaries(TEXT.filter(lambda name: name not in ("text", "texts", "error")), JSON, max_size=4),
)
@example(
    query=ALL,
    session_id=ALL[:255],
    metadata={t: t for t in NASTY},
    parameters={t: t for t in NASTY},
)
@example(query="\ud800", session_id="\udfff", metadata={"\ud800": ["\ud800"]}, parameters={"\ud800": "\ud800"})
def test_what_a_user_says_comes_back_as_it_was(
    wire: Wire, query: str, session_id: str, metadata: dict[str, Any], parameters: dict[str, Any]
) -> None:
    """The query comes back as the agent's own words, and as its error's."""
    subject = f"asks-{uuid.uuid4()}"
    session_id = session_id[:255]
    body: dict[str, Any] = {"agent": "speaks", "session_id": session_id, "metadata": metadata}
    with wire.client(subject) as client:
        for error in (False, True):
            sent = {"query": query, **body, "parameters": {**parameters, "error": error}}
            accepted = client.post(
                "/api/v1/query", content=json.dumps(sent), headers={"Content-Type": "application/json"}
            )
            assert accepted.status_code == 202, accepted.text
            request_id = accepted.json()["request_id"]
            assert accepted.json()["session_id"] == session_id
            events = list(client.events(request_id))
            assert events[0].json == {"request_id": request_id, "session_id": session_id}
            assert [(event.type, event.json) for event in events[2:]] == _spoken([query], error=error)
            run = client.run(request_id)
            assert (run["session_id"], run["metadata"]) == (session_id, metadata)
            assert run["error"] == ({"code": query, "message": query} if error else None)
            assert run["answer"] == query
            assert run["status"] == ("failed" if error else "completed")
        rows = client.get("/api/v1/runs").json()["runs"]
        assert [(row["session_id"], row["metadata"]) for row in rows] == [(session_id, metadata)] * 2
        if _has_utf8(session_id):
            assert client.get("/api/v1/runs", params={"session_id": session_id}).json()["runs"] == rows


def _has_utf8(text: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in text)


def test_no_text_becomes_a_header_or_a_byte_that_is_not_ascii(wire: Wire, alice: Client, subject: str) -> None:
    body = {
        "query": ALL,
        "session_id": ALL[:255],
        "metadata": dict.fromkeys(NASTY, ALL),
        "agent": "speaks",
        "parameters": {"texts": list(NASTY)},
    }
    content = json.dumps(body).encode("ascii")
    headers = {"Content-Type": "application/json"}
    streamed = alice.post("/api/v1/query/stream", content=content, headers=headers)
    assert set(streamed.headers) == STREAM_HEADERS
    request_id = streamed.headers["x-request-id"]
    run = f"/api/v1/runs/{request_id}"
    answers = [
        streamed,
        alice.get(run),
        alice.get(f"{run}/events"),
        alice.get("/api/v1/runs"),
        alice.get(f"{run}/stream"),
    ]
    answers.append(alice.post("/api/v1/query", content=content, headers=headers))
    for answer in answers:
        assert answer.content.isascii()
        assert answer.status_code in (200, 202)
        known = STREAM_HEADERS if "event-stream" in answer.headers["content-type"] else JSON_HEADERS
        assert set(answer.headers) <= known, set(answer.headers) - known
    assert len(sse.parse(streamed.content)) == 2 + 8 * len(NASTY) + 1
    assert len(streamed.content.splitlines()) == streamed.content.count(b"\n"), "a line end that is not LF"


@pytest.mark.parametrize(
    "path",
    [
        "/api/v1/runs/%0d%0aX-Injected:%201",
        "/api/v1/runs/{run}/stream?last_event_id=0-0%0d%0aX-Injected:%201",
        "/api/v1/runs/{run}/events?cursor=0-0%0d%0aX-Injected:%201",
        "/api/v1/runs?cursor=%0d%0aX-Injected:%201",
        "/api/v1/runs?session_id=%0d%0aX-Injected:%201",
        "/api/v1/runs/{run}?wait=1%0d%0aX-Injected:%201",
        "/%0d%0aX-Injected:%201",
        "/%ed%a0%80",
    ],
)
def test_no_address_becomes_a_header(wire: Wire, alice: Client, path: str) -> None:
    answer = alice.get(path.replace("{run}", alice.submit("something")))
    assert answer.status_code in (200, 400, 404)
    assert "x-injected" not in answer.headers
    assert set(answer.headers) <= JSON_HEADERS
    assert answer.content.isascii()


@pytest.mark.parametrize(
    "field", ["query", "session_id", "agent", "metadata", "parameters", "\r\nX-Injected: 1", "\u2028é", "\ud800"]
)
def test_a_refusal_injects_nothing(wire: Wire, alice: Client, field: str) -> None:
    for value in ([*NASTY], "" if field in ("query", "session_id") else "\r\nX-Injected: 1\ud800", 1):
        content = json.dumps({"query": "q", field: value})
        answer = alice.post("/api/v1/query", content=content, headers={"Content-Type": "application/json"})
        assert answer.status_code == 422, answer.text
        assert set(answer.headers) <= JSON_HEADERS
        assert answer.content.isascii()
        # pydantic refuses a name with a lone surrogate without telling which.
        assert [error["field"] for error in answer.json()["errors"]] == [field if _has_utf8(field) else ""]


@pytest.mark.parametrize("number", ["1e999", "-1e999", "NaN", "Infinity", "-Infinity", "[" * 5000, "9" * 5000])
@pytest.mark.parametrize("field", ["parameters", "metadata"])
def test_a_number_that_json_cannot_carry_on_is_refused(wire: Wire, alice: Client, field: str, number: str) -> None:
    content = f'{{"query": "q", "{field}": {{"x": {number}}}}}'
    answer = alice.post("/api/v1/query", content=content, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400, answer.text
    assert alice.get("/api/v1/runs").json()["runs"] == []
