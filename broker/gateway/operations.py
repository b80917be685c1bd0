"""The endpoints for load balancers, tools and people. None asks for a token."""

from __future__ import annotations

from collections.abc import Callable
from importlib import resources
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from broker.errors import Draining, Unavailable
from broker.events import dumps
from broker.gateway import api
from broker.gateway.auth import Principal
from broker.gateway.routes import Asgi, Gateway, Route, json_response


class Operations:
    def __init__(self, gateway: Gateway, document: Callable[[], dict[str, Any]]) -> None:
        self._gateway = gateway
        self._document = document

    def routes(self) -> list[Route]:
        return [
            Route(
                method="GET",
                path="/healthz",
                endpoint=self.healthz,
                summary="Liveness: this process answers",
                answers={200: api.Health},
                public=True,
            ),
            Route(
                method="GET",
                path="/readyz",
                endpoint=self.readyz,
                summary="Readiness: Redis answers, and this gateway is not draining",
                answers={200: api.Health, 503: api.Problem},
                public=True,
            ),
            Route(
                method="GET",
                path="/openapi.json",
                endpoint=self.openapi,
                summary="This document",
                answers={200: "json"},
                public=True,
            ),
            Route(
                method="GET",
                path="/",
                endpoint=self.console,
                summary="The console, a page to try the service with",
                answers={200: "html"},
                public=True,
            ),
        ]

    async def healthz(self, request: Request, principal: Principal) -> Asgi:
        return json_response(api.Health(status="ok"))

    async def readyz(self, request: Request, principal: Principal) -> Asgi:
        if self._gateway.unready:
            raise Draining
        await self._gateway.runs.ping()
        if not self._gateway.hub.connected:
            raise Unavailable
        return json_response(api.Health(status="ready"))

    async def openapi(self, request: Request, principal: Principal) -> Asgi:
        return Response(dumps(self._document()), media_type="application/json")

    async def console(self, request: Request, principal: Principal) -> Asgi:
        page = (resources.files("broker") / "web" / "console.html").read_bytes()
        return Response(page, media_type="text/html", headers={"Cache-Control": "no-cache", **_CONSOLE_HEADERS})


_CONSOLE_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
