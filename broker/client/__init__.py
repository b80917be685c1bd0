"""Python clients of the broker: `Client`, and `AsyncClient` for asyncio. docs/client.md is their manual."""

from broker.client.aio import AsyncClient, AsyncStream
from broker.client.calls import Submission
from broker.client.errors import ApiError, DamagedStream, RunCancelled, RunFailed, Unreachable
from broker.client.models import Accepted, Links, LogEvent, Run, RunError, RunSummary
from broker.client.received import Received, Unknown
from broker.client.sync import Client, Stream
from broker.client.tail import Disconnected

__all__ = [
    "Accepted",
    "ApiError",
    "AsyncClient",
    "AsyncStream",
    "Client",
    "DamagedStream",
    "Disconnected",
    "Links",
    "LogEvent",
    "Received",
    "Run",
    "RunCancelled",
    "RunError",
    "RunFailed",
    "RunSummary",
    "Stream",
    "Submission",
    "Unknown",
    "Unreachable",
]
