"""P24: when gateways are restarted, their clients come back spread out, and only those that still miss something."""

from __future__ import annotations

import asyncio
import signal
import statistics
from pathlib import Path

import pytest

from tests.conftest import Launcher
from tests.kit.checker import check_log, check_reader, entries_of
from tests.kit.eventsource import EventSource
from tests.kit.http import Client, token
from tests.kit.processes import Gateway
from tests.kit.scale import scaled

AUTH = {"Authorization": f"Bearer {token('alice', ttl=7200)}"}
RUNS = 10


def check_spread(seconds: list[float], low: float, high: float) -> None:
    """Over the whole range, and nowhere in a crowd. For fifty even draws chance fails this three times in a million."""
    assert low <= min(seconds)
    assert max(seconds) <= high
    assert statistics.stdev(seconds) > (high - low) / 8
    quarters = max(1, min(4, len(seconds) // 12))
    for n in range(quarters):
        at = low + n * (high - low) / quarters
        share = sum(at <= value <= at + (high - low) / quarters for value in seconds) / len(seconds)
        assert share > 0, f"none of {len(seconds)} in part {n} of {quarters}"
        assert quarters == 1 or share < 0.8, f"{share:.0%} of them in part {n} of {quarters}"


def gaps(source: EventSource) -> list[float]:
    """Seconds between a connection's end and the next one."""
    return [
        after.opened_at - before.ended_at for before, after in zip(source.streams, source.streams[1:], strict=False)
    ]


@pytest.mark.timeout(240)
async def test_after_a_restart_500_clients_come_back_spread_out_and_lose_nothing(launch: Launcher) -> None:
    server = launch.redis()
    gateways = [launch.gateway(server.url) for _ in range(2)]
    launch.worker(server.url)
    with Client(gateways[0].url, "alice") as client:
        finished = [client.submit(f"short {n}") for n in range(RUNS)]
        for request_id in finished:
            client.finished(request_id)
        enough = launch.folder / "enough"
        going_on = {"count": 50, "pause": 0.05, "until": str(enough)}
        running = [client.submit(f"long {n}", agent="chatter", parameters=going_on) for n in range(RUNS)]
        await storm(launch, server.url, gateways, client, running, finished, enough)


async def storm(
    launch: Launcher,
    redis_url: str,
    gateways: list[Gateway],
    client: Client,
    running: list[str],
    finished: list[str],
    enough: Path,
) -> None:
    """The running ones end when there is a file `enough`."""
    count = scaled(500)

    def source(n: int, request_id: str) -> EventSource:
        return EventSource(gateways[n % 2].url, f"/api/v1/runs/{request_id}/stream", AUTH)

    watching = [source(n, running[n // 2 % RUNS]) for n in range(count)]
    done = [source(n, finished[n // 2 % RUNS]) for n in range(count)]
    tasks = [asyncio.create_task(one.run()) for one in (*watching, *done)]
    async with asyncio.timeout(100):
        while not all(one.events for one in (*watching, *done)):
            await asyncio.sleep(0.02)
        # One is asked and one is killed: the one's clients have the jitter of its last words, the other's of its first.
        gateways[0].signal(signal.SIGTERM)
        gateways[1].signal(signal.SIGKILL)
        for gateway in gateways:
            await asyncio.to_thread(gateway.wait)
        for gateway in gateways:
            await asyncio.to_thread(launch.gateway, redis_url, port=gateway.port)
        while any(len(one.streams) < 2 for one in watching):
            await asyncio.sleep(0.02)
        enough.touch()
        await asyncio.gather(*tasks)

    logs = {request_id: client.log(request_id) for request_id in (*running, *finished)}
    for log in logs.values():
        check_log(log)
    for one in (*watching, *done):
        assert one.closed == "204"
        assert one.streams[-1].status == 204
    for n, one in enumerate(watching):
        check_reader(entries_of(one.events), logs[running[n // 2 % RUNS]])
        assert sum(stream.ending == "cut" for stream in one.streams) >= 1
    for n, one in enumerate(done):
        check_reader(entries_of(one.events), logs[finished[n // 2 % RUNS]])
        assert [stream.status for stream in one.streams] == [200, 204], "what had ended was not streamed again"

    for asked_or_killed in (watching, watching[::2], watching[1::2]):
        given = [one.streams[0].parser.retry_ms for one in asked_or_killed]
        check_spread([ms / 1000 for ms in given if ms is not None], 1, 3)
    first = min(one.streams[0].ended_at for one in watching)
    back = [one.streams[1].opened_at - first for one in watching]
    latest = max(back)
    crowd = max(sum(at <= value < at + 0.5 for value in back) for at in back)
    assert crowd < 0.6 * len(back), f"{crowd} of {len(back)} came within half a second"
    assert latest > 1.5
    for one in watching:
        assert gaps(one)[0] >= one.streams[0].parser.retry_ms / 1000 - 0.01  # type: ignore[operator]
