"""The models behind an OpenAI-compatible server, asked through the openai SDK."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal
from urllib.parse import urlsplit
from weakref import WeakKeyDictionary

import httpx
from openai import APIConnectionError, APIError, APIStatusError, AsyncOpenAI, AsyncStream, Timeout

from worker.models import completions, failures, responses
from worker.models.failures import Failed, NoSuchApi
from worker.models.model import Message, ModelError, Options, Piece, ToolSpec
from worker.models.retries import FIRST_SECONDS, Retries

logger = logging.getLogger(__name__)

OPENAI = "https://api.openai.com/v1"
CONNECT_SECONDS = 5.0
PLACEHOLDER_KEY = "none"
"""For servers of one's own, which want no key, while the SDK does."""
LAST_SECONDS = 5.0
"""How long the usage may come after the end of an answer."""
_NO_SUCH_API = frozenset({404, 405, 501})
_DISCONNECTED = (APIConnectionError, httpx.HTTPError)
"""The SDK wraps the errors of its transport, but in its versions 2 not those in the middle of a stream."""


@dataclass(frozen=True, kw_only=True)
class Server:
    """Where models are, and how they are asked. Without a key it cannot be asked at all."""

    base_url: str
    key: str | None = field(repr=False)
    api: Literal["auto", "completions", "responses"]
    stall_seconds: float
    retry_seconds: float
    first_pause: float = FIRST_SECONDS

    @property
    def is_openai(self) -> bool:
        return urlsplit(self.base_url).hostname == urlsplit(OPENAI).hostname


