"""The readers that users write first, and the libraries that they take. Each reads one connection and can resume."""

from __future__ import annotations

import codecs
import contextlib
import http.client
import json
import subprocess
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import httpx
import httpx_sse
import openai
import requests
from openai._streaming import ServerSentEvent, SSEDecoder

from broker.events import TERMINAL
from tests.kit import sse
from tests.kit.sse import Event

TIMEOUT = 30.0


class Cut(Exception):
    """The connection ended before the body did."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """What a reader asks for: a GET, or a POST where there is a body."""

    url: str
    headers: Mapping[str, str] = field(default_factory=dict)
    body: Mapping[str, Any] | None = None

    @property
    def method(self) -> str:
        return "GET" if self.body is None else "POST"

    def request_headers(self, after: str) -> dict[str, str]:
        return {**self.headers, **({"Last-Event-ID": after} if after else {})}

    def content(self) -> bytes | None:
        return None if self.body is None else json.dumps(self.body).encode("ascii")


class Reader(NamedTuple):
    name: str
    read: Callable[[Target, str], Iterator[Event]]
    """One connection's events after an id ("" is the start). Raises Cut."""
    replay: Callable[[Iterable[bytes]], Iterator[Event]]
    """The same reader over bytes that were recorded."""


class _Frame:
    """What a hand-written reader keeps of the lines that it has seen."""

    def __init__(self) -> None:
        self.id = self.type = self.data = ""

    def line(self, line: str) -> None:
        if line.startswith("id:"):
            self.id = line[3:].lstrip(" ")
        elif line.startswith("event:"):
            self.type = line[6:].lstrip(" ")
        elif line.startswith("data:"):
            self.data += line[5:].lstrip(" ")

    def take(self) -> Iterator[Event]:
        """The event, if there is one; the id stays."""
        kind, data, self.type, self.data = self.type, self.data, "", ""
        if data:
            yield Event(self.id, kind, data)


# -- curl -N | while read line ---------------------------------------------------------------------------------


