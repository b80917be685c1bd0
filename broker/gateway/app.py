"""The gateway, wired: the one place where its parts meet."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import AsyncIterator
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.routing import Route as StarletteRoute

from broker.errors import BrokerError, Misconfigured
from broker.gateway import openapi
from broker.gateway.access import Access
from broker.gateway.auth import Principal, make_authenticator, with_query_token
from broker.gateway.dialects import table
from broker.gateway.front import Front
from broker.gateway.hub import Hub
from broker.gateway.operations import Operations
from broker.gateway.problems import http_exception_handler, on_unexpected
from broker.gateway.routes import Gateway, Route
from broker.gateway.tickets import Tickets
from broker.ids import Owner
from broker.runs.connections import connect
from broker.runs.queue import Queue
from broker.runs.store import Runs
from broker.settings import Settings

_STAINLESS = [
    f"X-Stainless-{name}"
    for name in (
        "Arch",
        "Helper-Method",
        "Lang",
        "OS",
        "Package-Version",
        "Poll-Helper",
        "Retry-Count",
        "Runtime",
        "Runtime-Version",
        "Timeout",
    )
]
"""What OpenAI's SDK says of itself, in a page too."""
COMMAND_CONNECTIONS = 4
QUEUE_CONNECTIONS = 2
_NOBODY = Principal(Owner("", ""), frozenset(), None)


def make_app(settings: Settings) -> Access:
    """The ASGI application; its `state.gateway` has its parts."""
    redis = connect(settings.redis_url, connections=COMMAND_CONNECTIONS)
    queue = Queue(settings.queue_url, connections=QUEUE_CONNECTIONS)
    runs = Runs(redis, queue, settings)
    gateway = Gateway(
        settings=settings,
        runs=runs,
        hub=Hub(redis, redis, settings, on_met=runs.met, on_watched=runs.watched),
        authenticate=make_authenticator(settings),
        tickets=Tickets(settings),
    )
    routes = route_table(gateway)

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        gateway.hub.start()
        gateway.runs.start()
        _tune_collector()
        try:
            yield
        finally:
            await gateway.hub.close()
            await gateway.runs.close()
            await gateway.authenticate.close()
            await queue.close()
            await redis.aclose(close_connection_pool=True)

    app = Starlette(
        routes=_starlette_routes(gateway, routes),
        middleware=[_cors(settings.cors_origins)] if settings.cors_origins else [],
        exception_handlers={
            HTTPException: http_exception_handler(table.problem_shapes(Front(gateway))),
            Exception: on_unexpected,
        },
        lifespan=lifespan,
    )
    app.router.redirect_slashes = False  # to an address that the Host header names
    app.state.gateway = gateway
    return Access(app)


def _tune_collector() -> None:
    """Thousands of idle streams are long-lived objects, which Python's defaults would walk through again and again."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 50, 50)


def route_table(gateway: Gateway) -> list[Route]:
    """Raises Misconfigured where two dialects are mounted at one place."""
    routes: list[Route] = []
    operations = Operations(gateway, document=lambda: openapi.document(routes))
    routes += [*table.mounted(Front(gateway)), *operations.routes()]
    return routes


def _starlette_routes(gateway: Gateway, routes: list[Route]) -> list[StarletteRoute]:
    """One for each path, so that a 405 names every method that the path takes."""
    paths: dict[str, dict[str, Route]] = {}
    for route in routes:
        methods = paths.setdefault(route.path, {})
        if route.method in methods:
            raise Misconfigured(f"BROKER_DIALECTS: {route.method} {route.path} is there twice.")
        methods[route.method] = route
    return [_starlette_route(gateway, path, methods) for path, methods in paths.items()]


def _starlette_route(gateway: Gateway, path: str, methods: dict[str, Route]) -> StarletteRoute:
    async def endpoint(request: Request) -> Any:
        route = methods["GET" if request.method == "HEAD" else request.method]
        try:
            principal = await _principal(gateway, route, request)
            return await route.endpoint(request, principal)
        except BrokerError as error:
            return route.problem(error)

    return StarletteRoute(path, endpoint, methods=list(methods))


async def _principal(gateway: Gateway, route: Route, request: Request) -> Principal:
    if route.public:
        return _NOBODY
    scope = request.scope
    ticket = request.query_params.get("ticket") if route.ticket else None
    if ticket is not None:
        if gateway.settings.auth == "none":
            await gateway.authenticate(scope)  # which keeps web pages out
        return gateway.tickets.principal(ticket, request.path_params["request_id"])
    if route.query_token and gateway.settings.query_token:
        scope = with_query_token(scope)
    return await gateway.authenticate(scope)


def _cors(origins: tuple[str, ...]) -> Middleware:
    return Middleware(
        CORSMiddleware,
        allow_origins=list(origins),
        allow_methods=["GET", "POST", "DELETE"],
        allow_headers=[
            "Authorization",
            "Content-Type",
            "Idempotency-Key",
            "If-None-Match",
            "Last-Event-ID",
            "Prefer",
            "User-Agent",  # which ai 6 sets, where a browser lets it
            *_STAINLESS,
        ],
        expose_headers=[
            "Content-Location",
            "ETag",
            "Location",
            "Preference-Applied",
            "Retry-After",
            "X-Request-Id",
            "x-vercel-ai-ui-message-stream",
            "x-workflow-run-id",
            "x-workflow-stream-tail-index",
        ],
        max_age=600,
    )
