"""The outermost layer: X-Request-Id, the access log, and an answer to what nobody foresaw."""

from __future__ import annotations

import logging
import time

from starlette.applications import Starlette
from starlette.types import Message, Receive, Scope, Send

from broker.gateway.problems import internal
from broker.gateway.stream import STREAM
from broker.ids import new_request_id

logger = logging.getLogger("broker.access")
_NAME = b"x-request-id"


class Access:
    """Plain ASGI. Logs the path without its query string, and no header: neither a token nor a query's text."""

    def __init__(self, app: Starlette) -> None:
        self.app = app
        self.state = app.state

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began = time.perf_counter()
        seen = _Seen(send)
        try:
            await self.app(scope, receive, seen.send)
            stream = scope.pop(STREAM, None)
            if stream is not None:
                await stream.run(scope, receive, send)
        except Exception:
            request_id = seen.request_id or new_request_id()
            logger.exception("unexpected error", extra={"request_id": request_id, "path": scope["path"]})
            if not seen.status:
                seen.request_id = request_id
                await internal()(scope, receive, seen.send)
        finally:
            logger.info(
                "access",
                extra={
                    "request_id": seen.request_id,
                    "method": scope["method"],
                    "path": scope["path"],
                    "status": seen.status,
                    "seconds": round(time.perf_counter() - began, 4),
                },
            )


class _Seen:
    """What a response began with; gives it an X-Request-Id where it has none of its own."""

    __slots__ = ("_send", "request_id", "status")

    def __init__(self, send: Send) -> None:
        self._send = send
        self.status = 0
        self.request_id = ""

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = list(message.get("headers", []))
            named = next((value for name, value in headers if name == _NAME), None)
            if named is not None:
                self.request_id = named.decode("latin-1")
            else:
                self.request_id = self.request_id or new_request_id()
                message = {**message, "headers": [*headers, (_NAME, self.request_id.encode("ascii"))]}
        await self._send(message)
