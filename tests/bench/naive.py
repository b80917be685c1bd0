"""What people write by hand: a stream for each run, and a blocking XREAD for each client.

`python -m tests.bench.naive serve --port 8000` and `python -m tests.bench.naive work`, on the Redis of REDIS_URL.
It has no authentication, no fencing, no heartbeats that mean anything and no limits.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import uuid
from collections.abc import AsyncIterator, Awaitable
from typing import Any, cast

import openai
import uvicorn
from redis.asyncio import Redis
from sse_starlette.sse import EventSourceResponse
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

JOBS = "jobs"

redis: Redis = Redis.from_url(os.environ.get("REDIS_URL", "redis://127.0.0.1:6379"), decode_responses=True)


def key(run: str) -> str:
    return f"stream:{run}"


async def _events(run: str, cursor: str) -> AsyncIterator[dict[str, Any]]:
    while True:
        for _, entries in await redis.xread({key(run): cursor}, count=100, block=15_000):
            for cursor, event in entries:
                yield {"id": cursor, "event": event["t"], "data": event["d"]}
                if event["t"] == "final":
                    return


def _tail(run: str, cursor: str) -> Response:
    ping = int(os.environ.get("PING_SECONDS", "15"))
    return EventSourceResponse(_events(run, cursor), ping=ping, headers={"X-Accel-Buffering": "no"})


async def stream(request: Request) -> Response:
    return _tail(request.path_params["run"], request.headers.get("last-event-id", "0"))


async def submit(request: Request) -> Response:
    body, run = await request.json(), uuid.uuid4().hex
    await cast("Awaitable[int]", redis.rpush(JOBS, json.dumps({"run": run, **body})))
    return _tail(run, "0")


async def ready(request: Request) -> Response:
    await cast("Awaitable[bool]", redis.ping())
    return PlainTextResponse("ready")


app = Starlette(
    routes=[
        Route("/runs/{run}/stream", stream),
        Route("/query/stream", submit, methods=["POST"]),
        Route("/readyz", ready),
    ]
)


async def work() -> None:
    print("worker started", flush=True)
    running: set[asyncio.Task[None]] = set()
    while True:
        _, job = await cast("Awaitable[tuple[str, str]]", redis.blpop([JOBS]))
        task = asyncio.create_task(_run(**json.loads(job)))
        running.add(task)
        task.add_done_callback(running.discard)


async def _run(run: str, query: str, relay: bool = False) -> None:
    answer = ""
    async for text in _relayed(query) if relay else _words(query):
        answer += text
        await redis.xadd(key(run), {"t": "token", "d": json.dumps({"text": text})})
    await redis.xadd(key(run), {"t": "final", "d": json.dumps({"answer": answer})})


async def _words(query: str) -> AsyncIterator[str]:
    for word in query.split():
        yield word + " "


async def _relayed(query: str) -> AsyncIterator[str]:
    messages = [{"role": "user", "content": query}]
    model: Any = openai.AsyncOpenAI()
    async for chunk in await model.chat.completions.create(model="bench", messages=messages, stream=True):
        if text := chunk.choices[0].delta.content:
            yield text


def main() -> None:
    parser = argparse.ArgumentParser(description="The hand-written gateway and worker that the benchmark compares with")
    parser.add_argument("role", choices=["serve", "work"])
    parser.add_argument("--port", type=int, default=8000)
    options = parser.parse_args()
    if options.role == "work":
        asyncio.run(work())
    else:
        uvicorn.run(app, host="127.0.0.1", port=options.port, log_level="warning", backlog=4096)


if __name__ == "__main__":
    main()
