"""The gateway process."""

from __future__ import annotations

import asyncio
import logging
import socket
import sys

from broker.errors import Misconfigured
from broker.gateway.app import make_app
from broker.gateway.auth import make_authenticator
from broker.gateway.server import END_SECONDS, Server, configure
from broker.settings import Settings
from broker.supervisor import Program, Supervisor

logger = logging.getLogger(__name__)


def serve(settings: Settings, *, host: str, port: int, fd: int | None = None) -> int:
    """Serves until SIGTERM or SIGINT. Returns the exit code. Raises Misconfigured where it cannot listen."""
    server = make_server(settings)
    listener = socket.socket(fileno=fd) if fd is not None else listen(host, port)
    address, bound = listener.getsockname()[:2]
    logger.info("listening", extra={"host": address, "port": bound})
    server.run(sockets=[listener])
    return 0 if server.started else 1


def make_server(settings: Settings, kind: type[Server] = Server) -> Server:
    """A gateway, wired: what a signal does to the server, the application hears."""
    app = make_app(settings)
    gateway = app.state.gateway

    def drain() -> None:
        gateway.unready = True

    config = configure(app, send_timeout=settings.send_timeout_seconds)
    return kind(config, drain_delay=settings.drain_delay_seconds, on_drain=drain, on_cut=gateway.hub.drain)


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. Raises Misconfigured, which says why there is none."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host.strip("[]"), port))
        listener.listen(4096)
    except OSError as error:
        listener.close()
        raise Misconfigured(f"cannot listen on {host}:{port}: {error.strerror or error}") from None
    return listener


def serve_many(settings: Settings, *, host: str, port: int, processes: int) -> int:
    """A supervisor above `processes` gateways, which accept from one socket. Raises Misconfigured, as `serve` does."""
    make_authenticator(settings)
    listener = listen(host, port)
    listener.set_inheritable(True)
    fd = listener.fileno()
    command = [sys.executable, "-m", "broker", "serve", "--host", host, "--fd", str(fd)]
    programs = [Program(name=f"gateway-{n}", command=command, pass_fds=[fd]) for n in range(1, processes + 1)]
    supervisor = Supervisor(programs, stop_seconds=settings.drain_delay_seconds + END_SECONDS)
    return asyncio.run(supervisor.run())
