"""P9: any gateway will do. Three of them, no affinity, each killed in turn; what a client has seen is the log."""

from __future__ import annotations

import asyncio
import itertools
import random
import signal
from dataclasses import dataclass, field

from tests.conftest import Launcher
from tests.kit import sse
from tests.kit.checker import check_log, check_reader, entries_of
from tests.kit.eventsource import EventSource, Stream
from tests.kit.http import Client, token
from tests.kit.processes import Gateway
from tests.kit.scale import LONG

RUNS = 20
AUTHORIZATION = {"Authorization": f"Bearer {token('alice')}"}


@dataclass
class Balancer:
    """The gateways behind one name: each new connection goes to any of them, the dead ones included."""

    launch: Launcher
    redis_url: str
    chance: random.Random
    gateways: list[Gateway] = field(default_factory=list)

    def start(self, count: int) -> None:
        self.gateways = [self._launch(None) for _ in range(count)]

    def _launch(self, port: int | None) -> Gateway:
        return self.launch.gateway(self.redis_url, port=port, heartbeat_seconds=1)

    def any(self) -> str:
        return self.chance.choice(self.gateways).url

    async def kill_each_in_turn(self, rounds: int) -> int:
        """Each comes back on its port before the next one goes. Returns how many were killed."""
        for turn in range(rounds * len(self.gateways)):
            await asyncio.sleep(0.2 + self.chance.random() * 0.3)
            at = turn % len(self.gateways)
            self.gateways[at].signal(signal.SIGKILL)
            await asyncio.to_thread(self.gateways[at].wait)
            await asyncio.sleep(self.chance.random() * 0.3)
            port = self.gateways[at].port
            self.gateways[at] = await asyncio.to_thread(self._launch, port)
        return rounds * len(self.gateways)


class AnyGateway(EventSource):
    """An EventSource behind the balancer; it waits a fraction of what it is told, since time is short here."""

    def __init__(self, balancer: Balancer, request_id: str) -> None:
        path = f"/api/v1/runs/{request_id}/stream"
        super().__init__(balancer.any(), path, AUTHORIZATION, hurry=15)
        self.request_id = request_id
        self._balancer = balancer

    async def _connect(self) -> None:
        self.url = self._balancer.any()
        await super()._connect()


async def read_by_post(balancer: Balancer, body: bytes) -> list[sse.Event]:
    """A client that repeats its POST with the last id that it saw, blindly, until the run has ended."""
    events, refused = list[sse.Event](), 0
    for attempt in itertools.count():
        headers = {**AUTHORIZATION, "Content-Type": "application/json"}
        if events:
            headers["Last-Event-ID"] = events[-1].id
        parser = sse.EventStream(last_event_id=events[-1].id if events else "")
        stream = Stream(parser)
        try:
            await stream.open(balancer.any(), "/api/v1/query/stream", headers, method="POST", body=body)
            await stream.until(lambda stream=stream: stream.ending is not None, 60)  # type: ignore[misc]
        except (OSError, EOFError):
            refused += 1
        finally:
            events += stream.events
            await stream.close()
        if events and events[-1].type in ("final", "error", "cancelled"):
            return events
        assert attempt < 500, f"no end after {attempt} connections, {refused} of them refused"
        await asyncio.sleep(0.1)
    raise AssertionError


async def test_while_each_gateway_is_killed_in_turn_every_client_sees_the_whole_log_once(launch: Launcher) -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    server = launch.redis()
    balancer = Balancer(launch, server.url, random.Random(seed))
    await asyncio.to_thread(balancer.start, 3)
    await asyncio.to_thread(launch.worker, server.url)
    count = 900 if LONG else 170
    with Client(balancer.any()) as client:
        runs = [
            await asyncio.to_thread(
                client.submit, f"run {n}", agent="tokens", parameters={"count": count, "pause": 0.02}
            )
            for n in range(RUNS)
        ]
    sources = [AnyGateway(balancer, request_id) for request_id in runs for _ in range(2)]
    reading = [asyncio.create_task(source.run()) for source in sources]
    bodies = [
        f'{{"query":"post {n}","agent":"tokens","parameters":{{"count":{count},"pause":0.02}}}}'.encode()
        for n in range(5)
    ]
    posting = [asyncio.create_task(read_by_post(balancer, body)) for body in bodies for _ in range(2)]
    killed = await balancer.kill_each_in_turn(3 if LONG else 1)
    async with asyncio.timeout(90):
        await asyncio.gather(*reading)
        posted = await asyncio.gather(*posting)

    with Client(balancer.any()) as client:
        for source in sources:
            assert source.closed == "204", source.closed
            log = await asyncio.to_thread(client.log, source.request_id)
            check_log(log)
            check_reader(entries_of(source.events), log)
            assert len(log) == count + 3
        for events in posted:
            [request_id] = {event.id.partition("/")[0] for event in events}
            check_reader(entries_of(events), await asyncio.to_thread(client.log, request_id))
        # Two clients that posted the same query were given the same run, unless one came after its end.
        assert len({events[0].id for events in posted}) == len(bodies)
    connections, refused = sum(len(source.streams) for source in sources), sum(source.refused for source in sources)
    print(f"{killed} kills, {connections} connections of {len(sources)} clients, {refused} refused")
    # Without any kill each has two: one that streams, and one that is told 204.
    assert connections > 2 * len(sources), "the kills have hit too few streams to prove anything"
