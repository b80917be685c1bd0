"""One run after the other, as jobs name them: the claim, the attempt, and what comes after it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import secrets
import time
from typing import Any

from broker.events import AttemptReason, Cancelled, Error, Final
from broker.ids import Owner
from broker.runs import keys
from broker.runs.connections import is_away, until_answered
from broker.runs.leases import FORGET_MS
from broker.runs.record import FINISHED
from broker.runs.scripts import RENEWAL, Answer, Lease, Reply, keep_key
from broker.runs.subscriber import Subscriber
from worker.agent import Agent, Run
from worker.attempt import HANDED_OVER, LOST, WORKER_LOST, Outcome, execute
from worker.history import History
from worker.parts import Parts
from worker.publisher import Limits, Publisher
from worker.unwatched import Watch
from worker.watchdog import Work, current

logger = logging.getLogger(__name__)

_CLOSED_BY_OTHERS = FINISHED | {"erased"}
_FAILED = Error(code="internal", message="The worker failed; its log says why.")


class Runner:
    """The runs of one worker."""

    def __init__(self, parts: Parts, agents: dict[str, Agent]) -> None:
        self._parts = parts
        self._agents = agents
        self._limits = Limits(lease_ms=parts.lease_ms, retention_ms=parts.retention_ms)
        self._stops: dict[str, set[asyncio.Future[str]]] = {}
        self._publishers: set[Publisher] = set()
        """Of one run there may be two, when this worker was fenced and has not heard of it yet."""
        self._ended: list[str] = []
        self._controls = Subscriber(parts.redis, on_message=self._control)
        parts.primaries.on_change = self._renew

    def start(self) -> None:
        self._controls.start()

    async def close(self) -> None:
        await self._controls.close()

    @property
    def agent_names(self) -> list[str]:
        return sorted(self._agents)

    @property
    def leases(self) -> list[Lease]:
        """Of all runs that are under way. It may be called in another thread: a copy of a set is made in one step."""
        return [publisher.lease for publisher in tuple(self._publishers)]

    # -- what it is told ---------------------------------------------------------------------------------------

    def hand_over(self) -> None:
        """Gives all runs back, at once: another worker goes on at their checkpoints."""
        for request_id in self._stops:
            self._stop(request_id, HANDED_OVER)

    def _renew(self) -> None:
        """A primary is another one, or is back: what it lost is found at once."""
        for publisher in self._publishers:
            publisher.renew()

    def _control(self, channel: str, payload: bytes) -> None:
        """A message of a run's control channel."""
        request_id, why = keys.request_id_of(channel), payload.decode("ascii", "replace")
        if why in _CLOSED_BY_OTHERS:
            self._stop(request_id, why)
        else:  # of a newer version; what closes a run is in its record too, where the next renewal finds it
            logger.warning("a control message is not understood", extra={"request_id": request_id, "text": why})

    def _stop(self, request_id: str, why: str) -> None:
        for stop in self._stops.get(request_id, ()):
            if not stop.done():
                stop.set_result(why)

    async def keep_index(self) -> None:
        """Says in the index of leases when these runs are to be looked at, until cancelled (PROTOCOL 4.2)."""
        while True:
            await asyncio.sleep(self._limits.lease_ms / 3000)
            now_ms = self._parts.primaries.now_ms()
            if now_ms is None:
                continue
            ended, self._ended = self._ended, []
            scores = dict.fromkeys(ended, now_ms + FORGET_MS)
            scores |= {publisher.request_id: now_ms + self._limits.lease_ms for publisher in self._publishers}
            try:
                await self._parts.leases.put(scores)
            except Exception as error:  # the reaper will see for itself
                if not is_away(error):
                    logger.exception("the index of leases cannot be written")

    # -- a run -----------------------------------------------------------------------------------------------

    async def run(self, request_id: str, attempt: int) -> None:
        stop: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._stops.setdefault(request_id, set()).add(stop)
        control = keys.control(request_id)
        lease: Lease | None = None
        try:
            # Before the claim: a cancel that comes later is heard, an earlier one is the claim's answer.
            with contextlib.suppress(ConnectionError):
                await self._controls.subscribe(control)
            lease = await self._claim(request_id, attempt, stop)
            if lease is not None:
                await self._execute(lease, stop)
        except Exception:
            if lease is None:
                raise
            logger.exception("a run cannot be executed", extra={"request_id": request_id, "attempt": attempt})
            await self._fail(lease)
        finally:
            stops = self._stops[request_id]
            stops.discard(stop)
            if not stops:  # else the job came twice, and the other one still listens
                del self._stops[request_id]
                self._controls.unsubscribe(control)

    async def _claim(self, request_id: str, attempt: int, stop: asyncio.Future[str]) -> Lease | None:
        """The token makes a claim whose reply was lost safe to repeat. Where one waits for a replica (5.3), and the run
        is to be handed over, it waits no longer: what nobody relies on yet is given back as it is."""
        token = secrets.token_hex(8)
        claimed: Lease | None = None

        async def claim(replid: str) -> Reply:
            nonlocal claimed
            scripts = self._parts.closings.again if stop.done() else self._parts.scripts
            answer = await scripts.claim(request_id, attempt, token, self._limits.lease_ms, replid)
            if isinstance(answer, Lease):
                claimed = answer
                return Reply(Answer.OK, answer.resume_from, "running", [])
            return answer

        reply = await until_answered(
            lambda: self._parts.primaries.in_new_epoch(request_id, claim), "claim", request_id=request_id
        )
        if claimed is None:
            logger.info("claim refused", extra={"request_id": request_id, "attempt": attempt, "answer": reply.answer})
        return claimed

    async def _fail(self, lease: Lease) -> None:
        """What was accepted ends, whatever went wrong here; unless the run is somebody else's by now."""
        token = secrets.token_hex(8)
        await until_answered(
            lambda: self._parts.closings.close(
                lease.request_id, _FAILED, "worker_lost", token=token, if_still=("token", lease.token)
            ),
            "closing",
            request_id=lease.request_id,
        )

    async def _execute(self, lease: Lease, stop: asyncio.Future[str]) -> None:
        began = time.perf_counter()
        run = self._make_run(lease)
        name = json.loads(lease.record["agent"])
        current.set(Work(lease.request_id, name, lease.attempt))
        logger.info("run started", extra={"request_id": lease.request_id, "attempt": lease.attempt, "agent": name})
        publisher = Publisher(self._parts.scripts, lease, self._limits, self._parts.primaries)
        agent = self._agents.get(name) or _unknown_agent
        beside = [asyncio.create_task(self._keep_key(lease))]
        if lease.record["unwatched_ms"]:
            beside.append(asyncio.create_task(self._watch(lease)))
        self._publishers.add(publisher)
        try:
            outcome = await execute(lease, agent, publisher, run, stop)
        finally:
            self._publishers.discard(publisher)
            for task in beside:
                task.cancel()
        logger.info(
            "run ended",
            extra={
                "request_id": lease.request_id,
                "attempt": lease.attempt,
                "agent": name,
                "outcome": outcome.status,
                "events": outcome.events,
                "seconds": round(time.perf_counter() - began, 3),
            },
        )
        await self._after(lease, publisher, outcome)

    async def _keep_key(self, lease: Lease) -> None:
        """On a Cluster it may be on another shard, which may be away."""
        await until_answered(
            lambda: keep_key(self._parts.redis, lease.record["key"], self._parts.settings.key_life_ms),
            "keeping the key",
            request_id=lease.request_id,
        )

    async def _after(self, lease: Lease, publisher: Publisher, outcome: Outcome) -> None:
        if outcome.status in (Final.type, Error.type):
            self._ended.append(lease.request_id)
            self._parts.closings.keep_tail(publisher.tail(), publisher.written_at, self._lost)
        elif outcome.status == HANDED_OVER:
            await until_answered(
                lambda: self._give_back(lease, "handed_over"), "handing over", request_id=lease.request_id
            )
        elif outcome.status == WORKER_LOST:
            await until_answered(lambda: self._let_go(lease), "letting go", request_id=lease.request_id)
        elif outcome.status == LOST:
            await until_answered(lambda: self._lost(lease), "handing over", request_id=lease.request_id)

    async def _let_go(self, lease: Lease) -> None:
        """As if this worker had died: its lease ends now, so that a reaper counts the attempt as lost (PROTOCOL 4.4).

        A hand-over would be sooner, but it is not counted, and a run that kills whatever executes it must end.
        """
        await self._parts.scripts.append(lease, RENEWAL, lease_ms=1, retention_ms=self._limits.retention_ms)
        await self._parts.leases.put({lease.request_id: self._parts.primaries.now_ms() or lease.now_ms})

    async def _lost(self, lease: Lease) -> None:
        """A failover took what this attempt stands on: the next one begins at what survived (PROTOCOL 2)."""
        await self._give_back(lease, "data_lost")

    async def _give_back(self, lease: Lease, reason: AttemptReason) -> None:
        reply = await self._parts.scripts.hand_over(lease, reason)
        if reply.answer is not Answer.OK:
            return
        logger.warning("run handed over", extra={"request_id": lease.request_id, "reason": reason})
        await self._parts.queue.enqueue(
            lease.request_id,
            int(reply.rest[0]),
            enqueues=0,
            now_ms=self._parts.primaries.now_ms() or lease.now_ms,
        )

    async def _watch(self, lease: Lease) -> None:
        """Cancels the run when nobody has read it for as long as its submitter allowed (PROTOCOL 5.6)."""
        seconds, created_at = int(lease.record["unwatched_ms"]) / 1000, int(lease.record["created_at"])
        watch = Watch(seconds, self._limits.lease_ms / 1000)
        request_id, primaries = lease.request_id, self._parts.primaries
        while True:
            await asyncio.sleep(max(seconds / 8, 0.1))
            try:
                [value] = await self._parts.redis.hmget(keys.run(request_id), ["watched_at"])  # type: ignore[misc]
                watched_at = value.decode() if value else ""
                if watch.expired_on(primaries, request_id, created_at, watched_at):
                    await self._parts.closings.close(
                        request_id, Cancelled(reason="unwatched"), "cancelled", if_still=("watched_at", watched_at)
                    )
            except Exception as error:
                if not is_away(error):
                    logger.exception("a run's readers cannot be counted", extra={"request_id": request_id})
                primaries.disturbed(request_id)

    def _make_run(self, lease: Lease) -> Run:
        record, created_ms = lease.record, int(lease.record["created_at"])
        started_ms = int(record["started_at"] or lease.now_ms)
        left = started_ms / 1000 + self._parts.settings.max_run_seconds - lease.now_ms / 1000
        owner = Owner(json.loads(record["tenant"]), json.loads(record["subject"]))
        session_id = json.loads(record["session_id"])
        history = History(self._parts.redis, owner, session_id, before_ms=created_ms, request_id=lease.request_id)
        return Run(
            request_id=lease.request_id,
            query=json.loads(record["query"]),
            parameters=json.loads(record["parameters"]),
            session_id=session_id,
            tenant=owner.tenant,
            subject=owner.subject,
            attempt=lease.attempt,
            created_at=created_ms / 1000,
            deadline=time.time() + left,
            restored=json.loads(record["checkpoint"]) if record["checkpoint"] else None,
            recall=history.recall,
        )


async def _unknown_agent(run: Run) -> Any:
    """For a run whose agent this worker does not have: gateways and workers must have the same BROKER_AGENTS."""
    yield Error(code="unknown_agent", message="The worker that took this run does not have its agent.")
