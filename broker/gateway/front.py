"""What the routes of every dialect do with runs: submit, find what the caller may see, stream, wait."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping
from functools import partial
from typing import Any

from starlette.requests import Request

from broker.errors import Draining, RunNotFound, Unavailable
from broker.gateway import api, requests
from broker.gateway.auth import Principal
from broker.gateway.dialects.dialect import Dialect, Folded
from broker.gateway.folds import Folds
from broker.gateway.routes import Asgi, Gateway
from broker.gateway.stream import ComeAgain, RunResponse
from broker.ids import REQUEST_ID
from broker.runs.record import Head, Record, Submission
from broker.runs.store import Accepted

_NOT_ENDED = "The run has not ended yet. Send the same again to go on waiting for it."


class Front:
    """A gateway, as routes see it."""

    def __init__(self, gateway: Gateway) -> None:
        self.settings = gateway.settings
        self.runs = gateway.runs
        self.tickets = gateway.tickets
        self.hub = gateway.hub
        self._folds = Folds(gateway.runs.log)

    async def submit(
        self, request: Request, principal: Principal, submission: Submission, *, repeated: bool = False
    ) -> Accepted:
        """Starts a run or joins one. The request may have an Idempotency-Key, and may say itself that it is sent again.

        Raises Draining, and what Runs.submit does.
        """
        key = requests.idempotency_key(request)
        if self.hub.cutting:
            raise Draining
        repeated = repeated or requests.is_repeat(request)
        return await self.runs.submit(principal.owner, submission, idempotency_key=key, repeated=repeated)

    async def accepted_head(self, request_id: str) -> Head:
        """Of a run that was accepted a moment ago. Raises Unavailable where it is gone already."""
        head = await self.runs.head(request_id)
        if head is None:
            raise Unavailable("The run was lost in a failover, or erased. Try again.")
        return head

    async def visible(self, request_id: str, principal: Principal) -> Head:
        """Raises RunNotFound for what is no request_id, and for a run that is missing, erased, or not the caller's: the
        same in all cases."""
        head = await self.runs.head(request_id) if REQUEST_ID.fullmatch(request_id) else None
        if head is None or not (principal.ticket_for == request_id or sees(principal, head)):
            raise RunNotFound
        return head

    async def stream(
        self,
        request_id: str,
        head: Head,
        principal: Principal,
        dialect: Dialect,
        *,
        after: Any = None,
        headers: Mapping[str, str] | None = None,
    ) -> Asgi:
        """The run from the frame at the position `after` on; None is its beginning.

        Raises Unavailable when that cannot be now: clients of the kind of EventSource shall `come_again`.
        """
        if self.hub.cutting:
            raise Draining
        await self.watched(request_id, head)
        open_reader = partial(
            self.hub.open,
            request_id,
            head,
            dialect,
            after=after,
            seconds=self.seconds(principal),
        )
        return RunResponse(
            self.hub,
            dialect,
            open_reader,
            send_timeout=self.settings.send_timeout_seconds,
            headers={**stream_headers(request_id), **(headers or {})},
        )

    def come_again(self) -> Asgi:
        """Instead of a 503, which closes an EventSource for good."""
        return ComeAgain(self.settings.send_timeout_seconds)

    def seconds(self, principal: Principal) -> float | None:
        """How long an answer to this caller may take; None is for ever."""
        limits = [self.settings.max_stream_seconds]
        if principal.expires_at is not None:
            limits.append(max(principal.expires_at - time.time(), 0.0))
        return min((limit for limit in limits if limit is not None), default=None)

    async def ended(self, request: Request, principal: Principal, request_id: str, head: Head) -> Record:
        """The run when it has ended, for an answer that is held so long.

        Raises Unavailable where an answer to this caller may take no longer, or this gateway drains; RunNotFound where
        the run is gone, since a client that tried again would start what somebody has erased.
        """
        await self.wait(request, request_id, head, self.seconds(principal))
        record = await self.runs.record(request_id)
        if record.finished_at_ms is None:
            raise Unavailable(_NOT_ENDED)
        return record

    async def wait(self, request: Request, request_id: str, head: Head, seconds: float | None) -> None:
        """Until the run has ended, the client has gone, this gateway drains, or for `seconds`; None is for ever."""
        if not head.finished:
            self.runs.met([request_id])
        with contextlib.suppress(Unavailable):  # that memory is full keeps nobody from reading, and stops the count
            await self.watched(request_id, head)
        if seconds != 0 and not head.finished:
            await self.hub.wait_end(request_id, head, seconds, partial(_left, request))

    async def watched(self, request_id: str, head: Head) -> None:
        """Somebody reads the run: what `cancel_if_unwatched` counts from."""
        if head.cancel_if_unwatched and not head.finished:
            await self.runs.watched([request_id])

    async def end(self, request_id: str, dialect: Dialect) -> Any:
        """The position of the run's last frame, where nothing will ever follow it; else None. Raises RunNotFound."""
        record = await self.runs.record(request_id)
        if record.finished_at_ms is None and record.attempt < 2:
            return None  # what ends before its run is what a later attempt has changed
        folded = await self.folded(record, dialect)
        return folded.seen if dialect.ended(folded.state) else None

    async def folded(self, record: Record, dialect: Dialect) -> Folded:
        """The run's whole log, as of its record."""
        return await self._folds.of(record, dialect)


def sees(principal: Principal, head: Head) -> bool:
    if principal.owner == head.owner:
        return True
    return principal.sees_tenant and principal.owner.tenant == head.owner.tenant


async def _left(request: Request) -> None:
    """Returns when the client has gone."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def stream_headers(request_id: str) -> dict[str, str]:
    return {"X-Request-Id": request_id, "Content-Location": f"{api.PREFIX}/runs/{request_id}/stream"}