class OpenAIModel:
    """A Model. One client for each event loop, since its connections belong to that."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self._clients: WeakKeyDictionary[asyncio.AbstractEventLoop, AsyncOpenAI] = WeakKeyDictionary()
        self._has_responses = server.api != "completions"
        self._has_stream_options = True

    async def stream(
        self, messages: Sequence[Message], tools: Sequence[ToolSpec], options: Options
    ) -> AsyncGenerator[Piece, None]:
        """One answer. Before its first piece, failures are retried within the deadline. Raises ModelError."""
        server = self.server
        retries = Retries(deadline=options.deadline, seconds=server.retry_seconds, first=server.first_pause)
        while True:
            begun = False
            try:
                async with contextlib.aclosing(self._answer(messages, tools, options)) as pieces:
                    async for piece in pieces:
                        begun = True
                        yield piece
                return
            except Failed as failed:
                if self._learns(failed):
                    continue
                pause = None if begun else retries.pause(failed, time.time())
                logger.warning(
                    "a model failed",
                    extra={
                        "request_id": options.request_id,
                        "code": failed.code,
                        "reason": self._redacted(str(failed)),
                        "cause": self._redacted(repr(failed.__cause__)),
                        "model": options.model,
                        "again_in_seconds": pause,
                    },
                )
                if pause is None:
                    raise ModelError(failed.code, self._redacted(str(failed))) from None
            await asyncio.sleep(pause)

    async def aclose(self) -> None:
        """Closes the connections of this event loop."""
        if client := self._clients.pop(asyncio.get_running_loop(), None):
            await client.close()

    def _learns(self, failed: Failed) -> bool:
        """Whether it should be asked again, in another way: some servers refuse to be asked for the usage."""
        if self._has_stream_options and failed.code == "model_refused_request" and "stream_options" in str(failed):
            self._has_stream_options = False
            return True
        return False

    async def _answer(
        self, messages: Sequence[Message], tools: Sequence[ToolSpec], options: Options
    ) -> AsyncGenerator[Piece, None]:
        """By the API that the server has, and that has the parameters."""
        taken = frozenset(call["id"] for message in messages for call in message.get("tool_calls") or ())
        if self._has_responses and responses.PARAMETERS.issuperset(options.parameters):
            try:
                body = responses.request(messages, tools, options)
                reader = responses.Reader(options.model, taken)
                async with contextlib.aclosing(self._pieces(responses.PATH, body, reader, options)) as pieces:
                    async for piece in pieces:
                        yield piece
                return
            except NoSuchApi as missing:
                self._has_responses = False
                logger.warning(
                    "the model server has no Responses; until a restart it is asked by Chat Completions",
                    extra={
                        "request_id": options.request_id,
                        "status": missing.status,
                        "content_type": missing.content_type,
                    },
                )
        body = completions.request(messages, tools, options, newest=self.server.is_openai)
        if not self._has_stream_options:
            del body["stream_options"]
        chunks = completions.Reader(taken)
        async with contextlib.aclosing(self._pieces(completions.PATH, body, chunks, options)) as pieces:
            async for piece in pieces:
                yield piece

    async def _pieces(
        self, path: str, body: dict[str, Any], reader: completions.Reader | responses.Reader, options: Options
    ) -> AsyncGenerator[Piece, None]:
        """Raises Failed, and NoSuchApi before the first piece. When it is closed, so is the HTTP stream."""
        stream = await self._open(path, body, options)
        try:
            async with contextlib.aclosing(_events(stream, reader)) as events:
                async for data in events:
                    for piece in _checked(reader.feed(data)):
                        yield piece
        except _DISCONNECTED as error:
            if not reader.complete:
                raise self._disconnected(error, failures.broken()) from error
        except APIError as error:
            raise failures.of_object(error.body, model=options.model) from error
        except (ValueError, RecursionError) as error:
            raise failures.broken("a part of it is no JSON") from error
        finally:
            await stream.close()
        for piece in _checked(reader.end()):
            yield piece

    async def _open(self, path: str, body: dict[str, Any], options: Options) -> AsyncStream[object]:
        """The events as plain JSON: the SDK's own types cost time for each chunk, and know OpenAI's fields only."""
        optional = path == responses.PATH and self.server.api == "auto"
        try:
            stream = await self._client().post(
                path, body=body, cast_to=object, stream=True, stream_cls=AsyncStream[object]
            )
        except APIStatusError as error:
            missing = error.status_code in _NO_SUCH_API and not failures.is_about_the_model(error.body)
            headers = error.response.headers
            if optional and missing:
                raise NoSuchApi(error.status_code, headers.get("content-type", "")) from error
            raise failures.of_status(error.status_code, error.body, headers, model=options.model) from error
        except _DISCONNECTED as error:
            raise self._disconnected(error, failures.unreachable()) from error
        except UnicodeEncodeError as error:
            raise Failed("model_refused_request", "The request has text that UTF-8 cannot carry.") from error
        content_type = stream.response.headers.get("content-type", "")
        if content_type.startswith(("application/json", "text/html")):
            await stream.close()
            if optional:
                raise NoSuchApi(stream.response.status_code, content_type)
            raise Failed("model_refused_request", "The model server did not answer with a stream of events.")
        return stream

    def _disconnected(self, error: Exception, otherwise: Failed) -> Failed:
        """By the transport's exception. It is asked for its name, as the SDK's transport is not the same in each of
        its versions.
        """
        cause = error.__cause__ if isinstance(error, APIConnectionError) else error
        if type(cause).__name__ in ("ReadTimeout", "WriteTimeout"):
            return failures.stalled(self.server.stall_seconds)
        return otherwise

    def _client(self) -> AsyncOpenAI:
        loop = asyncio.get_running_loop()
        if loop not in self._clients:
            server = self.server
            if server.key is None:
                raise Failed(
                    "model_not_configured", "OPENAI_API_KEY is not set, nor OPENAI_BASE_URL of another server."
                )
            self._clients[loop] = AsyncOpenAI(
                base_url=server.base_url,
                api_key=server.key,
                max_retries=0,
                timeout=Timeout(server.stall_seconds, connect=CONNECT_SECONDS),
            )
        return self._clients[loop]

    def _redacted(self, text: str) -> str:
        return failures.redacted(text, self.server.key)


async def _events(
    stream: AsyncStream[object], reader: completions.Reader | responses.Reader
) -> AsyncGenerator[object, None]:
    """All of them, to the end of the stream, which some servers forget when the answer has ended."""
    events, until = aiter(stream), None
    while True:
        if until is None and reader.complete:
            until = asyncio.get_running_loop().time() + LAST_SECONDS
        try:
            async with asyncio.timeout_at(until):
                data = await anext(events)
        except (StopAsyncIteration, TimeoutError):
            return
        yield data


def _checked(pieces: Iterator[Piece]) -> list[Piece]:
    """Raises Failed, also where the server's events have another shape than they must."""
    try:
        return list(pieces)
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise failures.broken("a part of it is malformed") from error


@lru_cache(maxsize=8)
def opened(server: Server) -> OpenAIModel:
    """The same object for the same server."""
    return OpenAIModel(server)