def curl(target: Target, after: str) -> Iterator[Event]:
    command = ["curl", "-sSN", "--max-time", str(TIMEOUT), "-X", target.method, "-w", "%{stderr}%{http_code}"]
    for name, value in target.request_headers(after).items():
        command += ["-H", f"{name}: {value}"]
    if target.body is not None:
        command += ["-H", "Content-Type: application/json", "--data-binary", "@-"]
    process = subprocess.Popen(
        [*command, target.url], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdin is not None and process.stdout is not None and process.stderr is not None
    with process:
        try:
            process.stdin.write(target.content() or b"")
            process.stdin.close()
            yield from shell_lines(process.stdout)
            said = process.stderr.read().decode()
            code = process.wait()
        finally:
            process.kill()
    if code in (18, 52, 56):  # partial file, empty reply, failure in receiving
        raise Cut(said)
    assert code == 0 and said[-3:] in ("200", "204"), f"curl ended with {code}: {said}"


def shell_lines(chunks: Iterable[bytes]) -> Iterator[Event]:
    """`read` splits on LF only, and gives no line that the end has cut."""
    frame, rest = _Frame(), b""
    for chunk in chunks:
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            if line:
                frame.line(line.decode("utf-8"))
            else:
                yield from frame.take()


# -- fetch() and a split on blank lines ------------------------------------------------------------------------


def fetch(target: Target, after: str) -> Iterator[Event]:
    """Over http.client, the plainest client there is."""
    parts = urlsplit(target.url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=TIMEOUT)
    headers = {**target.request_headers(after), **({"Content-Type": "application/json"} if target.body else {})}
    path = f"{parts.path}?{parts.query}" if parts.query else parts.path
    with contextlib.closing(connection), _cuts(http.client.HTTPException, ConnectionError):
        connection.request(target.method, path, target.content(), headers)
        response = connection.getresponse()
        _check(response.status, lambda: response.read().decode())
        yield from blocks(iter(lambda: response.read1(65536), b""))


def blocks(chunks: Iterable[bytes]) -> Iterator[Event]:
    """TextDecoderStream, then a split on blank lines."""
    decoder, text, frame = codecs.getincrementaldecoder("utf-8")(), "", _Frame()
    for chunk in chunks:
        text += decoder.decode(chunk)
        while "\n\n" in text:
            block, text = text.split("\n\n", 1)
            for line in block.split("\n"):
                frame.line(line)
            yield from frame.take()


# -- line readers ----------------------------------------------------------------------------------------------


def httpx_lines(target: Target, after: str) -> Iterator[Event]:
    with _httpx(target, after) as response:
        yield from _httpx_lines(response)


def _httpx_lines(response: httpx.Response) -> Iterator[Event]:
    frame = _Frame()
    for line in response.iter_lines():
        if line:
            frame.line(line)
        else:
            yield from frame.take()


def requests_lines(target: Target, after: str) -> Iterator[Event]:
    headers = {**target.request_headers(after), **({"Content-Type": "application/json"} if target.body else {})}
    cuts = _cuts(requests.exceptions.ConnectionError, requests.exceptions.ChunkedEncodingError)
    with (
        cuts,
        requests.request(
            target.method, target.url, headers=headers, data=target.content(), stream=True, timeout=TIMEOUT
        ) as response,
    ):
        _check(response.status_code, lambda: response.text)
        yield from _requests_lines(response)


def _requests_lines(response: requests.Response) -> Iterator[Event]:
    """Takes each `data:` line as it comes, and does not wait for the blank one."""
    frame = _Frame()
    for line in response.iter_lines(decode_unicode=True):
        frame.line(line)
        if line.startswith("data:"):
            yield from frame.take()


class _Recorded:
    """What requests needs of a raw response."""

    def __init__(self, chunks: Iterable[bytes]) -> None:
        self._chunks = chunks

    def stream(self, size: int, decode_content: bool) -> Iterable[bytes]:
        return self._chunks

    def release_conn(self) -> None: ...


def _requests_replay(chunks: Iterable[bytes]) -> Iterator[Event]:
    response = requests.Response()
    response.status_code, response.encoding, response.raw = 200, "utf-8", _Recorded(chunks)
    yield from _requests_lines(response)


# -- libraries -------------------------------------------------------------------------------------------------


def whatwg(target: Target, after: str) -> Iterator[Event]:
    """One connection of the strict model; over several: sse.EventSource."""
    with _httpx(target, after) as response:
        stream = sse.EventStream(last_event_id=after)
        for data in response.iter_raw():
            yield from stream.feed(data)


def httpx_sse_reader(target: Target, after: str) -> Iterator[Event]:
    with _httpx(target, after) as response:
        if response.status_code == 200:
            yield from _httpx_sse(response)


def _httpx_sse(response: httpx.Response) -> Iterator[Event]:
    for event in httpx_sse.EventSource(response).iter_sse():
        yield Event(event.id, event.event, event.data)


def openai_sdk(target: Target, after: str) -> Iterator[Event]:
    """The SDK's own client and Stream, without its casts to OpenAI's types."""
    parts = urlsplit(target.url)
    path = f"{parts.path}?{parts.query}" if parts.query else parts.path
    options: Any = {"headers": {**target.request_headers(after), "Content-Type": "application/json"}}
    base = f"{parts.scheme}://{parts.netloc}"
    with (
        openai.DefaultHttpxClient(verify=False) as transport,
        openai.OpenAI(api_key="unused", base_url=base, max_retries=0, timeout=TIMEOUT, http_client=transport) as client,
        _cuts(openai.APIConnectionError),
    ):
        # Its own encoder would fail on lone surrogates.
        ask: Any = client.get if target.body is None else partial(client.post, content=target.content())
        with ask(path, cast_to=object, stream=True, stream_cls=openai.Stream[object], options=options) as stream:
            _check(stream.response.status_code, lambda: stream.response.read().decode())
            yield from _openai_events(stream._iter_events())


def _openai_events(events: Iterable[ServerSentEvent]) -> Iterator[Event]:
    for event in events:
        yield Event(event.id or "", event.event or "", event.data)


def _openai_replay(chunks: Iterable[bytes]) -> Iterator[Event]:
    yield from _openai_events(SSEDecoder().iter_bytes(iter(chunks)))


# -- what they share -------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _cuts(*kinds: type[Exception]) -> Iterator[None]:
    try:
        yield
    except kinds as error:
        if "timed out" in str(error).lower():
            raise
        raise Cut(repr(error)) from error


def _check(status: int, text: Callable[[], str]) -> None:
    assert status in (200, 204), f"{status}: {text()}"


@contextlib.contextmanager
def _httpx(target: Target, after: str) -> Iterator[httpx.Response]:
    headers = {**target.request_headers(after), **({"Content-Type": "application/json"} if target.body else {})}
    cuts = _cuts(httpx.NetworkError, httpx.RemoteProtocolError)
    with (
        cuts,
        httpx.Client(timeout=TIMEOUT, verify=False) as client,
        client.stream(target.method, target.url, headers=headers, content=target.content()) as response,
    ):
        _check(response.status_code, lambda: response.read().decode())
        yield response


def _recorded(chunks: Iterable[bytes]) -> httpx.Response:
    return httpx.Response(200, headers={"Content-Type": "text/event-stream; charset=utf-8"}, content=iter(chunks))


READERS = (
    Reader("curl", curl, shell_lines),
    Reader("whatwg", whatwg, sse.read),
    Reader("fetch", fetch, blocks),
    Reader("httpx", httpx_lines, lambda chunks: _httpx_lines(_recorded(chunks))),
    Reader("requests", requests_lines, _requests_replay),
    Reader("httpx-sse", httpx_sse_reader, lambda chunks: _httpx_sse(_recorded(chunks))),
    Reader("openai", openai_sdk, _openai_replay),
)


def follow(reader: Reader, target: Target, *, after: str = "", cuts: int = 0) -> list[Event]:
    """Reads to the terminal event, and resumes after each of at most `cuts` broken connections.

    The body must have ended properly after the terminal event, unless connections are expected to break.
    """
    seen: list[Event] = []
    broken = 0
    while True:
        try:
            for event in reader.read(target, seen[-1].id if seen else after):
                seen.append(event)
            assert seen and seen[-1].type in TERMINAL, f"{reader.name}: the body ended without a terminal: {seen[-1:]}"
            return seen
        except Cut:
            broken += 1
            assert broken <= cuts, f"{reader.name}: cut {broken} times, after {seen[-1:]}"
