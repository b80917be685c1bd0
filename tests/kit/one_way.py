"""Clients of the dialects `chat`, `session_chat`, `agent` and `prompt`, written from what is said of them: by lines, by
blank lines, and EventSource."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, NamedTuple
from urllib.parse import urlencode

import httpx

from broker.events import Event
from tests.kit import sse
from tests.kit.eventsource import Stream
from tests.kit.fleet import LEASE
from tests.kit.http import Client, token
from tests.kit.processes import Gateway, Worker

if TYPE_CHECKING:
    from tests.conftest import Launcher

HEARTBEAT = 0.4
ALICE = {"Authorization": f"Bearer {token('alice')}"}
Name = Literal["chat", "session_chat", "agent", "prompt"]
NAMES: tuple[Name, ...] = ("chat", "session_chat", "agent", "prompt")
PATHS: dict[Name, str] = {
    "chat": "/chat",
    "session_chat": "/api/chat",
    "agent": "/api/v1/agent/stream",
    "prompt": "/chat",
}


class Asking(NamedTuple):
    """A request that is answered with a stream."""

    method: str
    path: str
    body: bytes | None

    @property
    def headers(self) -> dict[str, str]:
        return {"Content-Type": "application/json"} if self.body is not None else {}


def asking(name: Name, message: str, *, agent: str = "", session: str = "", **parameters: Any) -> Asking:
    """What a client of this dialect sends; `agent` and parameters beside it."""
    more = {**({"agent": agent} if agent else {}), **({"parameters": parameters} if parameters else {})}
    named = {"session_id": session} if session else {}
    if name == "prompt":
        texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in more.items()}
        return Asking("GET", f"{PATHS[name]}?{urlencode({'prompt': message, **texts, **named})}", None)
    own: dict[Name, dict[str, Any]] = {
        "chat": {"message": message, "stream": True, **named},
        "session_chat": {"message": message, "sessionId": session or "a-session", "userId": "u"},
        "agent": {"message": message, **named},
    }
    return Asking("POST", PATHS[name], json.dumps({**own[name], **more}).encode())


# -- ways to read ----------------------------------------------------------------------------------------------


def by_lines(chunks: Iterable[bytes]) -> Iterator[Any]:
    """Cuts `data: `, the blank included, and looks at nothing else."""
    rest = b""
    for chunk in chunks:
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            if line.startswith(b"data: "):
                yield json.loads(line[len("data: ") :])


def by_blocks(chunks: Iterable[bytes]) -> Iterator[Any]:
    """Splits on blank lines, and takes the blocks that begin with `data:`."""
    rest = b""
    for chunk in chunks:
        *blocks, rest = (rest + chunk).split(b"\n\n")
        for block in blocks:
            if block.startswith(b"data:"):
                yield json.loads(block[len("data:") :])


def by_fields(chunks: Iterable[bytes]) -> Iterator[Any]:
    """Splits on blank lines, and finds the lines `event:` and `data:` in each block."""
    rest = b""
    for chunk in chunks:
        *blocks, rest = (rest + chunk).split(b"\n\n")
        for block in blocks:
            fields = dict(line.split(b": ", 1) for line in block.split(b"\n") if not line.startswith(b":"))
            if b"data" in fields:
                yield fields.get(b"event", b"message").decode(), json.loads(fields[b"data"])


def by_eventsource(chunks: Iterable[bytes]) -> Iterator[Any]:
    """(type, JSON), after the standard."""
    for event in sse.read(chunks):
        yield event.type, event.json


# -- what they have got ----------------------------------------------------------------------------------------


class Got(NamedTuple):
    """What a client of a dialect makes of all that it got."""

    text: str
    """Of the pieces of the answer."""
    end: Any
    """The object that ends it; None where it has not come. An error is one."""
    beside: list[Any]


def got(name: Name, events: Sequence[tuple[str, Any]]) -> Got:
    text, end, beside = "", None, []
    for kind, value in events:
        match name, value.get("type", kind), value:
            case ("chat", "token", _) | ("session_chat", "text_delta", _) | ("agent", "token", _):
                text += value["content"]
            case ("prompt", _, {"token": str(piece)}):
                text += piece
            case (_, "done" | "error", _) | ("prompt", _, {"lifecycle": "done"} | {"error": str()}):
                end = end or value
            case _:
                beside.append(value)
    return Got(text, end, beside)


# -- the service that they ask ---------------------------------------------------------------------------------


def script(events: Iterable[Event]) -> list[list[Any]]:
    return [[event.type, event.model_dump()] for event in events]


class Site:
    """A Redis, two gateways and a worker; a test that ends one of them starts its own. Settings are the second
    gateway's."""

    def __init__(self, launcher: Launcher, **settings: Any) -> None:
        self.launcher = launcher
        self.redis = launcher.redis()
        self.settings: dict[str, Any] = {"heartbeat_seconds": HEARTBEAT, "lease_seconds": LEASE}
        self.gateways = [self.gateway(), self.gateway(**settings)]
        self.worker_process = self.worker()

    def gateway(self, **settings: Any) -> Gateway:
        return self.launcher.gateway(self.redis.url, **{**self.settings, **settings})

    def worker(self) -> Worker:
        return self.launcher.worker(self.redis.url, **self.settings)

    @property
    def url(self) -> str:
        return self.gateways[0].url


@contextmanager
def answered(url: str, asked: Asking, **headers: str) -> Iterator[httpx.Response]:
    with (
        httpx.Client(base_url=url, verify=False, timeout=30) as client,
        client.stream(
            asked.method, asked.path, content=asked.body, headers={**ALICE, **asked.headers, **headers}
        ) as response,
    ):
        yield response


def whole(url: str, asked: Asking, **headers: str) -> bytes:
    """A stream that ends as a body should."""
    with answered(url, asked, **headers) as response:
        assert response.status_code == 200, response.read()
        return b"".join(response.iter_raw())


async def opened(url: str, asked: Asking, **headers: str) -> Stream:
    stream = Stream()
    await stream.open(url, asked.path, {**ALICE, **asked.headers, **headers}, method=asked.method, body=asked.body)
    assert stream.status == 200, bytes(stream.body)
    return stream


def got_from(name: Name, *bodies: bytes) -> Got:
    return got(name, [event for body in bodies for event in by_eventsource([body])])


def runs_of(client: Client) -> list[dict[str, Any]]:
    runs: list[dict[str, Any]] = client.get("/api/v1/runs", params={"limit": 500}).json()["runs"]
    return runs
