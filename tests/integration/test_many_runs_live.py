"""Many runs over one connection while things happen: gateways and workers are killed, gateways drain, clients do not
read. GET /api/v1/stream as in test_many_runs.py."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
import signal
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil

from broker.events import TERMINAL
from tests.conftest import Launcher
from tests.kit import raw
from tests.kit.eventsource import Stream
from tests.kit.http import Client
from tests.kit.many import check_cursors, check_runs, path_of, run_of
from tests.kit.processes import Gateway
from tests.kit.scribe import Scribe, Written
from tests.kit.watchers import AUTHORIZATION, AnyGateway

LEASE = 1.0
SETTINGS: dict[str, Any] = {"lease_seconds": LEASE, "heartbeat_seconds": 1, "grace_seconds": 0, "max_attempts": 100}
MEGABYTE = 1024 * 1024


async def test_every_reader_of_many_runs_gets_each_exactly_while_gateways_and_a_worker_are_killed(
    launch: Launcher, chance: random.Random
) -> None:
    """P8, P9. Lists and a session, of which half is submitted while it is read; each connection at any gateway."""
    server = launch.redis()
    gateways = [await asyncio.to_thread(launch.gateway, server.url, **SETTINGS) for _ in range(2)]
    worker = await asyncio.to_thread(launch.worker, server.url, **SETTINGS)
    enough: Path = launch.folder / "enough"
    urls = itertools.cycle([gateway.url for gateway in gateways])

    def submit(n: int) -> str:
        parameters = {"count": 20, "pause": 0.03, "until": str(enough)}
        agent = ("chatter", "stepper")[n % 2]
        for _ in range(20):
            with contextlib.suppress(OSError), Client(next(urls)) as client:
                return client.submit(f"query {n}", agent=agent, parameters=parameters, session_id="all")
        raise AssertionError("no gateway takes it")

    runs = [await asyncio.to_thread(submit, n) for n in range(4)]
    readers = [AnyGateway(lambda: next(urls), path_of(session_id="all"), hurry=10) for _ in range(3)]
    readers += [AnyGateway(lambda: next(urls), path_of(*runs), hurry=10) for _ in range(3)]
    reading = [asyncio.create_task(reader.run()) for reader in readers]
    try:
        for n in range(3):
            runs.append(await asyncio.to_thread(submit, 4 + n))
            await asyncio.sleep(0.3 + 0.3 * chance.random())
            gateways[n % 2].signal(signal.SIGKILL)
            if n == 0:
                worker.signal(signal.SIGKILL)
                await asyncio.to_thread(launch.worker, server.url, **SETTINGS)
            gateways[n % 2] = await asyncio.to_thread(launch.gateway, server.url, port=gateways[n % 2].port, **SETTINGS)
        await asyncio.sleep(LEASE)
        enough.touch()

        def complete() -> bool:
            ends = [{run_of(event) for event in reader.events if event.type in TERMINAL} for reader in readers]
            return all(ended >= set(runs) for ended in ends[:3]) and all(
                reader.closed is not None for reader in readers[3:]
            )

        async with asyncio.timeout(60):
            while not complete():
                await asyncio.sleep(0.05)
    finally:
        for task in reading:
            task.cancel()
        await asyncio.gather(*reading, return_exceptions=True)
    with Client(gateways[0].url) as client:
        logs = {request_id: client.log(request_id) for request_id in runs}
    for reader in readers[:3]:
        check_runs(reader.events, logs)
        check_cursors(reader.events)
    for reader in readers[3:]:
        assert reader.closed == "204"
        check_runs(reader.events, {request_id: logs[request_id] for request_id in runs[:4]})
        check_cursors(reader.events)
    cuts = sum(stream.ending == "cut" for reader in readers for stream in reader.streams)
    rewinds = sum(entry.type == "attempt" for log in logs.values() for entry in log) - len(logs)
    print(f"{cuts} streams cut, {rewinds} rewinds, {sum(map(len, logs.values()))} events")
    assert cuts >= len(readers), "too few to prove anything"
    assert rewinds > 0


async def test_streams_of_many_are_cut_between_events_when_the_gateway_drains_and_need_few_connections_to_redis(
    launch: Launcher,
) -> None:
    """P17, P16: 60 clients with 20 runs each, and some with a session in which there is nothing."""
    server = launch.redis()
    gateway = launch.gateway(server.url, heartbeat_seconds=1)
    async with Scribe(server.url) as scribe:
        runs = [await scribe.running("alice", f"drain {n}", tokens=1) for n in range(20)]
        streams = [Stream() for _ in range(60)]
        path = path_of(*(run.request_id for run in runs))
        await asyncio.gather(*(stream.open(gateway.url, path, AUTHORIZATION) for stream in streams))
        silent = [Stream() for _ in range(3)]
        for stream in silent:
            await stream.open(gateway.url, path_of(session_id="empty"), AUTHORIZATION)
            await stream.until(lambda stream=stream: bool(stream.comments))  # type: ignore[misc]
        for stream in streams:
            await stream.until(lambda stream=stream: len(stream.events) == 60)  # type: ignore[misc]
        to_redis = [
            one
            for one in psutil.Process(gateway.pid).net_connections("tcp")
            if one.raddr and one.raddr.port == server.port and one.status == "ESTABLISHED"
        ]
        assert 2 <= len(to_redis) <= 10
        enough = asyncio.Event()
        writing = asyncio.create_task(write(runs, enough))
        gateway.signal(signal.SIGTERM)
        for stream in (*streams, *silent):
            assert await stream.ended() == "cut"
            assert bytes(stream.body).rpartition(b"\nretry: ")[2].strip().isdigit()
            assert stream.parser.last_event_id == (stream.events[-1].id if stream.events else "")
        enough.set()
        await writing
        assert await asyncio.to_thread(gateway.wait, 10) == 0
        for stream in streams:
            check_cursors(stream.events)
        for run in runs:
            await run.end()
        other = launch.gateway(server.url)
        logs = {run.request_id: await run.log() for run in runs}
        for stream in streams[::20]:
            rest = await Stream().open(other.url, path, AUTHORIZATION | {"Last-Event-ID": stream.events[-1].id})
            assert await rest.ended() == "finished"
            check_runs([*stream.events, *rest.events], logs)


async def write(runs: Sequence[Written], enough: asyncio.Event) -> None:
    for run in itertools.cycle(runs):
        if enough.is_set():
            return
        await run.tokens(2)


async def test_clients_that_do_not_read_are_cut_at_the_send_timeout_and_cost_one_page_each(launch: Launcher) -> None:
    """P15: ten large runs in each of 20 connections that nobody reads, beside one that is read."""
    server = launch.redis()
    gateway = launch.gateway(server.url, send_timeout_seconds=1)
    async with Scribe(server.url) as scribe:
        runs = [await scribe.running("alice", f"large {n}") for n in range(10)]
        for run in runs:
            for _ in range(3):
                await run.append([("token", '{"text":"' + "x" * 10_000 + '"}')] * 30)
        path = path_of(*(run.request_id for run in runs))
        process = psutil.Process(gateway.pid)
        before, idle, highest = process.memory_info().rss, process.num_fds(), 0
        stuck = [non_reader(gateway, path) for _ in range(20)]
        try:
            reader = await Stream().open(gateway.url, path, AUTHORIZATION)
            await reader.until(lambda: len(reader.events) == 10 * 92)

            def cut() -> bool:
                nonlocal highest
                highest = max(highest, process.memory_info().rss)
                return process.num_fds() <= idle + 3

            for run in runs:
                await run.tokens(1)
            await until_true(cut)
            for run in runs:
                await run.end()
            assert await reader.ended() == "finished"
            check_runs(reader.events, {run.request_id: await run.log() for run in runs})
        finally:
            for sock in stuck:
                sock.close()
    # 10 MB of logs. For each: what is in its connection, a page of four slices, as they are and as chunks, and room.
    print(f"{(highest - before) / MEGABYTE:.1f} MB for {len(stuck)}")
    assert highest - before < len(stuck) * 1.5 * MEGABYTE + 32 * MEGABYTE


def non_reader(gateway: Gateway, path: str) -> socket.socket:
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.connect(("127.0.0.1", gateway.port))
    sock.sendall(raw.request("GET", path, *AUTHORIZATION.items()))
    return sock


async def until_true(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.02)
