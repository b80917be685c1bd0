"""Gateway and worker in one process: for the demo without a redis-server, whose fake one is in nobody else's reach."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import sys
from collections.abc import Iterator

import click

from broker import logs, settings
from broker.errors import BrokerError
from broker.gateway.main import make_server
from broker.gateway.server import Server
from broker.settings import Settings


class _QuietServer(Server):
    """Leaves the signals to `serve`, which passes them to the worker too."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def serve(loaded: Settings, listener: socket.socket) -> int:
    """Until SIGTERM or SIGINT. Returns the exit code."""
    from worker.main import Worker, open_agents

    server = make_server(loaded, _QuietServer)

    def stop() -> None:
        server.handle_exit(signal.SIGTERM, None)
        worker.stop()

    async with open_agents(loaded) as agents, asyncio.TaskGroup() as tasks:
        worker = Worker(loaded, agents)
        tasks.create_task(server.serve(sockets=[listener]))
        working = tasks.create_task(worker.run())
        await asyncio.sleep(0)  # the worker has its own signal handlers now, which these replace
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, stop)
    return working.result()


@click.command()
@click.option("--fd", type=click.IntRange(3), required=True, help="Serve on this inherited socket.")
def main(fd: int) -> None:
    try:
        loaded = settings.load()
        logs.configure()
        logs.print_settings(loaded, "gateway and worker")
        sys.exit(asyncio.run(serve(loaded, socket.socket(fileno=fd))))
    except BrokerError as error:
        click.echo(f"broker: {error}", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
